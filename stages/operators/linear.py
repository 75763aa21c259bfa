"""Matrix products: linear layers on vectors and on tokens, products of two values, attention."""

from __future__ import annotations

from collections.abc import Sequence, Set
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from stages.operators.op import (
    Flow,
    Keep,
    Kept,
    Op,
    Operator,
    Pull,
    Reading,
    Shape,
    Tensors,
    keeps_nothing,
    keeps_others,
    register,
)  # fmt: skip
from stages.operators.shapes import broadcast, reduced

if TYPE_CHECKING:
    from torch import Tensor


def _last_axis(op: Op) -> int:
    return -1


def _always(op: Op) -> bool:
    return True


# ------------------------------------------------------------------------------------------------------------- linear


def _linear_shape(op: Op) -> Shape:
    if not op.in_shape:
        raise ValueError("a number per sample, at least a vector is needed")
    return (*op.in_shape[:-1], op.shape[-1])


def _linear_tensors(op: Op) -> dict[str, Shape]:
    weight = {"weight": (op.shape[-1], op.in_shape[-1])}
    return weight | ({"bias": op.shape[-1:]} if op.bias else {})


def _linear_macs(op: Op) -> int:
    """Every weight is used once per token."""
    return op.weights * prod(op.shape[:-1])


def _linear(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    return F.linear(inputs[0], tensors[f"{op.owner}.weight"], tensors[f"{op.owner}.bias"] if op.bias else None)


def _pull_linear(op: Op, tensors: Tensors) -> Pull:
    weight = tensors[f"{op.owner}.weight"]
    return lambda kept, flow: [Flow(flow.gradient @ weight, fresh=True)]


def _linear_onnx(op: Op, w: Any) -> None:
    if len(op.shape) == 1:
        w.node("Gemm", [*w.inputs(op), *w.weights(op)], w.output(op), transB=1)
        return
    product = w.output(op) if not op.bias else w.inner(op, "product")
    transposed = w.constant(op, "transposed", w.array(f"{op.owner}.weight").T)
    w.node("MatMul", [*w.inputs(op), transposed], product)
    if op.bias:
        w.node("Add", [product, w.given(f"{op.owner}.bias")], w.output(op))


def _aten_linear(call: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """A linear layer; a product of activations that the user wrote as one is a matmul."""
    if call.is_value(weight):
        product = _aten_matmul(call, x, call.apply("t.default", weight))
        return product if bias is None else call.apply("add.Tensor", product, bias)
    own = {"weight": weight, "bias": bias}
    return call.emit(
        "linear", [call.last_axis_free(x)], own=own, out_channels=call.tensor_shape(weight)[0], bias=bias is not None
    )


def _aten_addmm(call: Any, bias: Any, x: Any, matrix: Any, beta: float = 1, alpha: float = 1) -> Any:
    if call.is_value(matrix) or beta != 1 or alpha != 1:
        call.refuse("addmm of two activations", "a linear layer", "use x @ y + z")
    return _aten_linear(call, x, call.apply("t.default", matrix), bias)


# ------------------------------------------------------------------------------------------------------------- matmul


def _matmul_shape(op: Op) -> Shape:
    a, b = op.in_shapes
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise ValueError(f"a product of {a} and {b}")
    return (*broadcast(a[:-2], b[:-2]), a[-2], b[-1])


def _matmul_macs(op: Op) -> int:
    """Columns of the first per output element."""
    return op.elements * op.in_shape[-1]


def _matmul(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    a, b = inputs
    return _batched(a, op.in_shapes[0], op) @ _batched(b, op.in_shapes[1], op)


def _batched(x: Tensor, shape: Shape, op: Op) -> Tensor:
    """A value of fewer axes than the product, with axes of 1 behind the batch."""
    missing = len(op.shape) - len(shape)
    return x.reshape(x.shape[0], *(1,) * missing, *shape) if missing else x


def _pull_matmul(op: Op, tensors: Tensors) -> Pull:
    first, second = op.in_shapes

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        g, empty = flow.gradient, Flow(flow.gradient, fresh=False)
        a, b = empty, empty
        if 1 in kept.inputs:
            spread = g @ _batched(kept.inputs[1], second, op).transpose(-1, -2)
            a = Flow(reduced(spread, first), fresh=True)
        if 0 in kept.inputs:
            spread = _batched(kept.inputs[0], first, op).transpose(-1, -2) @ g
            b = Flow(reduced(spread, second), fresh=True)
        return [a, b]

    return pull


def _matmul_onnx(op: Op, w: Any) -> None:
    w.node("MatMul", w.ranked_inputs(op), w.output(op))


def _aten_matmul(call: Any, a: Any, b: Any) -> Any:
    """`@`: a product with a parameter is a linear layer without bias; vectors are matrices of one row or column."""
    if not call.is_value(b) and call.tensor_rank(b) == 2:
        return _aten_linear(call, a, call.apply("t.default", b))
    return call.emit("matmul", call.aligned(a, b))


# ---------------------------------------------------------------------------------------------------------- attention


def _attention_shape(op: Op) -> Shape:
    q, k, v = op.in_shapes[:3]
    if len(q) < 2 or q[-1] != k[-1] or k[-2] != v[-2] or not q[:-2] == k[:-2] == v[:-2]:
        raise ValueError(f"attention of queries {q}, keys {k} and values {v}")
    products = (*q[:-1], k[-2])
    if any(op["causal"] or broadcast(mask, products) != products for mask in op.in_shapes[3:]):
        raise ValueError(f"a mask {op.in_shapes[3]} on products {products}, causal {op['causal']}")
    return (*q[:-1], v[-1])


def _attention_macs(op: Op) -> int:
    """Queries times keys, and probabilities times values."""
    q, k, v = op.in_shapes[:3]
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _keeps_attention(op: Op, wanted: Set[int]) -> Keep:
    """Queries, keys and values: the probabilities are computed again."""
    return Keep(inputs=tuple(range(len(op.inputs))))


def _attention(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    from torch.nn import functional as F

    q, k, v, *masks = inputs
    mask = _batched(masks[0], op.in_shapes[3], op) if masks else None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=bool(op["causal"]), scale=float(op["scale"]))


def _attention_onnx(op: Op, w: Any) -> None:
    q, k, v, *mask = w.ranked_inputs(op)
    rank = len(op.in_shape) + 1
    order = [*range(rank - 2), rank - 1, rank - 2]
    w.node("Transpose", [k], w.inner(op, "keys"), perm=order)
    w.node("MatMul", [q, w.inner(op, "keys")], w.inner(op, "products"))
    w.node("Mul", [w.inner(op, "products"), w.number(op["scale"])], w.inner(op, "scaled"))
    last = w.inner(op, "scaled")
    if op["causal"]:
        last = w.masked(op, last, causal=True)
    if mask:
        w.node("Add", [last, mask[0]], w.inner(op, "masked"))
        last = w.inner(op, "masked")
    w.node("Softmax", [last], w.inner(op, "shares"), axis=-1)
    w.node("MatMul", [w.inner(op, "shares"), v], w.output(op))


def _aten_attention(
    call: Any, q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if enable_gqa:
        call.refuse("attention with grouped queries", "as many key heads as query heads", "repeat the keys and values")
    values = [call.value(part) for part in (q, k, v)]
    factor = 1 / sqrt(values[0].shape[-1]) if scale is None else scale
    if attn_mask is not None:
        values.append(call.mask(attn_mask, values[0]))
    return call.emit("attention", values, scale=float(factor), causal=bool(is_causal))


# ------------------------------------------------------------------------------------------------------ ONNX, reading


def _prepare_gemm(node: Any, tensors: dict[str, Any]) -> None:
    """alpha * A B + beta * C with B as (out, in); the factors go into weight and bias."""
    weight = tensors.get("weight")
    if weight is None:
        return
    turned = weight if node.get("transB", 0) else weight.T
    tensors["weight"] = turned * node.get("alpha", 1.0) if node.get("alpha", 1.0) != 1 else turned
    if "bias" in tensors:
        bias = tensors["bias"] * node.get("beta", 1.0) if node.get("beta", 1.0) != 1 else tensors["bias"]
        if bias.size in (1, len(turned)):
            bias = bias.reshape(-1) if bias.size == len(turned) else bias.repeat(len(turned))
        tensors["bias"] = bias


def _read_gemm(node: Any, a: Any, b: Any, c: Any = None) -> Any:
    from torch.nn import functional as F

    if node.get("transA", 0):
        node.refuse("the batch as columns (transA)", "each sample a row")
    if "weight" in node.places.values():
        return F.linear(a, b, c) if c is None or c.ndim == 1 else F.linear(a, b) + c
    product = a @ (b.transpose(-1, -2) if node.get("transB", 0) else b) * node.get("alpha", 1.0)
    return product if c is None else product + node.tensor(c, a) * node.get("beta", 1.0)


def _prepare_matmul(node: Any, tensors: dict[str, Any]) -> None:
    """x W with W as (out, in)."""
    if "weight" in tensors and tensors["weight"].ndim == 2:
        tensors["weight"] = tensors["weight"].T


def _read_matmul(node: Any, a: Any, b: Any, bias: Any = None) -> Any:
    from torch.nn import functional as F

    fixed = node.places.get(1) == "weight" and b.ndim == 2
    if fixed:
        return F.linear(a, b, bias)
    return a @ b


def _read_attention(node: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    """What `graphs.onnx_patterns` found: a softmax of products, times values."""
    import torch
    from torch.nn import functional as F

    mask = mask if mask is None or isinstance(mask, torch.Tensor) else torch.from_numpy(mask)
    k = k.transpose(-1, -2) if node.get("turned") else k
    k, v = (part.expand(*q.shape[:-2], *part.shape[-2:]) for part in (k, v))  # keys that all heads share
    return F.scaled_dot_product_attention(q, k, v, mask, scale=node.get("scale"))


register(
    Operator(
        kind="linear",
        doc="linear layer on a vector, or on every token",
        fields=("bias",),
        tensors=_linear_tensors,
        shape=_linear_shape,
        macs=_linear_macs,
        keeps=keeps_nothing,
        trains=True,
        channel_axis=_last_axis,
        matrix=_always,
        forward=_linear,
        pull=_pull_linear,
        onnx=_linear_onnx,
        aten={"linear.default": _aten_linear, "addmm.default": _aten_addmm},
        from_onnx={"Gemm": Reading(_read_gemm, ("-", "weight", "bias"), _prepare_gemm)},
    ),
    Operator(
        kind="matmul",
        doc="matrix product of two values over their last two axes",
        arity=(2, 2),
        shape=_matmul_shape,
        macs=_matmul_macs,
        keeps=keeps_others,
        forward=_matmul,
        pull=_pull_matmul,
        onnx=_matmul_onnx,
        aten={"matmul.default": _aten_matmul, "bmm.default": _aten_matmul, "mm.default": _aten_matmul},
        from_onnx={"MatMul": Reading(_read_matmul, ("value", "weight", "bias"), _prepare_matmul)},
    ),
    Operator(
        kind="attention",
        doc="softmax(scale * Q K^T + mask) V per head",
        arity=(3, 4),
        args={"scale": float, "causal": bool},
        shape=_attention_shape,
        macs=_attention_macs,
        keeps=_keeps_attention,
        forward=_attention,
        onnx=_attention_onnx,
        aten={"scaled_dot_product_attention.default": _aten_attention},
        from_onnx={"Attention": Reading(_read_attention, ("-", "-", "-", "value"))},
    ),
)
