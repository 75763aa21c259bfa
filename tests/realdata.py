"""Real data for tests and examples, where there is any: the folder that `EDGETRAIN_DATA` names, or `shared` beside the
repository. A machine without it skips what needs it, with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Where real data would lie."""
    return Path(os.environ.get("EDGETRAIN_DATA") or ROOT.parent / "shared")


def real(name: str) -> Path:
    """The path of one file of real data, such as `data/omniglot.h5`; skips the calling test where it is missing."""
    path = folder() / name
    if not path.is_file():
        pytest.skip(f"no real data: {name} is not in {folder()} (set EDGETRAIN_DATA to the folder that holds it)")
    return path
