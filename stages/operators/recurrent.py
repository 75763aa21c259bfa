"""Recurrent layers and embeddings.

A recurrent layer holds one `weight` (H, D + H + biases, gates): row c is all that hidden unit c has in every gate, from
the input, from the hidden state and its biases. So a plan's live channel is a hidden unit, consistent over the gates.
Along the input axis no plan goes: the hidden state is no input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.errors import DataError
from stages.operators.op import (
    Flow,
    Kept,
    Op,
    Operator,
    Pull,
    Reading,
    Shape,
    Tensors,
    keeps_input,
    keeps_nothing,
    register,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

GATES = {"gru": 3, "lstm": 4}
"""Kind -> gates, in torch's order: reset, update, new; input, forget, cell, output."""


def _last_axis(op: Op) -> int:
    return -1


# ------------------------------------------------------------------------------------------------------------ recurrent


def _columns(op: Op) -> int:
    """Columns of the weight: inputs, hidden units, and two biases where there are any."""
    return int(op.in_shape[1] + op["hidden"] + 2 * op["biased"])


def _recurrent_shape(op: Op) -> Shape:
    if len(op.in_shape) != 2 or op["hidden"] < 1:
        raise ValueError(f"{op['hidden']} hidden units on {op.in_shape}, steps of vectors (T, D) are needed")
    return (op.in_shape[0], op["hidden"])


def _recurrent_tensors(op: Op) -> dict[str, Shape]:
    return {"weight": (op["hidden"], _columns(op), GATES[op.kind])}


def _recurrent_macs(op: Op) -> int:
    """Every weight of inputs and hidden state once per step; biases are additions."""
    steps, size = op.in_shape
    return int(steps * op["hidden"] * (size + op["hidden"]) * GATES[op.kind])


class Parts(NamedTuple):
    """A recurrent layer's weight as torch has it."""

    inputs: Tensor
    """(gates * H, D)."""
    hidden: Tensor
    """(gates * H, H)."""
    biases: tuple[Tensor, ...]
    """Two of (gates * H,), or none."""


def parts_of(op: Op, weight: Tensor) -> Parts:
    """torch's own tensors from ours: `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`."""
    size, hidden = op.in_shape[1], op["hidden"]
    rows = weight.permute(2, 0, 1)
    columns = [rows[:, :, :size], rows[:, :, size : size + hidden]]
    biases = [rows[:, :, size + hidden + i].reshape(-1) for i in (0, 1)] if op["biased"] else []
    inputs, states = (part.reshape(-1, part.shape[2]) for part in columns)
    return Parts(inputs, states, tuple(biases))


def _recurrent(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    import torch

    x = inputs[0].flip(1) if op["reverse"] else inputs[0]
    parts = parts_of(op, tensors[f"{op.owner}.weight"])
    flat = [part.contiguous() for part in (parts.inputs, parts.hidden, *parts.biases)]
    zero = x.new_zeros(1, len(x), op["hidden"])
    state = zero if op.kind == "gru" else [zero, zero]
    run: Any = torch.gru if op.kind == "gru" else torch.lstm
    y: Tensor = run(x, state, flat, bool(op["biased"]), 1, 0.0, False, False, True)[0]
    return y.flip(1) if op["reverse"] else y


class _Backward(NamedTuple):
    """What comes back through time."""

    from_inputs: Tensor
    """(N, T, gates, H): gradients at what the inputs add to the gates."""
    from_hidden: Tensor
    """(N, T, gates, H): at what the hidden state adds to them."""
    x: Tensor
    """(N, T, D), in the order in which the layer ran."""
    before: Tensor
    """(N, T, H): the hidden state before each step."""


def _through_time(op: Op, weight: Tensor, x: Tensor, gradient: Tensor) -> _Backward:
    """Back-propagation through time, the forward pass run again step by step."""
    import torch

    parts, hidden, gates = parts_of(op, weight), op["hidden"], GATES[op.kind]
    x, gradient = (x.flip(1), gradient.flip(1)) if op["reverse"] else (x, gradient)
    batch, steps = x.shape[:2]
    added = x @ parts.inputs.t()
    added = (added + parts.biases[0] if parts.biases else added).view(batch, steps, gates, hidden)
    h = c = x.new_zeros(batch, hidden)
    before, ran = [], []
    for t in range(steps):
        before.append(h)
        told = h @ parts.hidden.t()
        told = (told + parts.biases[1] if parts.biases else told).view(batch, gates, hidden)
        h, c, kept = STEPS[op.kind].forward(added[:, t], told, h, c)
        ran.append(kept)
    dh = dc = x.new_zeros(batch, hidden)
    from_inputs, from_hidden = torch.empty_like(added), torch.empty_like(added)
    for t in reversed(range(steps)):
        first, second, dh, dc = STEPS[op.kind].backward(ran[t], before[t], dh + gradient[:, t], dc)
        from_inputs[:, t], from_hidden[:, t] = first, second
        dh = dh + second.reshape(batch, -1) @ parts.hidden
    return _Backward(from_inputs, from_hidden, x, torch.stack(before, 1))


class _Step(NamedTuple):
    """One step of a cell and its gradient."""

    forward: Callable[..., Any]
    """(from the inputs (N, gates, H), from the hidden state, h, c) -> h, c, what the gradient needs."""
    backward: Callable[..., Any]
    """(what it needs, h before, dh, dc) -> gradients at both additions, of h before (beside what comes by the hidden
    state's weights), of c before."""


def _gru_forward(added: Tensor, told: Tensor, h: Tensor, c: Tensor) -> Any:
    """Cho et al. 2014 as torch has it: n = tanh(W x + r * (U h)), h' = (1 - z) n + z h."""
    r, z = (added[:, i].add(told[:, i]).sigmoid() for i in (0, 1))
    n = (added[:, 2] + r * told[:, 2]).tanh()
    return (1 - z) * n + z * h, c, (r, z, n, told[:, 2])


def _gru_backward(kept: Any, before: Tensor, dh: Tensor, dc: Tensor) -> Any:
    import torch

    r, z, n, told = kept
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (before - n) * z * (1 - z)
    dr = dn * told * r * (1 - r)
    return torch.stack((dr, dz, dn), 1), torch.stack((dr, dz, dn * r), 1), dh * z, dc


def _lstm_forward(added: Tensor, told: Tensor, h: Tensor, c: Tensor) -> Any:
    """Hochreiter and Schmidhuber 1997 with forget gates: c' = f c + i g, h' = o tanh(c')."""
    i, f, o = (added[:, k].add(told[:, k]).sigmoid() for k in (0, 1, 3))
    g = added[:, 2].add(told[:, 2]).tanh()
    new = f * c + i * g
    squashed = new.tanh()
    return o * squashed, new, (i, f, g, o, c, squashed)


def _lstm_backward(kept: Any, before: Tensor, dh: Tensor, dc: Tensor) -> Any:
    import torch

    i, f, g, o, c, squashed = kept
    dc = dc + dh * o * (1 - squashed * squashed)
    gates = (dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * squashed * o * (1 - o))
    both = torch.stack(gates, 1)
    return both, both, torch.zeros_like(dh), dc * f


STEPS = {"gru": _Step(_gru_forward, _gru_backward), "lstm": _Step(_lstm_forward, _lstm_backward)}


def _pull_recurrent(op: Op, tensors: Tensors) -> Pull:
    weight = tensors[f"{op.owner}.weight"]

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        found = _through_time(op, weight, kept.inputs[0], flow.gradient)
        dx = found.from_inputs.flatten(2) @ parts_of(op, weight).inputs
        return [Flow(dx.flip(1) if op["reverse"] else dx, fresh=True)]

    return pull


def _recurrent_gradient(op: Op, tensors: Tensors, x: Tensor, gradient: Tensor, channels: Tensor) -> Tensor:
    """Of the live units' rows: (live, columns, gates), and no others are computed."""
    import torch

    found = _through_time(op, tensors[f"{op.owner}.weight"], x, gradient)
    at_inputs, at_hidden = (part.index_select(3, channels) for part in (found.from_inputs, found.from_hidden))
    columns = [
        torch.einsum("ntgc,ntd->cdg", at_inputs, found.x),
        torch.einsum("ntgc,ntd->cdg", at_hidden, found.before),
    ]
    if op["biased"]:
        columns += [part.sum((0, 1)).t().unsqueeze(1) for part in (at_inputs, at_hidden)]
    return torch.cat(columns, 1)


# ONNX orders the gates otherwise: update, reset, new; input, output, forget, cell.
_ONNX_ORDER = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}


def _recurrent_onnx(op: Op, w: Any) -> None:
    """Steps first, as ONNX has them: (T, N, D) -> (T, 1, N, H)."""
    import numpy as np

    size, hidden = op.in_shape[1], op["hidden"]
    rows = np.moveaxis(w.array(f"{op.owner}.weight"), 2, 0)[list(_ONNX_ORDER[op.kind])]
    flat = rows.reshape(1, -1, rows.shape[2])
    w.node("Transpose", w.inputs(op), w.inner(op, "steps"), perm=[1, 0, 2])
    inputs = [w.inner(op, "steps"), w.constant(op, "W", flat[:, :, :size])]
    inputs.append(w.constant(op, "R", flat[:, :, size : size + hidden]))
    if op["biased"]:
        both = [rows[:, :, size + hidden + i].reshape(1, -1) for i in (0, 1)]
        inputs.append(w.constant(op, "B", np.concatenate(both, 1)))
    more = {"linear_before_reset": 1} if op.kind == "gru" else {}
    way = {"direction": "reverse"} if op["reverse"] else {}
    w.node(op.kind.upper(), inputs, w.inner(op, "states"), hidden_size=hidden, **more, **way)
    w.node("Squeeze", [w.inner(op, "states"), w.integers([1])], w.inner(op, "states1"))
    w.node("Transpose", [w.inner(op, "states1")], w.output(op), perm=[1, 0, 2])


def _aten_recurrent(kind: str) -> Callable[..., Any]:
    """`gru.input`, `lstm.input`: layers and directions one by one, each an operator of its own."""

    def translate(
        call: Any, x: Any, states: Any, params: Any, biased: bool, layers: int, dropout: float, train: bool,
        both_ways: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        call.refuse_state([states] if kind == "gru" else states)
        directions, each = 2 if both_ways else 1, 4 if biased else 2
        if len(params) != layers * directions * each:
            call.refuse("a recurrent layer with projections", "hidden states as they are (proj_size=0)")
        last, ends = call.value(x), []
        for layer in range(layers):
            outputs = []
            for way in range(directions):
                start = (layer * directions + way) * each
                name = f"l{layer}{'_reverse' if way else ''}" if layers * directions > 1 else ""
                y = call.recurrent(
                    kind, last, params[start : start + each], name, reverse=bool(way), biased=bool(biased)
                )
                outputs.append(y)
                steps = y.shape[0]
                ends.append((y, 0 if way else steps - 1))
            last = outputs[0] if directions == 1 else call.side_by_side_features(outputs)
        return [last, call.final_states(ends)]

    return translate


def _prepare_recurrent(node: Any, tensors: dict[str, Any]) -> None:
    """ONNX's gates in torch's order."""
    import numpy as np

    kind = node.kind.lower()
    gates = GATES[kind]
    order = [_ONNX_ORDER[kind].index(i) for i in range(gates)]
    for what, array in list(tensors.items()):
        directions = len(array)
        rows = array.reshape(directions, -1, gates, array.shape[1] // gates, *array.shape[2:])
        if what == "bias":
            rows = array.reshape(directions, 2, gates, -1)
            tensors[what] = np.ascontiguousarray(rows[:, :, order]).reshape(directions, 2, -1)
        else:
            tensors[what] = np.ascontiguousarray(rows[:, :, order]).reshape(array.shape)


def _read_recurrent(node: Any, x: Any, inputs: Any, hidden: Any, bias: Any = None, *rest: Any) -> Any:
    """X (T, N, D) -> Y (T, directions, N, H), Y_h (directions, N, H)."""
    import numpy as np
    import torch

    kind, way = node.kind.lower(), node.get("direction", "forward")
    plain = {"activations": None, "clip": None, "layout": 0, "input_forget": 0}
    odd = [name for name, usual in plain.items() if node.get(name, usual) not in (usual, 0)]
    if kind == "gru" and not node.get("linear_before_reset", 0):
        odd.append("linear_before_reset=0")
    if odd and odd != ["activations"]:
        node.refuse(f"with {', '.join(odd)}", "a recurrent layer as PyTorch has it")
    usual = {"gru": ["sigmoid", "tanh"], "lstm": ["sigmoid", "tanh", "tanh"]}[kind]
    given = [name.lower() for name in node.get("activations") or []]
    if given and given != usual * (len(given) // len(usual)):
        node.refuse(f"activations {given}", f"{usual}")
    for state in rest[1:]:
        if state is not None and (isinstance(state, torch.Tensor) or np.any(state)):
            node.refuse("an initial state", "zeros")
    if kind == "lstm" and len(rest) > 3 and rest[3] is not None and np.any(np.asarray(rest[3])):
        node.refuse("peepholes", "none")
    both = way == "bidirectional"
    if way == "reverse":
        x = x.flip(0)
    flat = []
    for i in range(len(inputs)):
        flat += [inputs[i], hidden[i], *([bias[i][0], bias[i][1]] if bias is not None else [])]
    size = hidden.shape[2]
    zero = x.new_zeros(len(inputs), x.shape[1], size)
    run: Any = torch.gru if kind == "gru" else torch.lstm
    found = run(x, zero if kind == "gru" else [zero, zero], flat, bias is not None, 1, 0.0, False, both, False)
    y = found[0]
    y = y.flip(0) if way == "reverse" else y
    states = y.reshape(y.shape[0], y.shape[1], len(inputs), size).permute(0, 2, 1, 3)
    return [states, *found[1:]]


# ------------------------------------------------------------------------------------------------------------ embedding


def _embedding_shape(op: Op) -> Shape:
    if op["entries"] < 1 or not op.shape:
        raise ValueError(f"{op['entries']} entries for {op.in_shape}")
    return (*op.in_shape, op.shape[-1])


def _embedding_tensors(op: Op) -> dict[str, Shape]:
    return {"weight": (op.shape[-1], op["entries"])}


def _numbers(op: Op, x: Tensor) -> Tensor:
    """Whole numbers of entries from values that came as floats. Raises `DataError` for one that is no entry."""
    import torch

    numbers = x.to(torch.int64)
    if numbers.device.type != "meta" and numbers.numel():
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= op["entries"]:
            found = low if low < 0 else high
            raise DataError(op.name, f"number {found}", f"0 to {op['entries'] - 1}, the entries of the embedding")
    return numbers


def _embedding(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    return F.embedding(_numbers(op, inputs[0]), tensors[f"{op.owner}.weight"].t())


def _pull_embedding(op: Op, tensors: Tensors) -> Pull:
    """Numbers have no gradient."""
    return lambda kept, flow: [Flow(flow.gradient.new_zeros(len(flow.gradient), *op.in_shape), fresh=True)]


def _embedding_gradient(op: Op, tensors: Tensors, x: Tensor, gradient: Tensor, channels: Tensor) -> Tensor:
    """(live, entries): each entry's gradients added up."""
    rows = gradient.reshape(-1, op.shape[-1]).index_select(1, channels)
    found = rows.new_zeros(op["entries"], len(channels))
    return found.index_add_(0, _numbers(op, x).reshape(-1), rows).t()


def _embedding_onnx(op: Op, w: Any) -> None:
    w.node("Cast", w.inputs(op), w.inner(op, "numbers"), to=7)
    table = w.constant(op, "table", w.array(f"{op.owner}.weight").T)
    w.node("Gather", [table, w.inner(op, "numbers")], w.output(op), axis=0)


def _aten_embedding(call: Any, weight: Any, index: Any, padding_idx: int = -1, *_: Any) -> Any:
    if padding_idx >= 0:
        call.note(f"entry {padding_idx}, the padding's, trains like the others")
    turned = call.apply("t.default", weight)
    size, entries = call.tensor_shape(turned)
    x = call.value(index)
    return call.emit("embedding", [x], own={"weight": turned}, out_channels=size, entries=entries)


def _layer(kind: str, doc: str) -> Operator:
    return Operator(
        kind=kind,
        doc=f"{doc} over steps (T, D) -> (T, H), from zeros; a live channel is a hidden unit in all gates",
        args={"hidden": int, "reverse": bool, "biased": bool},
        tensors=_recurrent_tensors,
        shape=_recurrent_shape,
        macs=_recurrent_macs,
        keeps=keeps_input,
        trains=True,
        by_output=True,
        channel_axis=_last_axis,
        forward=_recurrent,
        pull=_pull_recurrent,
        weight_gradient=_recurrent_gradient,
        onnx=_recurrent_onnx,
        aten={f"{kind}.input": _aten_recurrent(kind)},
        from_onnx={kind.upper(): Reading(_read_recurrent, ("-", "weight", "hidden", "bias"), _prepare_recurrent)},
    )


register(
    _layer(kind="gru", doc="gated recurrent units"),
    _layer(kind="lstm", doc="long short-term memory"),
    Operator(
        kind="embedding",
        doc="a vector for every whole number of the input, out of a table",
        args={"entries": int},
        tensors=_embedding_tensors,
        shape=_embedding_shape,
        macs="reads a table, no multiplication",
        keeps=keeps_nothing,
        trains=True,
        candidate=False,
        by_output=True,
        entries=lambda op: int(op["entries"]),
        channel_axis=_last_axis,
        forward=_embedding,
        pull=_pull_embedding,
        weight_gradient=_embedding_gradient,
        onnx=_embedding_onnx,
        aten={"embedding.default": _aten_embedding},
    ),
)
