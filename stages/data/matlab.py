"""MATLAB's files (.mat): versions 4 to 7 by scipy, 7.3 as the HDF5 that it is; arrays are held in memory.

MATLAB writes the axis of samples where it likes, often last (`X` 32 x 32 x 3 x N): it is the one that is as long as the
labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts import hdf5
from stages.artifacts.records import Array
from stages.artifacts.stream import SharedFile
from stages.data.arrays import Found, flat_arrays, from_names
from stages.data.samples import Notes
from stages.errors import DataError, UsageError

_SEVEN_THREE = b"MATLAB 7.3"


def mat(path: Path, x_name: str | None, y_name: str | None, *, labelled: bool, notes: Notes) -> Found:
    """Samples, labels and columns of a .mat file.

    Raises:
        DataError: no such arrays, or a file that cannot be read.
        UsageError: more than one axis may be that of the samples.
    """
    with path.open("rb") as file:
        arrays = _version_7_3(path) if file.read(len(_SEVEN_THREE)) == _SEVEN_THREE else _earlier(path)
    vectors = {name: array.ravel() for name, array in arrays.items() if array.size == max(array.shape, default=0)}
    found = from_names({**arrays, **vectors}, str(path), x_name, y_name, labelled=labelled, notes=notes)
    if found.y is None:
        return found
    x = np.moveaxis(np.asarray(found.x), _sample_axis(np.asarray(found.x), len(found.y), path), 0)
    columns = {name: array for name, array in vectors.items() if len(array) == len(x) and array is not found.y}
    return Found(x, found.y, columns, found.names, found.pictures)


def _sample_axis(x: Array, count: int, path: Path) -> int:
    axes = [axis for axis, size in enumerate(x.shape) if size == count]
    if len(axes) != 1:
        found = f"samples {x.shape} and {count} labels"
        fix = "save them as .npz or HDF5 with samples first"
        raise UsageError(str(path), found, f"one axis of {count}", fix)
    return axes[0]


def _earlier(path: Path) -> dict[str, Array]:
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(path)
    except Exception as error:  # a damaged file raises almost anything
        reason = " ".join(str(error).split())[:120]
        raise DataError(str(path), f"cannot be read as MATLAB's ({reason})", "a .mat file") from error
    return {name: value for name, value in content.items() if isinstance(value, np.ndarray) and value.dtype.kind != "O"}


def _version_7_3(path: Path) -> dict[str, Array]:
    """Its arrays with MATLAB's order of axes, which HDF5 has the other way round."""
    with SharedFile(path) as file:
        tree = hdf5.read_tree(file, str(path), user_block=True)
        return {name: np.asarray(array).T for name, array in flat_arrays(tree).items()}
