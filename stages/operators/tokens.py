"""Fewer tokens: those that a class token attends to go on, the others are dropped or fused into one."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

from stages.operators.op import Flow, Keep, Kept, Op, Operator, Pull, Reading, Shape, Tensors, register

if TYPE_CHECKING:
    from torch import Tensor


def _shape(op: Op) -> Shape:
    x, scores = op.in_shapes
    if len(x) != 2 or scores != x[:1] or not 1 <= op["keep"] < x[0] - 1:
        raise ValueError(f"{op['keep']} of the tokens {x} by scores {scores}, the class token not counted")
    return (1 + op["keep"] + op["fuse"], x[1])


def _macs(op: Op) -> int:
    """Fused: every value of a dropped token times the token's score; otherwise a copy."""
    tokens, width = op.in_shape
    return (tokens - 1 - int(op["keep"])) * width if op["fuse"] else 0


def _keeps(op: Op, wanted: Set[int]) -> Keep:
    """The scores, of which the choice is made again; where they get a gradient through a fused token the tokens too."""
    return Keep(inputs=(0, 1) if op["fuse"] and 1 in wanted else (1,))


def _chosen(op: Op, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (N, tokens, 1) of what is kept, and of what is dropped, by falling score; of equals the first."""
    order = scores[:, 1:].argsort(dim=1, descending=True, stable=True).unsqueeze(-1) + 1
    return order[:, : op["keep"]], order[:, op["keep"] :]


def _forward(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    import torch

    x, scores = inputs
    kept, dropped = _chosen(op, scores)
    parts = [x[:, :1], x.take_along_dim(kept, 1)]
    if op["fuse"]:
        parts.append(scores.take_along_dim(dropped[..., 0], 1).unsqueeze(1) @ x.take_along_dim(dropped, 1))
    return torch.cat(parts, 1)


def _pull(op: Op, tensors: Tensors) -> Pull:
    """The choice has no gradient; the fused token sum s_j x_j has one by its tokens and one by their scores."""
    keep, width = op["keep"], op.in_shape[1]

    def pull(held: Kept, flow: Flow) -> list[Flow]:
        g, scores = flow.gradient, held.inputs[1]
        kept, dropped = _chosen(op, scores)
        by_tokens, by_scores = g.new_zeros(len(g), *op.in_shape), g.new_zeros(scores.shape)
        by_tokens[:, :1] = g[:, :1]
        by_tokens.scatter_(1, kept.expand(-1, -1, width), g[:, 1 : 1 + keep])
        if op["fuse"]:
            fused = g[:, -1:]
            by_tokens.scatter_(1, dropped.expand(-1, -1, width), scores[..., None].take_along_dim(dropped, 1) * fused)
            if 0 in held.inputs:
                products = held.inputs[0].take_along_dim(dropped, 1) @ fused.transpose(1, 2)
                by_scores.scatter_(1, dropped[..., 0], products[..., 0])
        return [Flow(by_tokens, fresh=True), Flow(by_scores, fresh=True)]

    return pull


# --------------------------------------------------------------------------------------------------------------- ONNX


def _onnx(op: Op, w: Any) -> None:
    """All tokens behind the class token in their order by score, cut in two."""
    x, scores = w.inputs(op)
    tokens, keep = op.in_shape[0], op["keep"]
    name = {what: w.inner(op, what) for what in ("class", "rest", "others", "sorted", "order", "indices", "ordered")}

    def cut(value: str, start: int, stop: int, output: str) -> None:
        w.node("Slice", [value, *(w.integers([number]) for number in (start, stop, 1))], output)

    cut(x, 0, 1, name["class"])
    cut(x, 1, tokens, name["rest"])
    cut(scores, 1, tokens, name["others"])
    w.node("TopK", [name["others"], w.integers([tokens - 1])], (name["sorted"], name["order"]), axis=1)
    w.node("Unsqueeze", [name["order"], w.integers([2])], name["indices"])
    w.node("GatherND", [name["rest"], name["indices"]], name["ordered"], batch_dims=1)
    parts = [name["class"], w.inner(op, "kept")]
    cut(name["ordered"], 0, keep, parts[1])
    if op["fuse"]:
        shares, row, dropped = (w.inner(op, what) for what in ("shares", "row", "dropped"))
        cut(name["sorted"], keep, tokens - 1, shares)
        w.node("Unsqueeze", [shares, w.integers([1])], row)
        cut(name["ordered"], keep, tokens - 1, dropped)
        parts.append(w.inner(op, "fused"))
        w.node("MatMul", [row, dropped], parts[2])
    w.node("Concat", parts, w.output(op), axis=1)


def _read_topk(node: Any, x: Any, count: Any) -> Any:
    """Sorted, of equals the first, as ONNX has it; its indices are whole numbers that no gradient comes by."""
    axis, (most,) = node.get("axis", -1), node.whole(count)
    order = x.argsort(dim=axis, descending=bool(node.get("largest", 1)), stable=True).narrow(axis, 0, most)
    return [x.take_along_dim(order, axis), order]


def _read_gather_nd(node: Any, x: Any, places: Any) -> Any:
    if node.get("batch_dims", 0) != 1 or places.ndim != 3 or places.shape[-1] != 1:
        node.refuse(f"places {tuple(places.shape)}", "one number per token of each sample (batch_dims 1)")
    return x.take_along_dim(places.reshape(*places.shape[:2], *(1,) * (x.ndim - 2)), 1)


register(
    Operator(
        kind="drop_tokens",
        doc="the class token, the tokens of highest score, and if wanted one more: the others, times their scores",
        arity=(2, 2),
        args={"keep": int, "fuse": bool},
        shape=_shape,
        macs=_macs,
        keeps=_keeps,
        forward=_forward,
        pull=_pull,
        onnx=_onnx,
        aten={},
        from_onnx={
            "TopK": Reading(_read_topk, ("-", "-")),
            "GatherND": Reading(_read_gather_nd, ("value", "-")),
        },
    )
)
