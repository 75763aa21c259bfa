"""Weights from elsewhere, fitted to an architecture: by the names they have, or by order under other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from stages.artifacts.records import Array
from stages.errors import DataError
from stages.graphs.capture import Captured
from stages.graphs.folding import fold
from stages.graphs.record import check_tensors, tensor_shapes
from stages.models.modules import WRONG_CODE, is_weight
from stages.models.naming import in_order
from stages.operators import Shape

WHERE = "weights"


@dataclass(frozen=True)
class Matched:
    """Tensors under the architecture's names, and the classifier that came with them."""

    form: str
    """`batchnorm` or `deploy`, as records know them."""
    tensors: dict[str, Array]
    classifier: tuple[Array, Array] | None
    """Weight (C, D) and bias (C,) of a linear layer on the features that is not part of the architecture."""


def match(
    module: nn.Module, capture: Callable[[], Captured], weights: Mapping[str, Array], *, ordered: bool
) -> Matched:
    """Fit `weights` to `module`, which is captured where its own names do not say it all.

    First by name: the module's state dict, then its deploy form. When no name is known, layer by layer in the file's
    order (`ordered`), or in that which its names tell, all shapes agreeing. Raises `DataError` naming the tensor, the
    shape found and the shape expected.
    """
    own = _shapes(module)
    if own.keys() == weights.keys():
        check_tensors(own, weights, WHERE, WRONG_CODE)
        return Matched("batchnorm", dict(weights), None)
    captured = capture()
    graph, _ = fold(captured.graph, {key: tensor.numpy() for key, tensor in captured.tensors.items()})
    expected = {"batchnorm": own, "deploy": tensor_shapes(graph)}
    width = graph.feature_dim
    for form, shapes in expected.items():
        if shapes.keys() <= weights.keys():
            return _by_name(form, shapes, weights, width)
    form = max(expected, key=lambda form: len(expected[form].keys() & weights.keys()))
    names = list(weights) if ordered else in_order(weights)
    if names is not None and not expected[form].keys() & weights.keys():
        listed = {name: weights[name] for name in names}
        return _by_order(_layers_of_module(module), _layers_of_graph(captured), listed, width)
    return _by_name(form, expected[form], weights, width)  # raises: a tensor is missing


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if is_weight(name)}


def _by_name(form: str, shapes: Mapping[str, Shape], weights: Mapping[str, Array], width: int) -> Matched:
    rest = {name: value for name, value in weights.items() if name not in shapes}
    classifier = _classifier(rest, width)
    tensors = {name: value for name, value in weights.items() if name in shapes or classifier is None}
    check_tensors(shapes, tensors, WHERE, WRONG_CODE)
    return Matched(form, tensors, classifier)


def _classifier(rest: Mapping[str, Array], width: int) -> tuple[Array, Array] | None:
    """A linear layer on `width` features, if that is what `rest` is: (C, D) or (C, D, 1, 1) and (C,)."""
    weight = next((value for name, value in rest.items() if name.endswith("weight")), None)
    bias = next((value for name, value in rest.items() if name.endswith("bias")), None)
    if len(rest) != 2 or weight is None or bias is None:
        return None
    classes = len(bias)
    if weight.shape not in ((classes, width), (classes, width, 1, 1)):
        return None
    return weight.reshape(classes, width), bias


# ---------------------------------------------------------------------------------------------------------- by order

Layer = dict[str, tuple[str, Shape]]
"""Kind of tensor (weight, running_mean, ...) -> its name and shape."""


def _by_order(
    registered: Sequence[Layer], executed: Sequence[Layer], weights: Mapping[str, Array], width: int
) -> Matched:
    """Layer i of the file is layer i of the architecture, in the one order, registered or executed, that fits."""
    found = _grouped({name: tuple(value.shape) for name, value in weights.items()})
    last = {name: weights[name] for name, _ in found[-1].values()}
    classifier = _classifier(last, width) if len(found) == len(registered) + 1 else None
    found = found[:-1] if classifier else found
    misfits = [_misfit(order, found) for order in (executed, registered)]
    if all(misfits):
        raise DataError(WHERE, misfits[0], "", "are --arch and --arg those of the weights?")
    if not any(misfits) and executed != registered:
        raise DataError(WHERE, "unknown names, and two orders of the layers that both fit", "the architecture's names")
    order = executed if not misfits[0] else registered
    tensors = {
        ours[what][0]: weights[theirs[what][0]].reshape(ours[what][1])
        for ours, theirs in zip(order, found, strict=True) for what in ours
    }  # fmt: skip
    return Matched("batchnorm", tensors, classifier)


def _misfit(order: Sequence[Layer], found: Sequence[Layer]) -> str:
    """Why the layers of a file are not those of the architecture; empty when they are."""
    for ours, theirs in zip(order, found, strict=False):
        for what, (name, shape) in ours.items():
            if what not in theirs:
                return f"{next(iter(theirs.values()))[0]} stands where {name} should be"
            if _plain(theirs[what][1]) != _plain(shape):
                return f"{theirs[what][0]} has shape {theirs[what][1]} where {name} has {shape}"
        if theirs.keys() - ours.keys():
            return f"{theirs[min(theirs.keys() - ours.keys())][0]} is unknown to {next(iter(ours.values()))[0]}'s layer"
    if len(order) != len(found):
        return f"{len(found)} layers where the architecture has {len(order)}"
    return ""


def _plain(shape: Shape) -> Shape:
    """A matrix may be written as the weight of a 1x1 convolution."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _grouped(shapes: Mapping[str, Shape]) -> list[Layer]:
    """Tensors by the layer they belong to, in order."""
    layers: dict[str, Layer] = {}
    for name, shape in shapes.items():
        owner, _, what = name.rpartition(".")
        layers.setdefault(owner, {})[what] = (name, shape)
    return list(layers.values())


def _layers_of_module(module: nn.Module) -> list[Layer]:
    return _grouped(_shapes(module))


def _layers_of_graph(captured: Captured) -> list[Layer]:
    """The captured layers in execution order, under the names of the module's state dict."""
    layers: dict[str, Layer] = {op.name: {} for op in captured.graph.ops}
    for key, origin in captured.origins.items():
        owner, _, what = key.rpartition(".")
        layers[owner][what] = (origin.name, tuple(captured.tensors[key].shape))
    return [layer for layer in layers.values() if layer]
