"""Which engine runs a model: one protocol (`training.updates.Net`), several engines by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from stages.artifacts.records import Array, LayerUpdate
from stages.engines.parameter import Boundary, Floats, Parameter, Place
from stages.engines.timing import LayerTimes
from stages.errors import PartMissing, require
from stages.graphs.graph import Graph

if TYPE_CHECKING:
    from stages.models.deploy import Backbone

ENGINES = ("auto", "native", "torch")
"""`auto`: the native engine wherever its kernels cover the graph, else torch's."""
DEVICES = ("cpu", "cuda")
REMEDY = "pip install 'edgetrain[torch]'"


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs a model."""

    name: str
    """`native` or `torch`."""
    device: str = "cpu"
    """Of torch: `cpu`, `cuda` or `cuda:1`."""
    note: str = ""
    """Why it is not the one that a user would expect."""
    same_bits: bool = False
    """Of native: products and sums are rounded one by one, so that every machine gives the same bits; slower."""
    keep_bits: int = 32
    """In which inputs of live layers are kept for their weight gradients: 32, 16 or 8."""
    keep_rounding: str = "stochastic"
    """To these bits: `stochastic` leaves gradients unbiased, `nearest` draws nothing."""
    how: tuple[tuple[str, str], ...] = ()
    """What becomes of what the backward pass needs: (value, or `slice <operator>`; `keep`, `page` or `recompute`)."""
    page_dir: str = ""
    """Where what is paged lies; empty for the system's folder of temporary files."""


class TrainedNet(Protocol):
    """A backbone of which only a plan trains. Arrays in, arrays out; `training.updates.Net` is the part that trains."""

    @property
    def boundary(self) -> tuple[str, ...]:
        """The operators whose outputs `prefix` gives, in its order."""

    @property
    def layout(self) -> str:
        """How these outputs lie in memory, in words: another net can take them only if it says the same."""

    def prefix(self, x: Floats) -> Boundary: ...
    def suffix(self, boundary: Boundary) -> Floats: ...
    def forward(self, boundary: Boundary) -> tuple[Floats, Any]: ...
    def backward(self, kept: Any, gradient: Floats) -> None: ...
    def features(self, x: Floats) -> Floats:
        """Model input (N, *input) -> features (N, D)."""

    def parameters(self) -> list[Parameter]: ...
    def draw(self, seed: int) -> None:
        """What the following forward passes round by, where they round stochastically."""

    def turn(self, number: int) -> list[Parameter]:
        """Train what of the plan has this turn, from 0 on, and nothing else: the parameters that get gradients then."""

    def places(self) -> list[Place]:
        """Where every live tensor's values lie in the parameters."""

    def live_tensors(self) -> dict[str, Floats]:
        """Copies of the live slices by name: `<layer>.weight` (live, ...), `<layer>.bias` (live,)."""

    def load_live(self, tensors: Mapping[str, Array]) -> None:
        """Set the live slices to what `live_tensors` of a net with the same plan gave. Raises `DataError` otherwise."""

    def load_whole(self, tensors: Mapping[str, Array]) -> None:
        """Set the live slices to those of whole tensors by name, as `changed_tensors` gives them."""

    def changed_tensors(self) -> dict[str, Floats]:
        """The whole tensors that hold live values, by name; frozen values bit-equal to the backbone's.

        They may be the engine's own, which goes on to change them.
        """

    def tensors(self) -> dict[str, Floats]:
        """The whole backbone's tensors with the live values merged in, copied where they may still change."""


class Inspector(Protocol):
    """Sees what every channel of some layers does to a loss (`importance.fisher`)."""

    graph: Graph
    window: frozenset[str]
    """The layers to inspect, and with them every layer computed from their output."""

    def features(self, x: Floats) -> Floats:
        """Model input (n, *input) -> features (n, D); keeps what `sums` needs."""

    def sums(self, gradient: Floats) -> dict[str, tuple[Array, Array]]:
        """The loss gradient at the features (n, D) of the last call -> per layer the sums over positions of value times
        gradient, per sample and channel: at its output (n, C_out), and at its input through it alone (n, C_in)."""


def choose(wanted: str, graph: Graph, device: str = "cpu", *, same_bits: bool = False) -> Engine:
    """The engine that runs this graph; `same_bits` only the native one gives.

    Raises:
        UsageError: no such engine or device, or `native` with an operator that it has no kernel for (`NotCovered`).
        PartMissing: the engine is not installed; for `auto`, none is that could run the graph.
    """
    require(wanted in ENGINES, "--engine", repr(wanted), "one of " + ", ".join(ENGINES))
    kind = device.partition(":")[0]
    require(kind in DEVICES, "--device", repr(device), "one of " + ", ".join(DEVICES))
    require(wanted != "native" or kind == "cpu", "--device", f"{device} with --engine native", "--engine torch")
    if same_bits:
        require(wanted != "torch", "--same-bits", "with --engine torch", "--engine native")
        require(kind == "cpu", "--same-bits", f"with --device {device}", "--device cpu")
        wanted = "native"
    if wanted == "torch" or kind != "cpu":
        return _torch(device)
    from stages.engines.native.library import library
    from stages.engines.native.lowering import check_covered, uncovered

    if wanted == "native":
        check_covered(graph)
        library(same_bits)
        return Engine("native", same_bits=same_bits)
    reason = uncovered(graph)
    if not reason:
        try:
            library()
            return Engine("native")
        except PartMissing as missing:
            reason = f"{missing.where} {missing.found}"
    if not has_torch():
        fix = f"install a C compiler and EdgeTrain again, or {REMEDY}"
        raise PartMissing("--engine auto", f"{reason}, and torch is not installed", "an engine for the model", fix)
    return Engine("torch", device, f"torch computes, not the native engine: {reason}")


def _torch(device: str) -> Engine:
    need_torch("--engine torch")
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise PartMissing(f"--device {device}", "no CUDA device", "one that torch can use", "leave --device out")
    return Engine("torch", device)


def has_torch() -> bool:
    """Whether torch is installed; it is not imported for that."""
    return find_spec("torch") is not None


def need_torch(what: str) -> None:
    """Raise `PartMissing` where torch, which `what` cannot do without, is not installed."""
    if not has_torch():
        raise PartMissing(what, "torch is not installed", "torch", REMEDY)


def make_net(
    backbone: Backbone, updates: Sequence[LayerUpdate] = (), turns: Sequence[Sequence[LayerUpdate]] = ()
) -> TrainedNet:
    """A backbone of which only what `updates` name trains, run by the backbone's engine.

    `turns` are plans that share no channel and make up `updates` together: they train one at a time, the first of them
    first (`TrainedNet.turn`).

    Raises:
        DataError: the updates do not fit the backbone.
    """
    if backbone.engine.name == "torch":
        from stages.engines.torch.face import TorchNet
        from stages.engines.torch.net import SparseNet

        return TorchNet(SparseNet(backbone, updates, turns))
    from stages.engines.native.net import NativeNet

    engine = backbone.engine
    return NativeNet(
        backbone.graph, backbone.tensors, updates, turns=turns, same_bits=engine.same_bits, keep_bits=engine.keep_bits,
        nearest=engine.keep_rounding == "nearest", how=dict(engine.how), page_dir=engine.page_dir,
    )  # fmt: skip


def make_inspector(backbone: Backbone, window: Collection[str]) -> Inspector:
    """What sees the channels of the layers `window` and of all that is computed from them, by the backbone's engine."""
    if backbone.engine.name == "torch":
        from stages.engines.torch.inspector import Inspector as ByTorch

        return ByTorch(backbone.graph, backbone.tensors, window, device=backbone.engine.device)
    from stages.engines.native.inspector import Inspector as Native

    return Native(backbone.graph, backbone.tensors, window, same_bits=backbone.engine.same_bits)


def fisher_bytes(engine: Engine, graph: Graph, window: Collection[str], batch: int) -> int:
    """Bytes that an inspector of that engine holds for so many samples at once, beside weights and samples."""
    if engine.name == "torch":
        from stages.engines.torch import inspector as by_torch

        return by_torch.fisher_bytes(graph, window, batch)
    from stages.engines.native import inspector as native

    return native.fisher_bytes(graph, window, batch, workers=threads_of(engine))


def layer_times(
    backbone: Backbone, x: Floats, repeats: int, *, on_step: Callable[[int], None] = lambda done: None
) -> dict[str, LayerTimes]:
    """Seconds of every layer for the input x (N, *input), `repeats` runs each, by the backbone's engine.

    `on_step` gets the number of operators done.
    """
    if backbone.engine.name == "torch":
        from stages.engines.torch.timing import time_layers as by_torch

        return by_torch(backbone.graph, backbone.tensors, x, repeats, on_step=on_step)
    from stages.engines.native.timing import time_layers

    return time_layers(backbone.graph, backbone.tensors, x, repeats, on_step=on_step)


def threads_of(engine: Engine) -> int:
    """How many threads an engine computes with."""
    if engine.name == "native":
        from stages.engines.native.net import available_processors

        return available_processors()
    import torch

    return int(torch.get_num_threads())
