"""Human activity data in its publishers' own layout: UCI HAR and HARBOX. Both are small and held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.artifacts.codec import text_array
from stages.artifacts.records import Array, Preparation
from stages.data.samples import ArrayReader, Source, class_numbers
from stages.errors import DataError

SIGNALS = tuple(f"{sensor}_{axis}" for sensor in ("total_acc", "body_acc", "body_gyro") for axis in "xyz")
"""UCI HAR's raw signals, in the order in which they are interleaved."""

HARBOX_RATE_HZ = 50
HARBOX_WINDOW = 100
"""Lines of one sample: 2 s at 50 Hz."""
HARBOX_AXES = 9
"""Accelerometer, gyroscope and magnetometer, 3 axes each; the column before them counts time."""


def is_uci_har(root: Path) -> bool:
    """Whether the folder is UCI HAR as it is unpacked."""
    return (root / "activity_labels.txt").is_file() and (root / "train" / "y_train.txt").is_file()


def uci_har(root: Path, *, raw: bool = False) -> Source:
    """UCI HAR (Anguita et al. 2013): 561 features a sample, or with `raw` its 128 x 9 sensor values, time first.

    Columns: `subject`, and `split` (0 train, 1 test).
    """
    table = _table(root / "activity_labels.txt", str)
    numbers, names = np.array([int(row[0]) for row in table]), tuple(str(row[1]) for row in table)
    parts = [_uci_part(root / split, split, raw) for split in ("train", "test")]
    labels = np.concatenate([part[1] for part in parts])
    unknown = set(labels.tolist()) - set(numbers.tolist())
    if unknown:
        raise DataError(str(root), f"activity {min(unknown)}", "one that activity_labels.txt names")
    columns = {
        "subject": np.concatenate([part[2] for part in parts]),
        "split": np.repeat([0, 1], [len(part[1]) for part in parts]),
    }
    order = np.argsort(numbers)
    return Source(
        str(root),
        np.searchsorted(numbers[order], labels),
        ArrayReader(np.concatenate([p[0] for p in parts])),
        "ND",
        tuple(names[i] for i in order),
        columns,
        prepared=Preparation(of="arrays", sample_rate_hz=50 if raw else 0),
    )


def _uci_part(folder: Path, split: str, raw: bool) -> tuple[Array, Array, Array]:
    """Features (N, D), activity numbers (N,) and subjects (N,) of one half."""
    if raw:
        signals = [_table(folder / "Inertial Signals" / f"{name}_{split}.txt", np.float32) for name in SIGNALS]
        _same_length(folder, *signals)
        x = np.stack(signals, axis=2).reshape(len(signals[0]), -1)
    else:
        x = _table(folder / f"X_{split}.txt", np.float32)
    y, subject = (_table(folder / f"{name}_{split}.txt", np.int64)[:, 0] for name in ("y", "subject"))
    _same_length(folder, x, y, subject)
    return x, y, subject


def _same_length(folder: Path, *arrays: Array) -> None:
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) != 1:
        raise DataError(str(folder), f"files of {lengths} lines", "one line per sample in each")


def is_harbox(root: Path) -> bool:
    """Whether the folder holds one folder per user of HARBOX."""
    return any(root.glob("*/*_train.txt"))


def harbox(root: Path) -> Source:
    """HARBOX (Ouyang et al., ClusterFL 2021): `<user>/<Activity>_train.txt`, 100 lines of a time and 9 values a sample.

    A sample is the 900 values of 2 s, time first. Column: `user`.
    """
    files = sorted(root.glob("*/*_train.txt"), key=lambda path: (path.parent.name.zfill(8), path.name))
    windows = [_windows(path) for path in files]
    counts = [len(part) for part in windows]
    y, labels, names = class_numbers([path.stem.removesuffix("_train") for path in files])
    users = [_user(path) for path in files]
    return Source(
        str(root),
        np.repeat(y, counts),
        ArrayReader(np.concatenate(windows)),
        "ND",
        names,
        {"user": np.repeat(users, counts)},
        labels=labels,
        prepared=Preparation(of="arrays", sample_rate_hz=HARBOX_RATE_HZ),
        files=text_array([path.relative_to(root).as_posix() for path in files]).repeat(counts),
    )


def _windows(path: Path) -> Array:
    values = _table(path, np.float32)
    if values.shape[1] != 1 + HARBOX_AXES or len(values) % HARBOX_WINDOW:
        raise DataError(
            str(path),
            f"{values.shape[0]} lines of {values.shape[1]} values",
            f"a multiple of {HARBOX_WINDOW} lines of a time and {HARBOX_AXES} values",
        )
    return values[:, 1:].reshape(-1, HARBOX_WINDOW * HARBOX_AXES)


def _user(path: Path) -> int:
    if not path.parent.name.isdigit():
        raise DataError(str(path.parent), "a folder that is no user's number", "1, 2, ...")
    return int(path.parent.name)


def _table(path: Path, dtype: type) -> Array:
    """A file of values between white space, (lines, values)."""
    try:
        if not path.stat().st_size:
            raise DataError(str(path), "an empty file", "lines of values")
        return np.loadtxt(path, dtype=dtype, ndmin=2)
    except FileNotFoundError as error:
        raise DataError(str(path), "there is no such file", "the layout in which the data set is published") from error
    except ValueError as error:
        raise DataError(str(path), str(error), "lines of as many numbers each") from error
