"""The way back: versions of the weights that `train-sparse` publishes and `select` picks up.

A live directory holds `<version>.h5`, version v being the weights after v updates. Each file has the changed tensors,
the head and the hash of the model the run started from. Files appear by rename: a reader sees a whole version or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts import hdf5
from stages.artifacts.codec import head_from_tree, head_tree
from stages.artifacts.files import atomic_write
from stages.artifacts.records import Array, Group, Head, LayerUpdate
from stages.artifacts.updates import read_updates, updates_text
from stages.errors import DataError, OutputError, UsageError

POLL_S, MAX_POLL_S = 0.0005, 0.02
"""Shortest and longest time between two looks for a version."""
LATE = 1 / 16
"""Between them, as a share of the time waited so far: what looking too late may add to a round."""


@dataclass(frozen=True)
class Version:
    """Weights after `number` updates: the tensors that differ from the start, and the head."""

    number: int
    tensors: Mapping[str, Array]
    head: Head | None
    update_times: Sequence[tuple[int, float]] = ()
    """(samples, seconds) of the latest updates before this one, where the trainer measured them."""
    updates: tuple[LayerUpdate, ...] | None = None
    """What trains from here on, where a policy revises the plan."""


def version_for(round_number: int, lag: int) -> int:
    """Which version chooses a round's batch: max(0, round - lag).

    >>> [version_for(r, 1) for r in range(4)]
    [0, 0, 1, 2]
    """
    return max(0, round_number - lag)


class LiveDirectory:
    """One run's versions in a directory. `run` is `history.model_hash` of the record that the run started from."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run

    def prepare(self, *, keep_up_to: int | None = None) -> None:
        """Make the directory ready for a trainer: empty, or on resuming without versions beyond `keep_up_to`.

        Raises:
            UsageError: it holds versions of an earlier run.
            OutputError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(str(self.path), f"cannot be made ({error.strerror})", "a writable place") from error
        for half in self.path.glob(".*.h5.*.tmp"):  # left by a trainer that was killed while publishing
            half.unlink(missing_ok=True)
        numbers = self.numbers()
        if keep_up_to is None and numbers:
            raise UsageError(
                str(self.path),
                f"{len(numbers)} versions of an earlier run",
                "an empty live directory",
                "remove them, or continue that run with --resume",
            )
        if keep_up_to is not None:
            self.forget(keep_up_to)

    def forget(self, newest: int) -> None:
        """Drop versions beyond `newest`: a trainer that goes on from there publishes them anew."""
        for number in self.numbers():
            if number > newest:
                self._file(number).unlink(missing_ok=True)

    def publish(
        self,
        number: int,
        tensors: Mapping[str, Array],
        head: Head | None,
        *,
        keep: int,
        update_times: Sequence[tuple[int, float]] = (),
        updates: Sequence[LayerUpdate] | None = None,
    ) -> None:
        """Write version `number`, then drop all but the newest `keep` versions."""
        groups = {"tensors": _packed(tensors)}
        if head is not None:
            groups["head"] = head_tree(head)
        arrays = {"update_times": np.array(update_times, np.float64)} if update_times else {}
        attrs: dict[str, Any] = {"edgetrain": "live", "schema": 1, "version": number, "run": self.run}
        if updates is not None:
            attrs["updates"] = updates_text(updates)
        tree = Group(attrs, arrays, groups)
        atomic_write(self._file(number), hdf5.encode_tree(tree), durable=False)
        for old in self.numbers():
            if old <= number - keep:
                self._file(old).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all versions: the run is complete and its result is in the run record."""
        for number in self.numbers():
            self._file(number).unlink(missing_ok=True)

    def numbers(self) -> list[int]:
        """The versions that are there, ascending."""
        return sorted(int(file.stem) for file in self.path.glob("*.h5") if file.stem.isdecimal())

    def read(self, number: int) -> Version | None:
        """Version `number`, or None if it is not there.

        Raises:
            DataError: the file is corrupt or belongs to another run.
        """
        file = self._file(number)
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
        tree = hdf5.decode_tree(data, str(file))
        if tree.attrs.get("edgetrain") != "live" or "tensors" not in tree.groups:
            raise DataError(str(file), "not a version of a live directory", "a file of `train-sparse --live`")
        if tree.attrs.get("run") != self.run:
            raise DataError(
                str(file),
                "a version of another run",
                f"one that started from model {self.run[:12]}",
                "give each run its own live directory",
            )
        head = tree.groups.get("head")
        times = np.asarray(tree.arrays.get("update_times", np.zeros((0, 2))))
        return Version(
            number,
            _unpacked(tree.groups["tensors"], str(file)),
            None if head is None else head_from_tree(head, str(file)),
            tuple((int(samples), float(seconds)) for samples, seconds in times),
            read_updates(str(tree.attrs["updates"]), str(file)) if "updates" in tree.attrs else None,
        )

    def newest(self) -> Version | None:
        """The newest version that is there."""
        for number in reversed(self.numbers()):
            version = self.read(number)
            if version is not None:
                return version
        return None

    def published_s(self, number: int) -> float | None:
        """When version `number` was published, in seconds since the epoch; None if it is not there."""
        try:
            return self._file(number).stat().st_mtime
        except FileNotFoundError:
            return None

    def wait(self, number: int, alive: Callable[[], None], *, first: int = 0) -> Version:
        """Version `number` as soon as it is there; `alive` raises when waiting has become pointless.

        `first` is where a trainer that goes on from a checkpoint begins to publish: it stands in for earlier versions
        that are no longer there.

        Raises:
            DataError: the version has been dropped already.
        """
        began_s = time.monotonic()
        while (version := self.read(number)) is None:
            if any(later > number for later in self.numbers()) and self.published_s(number) is None:
                if number < first:
                    return self.wait(first, alive)
                raise DataError(
                    str(self._file(number)),
                    "gone: later versions are there",
                    "as many versions as `select --lag` needs",
                    "give `train-sparse` a higher --live-keep",
                )
            alive()
            time.sleep(min(max(LATE * (time.monotonic() - began_s), POLL_S), MAX_POLL_S))
        return version

    def _file(self, number: int) -> Path:
        return self.path / f"{number}.h5"


def _packed(tensors: Mapping[str, Array]) -> Group:
    """Tensors as three datasets: HDF5 takes a tenth of a millisecond per dataset, and a network has a hundred."""
    axes = max((tensor.ndim for tensor in tensors.values()), default=0)
    shapes = [(*tensor.shape, *(-1,) * (axes - tensor.ndim)) for tensor in tensors.values()]
    values = [np.asarray(tensor, np.float32).ravel() for tensor in tensors.values()]
    arrays = {
        "names": np.array([name.encode() for name in tensors], "S"),
        "shapes": np.array(shapes, np.int64).reshape(len(tensors), axes),
        "values": np.concatenate([np.zeros(0, np.float32), *values]),
    }
    return Group(arrays=arrays if tensors else {})


def _unpacked(group: Group, where: str) -> dict[str, Array]:
    """The tensors, as views of one array."""
    if not group.arrays:
        return {}
    try:
        names, shapes, values = (group.arrays[name] for name in ("names", "shapes", "values"))
        sizes = [tuple(int(size) for size in row if size >= 0) for row in shapes]
        ends = np.cumsum([prod(size) for size in sizes])
        pieces = np.split(values, ends[:-1])
        return {name.decode(): piece.reshape(size) for name, piece, size in zip(names, pieces, sizes, strict=True)}
    except (KeyError, ValueError, AttributeError) as error:
        raise DataError(
            where, f"tensors that do not fit each other ({error})", "a file of `train-sparse --live`"
        ) from error
