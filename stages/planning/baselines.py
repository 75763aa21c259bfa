"""Plans with a name: whole-model and last-layer training, biases, and the published SparseUpdate schemes.

SparseUpdate (Lin et al. 2022, arXiv:2206.15472) trains the biases of the last k layers and the weights of a few named
ones, of which it takes a share of the INPUT channels (a depthwise layer's own channels), those of largest L2 norm.
Layers are counted from the stem = 0 in the nets without a final mix layer. The schemes are tiny-training's
`compilation/mcu_ir_gen.py`; the figure in a name is the extra memory in its own int8 accounting, in KB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stages.artifacts.records import Array, LayerUpdate
from stages.errors import DataError, UsageError, require
from stages.graphs.blocks import inside
from stages.graphs.graph import Graph
from stages.graphs.updates import whole_update
from stages.operators import Op
from stages.planning.channels import ChannelEvidence, axis_of, l2, make_update


@dataclass(frozen=True)
class Scheme:
    """A published SparseUpdate scheme."""

    layers: int
    """Layers of the net it was made for, a final mix layer not counted."""
    biases: int
    """The last so many layers train their biases."""
    ratios: Mapping[int, float]
    """Layer number -> share of the input channels; layers published with ratio 0 train no weights and are left out."""


def _family(layers: int, *rows: tuple[str, int, dict[int, float]]) -> dict[str, Scheme]:
    return {name: Scheme(layers, biases, ratios) for name, biases, ratios in rows}


SCHEMES: Mapping[str, Scheme] = {
    **_family(
        42,
        ("mcunet-49kb", 20, {24: 0.25, 27: 0.5, 30: 0.5}),
        ("mcunet-74kb", 21, {21: 1, 24: 1, 27: 0.5, 30: 1}),
        ("mcunet-99kb", 22, {21: 1, 24: 1, 27: 1, 30: 1, 36: 0.125, 39: 0.25}),
        ("mcunet-124kb", 24, {21: 0.25, 24: 1, 27: 1, 30: 1, 33: 0.5, 39: 0.5}),
        ("mcunet-148kb", 23, {21: 1, 24: 1, 27: 1, 30: 1, 36: 1, 39: 0.5}),
    ),
    **_family(
        51,
        ("mbv2-49kb", 16, {36: 1, 39: 1, 41: 0.25, 42: 0.125, 45: 0.125, 48: 0.125, 49: 0.125}),
        ("mbv2-73kb", 20, {32: 0.125, 33: 0.5, 36: 0.5, 39: 1, 41: 0.25, 42: 0.125, 45: 0.125, 48: 1}),
        ("mbv2-99kb", 25, {27: 1, 30: 1, 33: 1, 36: 1, 39: 1, 42: 0.125, 45: 0.5, 48: 1}),
        ("mbv2-123kb", 31, {27: 1, 30: 1, 33: 1, 36: 1, 39: 1, 42: 0.5, 45: 1, 48: 1}),
        ("mbv2-138kb", 34, {27: 1, 30: 1, 33: 1, 36: 1, 39: 1, 42: 1, 45: 1, 48: 1}),
    ),
    **_family(
        60,
        ("proxyless-49kb", 21, {39: 0.25, 42: 1, 45: 1, 51: 0.125, 54: 0.25, 57: 0.25}),
        ("proxyless-74kb", 28, {33: 0.5, 36: 0.25, 39: 1, 42: 1, 45: 1, 51: 0.5, 54: 0.25, 57: 0.5}),
        ("proxyless-98kb", 25, {36: 1, 39: 0.5, 42: 1, 45: 1, 48: 0.25, 51: 0.5, 54: 1, 57: 1}),
        ("proxyless-120kb", 32, {36: 1, 39: 1, 42: 1, 45: 1, 48: 0.5, 51: 1, 54: 1, 57: 1}),
        ("proxyless-148kb", 45, {36: 1, 39: 1, 42: 1, 45: 1, 48: 1, 51: 1, 54: 1, 57: 1}),
    ),
}

_LAST = re.compile(r"last-(\d+)")
_BLOCKS = re.compile(r"blocks:(\d+(?:,\d+)*)")
BSR_EVERY = 4
"""BSR trains every fourth block: 3, 7 and 11 of twelve (arXiv:2405.10951; the authors' scripts)."""


def plan_names() -> tuple[str, ...]:
    """Every name that `named_plan` knows; `last-K` stands for last-1, last-2, ..., `blocks:LIST` for blocks:3,7,11."""
    return ("full", "last-layer", "last-K", "bias", "bsr", "blocks:LIST", *SCHEMES)


def is_plan(name: str) -> bool:
    """Whether `named_plan` knows the name."""
    return name in plan_names() or bool(_LAST.fullmatch(name) or _BLOCKS.fullmatch(name))


def named_plan(name: str, graph: Graph, *, tensors_l2: Mapping[str, Array] | None = None) -> tuple[LayerUpdate, ...]:
    """The updates of a named plan, in execution order.

    `full`: everything, biases too. `last-layer`: the weights of the last convolution (or linear layer) of the
    backbone; `last-3`: of the last three. `bias`: every bias and nothing else. `blocks:3,7`: all layers of these
    blocks, biases too, counted from 0. `bsr`: every fourth block so, and the normalisation behind the last one (BSR,
    arXiv:2405.10951). A scheme's name: SparseUpdate's.

    Args:
        name: one of `plan_names()`.
        graph: the backbone in deploy form.
        tensors_l2: `<layer>.weight` -> array: what a scheme's channels are ranked by; other plans need none.

    Raises:
        UsageError: an unknown name, a scheme made for another net, or weights missing that a scheme needs.
    """
    layers = graph.layers
    if name == "full":
        return tuple(whole_update(op) for op in layers)
    if name == "bias":
        return _nonempty(name, tuple(bias_update(op) for op in layers if op.bias))
    if name == "last-layer":
        return (whole_update(layers[-1], bias=False),)
    if match := _LAST.fullmatch(name):
        count = int(match[1])
        require(1 <= count <= len(layers), f"plan {name}", f"{count} layers", f"1 to {len(layers)}")
        return tuple(whole_update(op, bias=False) for op in layers[-count:])
    if match := _BLOCKS.fullmatch(name):
        return _whole_blocks(name, graph, tuple(int(number) for number in match[1].split(",")))
    if name == "bsr":
        blocks = _whole_blocks(name, graph, tuple(range(BSR_EVERY - 1, len(graph.blocks), BSR_EVERY)))
        return (*blocks, *(whole_update(op) for op in layers if _closes(graph, op)))
    if name in SCHEMES:
        return _sparse_update(name, graph, tensors_l2 or {})
    raise UsageError("plan", repr(name), "one of " + ", ".join(plan_names()))


def _whole_blocks(name: str, graph: Graph, numbers: tuple[int, ...]) -> tuple[LayerUpdate, ...]:
    count = len(graph.blocks)
    known = f"blocks from 0 to {count - 1}" if count else "a model of blocks"
    strange = [number for number in numbers if number >= count]
    require(not strange, f"plan {name}", f"block {strange[:1]} of {count}", known, "`edgetrain inspect` shows them")
    found = tuple(whole_update(op) for number in sorted(set(numbers)) for op in inside(graph, number))
    require(bool(found), f"plan {name}", f"a model of {count} blocks", f"at least {BSR_EVERY}, or blocks with layers")
    return found


def _closes(graph: Graph, op: Op) -> bool:
    """Whether a layer is a normalisation behind the last block."""
    return op.block < 0 and not op.operator.candidate and graph.position[op.name] > 0


def bias_update(op: Op) -> LayerUpdate:
    """The update that trains a layer's biases alone."""
    return LayerUpdate(op.name, "output", (), op.out_channels, tuple(range(op.out_channels)))


def _nonempty(name: str, updates: tuple[LayerUpdate, ...]) -> tuple[LayerUpdate, ...]:
    if not updates:
        raise DataError(f"plan {name}", "no layer has a bias", "biases to train", "choose another plan")
    return updates


def _sparse_update(name: str, graph: Graph, weights: Mapping[str, Array]) -> tuple[LayerUpdate, ...]:
    scheme = SCHEMES[name]
    layers = [op for op in graph.layers if op.name != "mix"]
    require(
        len(layers) == scheme.layers,
        f"plan {name}",
        f"a model of {len(layers)} layers",
        f"{scheme.layers} layers, a mix layer not counted",
        "the scheme was published for another net",
    )
    updates = []
    for number, op in enumerate(layers):
        trains_bias = op.bias and number >= scheme.layers - scheme.biases
        biases = tuple(range(op.out_channels)) if trains_bias else ()
        if number in scheme.ratios:
            updates.append(_scheme_update(op, scheme.ratios[number], weights, biases))
        elif biases:
            updates.append(bias_update(op))
    return tuple(updates)


def _scheme_update(op: Op, ratio: float, weights: Mapping[str, Array], biases: tuple[int, ...]) -> LayerUpdate:
    axis, channels = axis_of(op, "input")
    ranking = (
        None if ratio == 1 else l2(ChannelEvidence(op, axis, channels, None, weights.get(f"{op.name}.weight"), None))
    )
    update = make_update(op, axis, ranking, ratio)
    return LayerUpdate(op.name, update.axis, update.channels, update.axis_channels, biases)
