"""MATLAB's files: whichever axis it put the samples on, whichever version wrote them."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from stages.data.sources import Opening, open_source
from stages.errors import DataError, UsageError

X = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), np.uint8)
Y = np.array([1, 2, 10, 1, 2, 10, 1])


def read(path: Path) -> tuple[np.ndarray, list[int], str]:
    source = open_source([path], Opening())

    def stop(error: DataError) -> None:
        raise error

    return source.reader.read(np.arange(len(source)), stop)[0], source.y.tolist(), source.layout


def version_7_3(path: Path, **arrays: np.ndarray) -> Path:
    """As MATLAB writes it: 512 bytes of its own before the HDF5, axes the other way round."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file[name] = array.T
    content = bytearray(path.read_bytes())
    content[:20] = b"MATLAB 7.3 MAT-file,"
    path.write_bytes(content)
    return path


def test_samples_on_the_last_axis_as_in_svhn(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "old.mat", {"X": np.moveaxis(X, 0, 3), "y": Y[:, None]})
    new = version_7_3(tmp_path / "new.mat", X=np.moveaxis(X, 0, 3), y=Y[:, None].astype(float))
    for path in (tmp_path / "old.mat", new):
        x, y, layout = read(path)
        assert (y, layout) == (Y.tolist(), "NHWC")
        np.testing.assert_array_equal(x, X)


def test_samples_on_the_first_axis_and_columns(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"X": X, "y": Y, "user": np.arange(7)[None], "mean": np.zeros((5, 6))})
    source = open_source([tmp_path / "a.mat"], Opening())
    assert source.columns["user"].tolist() == list(range(7))
    assert source.notes.lines() == ["left out 1 arrays that are not one value per sample: mean"]
    np.testing.assert_array_equal(read(tmp_path / "a.mat")[0], X)


def test_axes_that_may_each_be_that_of_samples_are_asked(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"X": np.zeros((7, 7, 3), np.uint8), "y": Y})
    with pytest.raises(UsageError, match=r"samples \(7, 7, 3\) and 7 labels, expected one axis of 7"):
        read(tmp_path / "a.mat")


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file" + bytes(200), b"MATLAB 7.3 MAT-file" + bytes(600)])
def test_what_is_no_file_of_matlabs(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mat"):
        open_source([tmp_path / "a.mat"], Opening())
