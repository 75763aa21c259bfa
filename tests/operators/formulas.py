"""What each kind computes, written a second time: of one sample at a time, in plain torch or as the formula says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from stages.operators import Op

Formula = Callable[[Op, Sequence[Tensor], Mapping[str, Tensor]], Tensor]
"""One sample's inputs -> its output."""


def reference(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """The output (N, *shape) of inputs (N, *in_shape), sample by sample."""
    rule = FORMULAS[op.kind]
    return torch.stack([rule(op, [x[n] for x in inputs], tensors) for n in range(len(inputs[0]))])


def _own(op: Op, tensors: Mapping[str, Tensor], what: str) -> Tensor:
    return tensors[f"{op.owner}.{what}"]


def _convolution(op: Op, x: Tensor, tensors: Mapping[str, Tensor], transposed: bool) -> Tensor:
    bias = _own(op, tensors, "bias") if op.bias else None
    extra = list(op["output_padding"]) if transposed else [0] * len(op.kernel)
    found: Tensor = torch.ops.aten.convolution(
        x[None], _own(op, tensors, "weight"), bias, op.stride, op.padding, op.dilation, transposed, extra, op.groups
    )
    return found[0]


def _linear(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    found = torch.tensordot(inputs[0], _own(op, tensors, "weight"), dims=([-1], [1]))
    return found + _own(op, tensors, "bias") if op.bias else found


def _attention(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    q, k, v, *mask = inputs
    products = op["scale"] * torch.matmul(q, k.transpose(-1, -2))
    if op["causal"]:
        future = torch.ones(products.shape[-2:]).triu(1).bool()
        products = products.masked_fill(future, float("-inf"))
    weights = (products + mask[0] if mask else products).exp()
    return torch.matmul(weights / weights.sum(-1, keepdim=True), v)


def _normalised(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    mean = x.mean(tuple(axes), keepdim=True)
    return (x - mean) / ((x - mean).square().mean(tuple(axes), keepdim=True) + eps).sqrt()


def _along(x: Tensor, axis: int, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[axis] = -1
    return x.reshape(shape)


def _batchnorm(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    x = inputs[0]
    gamma, beta, mean, var = (
        _along(_own(op, tensors, what), op["axis"], x.ndim)
        for what in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / (var + op["eps"]).sqrt() * gamma + beta


def _scale(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    x = inputs[0]
    found = x * _along(_own(op, tensors, "weight"), op["axis"], x.ndim)
    return found + _along(_own(op, tensors, "bias"), op["axis"], x.ndim) if op.bias else found


def _groupnorm(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    x = inputs[0]
    return _normalised(x.reshape(op["groups"], -1), [1], op["eps"]).reshape(x.shape)


def _prelu(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = torch.ops.aten.prelu(inputs[0][None], _own(op, tensors, "weight"))
    return found[0]


def _gelu(op: Op, x: Tensor) -> Tensor:
    if op["approximate"] == "tanh":
        return 0.5 * x * (1 + torch.tanh(sqrt(2 / torch.pi) * (x + 0.044715 * x**3)))
    return x * torch.special.ndtr(x)


def _windows(op: Op, x: Tensor, rule: Callable[[Tensor, int], Any]) -> Tensor:
    """Each output from the entries of its window that lie in the map, and how many lie in map or padding."""
    apart = op.dilation or (1,) * len(op.kernel)
    out = x.new_zeros(op.shape)
    for place in product(*map(range, op.shape[1:])):
        taps, counted = [], 1
        for at, k, s, p, d, size in zip(place, op.kernel, op.stride, op.padding, apart, op.in_shape[1:], strict=True):
            span = [at * s - p + tap * d for tap in range(k)]
            taps.append([i for i in span if 0 <= i < size])
            counted *= sum(i < size + p for i in span)
        inside = x
        for axis, wanted in enumerate(taps):
            inside = inside.index_select(axis + 1, torch.tensor(wanted))
        out[(slice(None), *place)] = rule(inside.flatten(1), counted)
    return out


def _max_pool(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    return _windows(op, inputs[0], lambda inside, counted: inside.amax(1))


def _avg_pool(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    return _windows(
        op, inputs[0], lambda inside, counted: inside.sum(1) / (counted if op.count_include_pad else inside.shape[1])
    )


def _bins(op: Op, x: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    out = x.new_zeros(op.shape)
    for place in product(*map(range, op.shape[1:])):
        cut = [
            slice(at * size // want, -(-(at + 1) * size // want))
            for at, size, want in zip(place, op.in_shape[1:], op["size"], strict=True)
        ]
        out[(slice(None), *place)] = rule(x[(slice(None), *cut)].flatten(1))
    return out


def _take(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([inputs[0].select(op["axis"], i) for i in op["index"]], op["axis"])


SOURCE = {
    "reflect": lambda i, size: size - 1 - abs(size - 1 - abs(i)),
    "replicate": lambda i, size: min(max(i, 0), size - 1),
    "circular": lambda i, size: i % size,
}
"""Where an entry beyond the border comes from."""


def _pad(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    x = inputs[0]
    for axis, (before, size, after) in enumerate(zip(op["before"], op.in_shape, op["after"], strict=True)):
        wanted = range(-before, size + after)
        if op["mode"] == "constant":
            found = [
                x.select(axis, i) if 0 <= i < size else torch.full_like(x.select(axis, 0), op["value"]) for i in wanted
            ]
        else:
            found = [x.select(axis, SOURCE[op["mode"]](i, size)) for i in wanted]
        x = torch.stack(found, axis)
    return x


def _roll(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    x = inputs[0]
    for shift, axis in zip(op["shifts"], op["axes"], strict=True):
        x = x.index_select(axis, (torch.arange(x.shape[axis]) - shift) % x.shape[axis])
    return x


def _upsample(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    aten, corners = torch.ops.aten, [] if op["mode"] == "nearest" else [op["align_corners"]]
    call = getattr(aten, f"upsample_{op['mode']}{len(op['size'])}d")
    found: Tensor = call(inputs[0][None], list(op["size"]), *corners)
    return found[0]


def _of(rule: Callable[[Op, Tensor], Tensor]) -> Formula:
    return lambda op, inputs, tensors: rule(op, inputs[0])


def _plain(rule: Callable[..., Tensor]) -> Formula:
    return lambda op, inputs, tensors: rule(*inputs)


def _soft(x: Tensor, axis: int) -> Tensor:
    return x.exp() / x.exp().sum(axis, keepdim=True)


def _gates(op: Op, weight: Tensor, x: Tensor, h: Tensor, gate: int) -> tuple[Tensor, Tensor]:
    """What inputs and hidden state add to one gate of every unit."""
    size, hidden = len(x), len(h)
    added = (weight[:, :size, gate] @ x[:, None])[:, 0]
    told = (weight[:, size : size + hidden, gate] @ h[:, None])[:, 0]
    biases = weight[:, size + hidden :, gate]
    return (added + biases[:, 0], told + biases[:, 1]) if op["biased"] else (added, told)


def _gru(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    x, weight = inputs[0], _own(op, tensors, "weight")
    h, found = x.new_zeros(op["hidden"]), []
    for step in reversed(x) if op["reverse"] else x:
        (r_x, r_h), (z_x, z_h), (n_x, n_h) = (_gates(op, weight, step, h, gate) for gate in range(3))
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        h = (1 - z) * torch.tanh(n_x + r * n_h) + z * h
        found.append(h)
    return torch.stack(found[::-1] if op["reverse"] else found)


def _lstm(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    x, weight = inputs[0], _own(op, tensors, "weight")
    h = c = x.new_zeros(op["hidden"])
    found = []
    for step in reversed(x) if op["reverse"] else x:
        i, f, g, o = (sum(_gates(op, weight, step, h, gate)) for gate in range(4))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        found.append(h)
    return torch.stack(found[::-1] if op["reverse"] else found)


def _embedding(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    table = _own(op, tensors, "weight").t()
    return table[inputs[0].long()] + 0 * inputs[0][..., None]


OPAQUE: Mapping[str, Callable[..., Tensor]] = {
    "erf.default": torch.erf,
    "maximum.default": torch.maximum,
    "gather.default": lambda x: x[:, [1, 0]],
    "topk.default": lambda x: x.sort(descending=True).values[:2],
    "gt.Scalar": lambda x: (x > 0.5) + 0 * x,
    "where.self": lambda mask, a, b: torch.where(mask.round() != 0, a, b) + 0 * mask,
    "repeat.default": lambda x: torch.cat([x, x]),
    "bmm.default": torch.matmul,
}


def _opaque(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    if op["function"] == "lerp.Tensor":
        return inputs[0] + _own(op, tensors, "value0") * (inputs[1] - inputs[0])
    if op["function"] == "cumsum.default":
        axis = 0 if op.in_shape == (5, 6) else -1
        return inputs[0].cumsum(axis)
    return OPAQUE[op["function"]](*inputs)


def _drop_tokens(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """Token by token, by their places in the sorted list of scores."""
    x, scores = inputs
    order = sorted(range(1, len(x)), key=lambda j: (-scores[j].item(), j))
    rows = [x[0], *(x[j] for j in order[: op["keep"]])]
    if op["fuse"]:
        rest = order[op["keep"] :]
        rows.append((torch.stack([scores[j] for j in rest])[None] @ torch.stack([x[j] for j in rest]))[0])
    return torch.stack(rows)


FORMULAS: Mapping[str, Formula] = {
    "drop_tokens": _drop_tokens,
    "gru": _gru,
    "lstm": _lstm,
    "embedding": _embedding,
    "opaque": _opaque,
    "conv": lambda op, inputs, tensors: _convolution(op, inputs[0], tensors, False),
    "conv_transpose": lambda op, inputs, tensors: _convolution(op, inputs[0], tensors, True),
    "linear": _linear,
    "matmul": _plain(torch.matmul),
    "attention": _attention,
    "batchnorm": _batchnorm,
    "scale": _scale,
    "layernorm": _of(lambda op, x: _normalised(x, range(x.ndim - op["axes"], x.ndim), op["eps"])),
    "groupnorm": _groupnorm,
    "relu": _plain(lambda x: torch.maximum(x, torch.zeros_like(x))),
    "relu6": _plain(lambda x: x.clamp(0, 6)),
    "clamp": _of(lambda op, x: x.clip(op["low"], op["high"])),
    "leaky_relu": _of(lambda op, x: torch.where(x < 0, op["slope"] * x, x)),
    "prelu": _prelu,
    "hardsigmoid": _plain(lambda x: (x + 3).clamp(0, 6) / 6),
    "sigmoid": _plain(lambda x: 1 / (1 + (-x).exp())),
    "tanh": _plain(lambda x: 1 - 2 / ((2 * x).exp() + 1)),
    "softplus": _of(lambda op, x: torch.log1p(torch.exp(op["beta"] * x)) / op["beta"]),
    "elu": _of(lambda op, x: op["scale"] * torch.where(x > 0, x, op["alpha"] * (x.exp() - 1))),
    "exp": _plain(torch.exp),
    "softmax": _of(lambda op, x: _soft(x, op["axis"])),
    "log_softmax": _of(lambda op, x: _soft(x, op["axis"]).log()),
    "sign": _plain(torch.sign),
    "hardswish": _plain(lambda x: x * (x + 3).clamp(0, 6) / 6),
    "silu": _plain(lambda x: x / (1 + (-x).exp())),
    "mish": _plain(lambda x: x * torch.tanh((1 + x.exp()).log())),
    "gelu": _of(_gelu),
    "abs": _plain(lambda x: torch.maximum(x, -x)),
    "log": _plain(torch.log),
    "power": _of(lambda op, x: torch.float_power(x, op["exponent"])),
    "add": _plain(torch.add),
    "subtract": _plain(torch.sub),
    "multiply": _plain(torch.mul),
    "divide": _plain(torch.div),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _of(lambda op, x: _bins(op, x, lambda part: part.mean(1))),
    "adaptive_max_pool": _of(lambda op, x: _bins(op, x, lambda part: part.amax(1))),
    "global_pool": _plain(lambda x: x.flatten(1).sum(1) / prod(x.shape[1:])),
    "mean": _of(lambda op, x: x.sum(op["axes"], op["keepdim"]) / prod(x.shape[axis] for axis in op["axes"])),
    "sum": _of(lambda op, x: torch.sum(x, op["axes"], op["keepdim"])),
    "max": _of(lambda op, x: x.sort(op["axes"][0]).values.select(op["axes"][0], -1).reshape(op.shape)),
    "amax": _of(lambda op, x: torch.amax(x, op["axes"], op["keepdim"])),
    "vector_norm": _of(lambda op, x: (x.abs() ** op["order"]).sum(op["axes"], op["keepdim"]) ** (1 / op["order"])),
    "flatten": _plain(torch.flatten),
    "reshape": _of(lambda op, x: x.contiguous().view(op["to"])),
    "permute": _of(lambda op, x: torch.permute(x, op["order"])),
    "expand": _of(lambda op, x: torch.broadcast_to(x, op["to"])),
    "concat": lambda op, inputs, tensors: torch.cat(list(inputs), op["axis"]),
    "slice": _of(lambda op, x: x.index_select(op["axis"], torch.arange(op["start"], op["stop"], op["step"]))),
    "take": _take,
    "pad": _pad,
    "roll": _roll,
    "upsample": _upsample,
}  # fmt: skip
