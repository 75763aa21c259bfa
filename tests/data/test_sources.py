"""Every kind of data is told apart, opened and read; what cannot be is refused in one line."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from stages.artifacts.records import Preparation
from stages.data.images import ImageForm
from stages.data.listings import Columns
from stages.data.sounds import SoundForm
from stages.data.sources import FILES, FOLDERS, MEDIA_KINDS, OPENERS, Opening, detect, open_source
from stages.data.tables import Writing
from stages.errors import DataError, InputMissing, UsageError


def stop(error: DataError) -> None:
    raise error


def image(path: Path, value: int, shape: tuple[int, ...] = (6, 4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)
    return path


def sound(path: Path, samples: int, rate: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.arange(samples, dtype="<i2").tobytes())
    return path


def make(kind: str, root: Path) -> list[Path]:
    """Four samples of two classes in each of the formats; the classes are `a` and `b`, or 0 and 1."""
    y = np.array([0, 1, 0, 1])
    if kind in ("images", "list", "coco"):
        files = [image(root / f"{'ab'[label]}/{i}.png", i) for i, label in enumerate(y)]
    if kind == "images":
        return [root]
    if kind == "list":
        (root / "files.csv").write_text("".join(f"{f.parent.name}/{f.name},{f.parent.name}\n" for f in files))
        return [root / "files.csv"]
    if kind == "coco":
        content = {
            "images": [{"id": i, "file_name": f"{f.parent.name}/{f.name}"} for i, f in enumerate(files)],
            "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
            "annotations": [{"image_id": i, "category_id": int(c), "bbox": [0, 0, 4, 6]} for i, c in enumerate(y)],
        }
        (root / "instances.json").write_text(json.dumps(content))
        return [root / "instances.json"]
    if kind == "sounds":
        for i, label in enumerate(y):
            sound(root / f"{'ab'[label]}/{i}.wav", 20)
        return [root]
    x = np.arange(4, dtype=np.uint8)[:, None, None] + np.zeros((1, 6, 4), np.uint8)
    if kind == "npz":
        np.savez(root / "d.npz", x=x, y=y)
        return [root / "d.npz"]
    if kind == "npy":
        np.save(root / "x.npy", x)
        np.save(root / "y.npy", y)
        return [root / "x.npy", root / "y.npy"]
    if kind == "npy-folder":
        np.save(root / "a.npy", x[:2])
        np.save(root / "b.npy", x[2:])
        return [root]
    if kind == "csv":
        rows = [",".join(map(str, [*x[i].ravel(), y[i]])) for i in range(4)]
        (root / "d.csv").write_text("\n".join([",".join([*(f"p{k}" for k in range(24)), "label"]), *rows]))
        return [root / "d.csv"]
    if kind == "hdf5":
        with h5py.File(root / "d.h5", "w") as file:
            file["x"], file["y"] = x, y
        return [root / "d.h5"]
    if kind == "matlab":
        scipy.io.savemat(root / "d.mat", {"X": np.moveaxis(x[:, :, :3], 0, 2), "y": y[:, None]})
        return [root / "d.mat"]
    if kind == "cifar":
        (root / "batches.meta.txt").write_text("a\nb\n")
        (root / "data_batch_1.bin").write_bytes(b"".join(bytes([c]) + bytes(3072) for c in y))
        return [root]
    if kind == "harbox":
        for label, name in enumerate("ab"):
            (root / "1").mkdir(exist_ok=True)
            np.savetxt(root / "1" / f"{name}_train.txt", np.full((200, 10), label))
        return [root]
    (root / "activity_labels.txt").write_text("1 a\n2 b\n")
    for split in ("train", "test"):
        (root / split).mkdir()
        np.savetxt(root / split / f"X_{split}.txt", np.zeros((2, 561)))
        np.savetxt(root / split / f"y_{split}.txt", [1, 2], fmt="%d")
        np.savetxt(root / split / f"subject_{split}.txt", [1, 2], fmt="%d")
    return [root]


def test_there_is_a_sample_of_every_opener() -> None:
    assert len(OPENERS) == 13
    assert {*FILES.values(), *FOLDERS, *MEDIA_KINDS, "csv", "list", "npy", "npy-folder"} == OPENERS.keys()


@pytest.mark.parametrize("kind", list(OPENERS))
def test_every_kind_is_recognised_and_read(tmp_path: Path, kind: str) -> None:
    paths = make(kind, tmp_path)
    assert detect(paths, Opening()) == kind
    source = open_source(paths, Opening())
    assert sorted(source.y.tolist()) == [0, 0, 1, 1]
    assert source.names in (None, ("a", "b"))
    x, good = source.reader.read(np.array([3, 0, 2]), stop)
    assert len(x) == len(good) == 3
    again, _ = source.reader.read(np.array([0]), stop)
    assert np.array_equal(again[0], x[1])


@pytest.mark.parametrize("kind", ["images", "list", "coco", "npz", "npy", "npy-folder", "hdf5", "matlab", "cifar"])
def test_images_of_every_kind_take_a_size(tmp_path: Path, kind: str) -> None:
    source = open_source(make(kind, tmp_path), Opening(image=ImageForm(size=(3, 5))))
    x, _ = source.reader.read(np.array([1]), stop)
    spatial = x.shape[2:] if source.layout == "NCHW" else x.shape[1:3]
    assert spatial == (3, 5)


def test_flat_samples_become_images(tmp_path: Path) -> None:
    paths = make("csv", tmp_path)
    source = open_source(paths, Opening(shape=(6, 4)))
    assert source.layout == "NHW"
    assert source.reader.read(np.array([2]), stop)[0].tolist() == [[[2.0] * 4] * 6]
    assert open_source(paths, Opening(shape=(1, 6, 4))).layout == "NCHW"
    assert open_source(paths, Opening(shape=(2, 3, 4), layout="NHWC")).layout == "NHWC"
    with pytest.raises(DataError, match="--layout"):
        open_source(paths, Opening(shape=(2, 3, 4)))
    with pytest.raises(DataError, match="samples of"):
        open_source(paths, Opening(shape=(5, 5))).reader.read(np.array([0]), stop)


def test_files_beside_a_table_lie_under_base(tmp_path: Path) -> None:
    image(tmp_path / "pictures" / "1.png", 7)
    (tmp_path / "list.csv").write_text("name,kind\n1.png,cat\n")
    columns = Columns(file="name", label="kind")
    source = open_source([tmp_path / "list.csv"], Opening(base=tmp_path / "pictures", columns=columns))
    assert source.reader.read(np.array([0]), stop)[0].max() == 7


def test_crop_boxes_of_a_table_reach_the_images(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(6, 4)
    Image.fromarray(values).save(tmp_path / "1.png")
    (tmp_path / "list.csv").write_text("f,c,l,t,r,b\n1.png,cat,1,2,3,5\n")
    source = open_source([tmp_path / "list.csv"], Opening(columns=Columns(box=("l", "t", "r", "b"))))
    assert np.array_equal(source.reader.read(np.array([0]), stop)[0][0], values[2:5, 1:3])


def test_recordings_of_different_lengths_need_seconds(tmp_path: Path) -> None:
    sound(tmp_path / "a" / "1.wav", 50)
    sound(tmp_path / "a" / "2.wav", 70)
    with pytest.raises(DataError, match=r"2\.wav: shape \(70,\).*--seconds"):
        open_source([tmp_path], Opening()).reader.read(np.array([0, 1]), stop)
    source = open_source([tmp_path], Opening(sound=SoundForm(seconds=0.6)))
    assert source.reader.read(np.array([0, 1]), stop)[0].shape == (2, 60)
    assert (source.layout, source.prepared) == ("NT", Preparation(of="recordings", sample_rate_hz=100, seconds=0.6))


def test_text_classes_of_a_table_of_numbers_get_names(tmp_path: Path) -> None:
    (tmp_path / "iris.csv").write_text("5.1,3.5,setosa\n6.2,3.4,virginica\n")
    source = open_source([tmp_path / "iris.csv"], Opening(columns=Columns(label="-1")))
    assert source.names == ("setosa", "virginica")
    assert source.layout == "ND"


def test_pictures_need_no_classes_where_labels_are_not_wanted(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.png"):
        image(tmp_path / name, 1)
    source = open_source([tmp_path], Opening(labelled=False))
    assert source.files is not None
    assert source.files.tolist() == [b"a.jpg", b"b.png", b"sub/c.png"]
    assert source.y.tolist() == [-1, -1, 0]
    with pytest.raises(DataError, match="outside every class folder"):
        open_source([tmp_path], Opening())


def test_class_folders_are_not_lost_to_an_array_beside_them(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        image(tmp_path / name, 1)
    np.save(tmp_path / "mean.npy", np.zeros((6, 4, 3), np.float32))
    source = open_source([tmp_path], Opening())
    assert source.names == ("a", "b")
    assert source.notes.lines() == ["left out 1 of another kind: mean.npy"]
    np.save(tmp_path / "std.npy", np.zeros((6, 4, 3), np.float32))
    (tmp_path / "b/1.png").rename(tmp_path / "a/2.png")
    (tmp_path / "b").rmdir()
    with pytest.raises(DataError, match=r"images and arrays, expected .*--format images` or `--format npy-folder"):
        open_source([tmp_path], Opening())


def test_names_that_are_numbers_are_their_labels_at_every_door(tmp_path: Path) -> None:
    for name in ("2", "10"):
        image(tmp_path / "d" / name / "1.png", 1)
    (tmp_path / "list.csv").write_text("file,label\nd/2/1.png,2\nd/10/1.png,10\n")
    (tmp_path / "rows.csv").write_text("a,label\n1,2\n2,10\n")
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 3), np.uint8), y=["2", "10"])
    for name in ("d", "list.csv", "rows.csv", "d.npz"):
        source = open_source([tmp_path / name], Opening())
        assert sorted(source.y.tolist()) == [2, 10]
        assert source.name_of in ({}, {2: "2", 10: "10"})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *((kind, b"a/0.png") for kind in ("images", "list", "coco")),
        ("sounds", b"a/0.wav"),
        ("npy-folder", b"a.npy"),
        ("cifar", b"data_batch_1.bin"),
        ("harbox", b"1/a_train.txt"),
    ],
)
def test_the_file_of_each_sample_is_kept(tmp_path: Path, kind: str, expected: bytes) -> None:
    source = open_source(make(kind, tmp_path), Opening())
    assert source.files is not None
    assert source.files[0] == expected


def test_sources_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="nowhere"):
        open_source([tmp_path / "nowhere"], Opening())
    with pytest.raises(DataError, match="a folder without images"):
        open_source([tmp_path], Opening())
    jpeg = image(tmp_path / "a" / "picture.jpg", 1)
    with pytest.raises(UsageError, match=r"suffix '\.jpg', expected .*\.h5.*\.npz"):
        open_source([jpeg], Opening())
    jpeg.rename(tmp_path / "photo.h5")
    with pytest.raises(DataError, match="a JPEG picture, expected HDF5"):
        open_source([tmp_path / "photo.h5"], Opening())
    image(tmp_path / "a" / "1.png", 1)
    sound(tmp_path / "b" / "1.wav", 10)
    with pytest.raises(DataError, match="--format images"):
        open_source([tmp_path], Opening())
    with pytest.raises(DataError, match=r"/a: no file of the kind in this folder"):
        open_source([tmp_path], Opening(format="sounds"))
    assert len(open_source([tmp_path], Opening(format="sounds", skip_empty=True))) == 1
    with pytest.raises(UsageError, match=r"x\.npy y\.npy"):
        open_source([make("npy", tmp_path)[0]], Opening())
    with pytest.raises(UsageError, match="3 sources"):
        open_source([tmp_path] * 3, Opening())


def test_sensor_values_become_windows(tmp_path: Path) -> None:
    """HARBOX lies time first, so its flat samples are windows of 100 x 9."""
    paths = make("harbox", tmp_path)
    flat, windows = open_source(paths, Opening()), open_source(paths, Opening(shape=(100, 9), layout="NTC"))
    rows = np.arange(len(flat))
    x = windows.reader.read(rows, stop)[0]
    assert (windows.layout, x.shape) == ("NTC", (len(flat), 100, 9))
    np.testing.assert_array_equal(x.reshape(len(flat), -1), flat.reader.read(rows, stop)[0])


@pytest.mark.parametrize(
    ("kind", "option", "opening"),
    [
        ("images", "--base", {"base": Path()}),
        ("csv", "--pattern", {"pattern": "x"}),
        ("csv", "--x-name", {"y_name": "y"}),
        ("images", "--layout", {"layout": "NHWC"}),
        ("harbox", "--layout", {"layout": "NTC"}),
        ("cifar", "--shape", {"shape": (32, 32, 3)}),
        ("images", "--box-scale", {"image": ImageForm(box_scale=1.2)}),
        ("harbox", "--raw", {"raw": True}),
        ("npz", "--boxes", {"image": ImageForm(boxes="stored")}),
        ("images", "--delimiter", {"writing": Writing(delimiter=";")}),
        ("npz", "--box", {"columns": Columns(box=("1", "2", "3", "4"))}),
        ("npz", "--column", {"columns": Columns(kept=("user",))}),
        ("npz", "--colour", {"image": ImageForm(colour="gray")}),
        ("images", "--seconds", {"sound": SoundForm(seconds=1.0)}),
        ("csv", "--size", {"image": ImageForm(size=(3, 3))}),
        ("sounds", "--size", {"image": ImageForm(size=(3, 3))}),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    tmp_path: Path, kind: str, option: str, opening: dict[str, object]
) -> None:
    with pytest.raises(UsageError, match=option):
        open_source(make(kind, tmp_path), Opening(**opening))


@pytest.mark.parametrize("wrong", [{"format": "zip"}, {"layout": "HWN"}, {"shape": (3,)}], ids=lambda w: next(iter(w)))
def test_openings_check_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Opening(**wrong)
