"""Every door sees the same: what `pack` makes of files is what a model gets that is given the files themselves."""

from __future__ import annotations

import csv
import json
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgetrain_cli.commands.evaluate import evaluate as evaluate_command
from edgetrain_cli.commands.import_weights import import_weights as import_command
from edgetrain_cli.commands.pack import pack as pack_command
from edgetrain_cli.commands.predict import predict as predict_command
from edgetrain_cli.commands.train_sparse import train_sparse as train_command
from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block, InputSpec, Preparation
from stages.artifacts.stream import is_stream, open_records
from stages.data.blocks import join_blocks
from stages.data.doors import blocks_for_model
from stages.data.images import FITS, ImageForm
from stages.data.reading import Form
from stages.data.samples import Notes
from stages.data.sounds import SoundForm
from stages.data.sources import Opening, open_source
from stages.errors import DataError, InputMissing, UsageError
from stages.packing import Packing, pack
from stages.randomness import generator

PICTURES = InputSpec("image", (1, 12, 12), (1 / 255,))
SOUND = InputSpec("sound", (1, 4, 8), (0.1,), (0.5,), 8000, 64, 32)
FLAT = InputSpec("features", (3,))


def pictures(root: Path, seed: int = 0, *, colour: bool = False) -> Path:
    """Two classes of three pictures of different sizes."""
    rng = np.random.default_rng(seed)
    for name in ("2", "10"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            shape = (9 + i, 14 - i, 3) if colour else (9 + i, 14 - i)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(root / name / f"{i}.png")
    return root


def recordings(root: Path, rate: int = 8000) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            with wave.open(str(root / name / f"{i}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes(rng.integers(-99, 99, 150 + i, np.int16).tobytes())
    return root


def packed(paths: list[Path], opening: Opening, form: Form | None = None) -> Block:
    """What `pack --in-order` makes of it."""
    packing = Packing(shuffle=False, form=form or Form())
    return join_blocks(list(pack(open_source(paths, opening), packing, generator(0, "pack"))))


def given_to(spec: InputSpec, path: Path, prepared: Preparation | None) -> Block:
    return join_blocks(list(blocks_for_model(path, replace(spec, prepared=prepared), block_length=4)))


def assert_alike(one: Block, other: Block) -> None:
    assert (one.layout, one.names, one.prepared) == (other.layout, other.names, other.prepared)
    assert one.x.dtype == other.x.dtype
    for mine, yours in ((one.x, other.x), (one.y, other.y), *((one.columns[n], other.columns[n]) for n in one.columns)):
        np.testing.assert_array_equal(mine, yours)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from(sorted(FITS)),
    st.sampled_from([(7, 7), (12, 5)]),
    st.sampled_from(["gray", "rgb", "auto"]),
    st.booleans(),
    st.booleans(),
)
def test_pictures_are_prepared_as_they_were_packed(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    fit: str,
    size: tuple[int, int],
    colour: str,
    coloured: bool,
    invert: bool,
) -> None:
    root = pictures(tmp_path_factory.mktemp("p") / "set", seed, colour=coloured)
    opening = Opening(image=ImageForm(size=size, fit=fit, colour=colour))
    block = packed([root], opening, Form(invert=invert))
    found = given_to(PICTURES, root, block.prepared)
    assert_alike(block, found)
    one = root / "10" / "1.png"
    (alone,) = blocks_for_model(one, replace(PICTURES, prepared=block.prepared), labelled=False)
    at = block.columns["source"].tolist().index(b"10/1.png")
    np.testing.assert_array_equal(alone.x[0], block.x[at])
    assert alone.y.tolist() == [-1]


@pytest.mark.parametrize("seconds", [None, 0.02, 0.0125])
@pytest.mark.parametrize("rate", [None, 4000])
def test_recordings_are_prepared_as_they_were_packed(tmp_path: Path, rate: int | None, seconds: float | None) -> None:
    root = recordings(tmp_path / "set")
    for name in ("a", "b"):
        (root / name / "1.wav").unlink()
    block = packed([root], Opening(sound=SoundForm(rate_hz=rate, seconds=seconds)))
    spec = replace(SOUND, sample_rate_hz=rate or 8000)
    found = given_to(spec, root, block.prepared)
    shorter = min(found.x.shape[1], block.x.shape[1])
    np.testing.assert_array_equal(np.asarray(found.x)[:, :shorter], np.asarray(block.x)[:, :shorter])
    assert found.prepared is not None
    assert found.prepared.sample_rate_hz == spec.sample_rate_hz


@pytest.mark.parametrize("kind", ["npz", "csv", "mat"])
def test_arrays_and_tables_are_prepared_as_they_were_packed(tmp_path: Path, kind: str) -> None:
    x, y = np.random.default_rng(0).random((5, 6)), np.array([2, 0, 1, 1, 10])
    path = tmp_path / f"d.{kind}"
    if kind == "npz":
        np.savez(path, x=x, y=y)
    elif kind == "mat":
        scipy.io.savemat(path, {"X": x.T, "y": y})
    else:
        rows = "".join(",".join([*map(repr, row.tolist()), str(label)]) + "\n" for row, label in zip(x, y, strict=True))
        path.write_text("a,b,c,d,e,f,label\n" + rows)
    opening = Opening(shape=(2, 3), layout="NHW")
    block = packed([path], opening, Form(scale=255, dtype="uint8"))
    assert_alike(block, given_to(replace(PICTURES, shape=(1, 2, 3)), path, block.prepared))


def test_a_table_of_files_is_what_its_files_are(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set")
    (tmp_path / "list.csv").write_text("file,label\nset/2/0.png,2\nset/10/1.png,10\n")
    block = packed([root], Opening(image=ImageForm(size=(5, 5), fit="pad")), Form(invert=True))
    found = given_to(PICTURES, tmp_path / "list.csv", block.prepared)
    np.testing.assert_array_equal(found.x, np.asarray(block.x)[[3, 1]])
    assert found.names == ("2", "10")


def test_without_a_preparation_pictures_come_to_the_models_size_which_is_said(tmp_path: Path) -> None:
    notes = Notes()
    (block,) = blocks_for_model(pictures(tmp_path / "set"), PICTURES, notes=notes)
    assert block.x.shape == (6, 12, 12)
    assert notes.lines() == [
        "nothing says how this model's pictures were prepared: they are stretched to 12 x 12",
    ]
    (block,) = blocks_for_model(recordings(tmp_path / "sounds"), SOUND)
    assert block.x.shape == (4, 64 + 3 * 32)


def test_pictures_of_any_size_where_the_model_learnt_from_theirs(tmp_path: Path) -> None:
    found = list(blocks_for_model(pictures(tmp_path / "set"), PICTURES, Preparation(of="pictures", colour="gray")))
    assert [block.x.shape for block in found] == [(1, 9 + i % 3, 14 - i % 3) for i in range(6)]


def test_what_cannot_be_prepared_alike_is_refused(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set")
    scaled = Preparation(of="arrays", scale=255.0, dtype="uint8")
    with pytest.raises(DataError, match=r"pictures, for a model that learnt from arrays scaled by 255.*edgetrain pack"):
        list(blocks_for_model(root, PICTURES, scaled))
    with pytest.raises(DataError, match="pictures, for a model that reads sound"):
        list(blocks_for_model(root, SOUND))
    with pytest.raises(DataError, match="recordings, for a model that reads image"):
        list(blocks_for_model(recordings(tmp_path / "sounds"), PICTURES))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="a folder without images"):
        list(blocks_for_model(tmp_path / "nothing", FLAT))


def test_labels_are_wanted_where_they_are_used(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,label\n1,2,x\n3,4,\n")
    spec = InputSpec("features", (2,))
    with pytest.raises(DataError, match=r"1 of 2 samples have no label"):
        list(blocks_for_model(tmp_path / "t.csv", spec))
    (block,) = blocks_for_model(tmp_path / "t.csv", spec, labelled=False)
    assert block.y.tolist() == [-1, -1]
    (tmp_path / "bare.csv").write_text("a,b\n1,2\n3,4\n")
    (block,) = blocks_for_model(tmp_path / "bare.csv", spec, labelled=False)
    assert block.x.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(UsageError, match="no column is called label"):
        list(blocks_for_model(tmp_path / "bare.csv", spec))


def test_streams_are_told_from_other_files(tmp_path: Path) -> None:
    block = Block(np.zeros((1, 3), np.float32), np.zeros(1, np.int64), "ND")
    (tmp_path / "a.h5").write_bytes(encode(block))
    (tmp_path / "a.bin").write_bytes(encode(block))
    (tmp_path / "damaged.h5").write_bytes(b"")
    (tmp_path / "t.csv").write_text("a\n")
    assert [is_stream(tmp_path / name) for name in ("a.h5", "a.bin", "damaged.h5", "t.csv")] == [
        True,
        True,
        True,
        False,
    ]
    assert is_stream(Path("/dev/null"))
    assert not is_stream(tmp_path)
    with pytest.raises(InputMissing):
        is_stream(tmp_path / "none")


# -------------------------------------------------------------------------------------------------------- the commands


def distinct(root: Path) -> Path:
    """Dark strokes on white, in wide pictures: easy to tell apart if, and only if, they are prepared alike."""
    rng = np.random.default_rng(0)
    for name, rows in (("2", slice(2, 6)), ("10", slice(14, 18))):
        for split in ("train", "test"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                picture = np.full((20, 60), 255 - rng.integers(0, 9), np.uint8)
                picture[rows, 20:40] = rng.integers(0, 9)
                Image.fromarray(picture).save(root / split / name / f"{i}.png")
    return root


def test_the_commands_see_a_folder_as_they_see_what_pack_makes_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, at = (
        distinct(tmp_path / "data"),
        {name: str(tmp_path / f"{name}.h5") for name in ("base", "a", "b", "tr", "te")},
    )
    import_command(arch="cnn4", size=32, out=at["base"], quiet=True)
    for split, name in (("train", "tr"), ("test", "te")):
        pack_command([str(data / split)], at[name], size="32", fit="crop", invert=True, shuffle=False, quiet=True)
    train_command(at["base"], at["tr"], at["a"], last_layer=True, iterations=2, lr=0.001, quiet=True)
    capfd.readouterr()
    results = []
    for samples in (at["te"], str(data / "test")):
        evaluate_command(at["a"], [samples], as_json=True)
        results.append(json.loads(capfd.readouterr().out))
    assert results[0] == results[1]
    assert results[0]["accuracy"] == 1.0
    tables = []
    for samples in (at["te"], str(data / "test")):
        predict_command(at["a"], samples, str(tmp_path / "p.csv"), quiet=True)
        with (tmp_path / "p.csv").open() as file:
            tables.append([(row["sample"], row["predicted"], row["p(10)"]) for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert tables[0][0][:2] == ("10/0.png", "10")
    train_command(at["base"], str(data / "train"), at["b"], last_layer=True, iterations=2, lr=0.001, quiet=True)
    (run,) = open_records(at["b"])
    assert run.model.input.prepared == Preparation(of="pictures", size=(32, 32), colour="gray")  # type: ignore[union-attr]
    with pytest.raises(DataError, match="inverted pictures, expected as they are"):
        evaluate_command(at["b"], [at["te"]])


def test_classes_that_are_numbers_meet_whatever_they_are_called(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = distinct(tmp_path / "data")
    at = {name: str(tmp_path / f"{name}.h5") for name in ("base", "a", "tr", "te")}
    import_command(arch="cnn4", size=32, out=at["base"], quiet=True)
    pack_command([str(data / "train")], at["tr"], size="32", quiet=True)
    train_command(at["base"], at["tr"], at["a"], last_layer=True, iterations=1, lr=0.001, quiet=True)
    found = packed([data / "test"], Opening(image=ImageForm(size=(32, 32))))
    np.savez(tmp_path / "test.npz", x=found.x, y=found.y)
    capfd.readouterr()
    evaluate_command(at["a"], [str(tmp_path / "test.npz")], as_json=True)
    result = json.loads(capfd.readouterr().out)
    assert (result["accuracy"], [each["name"] for each in result["classes"]]) == (1.0, ["2", "10"])


def test_a_block_of_another_rate_is_refused_by_every_command(tmp_path: Path) -> None:
    at = {name: str(tmp_path / f"{name}.h5") for name in ("base", "s", "a")}
    import_command(arch="ds-cnn-w16", out=at["base"], quiet=True)
    pack_command([str(recordings(tmp_path / "set"))], at["s"], seconds=1.0, quiet=True)
    for command in (
        lambda: train_command(at["base"], at["s"], at["a"], last_layer=True, iterations=1, lr=0.01, quiet=True),
        lambda: evaluate_command(at["base"], [at["s"]], support=at["s"]),
        lambda: predict_command(at["base"], at["s"], support=at["s"]),
    ):
        with pytest.raises(DataError, match=r"8000 samples per second, expected 16000, the model's.*--rate 16000"):
            command()
    assert not Path(at["a"]).exists()


def test_a_model_that_knows_names_says_what_it_takes_numbers_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    at = {name: str(tmp_path / f"{name}.h5") for name in ("base", "a", "s")}
    import_command(arch="cnn4", out=at["base"], quiet=True)
    x = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    np.savez(tmp_path / "named.npz", x=x, y=np.repeat(["cat", "dog"], 3))
    np.savez(tmp_path / "numbers.npz", x=x, y=np.repeat([0, 1], 3))
    train_command(at["base"], str(tmp_path / "named.npz"), at["a"], last_layer=True, iterations=1, lr=0.01, quiet=True)
    capfd.readouterr()
    evaluate_command(at["a"], [str(tmp_path / "numbers.npz")])
    assert "class 0 for 'cat', 1 for 'dog'" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------- what a person had tried


@pytest.fixture
def bracketed(tmp_path: Path) -> tuple[str, Path, str]:
    """A model, a folder whose names are in brackets, with hidden files in it, and its blocks."""
    root = tmp_path / "d"
    for label, name in enumerate(("[red]cat", "[unknown]")):
        (root / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.full((28, 28), 200 * label + i, np.uint8)
            Image.fromarray(pixels).save(root / name / f"p[bold]{i}.png")
    (root / "[red]cat" / "._p.png").write_bytes(b"\0\5\026\7mac")
    (root / ".ipynb_checkpoints").mkdir()
    Image.fromarray(pixels).save(root / ".ipynb_checkpoints" / "p.png")
    base, blocks = str(tmp_path / "base.h5"), str(tmp_path / "d.h5")
    import_command(arch="cnn4", out=base, quiet=True)
    pack_command([str(root)], blocks, quiet=True)
    return base, root, blocks


def test_names_in_brackets_are_shown_and_hidden_files_are_no_samples(
    bracketed: tuple[str, Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    base, root, blocks = bracketed
    capfd.readouterr()
    predict_command(base, str(root), support=blocks)
    evaluate_command(base, [blocks], support=blocks)
    shown = capfd.readouterr()
    for text in ("[red]cat", "[unknown]", "p[bold]0.png", "p[bold]1.png"):
        assert text in shown.out
    assert "._p" not in shown.out
    assert "d: left out 2 hidden: .ipynb_checkpoints, [red]cat/._p.png" in shown.err


@pytest.mark.parametrize(
    ("name", "format"), [("a.txt", None), ("a.CSV", None), ("t.csv", "table"), ("a.json", "jsonl")]
)
def test_every_answer_is_in_the_file_that_was_named(
    bracketed: tuple[str, Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, format: str | None
) -> None:
    base, root, blocks = bracketed
    capfd.readouterr()
    predict_command(base, str(root), str(tmp_path / name), format=format, support=blocks, rows=1, quiet=True)
    text = (tmp_path / name).read_text()
    assert all(f"p[bold]{i}.png" in text for i in range(2))
    assert capfd.readouterr().out == ""
    with pytest.raises(UsageError, match="suffix"):
        predict_command(base, str(root), str(tmp_path / "no.json"), support=blocks)


def test_boxes_of_annotations_are_cut_from_the_picture_that_they_speak_of(tmp_path: Path) -> None:
    """MSCOCO's boxes in a picture that EXIF turns, by the width and height that the annotations state."""
    pixels = np.full((24, 40, 3), 90, np.uint8)
    pixels[2:10, 2:10], pixels[12:20, 14:22] = (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).save(tmp_path / "i.png", exif=exif)
    notes = [{"image_id": 1, "category_id": c, "bbox": box} for c, box in ((1, [2, 2, 8, 8]), (2, [14, 12, 8, 8]))]
    content = {
        "images": [{"id": 1, "file_name": "i.png", "width": 40, "height": 24}],
        "categories": [{"id": 1, "name": "green"}, {"id": 2, "name": "blue"}],
        "annotations": notes,
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    block = packed([tmp_path / "c.json"], Opening(image=ImageForm(size=(8, 8))))
    names = [block.name_of(int(label)) for label in block.y]
    means = dict(zip(names, np.asarray(block.x).reshape(2, -1, 3).mean(1).tolist(), strict=True))
    assert means == {"green": [0, 255, 0], "blue": [0, 0, 255]}
