"""Which engine trains: one protocol (`training.updates.Net`), several engines by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from stages.artifacts.records import LayerUpdate
from stages.engines.torch.net import SparseNet
from stages.errors import require
from stages.models.deploy import Backbone

if TYPE_CHECKING:
    from stages.engines.torch.native_net import NativeBehindTorch

ENGINES = ("torch", "native")

TrainedNet: TypeAlias = "SparseNet | NativeBehindTorch"
"""What every engine offers (`SparseNet` describes it)."""


def make_net(backbone: Backbone, updates: Sequence[LayerUpdate], engine: str = "torch") -> TrainedNet:
    """A backbone of which only what `updates` name trains, run by the named engine.

    Raises:
        UsageError: no such engine, or an operator that it has no kernel for.
        PartMissing: the native library was not built on this machine.
        DataError: the updates do not fit the backbone.
    """
    require(engine in ENGINES, "--engine", repr(engine), "one of " + ", ".join(ENGINES))
    if engine == "torch":
        return SparseNet(backbone, updates)
    from stages.engines.torch.native_net import NativeBehindTorch

    return NativeBehindTorch(backbone, updates)
