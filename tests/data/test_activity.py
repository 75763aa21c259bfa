"""UCI HAR and HARBOX in their publishers' layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.data.activity import SIGNALS, harbox, is_harbox, is_uci_har, uci_har
from stages.data.samples import Source
from stages.errors import DataError


def read_all(source: Source) -> np.ndarray:
    return source.reader.read(np.arange(len(source)), lambda error: None)[0]


def lines(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, values, fmt="%.7e" if values.dtype.kind == "f" else "%d")


@pytest.fixture
def uci(tmp_path: Path) -> Path:
    """Two subjects for training, one for testing; 561 features and nine signals of 128 values."""
    root = tmp_path / "UCI HAR Dataset"
    root.mkdir()
    (root / "activity_labels.txt").write_text("1 WALKING\n2 SITTING\n3 LAYING\n")
    rng = np.random.default_rng(0)
    for split, y, subject in (("train", [3, 1, 2], [1, 1, 4]), ("test", [2, 2], [9, 9])):
        lines(root / split / f"X_{split}.txt", rng.normal(size=(len(y), 561)))
        lines(root / split / f"y_{split}.txt", np.array(y))
        lines(root / split / f"subject_{split}.txt", np.array(subject))
        for k, signal in enumerate(SIGNALS):
            values = 1000.0 * k + np.arange(128) + np.arange(len(y))[:, None] * 1e5
            lines(root / split / "Inertial Signals" / f"{signal}_{split}.txt", values)
    return root


def test_uci_har_features(uci: Path) -> None:
    assert is_uci_har(uci)
    source = uci_har(uci)
    assert source.names == ("WALKING", "SITTING", "LAYING")
    assert source.y.tolist() == [2, 0, 1, 1, 1]
    assert source.columns["subject"].tolist() == [1, 1, 4, 9, 9]
    assert source.columns["split"].tolist() == [0, 0, 0, 1, 1]
    expected = np.random.default_rng(0).normal(size=(3, 561))
    assert np.allclose(read_all(source)[:3], expected, atol=1e-6)


def test_uci_har_signals_are_interleaved_time_first(uci: Path) -> None:
    assert len(SIGNALS) == 9
    x = read_all(uci_har(uci, raw=True)).reshape(5, 128, 9)
    assert x[0, 5, 0] == 5
    assert x[1, 127, 8] == 8000 + 127 + 1e5
    assert x[4, 0, 3] == 3000 + 1e5


def test_uci_har_that_is_incomplete(uci: Path) -> None:
    lines(uci / "test" / "y_test.txt", np.array([2]))
    with pytest.raises(DataError, match="one line per sample"):
        uci_har(uci)
    lines(uci / "test" / "y_test.txt", np.array([2, 8]))
    with pytest.raises(DataError, match="activity 8"):
        uci_har(uci)
    (uci / "train" / "X_train.txt").write_text("")
    with pytest.raises(DataError, match=r"X_train\.txt: an empty file"):
        uci_har(uci)
    (uci / "train" / "X_train.txt").unlink()
    with pytest.raises(DataError, match=r"X_train\.txt: there is no such file"):
        uci_har(uci)


def harbox_file(path: Path, windows: int, start: float = 0.0) -> np.ndarray:
    """`windows` samples of 100 lines: a time, then 9 values."""
    values = start + np.arange(windows * 900, dtype=np.float32).reshape(-1, 9)
    lines(path, np.concatenate([np.arange(len(values))[:, None] * 20.0, values], axis=1))
    return values.reshape(windows, 900)


def test_harbox(tmp_path: Path) -> None:
    assert not is_harbox(tmp_path)
    ten = harbox_file(tmp_path / "10" / "Walk_train.txt", 1, 5e4)
    two = harbox_file(tmp_path / "2" / "typing_train.txt", 2)
    call = harbox_file(tmp_path / "2" / "Call_train.txt", 1, 1e4)
    assert is_harbox(tmp_path)
    source = harbox(tmp_path)
    assert source.names == ("Call", "Walk", "typing")
    assert source.columns["user"].tolist() == [2, 2, 2, 10]
    assert source.y.tolist() == [0, 2, 2, 1]
    assert np.array_equal(read_all(source), np.concatenate([call, two, ten]))


def test_harbox_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "1" / "Walk_train.txt"
    harbox_file(path, 1)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"Walk_train\.txt: 99 lines of 10 values"):
        harbox(tmp_path)
    path.write_text("1 2 x\n")
    with pytest.raises(DataError, match=r"Walk_train\.txt"):
        harbox(tmp_path)
    harbox_file(path, 1)
    (tmp_path / "1").rename(tmp_path / "anna")
    with pytest.raises(DataError, match="anna: a folder that is no user's number"):
        harbox(tmp_path)
