"""Images: what is written comes back, equal records are equal bytes, hostile and damaged content is refused."""

import io
import threading
from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stages.artifacts import hdf5
from stages.artifacts.codec import to_tree
from stages.artifacts.records import PREPARED_FROM, Block, End, Group, LayerUpdate, Preparation
from stages.artifacts.schema import VERSION
from stages.errors import DataError, SchemaError


def image(fill, **options) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        fill(file)
    return buffer.getvalue()


def minimal(file) -> None:
    file["x"] = np.zeros((3, 4, 4), np.uint8)
    file["y"] = np.zeros(3, np.int64)


@pytest.mark.parametrize("name", ["block", "run"])
def test_a_record_comes_back_and_equal_records_are_equal_bytes(name, request):
    data = hdf5.encode(request.getfixturevalue(name))
    again = hdf5.encode(hdf5.decode(data))
    assert again == data


def test_every_part_of_a_run_survives(run):
    back = hdf5.decode(hdf5.encode(run))
    assert back.plan == run.plan
    assert back.history == run.history
    assert back.model.input == run.model.input
    assert back.model.tensors["temperature"].shape == ()
    assert back.model.head.names == ("yes", "no")
    assert back.model.head.known.tolist() == [True, False]
    assert [len(part) for part in back.scores.output_fisher] == [2, 3]
    assert back.extra.attrs["lab"] == "B12"
    assert back.extra.groups["notes"].arrays["page"][0] == b"text"
    assert back.profile.totals["energy"] == "unavailable"


def test_every_part_of_a_block_survives(block):
    back = hdf5.decode(hdf5.encode(block))
    assert back.names == block.names
    assert back.round == 4
    assert back.facts == {"variance": 0.5, "strategy": "titan"}
    assert back.per_class["seen"].tolist() == [5, 6, 7]
    assert back.per_class["allocation"].tolist() == [1, 2, 3]
    assert back.columns["drawer"].tolist() == list(range(6))
    assert back.extra.arrays["speakers"].tolist() == [b"x", b"yy"]


def test_the_end_mark_is_a_block_without_samples():
    data = hdf5.encode(End(5, {"dropped": 3}))
    with h5py.File(io.BytesIO(data)) as file:
        assert file.attrs["edgetrain"] == b"block"
        assert file["x"].shape == (0,)
        assert file.attrs["end"] == 5
    assert hdf5.decode(data) == End(5, {"dropped": 3})


def test_the_dialect(block):
    data = hdf5.encode(block)
    assert data[8] == 3  # superblock of libver v110
    assert int.from_bytes(data[28:36], "little") == len(data)
    with h5py.File(io.BytesIO(data)) as file:

        def check(_, item):
            if isinstance(item, h5py.Dataset):
                assert item.fletcher32
                assert h5py.check_string_dtype(item.dtype) is None or item.dtype.kind == "S"

        file.visititems(check)


@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.float32]),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    ),
    data=st.data(),
)
def test_any_block_comes_back(x, data):
    y = data.draw(hnp.arrays(np.int64, len(x), elements=st.integers(0, 4)))
    layout = "NT" if x.dtype == np.int16 else "ND"
    back = hdf5.decode(hdf5.encode(Block(x, y, layout)))
    assert back.x.tobytes() == x.tobytes()
    assert back.x.dtype == x.dtype
    assert back.y.tolist() == y.tolist()


@pytest.mark.parametrize("libver", ["earliest", ("v108", "v108"), ("v110", "v110"), "latest"])
def test_a_users_own_file_is_a_block(libver):
    back = hdf5.decode(image(minimal, libver=libver))
    assert isinstance(back, Block)
    assert back.layout == "NHW"


def test_a_users_own_attributes_are_not_taken_for_ours():
    def fill(file):
        minimal(file)
        file.attrs.update({"end": 7, "round": "first", "layout": "rows", "camera": "left"})

    back = hdf5.decode(image(fill))
    assert isinstance(back, Block)
    assert back.round is None
    assert back.facts == {"camera": "left"}


def test_text_of_variable_length_is_accepted_from_others():
    def fill(file):
        minimal(file)
        file["classes"] = ["cat", "dög"]

    assert hdf5.decode(image(fill)).names == ("cat", "dög")


HOSTILE = {
    "a soft link": lambda file: file.__setitem__("also", h5py.SoftLink("/x")),
    "an external link": lambda file: file.__setitem__("passwd", h5py.ExternalLink("/etc/passwd", "/")),
    "external storage": lambda file: file.create_dataset(
        "raw", shape=(4,), dtype="u1", external=[("/etc/passwd", 0, 4)]
    ),
    "an object reference": lambda file: file.create_dataset("ref", data=np.array([file["x"].ref], h5py.ref_dtype)),
    "a reference in an attribute": lambda file: file.attrs.create("ref", file["x"].ref, dtype=h5py.ref_dtype),
    "a ragged dataset": lambda file: file.create_dataset("ragged", shape=(2,), dtype=h5py.vlen_dtype(np.int32)),
    "a second link": lambda file: file.__setitem__("twice", file["x"]),
    "a loop": lambda file: file.create_group("g").__setitem__("up", file["/"]),
    "a named type": lambda file: file.__setitem__("type", np.dtype("f8")),
}


def virtual(file) -> None:
    layout = h5py.VirtualLayout(shape=(4,), dtype="u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "data", shape=(4,))
    file.create_virtual_dataset("virtual", layout)


@pytest.mark.parametrize("name", [*HOSTILE, "virtual storage"])
def test_what_reaches_outside_is_refused(name):
    def fill(file):
        minimal(file)
        (HOSTILE.get(name) or virtual)(file)

    with pytest.raises(SchemaError):
        hdf5.decode(image(fill))
    hdf5.decode(image(minimal))  # the same file without it is fine


def test_a_small_image_cannot_claim_a_huge_dataset():
    def fill(file):
        minimal(file)
        file.create_dataset("huge", shape=(1 << 40,), dtype="u1", chunks=(1 << 16,), compression="gzip")

    with pytest.raises(SchemaError, match="max-record"):
        hdf5.decode(image(fill), max_bytes=1 << 20)


def test_deep_nesting_is_refused():
    def fill(file):
        minimal(file)
        file.create_group("/".join("g" * 40))

    with pytest.raises(SchemaError, match="nesting"):
        hdf5.decode(image(fill))


def large(seed: int) -> Block:
    """A block whose image is built and read through a file in memory of ours."""
    x = np.random.default_rng(seed).integers(0, 255, (50, 300, 300), dtype=np.uint8)
    assert x.nbytes > hdf5.COPIED_BYTES
    return Block(x, np.arange(50), "NHW")


def test_a_large_record_is_the_same_bytes_whatever_was_in_memory_before(tmp_path):
    images = [bytes(hdf5.encode(large(seed))) for seed in (0, 1, 0, 2, 0)]
    assert images[0] == images[2] == images[4] != images[1]
    (tmp_path / "block.h5").write_bytes(images[0])
    with h5py.File(tmp_path / "block.h5") as file:
        assert np.array_equal(file["x"][:], large(0).x)
    assert np.array_equal(hdf5.decode(images[0]).x, large(0).x)
    assert hdf5.image_bytes(images[0][: hdf5.HEADER_BYTES], "") == len(images[0])


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_damaged_large_record_is_refused(at):
    data = bytearray(hdf5.encode(large(0)))
    with pytest.raises(DataError):
        hdf5.decode(bytes(data[: int(at * len(data))]))
    data[int(at * len(data))] ^= 4
    with pytest.raises(DataError):
        hdf5.decode(bytes(data))


@pytest.mark.parametrize("kept", [0, 7, 8, 40, 100, 0.5, 0.9])
def test_a_truncated_image_is_refused(block, kept):
    data = hdf5.encode(block)
    cut = int(kept if isinstance(kept, int) else kept * len(data))
    with pytest.raises(DataError):
        hdf5.decode(data[:cut])


def test_a_flipped_bit_is_never_silently_wrong(block):
    """Every byte that HDF5 stores is under some checksum: a flip is an error or changes nothing that is read."""
    data = hdf5.encode(block)
    rng = np.random.default_rng(0)
    caught = 0
    for at, bit in zip(rng.integers(0, len(data), 300), rng.integers(0, 8, 300), strict=True):
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        try:
            same = hdf5.encode(hdf5.decode(bytes(damaged))) == data
        except DataError:
            caught += 1
        else:
            assert same, f"bit {bit} of byte {at}"
    assert caught > 50


@pytest.mark.parametrize(
    ("datasets", "attributes", "words"),
    [
        ({"x": np.zeros((3, 4, 4))}, {}, "f4"),
        ({"y": np.zeros(3)}, {}, "integers"),
        ({"y": np.zeros(4, np.int64)}, {}, "N=3"),
        ({"y": np.array([0, -2, 0])}, {}, "label -2"),
        ({"y": np.array([0, 1, 5]), "classes": np.array([b"a", b"b"])}, {}, "label 5"),
        ({"x": np.zeros((3, 4, 4, 4), np.uint8)}, {}, "layout"),
        ({}, {"edgetrain": "cake"}, "'run' or 'block'"),
        ({}, {"edgetrain": "block", "schema": 99}, "update EdgeTrain"),
        ({}, {"edgetrain": "block", "schema": VERSION + 1}, "update EdgeTrain"),
        ({}, {"edgetrain": "block", "schema": 0}, "1 to 2"),
        ({}, {"edgetrain": "block", "schema": 2, "prepared": "{"}, "JSON"),
        ({}, {"edgetrain": "block", "schema": 2, "prepared": '{"of": "cake"}'}, "pictures"),
        ({}, {"edgetrain": "block", "schema": 2, "prepared": '{"turn": 90}'}, "turn"),
        ({}, {"edgetrain": "block", "schema": 2, "prepared": '{"size": [0, 4]}'}, "size"),
        ({}, {"edgetrain": "block", "schema": 2, "prepared": '{"invert": 1}'}, "invert"),
    ],
)
def test_malformed_blocks_say_what_is_wrong(datasets, attributes, words):
    def fill(file):
        for name, array in {"x": np.zeros((3, 4, 4), np.uint8), "y": np.zeros(3, np.int64), **datasets}.items():
            file[name] = array
        file.attrs.update(attributes)

    with pytest.raises(DataError, match=words):
        hdf5.decode(image(fill))


@pytest.mark.parametrize(
    ("dataset", "values"),
    [
        ("channels", [2]),  # of 2 channels there are 0 and 1
        ("channels", [-1]),
        ("axis", [b"sideways"]),
        ("bias", [-1, 1]),
        ("axis_channels", [1]),
        ("channel_count", [2]),
    ],
)
def test_a_malformed_plan_is_refused_when_it_is_read(run, dataset, values):
    tree = to_tree(run)
    arrays = tree.groups["plan"].arrays
    arrays[dataset] = np.array(values, np.asarray(arrays[dataset]).dtype if dataset != "axis" else "S8")
    with pytest.raises(SchemaError, match="/plan"):
        hdf5.decode(hdf5.encode_tree(tree))


def test_channels_of_a_plan_ascend(run):
    """Once each: training one twice would count its gradient twice."""
    for channels in ((1, 0), (1, 1)):
        plan = replace(run.plan, updates=(LayerUpdate("stem", "output", channels, 2),))
        with pytest.raises(SchemaError, match="ascending channels from 0 to 1"):
            hdf5.decode(hdf5.encode(replace(run, plan=plan)))


def test_samples_that_have_no_labels_yet_are_a_block():
    def fill(file):
        file["x"] = np.zeros((3, 4, 4), np.uint8)

    found = hdf5.decode(image(fill))
    assert found.y.tolist() == [-1, -1, -1]
    assert hdf5.decode(hdf5.encode(found)).y.tolist() == [-1, -1, -1]


def test_version_1_is_read_and_its_columns_keep_their_meaning():
    def fill(file):
        file["x"], file["y"], file["source"] = np.zeros((2, 3), "f4"), np.arange(2), np.array([7, 8])
        file.attrs.update({"edgetrain": "block", "schema": 1, "layout": "ND", "prepared": 3, "sample_rate_hz": 8000})

    found = hdf5.decode(image(fill))
    assert found.columns["source_column"].tolist() == [7, 8]
    assert (found.facts, found.prepared) == ({"prepared_fact": 3}, Preparation(sample_rate_hz=8000))
    again = hdf5.decode(hdf5.encode(found))
    assert (again.facts, again.prepared) == (found.facts, found.prepared)


@given(
    st.builds(
        Preparation,
        of=st.sampled_from(PREPARED_FROM),
        size=st.none() | st.tuples(st.integers(1, 999), st.integers(1, 999)),
        fit=st.sampled_from(["stretch", "crop", "pad"]),
        colour=st.sampled_from(["", "gray", "rgb"]),
        invert=st.booleans(),
        dtype=st.sampled_from(["", "uint8"]),
        scale=st.sampled_from([1.0, 15.9375]),
        sample_rate_hz=st.sampled_from([0, 16000]),
        seconds=st.sampled_from([0.0, 1.5]),
        shape=st.none() | st.just((28, 28)),
        layout=st.sampled_from(["", "NHW"]),
    )
)
def test_how_samples_were_prepared_comes_back_as_it_was(prepared):
    block = Block(np.zeros((1, 2), np.float32), np.zeros(1, np.int64), "ND", prepared=prepared)
    found = hdf5.decode(hdf5.encode(block))
    assert found.prepared == (None if prepared == Preparation() else prepared)
    assert found.facts == {}


def test_a_tree_of_any_kind_can_be_read(tmp_path):
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        file["blocks/00/expand/weight"] = np.ones((2, 3), np.float32)
        file["blocks/00"].attrs["residual"] = True
    with path.open("rb") as stream:
        tree = hdf5.read_tree(stream, "weights.h5")
        weight = tree.groups["blocks"].groups["00"].groups["expand"].arrays["weight"]
        assert np.asarray(weight).shape == (2, 3)
        assert tree.groups["blocks"].groups["00"].attrs["residual"]


def test_unknown_dtypes_are_not_written():
    with pytest.raises(SchemaError):
        hdf5.encode_tree(Group(arrays={"objects": np.array([object()])}))


def test_threads_read_and_write_at_once(block, run):
    """`filter --pace demand` reads samples in one thread while another writes a round."""
    images, same = {name: hdf5.encode(record) for name, record in (("block", block), ("run", run))}, []

    def work(name):
        for _ in range(60):
            same.append(hdf5.encode(hdf5.decode(images[name])) == images[name])

    threads = [threading.Thread(target=work, args=(name,)) for name in images for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 240
    assert all(same)
