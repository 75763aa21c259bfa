"""A file that keeps the frozen layers' outputs of a support set and its views from one command to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from stages.artifacts.files import atomic_write
from stages.artifacts.hdf5 import decode_tree, encode_tree
from stages.artifacts.records import Group, LayerUpdate
from stages.engines.parameter import Floats
from stages.errors import DataError
from stages.models.deploy import Backbone
from stages.training.updates import PrefixCache

KIND = "prefix-cache"


@dataclass(frozen=True)
class PrefixFile:
    """One cached support set; what is in the file is used if it was made from the same inputs, else replaced."""

    path: Path

    def through(self, key: str, compute: Callable[[], Sequence[PrefixCache]]) -> Sequence[PrefixCache]:
        """What is stored under this key; where there is nothing, what `compute` gives, which is then stored.

        Raises:
            DataError: the file is something else, or corrupt.
        """
        caches = self.load(key)
        if caches is None:
            caches = compute()
            self.save(key, caches)
        return caches

    def load(self, key: str) -> Sequence[PrefixCache] | None:
        """The caches stored under this key, in order; None where there are none.

        Raises:
            DataError: the file is something else, or corrupt.
        """
        if not self.path.exists():
            return None
        where = str(self.path)
        tree = decode_tree(self.path.read_bytes(), where)
        if tree.attrs.get("edgetrain") != KIND:
            raise DataError(where, "not a prefix cache", "a file of `train-sparse --cache-file`, or a new name")
        if tree.attrs.get("key") != key:
            return None
        return [PrefixCache.from_arrays(tree.groups[name].arrays) for name in sorted(tree.groups)]

    def save(self, key: str, caches: Sequence[PrefixCache]) -> None:
        """Replace the file's content, in one step."""
        groups = {f"lot{number:06d}": Group(arrays=cache.arrays()) for number, cache in enumerate(caches)}
        attrs = {"edgetrain": KIND, "schema": 1, "key": key}
        atomic_write(self.path, encode_tree(Group(attrs, groups=groups)))


def prefix_key(backbone: Backbone, updates: Sequence[LayerUpdate], lots: Sequence[Floats], layout: str = "") -> str:
    """SHA-256 over all that the frozen layers' outputs depend on: weights, what trains, the engine, and the inputs.

    An engine's layout may depend on the live channels, so all of a plan counts; `layout` says more of it.
    """
    engine = backbone.engine.name, backbone.engine.device, backbone.engine.same_bits, layout
    digest = sha256(repr((backbone.graph.ops, tuple(updates), engine)).encode())
    for name in sorted(backbone.tensors):
        digest.update(name.encode())
        digest.update(backbone.tensors[name].tobytes())
    for lot in lots:
        digest.update(str(lot.shape).encode())
        digest.update(lot.tobytes())
    return digest.hexdigest()
