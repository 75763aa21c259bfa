"""Pack: which samples, in which order, in which form, in how much memory; and the commands `pack` and `join`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgetrain_cli.commands.join import join as join_command
from edgetrain_cli.commands.pack import pack as pack_command
from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Block, Preparation
from stages.artifacts.stream import open_records
from stages.data.blocks import join_blocks
from stages.data.reading import Form
from stages.data.samples import ArrayReader, OnBad, Source
from stages.errors import DataError, InputMissing, UsageError
from stages.joining import join
from stages.packing import BadSamples, Condition, Packing, choose, class_list, pack
from stages.randomness import generator
from tests.realdata import real


def source(y: list[int], names: tuple[str, ...] | None = None, **columns: list[object]) -> Source:
    """Samples whose only feature is their row."""
    x = np.arange(len(y), dtype=np.float32)[:, None]
    arrays = {name: np.array(values) for name, values in columns.items()}
    return Source("here", np.array(y, np.int64), ArrayReader(x), "ND", names, arrays)


def rows_of(blocks: list[Block]) -> list[int]:
    return [int(value) for block in blocks for value in block.x[:, 0]]


def packed(data: Source, seed: int = 0, **options: object) -> list[Block]:
    return list(pack(data, Packing(**options), generator(seed, "pack")))


# --------------------------------------------------------------------------------------------------------------- order


def test_in_order_shuffled_and_repeatable() -> None:
    data = source([0, 1] * 10)
    assert rows_of(packed(data, shuffle=False)) == list(range(20))
    shuffled = rows_of(packed(data))
    assert sorted(shuffled) == list(range(20))
    assert shuffled != list(range(20))
    assert shuffled == rows_of(packed(data))
    assert shuffled != rows_of(packed(data, seed=1))


@given(st.integers(1, 9), st.integers(1, 30))
def test_blocks_have_the_stated_length_and_the_stream_counts_its_samples(length: int, count: int) -> None:
    blocks = packed(source([0] * count), block_length=length)
    assert [len(block) for block in blocks[:-1]] == [length] * (len(blocks) - 1)
    assert [int(i) for block in blocks for i in block.columns["index"]] == list(range(count))


def test_the_order_does_not_depend_on_the_block_length() -> None:
    data = source([0, 1, 2] * 7)
    assert rows_of(packed(data, block_length=4)) == rows_of(packed(data, block_length=100))


def test_drift_by_class_and_by_column() -> None:
    data = source([1, 0, 1, 0, 1, 0], user=[7, 7, 5, 5, 6, 6])
    by_class = packed(data, drift="class")
    assert join_blocks(by_class).y.tolist() == [0, 0, 0, 1, 1, 1]
    by_user = packed(data, drift="user", shuffle=False)
    assert rows_of(by_user) == [2, 3, 4, 5, 0, 1]
    many = source([0, 1] * 50)
    assert rows_of(packed(many, drift="class")) != rows_of(packed(many, drift="class", shuffle=False))
    with pytest.raises(UsageError, match=r"--drift: no column 'hour', expected class, user"):
        packed(data, drift="hour")


# -------------------------------------------------------------------------------------------------------------- choice


@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 3))
def test_shares_of_one_seed_are_disjoint_and_complete(seed: int, first: int, second: int) -> None:
    data = source([0] * 9 + [1] * 8 + [5] * 7)
    support = rows_of(packed(data, seed, per_class=first))
    more = rows_of(packed(data, seed, skip_per_class=first, per_class=second))
    rest = rows_of(packed(data, seed, skip_per_class=first + second))
    assert sorted(support + more + rest) == list(range(24))
    assert Counter(data.y[support].tolist()) == {0: first, 1: first, 5: first}
    assert Counter(data.y[more].tolist()) == {0: second, 1: second, 5: second}


def packed_or_too_few(data: Source, seed: int, **how: object) -> list[Block] | None:
    """None where the condition cuts into a share, which is refused."""
    try:
        return packed(data, seed, **how)
    except DataError as error:
        if "pack what --where chooses into a file first" not in str(error):
            raise
        return None


@settings(max_examples=40)
@given(st.integers(0, 99), st.sampled_from(["", "user!=3", "user=1,2,3"]), st.sampled_from([(), ("bee",)]))
def test_shares_are_disjoint_whatever_else_chooses(seed: int, where: str, classes: tuple[str, ...]) -> None:
    data = source([0] * 9 + [1] * 8, ("ant", "bee"), user=[i % 4 for i in range(17)])
    how = {"where": (Condition.parse(where),) if where else (), "classes": classes}
    wanted = packed_or_too_few(data, seed, per_class=3, **how)
    if wanted is None:
        return
    support = rows_of(wanted)
    for other in ({}, how):
        assert not {*support} & {*rows_of(packed(data, seed, skip_per_class=3, **other))}
    whole = rows_of(packed(data, seed, per_class=3))
    assert {*support} <= {*whole}


def test_shares_in_order_keep_the_order_of_the_source() -> None:
    rows = rows_of(packed(source([0, 1, 2] * 10), per_class=5, shuffle=False))
    assert rows == sorted(rows)


def test_shares_are_random_members_of_their_class() -> None:
    chosen = Counter(row for seed in range(400) for row in rows_of(packed(source([0] * 4), seed, per_class=1)))
    assert all(abs(chosen[row] - 100) < 50 for row in range(4))


def test_a_class_that_is_too_small_is_named() -> None:
    data = source([0, 0, 1], ("ant", "bee"))
    with pytest.raises(DataError, match=r"here: class bee: 1 samples, expected 2"):
        packed(data, per_class=2)
    assert rows_of(packed(data, skip_per_class=1, shuffle=False)) in ([0], [1])


def test_where_on_numbers_texts_and_labels() -> None:
    data = source([0, 1, 2, 3], user=[b"ann", b"bob", b"ann", b"eve"], split=[0, 0, 1, 1])

    def where(*texts: str) -> list[int]:
        return rows_of(packed(data, shuffle=False, where=tuple(Condition.parse(text) for text in texts)))

    assert where("split=1") == [2, 3]
    assert where("user=ann,eve") == [0, 2, 3]
    assert where("user!=ann,eve") == [1]
    assert where("split=1", "user=ann") == [2]
    assert where("label!=0") == [1, 2, 3]
    named = source([0, 1, 1, 2], ("10", "11", "2"))
    assert rows_of(packed(named, shuffle=False, where=(Condition.parse("class=2"),))) == [3]
    for text, message in (("hour=1", "no column 'hour'"), ("split=one", "a number"), ("split", "COLUMN=VALUE")):
        with pytest.raises(UsageError, match=message):
            where(text)
    for text, message in (
        ("split=7", r"no sample with split=7, expected values such as 0, 1"),
        ("user!=zoe", r"no sample with user=zoe, expected values such as ann, bob, eve"),
    ):
        with pytest.raises(UsageError, match=message):
            where(text)
    with pytest.raises(DataError, match="no sample is left of 4"):
        where("split=0", "label=3")


def test_classes_by_name_or_number_keep_their_labels_and_names(tmp_path: Path) -> None:
    named = source([0, 1, 2, 0], ("ant", "bee", "cat"))
    (block,) = packed(named, classes=("cat", "ant"), shuffle=False)
    assert block.y.tolist() == [0, 2, 0]
    assert block.labels is not None
    assert (block.labels.tolist(), block.names) == ([0, 2], ("ant", "cat"))
    assert rows_of(packed(source([4, 5, 6]), classes=("5",))) == [1]
    with pytest.raises(UsageError, match=r"'dog', expected one of the 3 classes \(ant, bee, cat"):
        packed(named, classes=("dog",))
    (tmp_path / "names.txt").write_text("ant\n\nbee, the second\n")
    assert class_list(f"@{tmp_path / 'names.txt'}") == ("ant", "bee, the second")
    assert class_list("a, b") == ("a", "b")
    with pytest.raises(InputMissing):
        class_list("@nowhere.txt")


def test_limit_comes_after_the_order() -> None:
    data = source([0] * 30)
    assert rows_of(packed(data, limit=5)) == rows_of(packed(data))[:5]


def test_labels_that_cannot_be() -> None:
    with pytest.raises(DataError, match=r"here: sample 1: no label \(1 such samples\).*class!=-1.*--unlabelled"):
        packed(source([0, -1]))
    assert rows_of(packed(source([0, -1]), where=(Condition.parse("label!=-1"),))) == [0]
    (kept,) = packed(source([0, -1], ("ant",)), unlabelled=True, shuffle=False)
    assert (kept.y.tolist(), kept.names) == ([0, -1], ("ant",))
    with pytest.raises(DataError, match=r"label -2 .*class!=-2"):
        packed(source([0, -2]))
    with pytest.raises(DataError, match="label 2"):
        packed(source([0, 2], ("ant", "bee")))


# ---------------------------------------------------------------------------------------------------- samples and noise


def test_samples_with_nan_fail_or_are_skipped_and_counted() -> None:
    x = np.arange(6, dtype=np.float32)[:, None]
    x[2], x[4] = np.nan, np.inf
    data = replace(source([0] * 6), reader=ArrayReader(x))
    with pytest.raises(DataError, match="here: sample 2: NaN"):
        packed(data, shuffle=False)
    bad = BadSamples("skip")
    blocks = list(pack(data, Packing(shuffle=False, block_length=3), generator(0, "pack"), on_bad=bad))
    assert rows_of(blocks) == [0, 1, 3, 5]
    assert [len(block) for block in blocks] == [3, 1]
    assert [int(i) for block in blocks for i in block.columns["index"]] == [0, 1, 2, 3]
    assert bad.count == 2
    with pytest.raises(DataError, match="all 6 samples are bad"):
        list(
            pack(
                replace(data, reader=ArrayReader(x * np.nan)),
                Packing(),
                generator(0, "pack"),
                on_bad=BadSamples("skip"),
            )
        )
    with pytest.raises(UsageError):
        BadSamples("ignore")


def test_a_class_whose_samples_are_all_bad_does_not_vanish() -> None:
    data = replace(source([0, 1, 1], ("ant", "bee")), reader=ArrayReader(np.array([[np.nan], [1.0], [2.0]])))
    with pytest.raises(DataError, match="none of the 1 samples of class ant can be used"):
        list(pack(data, Packing(), generator(0, "pack"), on_bad=BadSamples("skip")))


def test_blocks_say_how_samples_were_prepared_and_where_they_came_from() -> None:
    files = np.array([b"a/0.png", b"a/1.png"])
    before = Preparation(of="pictures", size=(2, 2), fit="crop")
    pixels = ArrayReader(np.zeros((2, 2, 2), np.uint8))
    data = Source("here", np.array([0, 0]), pixels, "NHW", files=files, prepared=before)
    (block,) = packed(data, form=Form(invert=True), shuffle=False)
    assert block.prepared == replace(before, invert=True)
    assert block.columns["source"].tolist() == files.tolist()
    again = decode(encode(block))
    assert isinstance(again, Block)
    assert (again.prepared, again.columns["source"].tolist()) == (block.prepared, files.tolist())
    with pytest.raises(DataError, match="pictures as they are, expected inverted"):
        join_blocks([block, replace(block, prepared=before)])


def test_noise_is_marked_and_the_truth_kept() -> None:
    data = source([0, 1, 2, 3] * 25, user=list(range(100)))
    block = join_blocks(packed(data, label_noise=0.4, feature_noise=0.2, noise_std=5.0, block_length=7))
    truth = data.y[block.columns["user"]]
    assert np.array_equal(block.columns["true_label"], truth)
    assert int((block.y != truth).sum()) == 40
    moved = block.x[:, 0] != block.columns["user"]
    assert np.array_equal(moved, block.columns["noisy"] == 1)
    assert int(moved.sum()) == 20


def test_a_column_that_is_called_like_a_blocks_own_is_renamed() -> None:
    (block,) = packed(source([0, 1], labels=[5, 6], index=[8, 9]), shuffle=False)
    assert block.columns["labels_column"].tolist() == [5, 6]
    assert block.columns["index"].tolist() == [0, 1]


def test_facts_and_columns_cannot_pass_for_a_blocks_own() -> None:
    data = replace(source([0, 1], **{"a/b": [1, 2]}), facts={"end": 3, "rate": 8})
    (block,) = packed(data)
    assert block.facts == {"rate": 8}
    assert block.prepared == Preparation(of="arrays")
    assert "a_b" in block.columns


def test_memory_is_bounded_by_a_span() -> None:
    asked: list[int] = []

    class Counting:
        span = 4

        def read(self, rows: np.ndarray, on_bad: OnBad) -> tuple[np.ndarray, np.ndarray]:
            asked.append(len(rows))
            return np.zeros((len(rows), 1), np.float32), np.arange(len(rows))

    steps: list[int] = []
    data = replace(source([0] * 10), reader=Counting())
    stream = pack(data, Packing(block_length=2), generator(0, "pack"), on_step=steps.append)
    next(stream)
    assert asked == [4]
    list(stream)
    assert (asked, steps) == ([4, 4, 2], [4, 8, 10])


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_length": 0},
        {"per_class": 0},
        {"skip_per_class": -1},
        {"limit": 0},
        {"label_noise": 1.5},
        {"feature_noise": -0.1},
        {"noise_std": 0.0},
        {"unlabelled": True, "per_class": 3},
    ],
    ids=str,
)
def test_packing_checks_itself(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(wrong)).replace("_", "-")):
        Packing(**wrong)


@pytest.mark.parametrize("wrong", [{"dtype": "float64"}, {"scale": 0.0}, {"scale": float("nan")}], ids=str)
def test_forms_check_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(wrong))):
        Form(**wrong)


# ---------------------------------------------------------------------------------------------------------------- join


def test_join_refuses_more_than_fits() -> None:
    blocks = packed(source([0] * 10), block_length=5)  # 20 bytes each
    assert len(join(blocks, max_bytes=40)) == 10
    with pytest.raises(DataError, match=r"after 2 blocks.*--max-record"):
        join(blocks, max_bytes=39)


def test_join_says_what_it_leaves_out() -> None:
    one, other = (packed(source([0, 1], user=[1, 2]))[0] for _ in range(2))
    notes: list[str] = []
    plain = replace(other, columns={"index": other.columns["index"]}, facts={"day": 2})
    joined = join([replace(one, facts={"day": 1}, per_class={"seen": np.ones(2)}, labels=np.arange(2)), plain],
                  max_bytes=99, on_note=notes.append)  # fmt: skip
    assert set(joined.columns) == {"index"}
    assert notes == [
        "left out columns that not all blocks share: user",
        "left out facts that not all blocks share: day",
        "left out counts per class that not all blocks share: seen",
    ]


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of six 5x4 images whose grey value is their number, and one file that is no image."""
    for label, name in enumerate(("ant", "bee", "cat")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((5, 4), 10 * label + i, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "pictures" / "bee" / "9.png").write_bytes(b"not an image")
    return tmp_path / "pictures"


def blocks_of(path: Path) -> list[Block]:
    return [record for record in open_records(path) if isinstance(record, Block)]


def test_the_command_packs_support_and_query(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    support, query = tmp_path / "support.h5", tmp_path / "query.h5"
    pack_command([str(pictures)], str(support), per_class=2, seed=3, on_bad="skip")
    pack_command([str(pictures)], str(query), skip_per_class=2, seed=3, on_bad="skip")
    found = [join_blocks(blocks_of(path)) for path in (support, query)]
    values = [set(np.asarray(block.x)[:, 0, 0].tolist()) for block in found]
    assert values[0].isdisjoint(values[1])
    assert len(values[0] | values[1]) == 18
    assert found[0].names == ("ant", "bee", "cat")
    assert "skipped 1 of" in capsys.readouterr().err


def test_the_command_stops_at_a_bad_file_and_leaves_nothing(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"9\.png: cannot be read as an image"):
        pack_command([str(pictures)], str(tmp_path / "out.h5"))
    assert not (tmp_path / "out.h5").exists()


def test_the_same_seed_writes_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.h5" for i in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        pack_command([str(pictures)], str(path), size="3x6", on_bad="skip", seed=seed, quiet=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != paths[2].read_bytes()
    assert blocks_of(paths[0])[0].x.shape == (18, 3, 6)


def test_the_command_join(pictures: Path, tmp_path: Path) -> None:
    pack_command([str(pictures)], str(tmp_path / "a.h5"), classes="ant,cat", block_length=5, quiet=True)
    join_command([str(tmp_path / "a.h5"), str(tmp_path / "a.h5")], str(tmp_path / "all.h5"), quiet=True)
    (block,) = blocks_of(tmp_path / "all.h5")
    assert len(block) == 24
    with pytest.raises(DataError, match="--max-record"):
        join_command([str(tmp_path / "a.h5")], str(tmp_path / "no.h5"), max_record="100B", quiet=True)


# ----------------------------------------------------------------------------------------------------------- real data


def test_omniglot_evaluation_alphabets(tmp_path: Path) -> None:
    out = tmp_path / "o.h5"
    pack_command(
        [str(real("data/omniglot.h5"))], str(out), size="28", where=["split=1", "drawer=1,2"], limit=300, quiet=True
    )
    block = join_blocks(blocks_of(out))
    assert block.x.shape == (300, 28, 28)
    assert set(block.columns["drawer"].tolist()) == {1, 2}
    assert block.names is not None
    assert all("/" in name for name in block.names)


def test_spoken_digits_drift_by_speaker(tmp_path: Path) -> None:
    from stages.data.sources import Opening, open_source

    data = open_source([real("data/fsdd.h5")], Opening())
    rows = choose(data, Packing(drift="speaker"), generator(0, "pack"))
    speakers = data.columns["speaker"][rows]
    assert (np.diff(speakers) >= 0).all()
    assert len(set(speakers.tolist())) == 6
    first = next(pack(data, Packing(drift="speaker", block_length=20), generator(0, "pack")))
    assert (first.x.shape, first.x.dtype, first.layout) == ((20, 8000), np.int16, "NT")
