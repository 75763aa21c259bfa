"""Arrays that others saved: what is taken for samples, labels, columns, names; and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block
from stages.data import arrays
from stages.data.samples import Source
from stages.errors import DataError, InputMissing


def read_all(source: Source) -> np.ndarray:
    def stop(error: DataError) -> None:
        raise error

    return source.reader.read(np.arange(len(source)), stop)[0]


# ----------------------------------------------------------------------------------------------------------- .npz, .npy


def test_npz_by_usual_names_with_columns_and_class_names(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, images=np.zeros((3, 4, 4), np.uint8), labels=[0, 1, 1], user=["a", "b", "a"], classes=["cat", "dog"])
    x, y, columns, names = arrays.npz(path, None, None)
    assert x.shape == (3, 4, 4)
    assert y.tolist() == [0, 1, 1]
    assert names == ("cat", "dog")
    assert columns["user"].tolist() == [b"a", b"b", b"a"]


def test_npz_by_stated_names(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x_train=np.zeros((2, 3)), y_train=[0, 1], x_test=np.ones((1, 3)), y_test=[1])
    x, y, _, _ = arrays.npz(path, "x_test", "y_test")
    assert (x.shape, y.tolist()) == ((1, 3), [1])
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
    y, names = arrays.labels_of(np.array([b"dog", b"cat"]), None, "")
    assert (y.tolist(), names) == ([1, 0], ("cat", "dog"))
    for wrong in (np.array([0.5]), np.array([np.nan]), np.zeros((2, 2), int), np.array([None])):
        with pytest.raises(DataError, match="whole numbers or names"):
            arrays.labels_of(wrong, None, "here")


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="3 samples and 2 labels"):
        arrays.array_source(np.zeros((3, 2)), np.zeros(2, int), {}, None, "here", None)
    with pytest.raises(DataError, match="--layout"):
        arrays.array_source(np.zeros((3, 4, 4, 5)), np.zeros(3, int), {}, None, "here", None)
    with pytest.raises(DataError, match=r"numbers \(N"):
        arrays.array_source(np.zeros(3), np.zeros(3, int), {}, None, "here", None)
    stated = arrays.array_source(np.zeros((3, 4, 4, 5)), np.zeros(3, int), {}, None, "here", "NHWC")
    assert stated.layout == "NHWC"


# ----------------------------------------------------------------------------------------------------------------- HDF5


def test_a_users_own_hdf5_is_read_slice_by_slice(tmp_path: Path) -> None:
    path = tmp_path / "mine.h5"
    x = np.random.default_rng(0).random((40, 6))
    with h5py.File(path, "w") as file:
        file["x"], file["y"], file["user"] = x, np.arange(40) % 3, np.arange(40)
        file["classes"] = ["a", "b", "c"]
    source = arrays.hdf5_file(path, None, None, None)
    assert source.names == ("a", "b", "c")
    assert source.columns["user"].tolist() == list(range(40))
    rows = np.array([39, 0, 0, 17])
    got, _ = source.reader.read(rows, lambda error: None)
    assert np.array_equal(got, x[rows])


def test_a_stream_of_blocks_is_one_source(tmp_path: Path) -> None:
    def block(start: int, names: tuple[str, ...], labels: list[int]) -> Block:
        x = np.arange(start, start + 2, dtype=np.float32)[:, None]
        return Block(x, np.array(labels), "ND", {"user": np.array([start, start])}, np.unique(labels), names)

    path = tmp_path / "stream.h5"
    path.write_bytes(encode(block(0, ("a", "c"), [0, 2])) + encode(block(2, ("b", "c"), [1, 2])))
    source = arrays.hdf5_file(path, None, None, None)
    assert source.names == ("a", "b", "c")
    assert source.y.tolist() == [0, 2, 1, 2]
    assert source.columns["user"].tolist() == [0, 0, 2, 2]
    assert read_all(source)[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff\xe0" + bytes(80), b"\x89HDF\r\n\x1a\n" + bytes(80)], ids=["empty", "jpeg", "zeros"]
)
def test_what_is_no_hdf5(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "no.h5"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no\.h5"):
        arrays.hdf5_file(path, None, None, None)


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
    source = arrays.npy_folder(tmp_path, None)
    assert source.names == ("ant", "cat")
    assert source.y.tolist() == [0, 0, 0, 1, 1]
    assert read_all(source)[:, 0].tolist() == [2, 2, 2, 1, 1]
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
    source = arrays.cifar(tmp_path)
    assert source.names == ("airplane", "bird")
    assert source.y.tolist() == [0, 1, 1]
    assert source.columns["split"].tolist() == [0, 0, 1]
    assert np.array_equal(read_all(source), images)
    (tmp_path / "test_batch.bin").write_bytes(records[2:].tobytes()[:-1])
    with pytest.raises(DataError, match=r"test_batch\.bin"):
        arrays.cifar(tmp_path)
