"""Operators that ONNX files hold in pieces, put together again: fewer values to keep, and kernels of their own.

A bias behind a product of matrices, LayerNorm before opset 17, attention, and functions of single elements, which are
known by their values: however a GELU is written, it is one when it gives what a GELU gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import erf
from typing import Any

import numpy as np

from stages.artifacts.records import Array
from stages.graphs.onnx_reader import Parsed, Step

POINTS = np.linspace(-9.0, 9.0, 361)
"""Where functions of an element are compared."""
SAME = 1e-5
"""Largest difference of two writings of one function there; constants are float32. The two GELUs differ by 5e-4."""


def put_together(parsed: Parsed) -> Parsed:
    """The same graph with whole operators for what is in pieces. A value that others read, too, stays."""
    for rule in (_functions, _biases, _layernorms, _attentions, _zero_states):
        rule(parsed)
    return parsed


class _Links:
    """Who makes and who reads each value."""

    def __init__(self, parsed: Parsed) -> None:
        self.known, self.opset = parsed.known, parsed.opset
        self.maker = {output: step for step in parsed.steps for output in step.outputs}
        self.readers: dict[str, int] = dict.fromkeys(parsed.outputs, 1)
        for step in parsed.steps:
            for name in step.inputs:
                self.readers[name] = self.readers.get(name, 0) + 1

    def alone(self, name: str, *kinds: str) -> Step | None:
        """What makes a value that only one reads, if it is of one of these kinds."""
        step = self.maker.get(name)
        return step if step is not None and step.kind in kinds and self.readers[name] == 1 else None

    def number(self, name: str) -> float | None:
        """A known number."""
        array = self.known.get(name)
        return None if array is None or array.size != 1 else float(array.reshape(-1)[0])

    def with_number(self, step: Step) -> tuple[str, float] | None:
        """The other operand and the number of a sum or product with one."""
        for i, name in enumerate(step.inputs):
            number = self.number(name)
            if number is not None and len(step.inputs) == 2:
                return step.inputs[1 - i], number
        return None


def _replace(parsed: Parsed, gone: list[Step], new: Step) -> None:
    """A step for several, in the place of the last."""
    last = max(i for i, step in enumerate(parsed.steps) if any(step is other for other in gone))
    parsed.steps[last] = new
    parsed.steps[:] = [step for step in parsed.steps if step is new or not any(step is other for other in gone)]


# ------------------------------------------------------------------------------------------------------------- biases


def _biases(parsed: Parsed) -> None:
    """MatMul and Add of a vector: a linear layer with a bias."""
    links = _Links(parsed)
    for step in [step for step in parsed.steps if step.kind == "Add"]:
        for i, name in enumerate(step.inputs):
            product, bias = links.alone(name, "MatMul"), links.known.get(step.inputs[1 - i])
            if product is None or bias is None or len(product.inputs) != 2:
                continue
            weight = links.known.get(product.inputs[1])
            if weight is None or weight.ndim != 2 or bias.shape != weight.shape[1:]:
                continue
            inputs = [*product.inputs, step.inputs[1 - i]]
            _replace(parsed, [product, step], Step("MatMul", inputs, step.outputs, {}, product.name))
            break


# ---------------------------------------------------------------------------------------------------------- LayerNorm


def _layernorms(parsed: Parsed) -> None:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in single operators."""
    for step in [step for step in parsed.steps if step.kind == "Div"]:
        found = _normalised(_Links(parsed), step)
        if found is None:
            continue
        x, eps, gone = found
        links = _Links(parsed)
        weight, bias, end = "", "", step
        for kind in ("Mul", "Add"):
            reader = next((s for s in parsed.steps if end.outputs[0] in s.inputs), None)
            if reader is None or reader.kind != kind or links.readers[end.outputs[0]] != 1:
                break
            other = next((name for name in reader.inputs if name != end.outputs[0]), "")
            if getattr(links.known.get(other), "ndim", 0) != 1:
                break
            weight, bias = (other, bias) if kind == "Mul" else (weight, other)
            end = reader
            gone.append(reader)
        if not weight:
            continue
        attributes = {"axis": -1, "epsilon": eps}
        inputs = [x, weight, *([bias] if bias else [])]
        _replace(parsed, gone, Step("LayerNormalization", inputs, end.outputs, attributes, end.name))


def _normalised(links: _Links, step: Step) -> tuple[str, float, list[Step]] | None:
    """The input, eps and the steps of a division of a centred value by its deviation."""
    centred, root = links.maker.get(step.inputs[0]), links.alone(step.inputs[1], "Sqrt")
    if centred is None or centred.kind != "Sub" or root is None:
        return None
    mean, shifted = links.alone(centred.inputs[1], "ReduceMean"), links.alone(root.inputs[0], "Add")
    if mean is None or shifted is None or mean.inputs[0] != centred.inputs[0] or not _over_last(links, mean):
        return None
    pair = links.with_number(shifted)
    variance = links.alone(pair[0], "ReduceMean") if pair else None
    if pair is None or variance is None or not _over_last(links, variance):
        return None
    square = links.alone(variance.inputs[0], "Pow", "Mul")
    if square is None or square.inputs[0] != centred.outputs[0]:
        return None
    squared = square.inputs[1] == centred.outputs[0] if square.kind == "Mul" else links.number(square.inputs[1]) == 2
    readers = 3 if square.kind == "Mul" else 2
    if not squared or links.readers[centred.outputs[0]] != readers:
        return None
    return centred.inputs[0], pair[1], [mean, centred, square, variance, shifted, root, step]


def _over_last(links: _Links, step: Step) -> bool:
    axes = step.attributes.get("axes")
    if axes is None and len(step.inputs) > 1:
        axes = links.known[step.inputs[1]].reshape(-1).tolist() if step.inputs[1] in links.known else None
    return axes == [-1] and step.attributes.get("keepdims", 1) == 1


# ---------------------------------------------------------------------------------------------------------- attention


def _attentions(parsed: Parsed) -> None:
    """softmax(scale * Q K^T + mask) V."""
    for step in [step for step in parsed.steps if step.kind == "MatMul"]:
        links = _Links(parsed)
        found = _attention(links, step)
        if found is not None:
            inputs, scale, gone = found
            keys = links.alone(inputs[1], "Transpose")
            perm = keys.attributes.get("perm", []) if keys is not None else []
            turned = len(perm) < 2 or perm != [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
            if keys is not None and not turned:
                inputs[1] = keys.inputs[0]
                gone.append(keys)
            attributes = {"scale": scale, "turned": turned}
            _replace(parsed, gone, Step("Attention", inputs, step.outputs, attributes, step.name))


def _attention(links: _Links, step: Step) -> tuple[list[str], float, list[Step]] | None:
    shares = links.alone(step.inputs[0], "Softmax")
    usual = -1 if links.opset >= 13 else 1
    if shares is None or shares.attributes.get("axis", usual) not in (-1, 3) or len(step.inputs) != 2:
        return None
    if step.inputs[1] in links.known:
        return None
    total = links.alone(shares.inputs[0], "Add")
    if total is None:
        return _scaled_products(links, shares.inputs[0], step, [shares, step], [])
    found = (
        _scaled_products(links, total.inputs[i], step, [total, shares, step], [total.inputs[1 - i]]) for i in (0, 1)
    )
    return next((one for one in found if one is not None), None)


def _scaled_products(
    links: _Links, name: str, step: Step, gone: list[Step], mask: list[str]
) -> tuple[list[str], float, list[Step]] | None:
    scale, gone = 1.0, list(gone)
    scaled = links.alone(name, "Mul", "Div")
    if scaled is not None:
        pair = links.with_number(scaled)
        if pair is None or (scaled.kind == "Div" and pair[0] != scaled.inputs[0]):
            return None
        name, scale = pair[0], 1 / pair[1] if scaled.kind == "Div" else pair[1]
        gone.append(scaled)
    products = links.alone(name, "MatMul")
    if products is None or any(other in links.known for other in products.inputs) or len(products.inputs) != 2:
        return None
    return [*products.inputs, step.inputs[1], *mask], scale, [products, *gone]


# ------------------------------------------------------------------------------------------------------ initial states


def _zero_states(parsed: Parsed) -> None:
    """Zeros spread over the batch that a recurrent layer starts from: what it does without them."""
    links = _Links(parsed)
    for step in parsed.steps:
        if step.kind in ("GRU", "LSTM", "RNN"):
            step.inputs[5:7] = ["" if _is_zero(links, name) else name for name in step.inputs[5:7]]


def _is_zero(links: _Links, name: str) -> bool:
    while name in links.maker and links.maker[name].kind in ("Expand", "Identity", "Unsqueeze", "Squeeze", "Slice"):
        name = links.maker[name].inputs[0]
    made = links.maker.get(name)
    if made is not None and made.kind == "ConstantOfShape":
        return made.attributes.get("value") is None or not _values(made.attributes["value"]).any()
    return name in links.known and not links.known[name].any()


def _values(tensor: Any) -> Array:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


# -------------------------------------------------------------------------------------------- functions of one element


def _functions(parsed: Parsed) -> None:
    """Regions of single-element operators between one value and another that make up a known function."""
    done = False
    while not done:
        links = _Links(parsed)
        found = next(_recognised(parsed, links), None)
        done = found is None
        if found is not None:
            region, source, (kind, attributes) = found
            end = region[0]
            _replace(parsed, region, Step(kind, [source], end.outputs, dict(attributes), end.name))


def _recognised(parsed: Parsed, links: _Links) -> Iterator[tuple[list[Step], str, tuple[str, Mapping[str, Any]]]]:
    for end in reversed(parsed.steps):
        if end.kind not in ("Mul", "Div"):  # what all of them end in
            continue
        for region, source in _regions(end, links):
            function = _function_of(region, source, links)
            if function is not None:
                yield region, source, function
                break


MOST_STEPS = 12


def _regions(end: Step, links: _Links) -> Iterator[tuple[list[Step], str]]:
    """Regions that end in a step and begin in one value, smallest first; nobody else reads what is between."""
    region = [end]
    while len(region) <= MOST_STEPS:
        inside = {output for step in region for output in step.outputs}
        open_ = list(dict.fromkeys(n for s in region for n in s.inputs if n not in inside and links.number(n) is None))
        if len(region) > 1 and len(open_) == 1:
            yield list(region), open_[0]
        grown = next((step for name in reversed(open_) if (step := _inner(name, region, links)) is not None), None)
        if grown is None:
            return
        region.append(grown)


def _inner(name: str, region: list[Step], links: _Links) -> Step | None:
    """What makes a value of a region, where it is a function of elements that the region alone reads."""
    step = links.maker.get(name)
    readers = sum(other.inputs.count(name) for other in region)
    return step if step is not None and step.kind in ELEMENTWISE and links.readers[name] == readers else None


def _function_of(region: list[Step], source: str, links: _Links) -> tuple[str, Mapping[str, Any]] | None:
    values: dict[str, Any] = {source: POINTS}
    with np.errstate(all="ignore"):
        for step in _in_order(region):
            inputs = [values[name] if name in values else links.number(name) for name in step.inputs if name]
            values[step.outputs[0]] = ELEMENTWISE[step.kind](step, *inputs)
    found = values[region[0].outputs[0]]
    for (kind, attributes), expected in FUNCTIONS:
        if np.shape(found) == POINTS.shape and np.abs(found - expected).max() < SAME:
            return kind, attributes
    return None


def _in_order(region: list[Step]) -> list[Step]:
    """Makers before readers."""
    made: list[Step] = []
    waiting = list(region)
    while waiting:
        outputs = {output for step in waiting for output in step.outputs}
        ready = [step for step in waiting if outputs.isdisjoint(step.inputs)]
        made += ready
        waiting = [step for step in waiting if not any(step is other for other in ready)]
    return made


def _erf(x: Array) -> Array:
    return np.array([erf(v) for v in np.asarray(x).reshape(-1)]).reshape(np.shape(x))


def _clip(step: Step, x: Any, low: float | None = None, high: float | None = None) -> Any:
    return np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)


def _hardsigmoid(step: Step, x: Any) -> Any:
    return np.clip(step.attributes.get("alpha", 0.2) * x + step.attributes.get("beta", 0.5), 0, 1)


ELEMENTWISE: Mapping[str, Callable[..., Any]] = {
    "Add": lambda step, a, b: a + b,
    "Sub": lambda step, a, b: a - b,
    "Mul": lambda step, a, b: a * b,
    "Div": lambda step, a, b: a / b,
    "Pow": lambda step, a, b: a**b,
    "Neg": lambda step, x: -x,
    "Erf": lambda step, x: _erf(x),
    "Tanh": lambda step, x: np.tanh(x),
    "Sigmoid": lambda step, x: 1 / (1 + np.exp(-x)),
    "Softplus": lambda step, x: np.logaddexp(0, x),
    "Relu": lambda step, x: np.maximum(x, 0),
    "Clip": _clip,
    "HardSigmoid": _hardsigmoid,
}
"""Functions of single elements, float64."""

_PHI = 0.5 * (1 + _erf(POINTS / np.sqrt(2)))
_CUBIC = np.sqrt(2 / np.pi) * (POINTS + 0.044715 * POINTS**3)

FUNCTIONS: tuple[tuple[tuple[str, Mapping[str, Any]], Array], ...] = (
    (("Gelu", {"approximate": "none"}), POINTS * _PHI),
    (("Gelu", {"approximate": "tanh"}), 0.5 * POINTS * (1 + np.tanh(_CUBIC))),
    (("HardSwish", {}), POINTS * np.clip(POINTS + 3, 0, 6) / 6),
    (("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}), np.clip(POINTS + 3, 0, 6) / 6),
    (("Silu", {}), POINTS / (1 + np.exp(-POINTS))),
    (("Mish", {}), POINTS * np.tanh(np.logaddexp(0, POINTS))),
)
"""What is looked for, at `POINTS`."""
