"""Arrays that others saved: what is taken for samples, labels, columns, names; and what is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, Preparation
from stages.artifacts.stream import open_records
from stages.data import arrays
from stages.data.samples import Notes, Source
from stages.errors import DataError, InputMissing


def read_all(source: Source) -> np.ndarray:
    def stop(error: DataError) -> None:
        raise error

    return source.reader.read(np.arange(len(source)), stop)[0]


# ----------------------------------------------------------------------------------------------------------- .npz, .npy


def test_npz_by_usual_names_with_columns_and_class_names(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, images=np.zeros((3, 4, 4), np.uint8), labels=[0, 1, 1], user=["a", "b", "a"], classes=["cat", "dog"])
    found = arrays.npz(path, None, None)
    assert found.x.shape == (3, 4, 4)
    assert found.y is not None
    assert found.y.tolist() == [0, 1, 1]
    assert found.names == ("cat", "dog")
    assert found.columns["user"].tolist() == [b"a", b"b", b"a"]


def test_npz_by_stated_names(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x_train=np.zeros((2, 3)), y_train=[0, 1], x_test=np.ones((1, 3)), y_test=[1])
    found = arrays.npz(path, "x_test", "y_test")
    assert found.y is not None
    assert (found.x.shape, found.y.tolist()) == ((1, 3), [1])
    with pytest.raises(DataError, match=r"expected one called z.*--x-name"):
        arrays.npz(path, "z", None)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "pickled", "npy"])
def test_npz_that_is_none(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.random.default_rng(0).random((50, 9)), y=np.zeros(50, int))
    whole = path.read_bytes()
    if damage == "pickled":
        np.savez(path, x=np.array([{}, None], object), y=[0, 1])
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"x,y\n1,2\n"}[damage])
    with pytest.raises(DataError, match=r"d\.npz"):
        arrays.npz(path, None, None)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    for suffix, read in ((".npy", arrays.npy), (".npz", lambda path: arrays.npz(path, None, None))):
        path = tmp_path / f"d{suffix}"
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DataError, match="pickled"):
            read(path)
    assert not (tmp_path / "ran").exists()


def test_npy_stays_on_disk_and_missing_files_are_missing(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    assert isinstance(arrays.npy(tmp_path / "x.npy"), np.memmap)
    for read in (arrays.npy, lambda path: arrays.npz(path, None, None)):
        with pytest.raises(InputMissing):
            read(tmp_path / "none.npy")


# --------------------------------------------------------------------------------------------------------------- labels


def test_labels_of_every_kind() -> None:
    assert arrays.labels_of(np.array([[3], [1]], np.uint8), None, "")[0].tolist() == [3, 1]
    assert arrays.labels_of(np.array([1.0, 2.0]), None, "")[0].dtype == np.int64
    y, _, names = arrays.labels_of(np.array([b"dog", b"cat"]), None, "")
    assert (y.tolist(), names) == ([1, 0], ("cat", "dog"))
    assert arrays.labels_of(np.array([[3, 1]]), None, "").y.tolist() == [3, 1]
    assert arrays.labels_of(np.array([np.nan, 2.0]), None, "").y.tolist() == [-1, 2]
    assert arrays.labels_of(np.array(["a", ""]), None, "").y.tolist() == [0, -1]
    for wrong in (np.array([0.5]), np.zeros((2, 2), int), np.array([None])):
        with pytest.raises(DataError, match="whole numbers or names"):
            arrays.labels_of(wrong, None, "here")


def source(x: np.ndarray, y: np.ndarray, layout: str | None = None) -> Source:
    return arrays.array_source(arrays.Found(x, y, {}, None), "here", layout)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="3 samples and 2 labels"):
        source(np.zeros((3, 2)), np.zeros(2, int))
    with pytest.raises(DataError, match="--layout"):
        source(np.zeros((3, 4, 4, 5)), np.zeros(3, int))
    with pytest.raises(DataError, match=r"numbers \(N"):
        source(np.zeros(3), np.zeros(3, int))
    with pytest.raises(DataError, match=r"complex128 \(3, 2\), expected numbers"):
        source(np.zeros((3, 2), complex), np.zeros(3, int))
    assert source(np.zeros((3, 4, 4, 5)), np.zeros(3, int), "NHWC").layout == "NHWC"


def test_three_axes_are_grey_pictures_only_where_they_cannot_be_signals() -> None:
    y = np.zeros(3, int)
    assert source(np.zeros((3, 8, 6), np.uint8), y).layout == "NHW"
    with pytest.raises(DataError, match=r"shape \(3, 128, 9\) without a layout.*--layout"):
        source(np.zeros((3, 128, 9)), y)
    named = arrays.from_names({"images": np.zeros((3, 8, 8)), "y": y}, "here", None, None)
    assert arrays.array_source(named, "here", None).layout == "NHW"


# ----------------------------------------------------------------------------------------------------------------- HDF5


def test_a_users_own_hdf5_is_read_slice_by_slice(tmp_path: Path) -> None:
    path = tmp_path / "mine.h5"
    x = np.random.default_rng(0).random((40, 6))
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["user"] = x, np.arange(40) % 3, np.arange(40)
        file["classes"] = ["a", "b", "c"]
    found = arrays.hdf5_file(path, None, None, None)
    assert found.names == ("a", "b", "c")
    assert found.columns["user"].tolist() == list(range(40))
    rows = np.array([39, 0, 0, 17])
    got, _ = found.reader.read(rows, lambda error: None)
    assert np.array_equal(got, x[rows])


def test_a_stream_of_blocks_is_one_source(tmp_path: Path) -> None:
    def block(start: int, names: tuple[str, ...], labels: list[int]) -> Block:
        x = np.arange(start, start + 2, dtype=np.float32)[:, None]
        return Block(x, np.array(labels), "ND", {"user": np.array([start, start])}, np.unique(labels), names)

    path = tmp_path / "stream.h5"
    path.write_bytes(encode(block(0, ("a", "c"), [0, 2])) + encode(block(2, ("b", "c"), [1, 2])))
    found = arrays.hdf5_file(path, None, None, None)
    assert found.names == ("a", "b", "c")
    assert found.y.tolist() == [0, 2, 1, 2]
    assert found.columns["user"].tolist() == [0, 0, 2, 2]
    assert read_all(found)[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff\xe0" + bytes(80), b"\x89HDF\r\n\x1a\n" + bytes(80)], ids=["empty", "jpeg", "zeros"]
)
def test_what_is_no_hdf5(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "no.h5"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no\.h5"):
        arrays.hdf5_file(path, None, None, None)


def test_blocks_that_name_a_label_differently_or_were_prepared_differently_are_refused(tmp_path: Path) -> None:
    def stream(*blocks: Block) -> Path:
        (tmp_path / "s.h5").write_bytes(b"".join(bytes(encode(block)) for block in blocks))
        return tmp_path / "s.h5"

    plain = Block(np.zeros((1, 2), np.float32), np.array([0]), "ND", {}, np.array([0]), ("cat",))
    with pytest.raises(DataError, match="label 0 is 'dog'"):
        arrays.hdf5_file(stream(plain, replace(plain, names=("dog",))), None, None, None)
    slow, fast = (replace(plain, prepared=Preparation(sample_rate_hz=hz)) for hz in (8000, 16000))
    with pytest.raises(DataError, match="16000 samples per second, expected 8000"):
        arrays.hdf5_file(stream(slow, fast), None, None, None)
    assert arrays.hdf5_file(stream(slow, slow), None, None, None).prepared == slow.prepared


def test_samples_in_a_group_of_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "deep.h5", "w") as file:
        file["train/x"], file["train/y"], file["train/user"] = np.zeros((2, 3)), [0, 1], [5, 6]
        file["mean"] = np.zeros(3)
    notes = Notes()
    found = arrays.hdf5_file(tmp_path / "deep.h5", None, None, None, notes=notes)
    assert (found.y.tolist(), found.columns["user"].tolist()) == ([0, 1], [5, 6])
    assert notes.lines() == ["left out 1 arrays of other groups: mean"]
    with h5py.File(tmp_path / "deep.h5", "a") as file:
        file["test/x"], file["test/y"] = np.zeros((1, 3)), [1]
    with pytest.raises(DataError, match=r"arrays test/x, train/x, expected one of them.*--x-name"):
        arrays.hdf5_file(tmp_path / "deep.h5", None, None, None)
    assert arrays.hdf5_file(tmp_path / "deep.h5", "test/x", None, None).y.tolist() == [1]


def test_a_pandas_store_is_called_what_it_is(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "frame.h5", "w") as file:
        file.attrs["TITLE"] = h5py.Empty("S1")
        file["df/block0_values"] = np.zeros((2, 3))
        file["df"].attrs["pandas_type"] = "frame"
    with pytest.raises(DataError, match=r"/df: a table that pandas stored.*to_csv"):
        arrays.hdf5_file(tmp_path / "frame.h5", None, None, None)


@pytest.mark.parametrize("kind", ["f4", "S1", h5py.string_dtype()], ids=str)
def test_attributes_and_datasets_that_hold_nothing_do_no_harm(tmp_path: Path, kind: object) -> None:
    with h5py.File(tmp_path / "null.h5", "w") as file:
        file["x"], file["y"] = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
        file.attrs["units"] = h5py.Empty(kind)
        file["nothing"] = h5py.Empty(kind)
    assert arrays.hdf5_file(tmp_path / "null.h5", None, None, None).layout == "NHW"
    (record,) = open_records(tmp_path / "null.h5")
    assert isinstance(record, Block)
    assert "units" not in record.facts


def test_truncated_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"] = np.zeros((100, 10)), np.zeros(100, int)
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.h5"):
        arrays.hdf5_file(tmp_path / "cut.h5", None, None, None)


# ---------------------------------------------------------------------------------------------------- published folders


def test_a_folder_of_npy_files_is_one_class_each_as_quick_draw(tmp_path: Path) -> None:
    np.save(tmp_path / "cat.npy", np.full((2, 784), 1, np.uint8))
    np.save(tmp_path / "ant.npy", np.full((3, 784), 2, np.uint8))
    found = arrays.npy_folder(tmp_path, None)
    assert found.names == ("ant", "cat")
    assert found.y.tolist() == [0, 0, 0, 1, 1]
    assert read_all(found)[:, 0].tolist() == [2, 2, 2, 1, 1]
    np.save(tmp_path / "dog.npy", np.zeros((3, 10), np.uint8))
    with pytest.raises(DataError, match="one shape and dtype"):
        arrays.npy_folder(tmp_path, None)


@pytest.mark.parametrize(("names_file", "label_bytes"), [("batches.meta.txt", 1), ("fine_label_names.txt", 2)])
def test_cifar_binary(tmp_path: Path, names_file: str, label_bytes: int) -> None:
    (tmp_path / names_file).write_text("airplane\nbird\n\n")
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    labels = np.array([[9, 0], [9, 1], [9, 1]], np.uint8)[:, 2 - label_bytes :]
    records = np.concatenate([labels, images.reshape(3, -1)], axis=1)
    (tmp_path / "data_batch_1.bin").write_bytes(records[:2].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[2:].tobytes())
    found = arrays.cifar(tmp_path)
    assert found.names == ("airplane", "bird")
    assert found.y.tolist() == [0, 1, 1]
    assert found.columns["split"].tolist() == [0, 0, 1]
    assert np.array_equal(read_all(found), images)
    (tmp_path / "test_batch.bin").write_bytes(records[2:].tobytes()[:-1])
    with pytest.raises(DataError, match=r"test_batch\.bin"):
        arrays.cifar(tmp_path)
