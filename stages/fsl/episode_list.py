"""A list of tasks as a tree of columns, to be written to and read from an artifact.

Every column holds all tasks one after another; `ways`, `support_count` and `query_count` (one entry per task) say how
many entries of the others belong to each. `data_sha256` names the samples that the positions count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np

from stages.artifacts.records import Array, Block, Group
from stages.errors import SchemaError
from stages.fsl.episodes import Episode

KIND = "episodes"
VERSION = 1
_COUNTS = ("ways", "support_count", "query_count")
_PARTS = {
    "classes": "ways",
    "support": "support_count",
    "support_labels": "support_count",
    "query": "query_count",
    "query_labels": "query_count",
}
"""Column -> the column that counts its entries per task."""


def to_tree(episodes: Sequence[Episode], data_sha256: str) -> Group:
    """Tasks -> columns."""
    counts = {
        "ways": [episode.ways for episode in episodes],
        "support_count": [len(episode.support) for episode in episodes],
        "query_count": [len(episode.query) for episode in episodes],
    }
    arrays: dict[str, Array] = {name: np.array(values, np.int64) for name, values in counts.items()}
    for name in _PARTS:
        pieces = [getattr(episode, name) for episode in episodes]
        arrays[name] = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
    return Group({"edgetrain": KIND, "schema": VERSION, "data_sha256": data_sha256}, arrays)


def from_tree(tree: Group, data_sha256: str, samples: int, where: str) -> list[Episode]:
    """Columns -> tasks over data with that hash and that many samples.

    Raises `SchemaError` for a tree that is no list of tasks, does not fit together, or speaks of other data.
    """
    _check_kind(tree, data_sha256, where)
    columns = {name: _column(tree, name, where) for name in (*_COUNTS, *_PARTS)}
    pieces = {name: _split(columns, name, counts, where) for name, counts in _PARTS.items()}
    episodes = [Episode(**{name: parts[i] for name, parts in pieces.items()}) for i in range(len(columns["ways"]))]
    for number, episode in enumerate(episodes):
        _check_episode(episode, samples, f"{where}, task {number}")
    return episodes


def data_hash(block: Block) -> str:
    """SHA-256 over labels, shape and type of a block's samples: what the positions of a task refer to."""
    text = f"{tuple(block.x.shape)} {block.x.dtype}"
    return sha256(text.encode() + np.ascontiguousarray(block.y, np.int64).tobytes()).hexdigest()


def _check_kind(tree: Group, data_sha256: str, where: str) -> None:
    if tree.attrs.get("edgetrain") != KIND:
        raise SchemaError(where, "no list of tasks", "a file that `evaluate --write-tasks` wrote")
    if tree.attrs.get("schema") != VERSION:
        raise SchemaError(f"{where}@schema", repr(tree.attrs.get("schema")), str(VERSION), "update edgetrain")
    if tree.attrs.get("data_sha256") != data_sha256:
        raise SchemaError(where, "tasks over other samples", "the samples they were drawn from", "name the same file")


def _column(tree: Group, name: str, where: str) -> Array:
    array = np.asarray(tree.arrays.get(name))
    if array.dtype.kind != "i" or array.ndim != 1 or array.min(initial=0) < 0:
        raise SchemaError(f"{where}:/{name}", "missing or malformed", "int64 (N,), none negative")
    return array


def _split(columns: Mapping[str, Array], name: str, counts: str, where: str) -> list[Array]:
    column, lengths = columns[name], columns[counts]
    if len(lengths) != len(columns["ways"]) or int(lengths.sum()) != len(column):
        raise SchemaError(f"{where}:/{name}", f"{len(column)} entries", f"{int(lengths.sum())}, the sum of /{counts}")
    return np.split(column, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _check_episode(episode: Episode, samples: int, where: str) -> None:
    for name in ("support", "query"):
        positions, labels = getattr(episode, name), getattr(episode, f"{name}_labels")
        if not len(positions) or int(positions.max()) >= samples:
            raise SchemaError(f"{where}: {name}", "empty, or beyond the samples", f"positions below {samples}")
        if int(labels.max()) >= episode.ways:
            raise SchemaError(f"{where}: {name}_labels", f"class {int(labels.max())}", f"below {episode.ways}")
    if len(np.intersect1d(episode.support, episode.query)):
        raise SchemaError(where, "samples both in support and in query", "disjoint sets")
