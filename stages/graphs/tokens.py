"""Fewer tokens behind chosen blocks of a vision transformer: a graph rewritten so that it drops them.

BSR (arXiv:2405.10951, the authors' `reprogram.py`): behind the attention of a block, before its perceptron, go on the
class token, the share of tokens to which it attends most, and if wanted the sum of the others, each times its score.
Found by structure, whatever the model's classes and names: a parameter in front of a sequence (the class token),
attention among all of it, and the addition of what the attention gives. From there on every shape is made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from math import ceil, prod
from typing import Any, NoReturn

import numpy as np

from stages.artifacts.records import Array
from stages.errors import UsageError, require
from stages.graphs.graph import Graph
from stages.operators import TABLE, Op, Shape

WHERE = "--drop-tokens"
Axes = frozenset[int]
"""Which axes of a value count tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drops:
    """Where tokens are dropped, and how many."""

    blocks: tuple[int, ...]
    """Numbers from 0, in the order of the attentions."""
    keep: float
    """Share of the tokens that each of them lets pass, in (0, 1]: ceil(keep * (N - 1)) of N - 1, in decimals."""
    fuse: bool = False
    """The others go on as one more token."""

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, "--keep-tokens", f"{self.keep}", "a share above 0 and at most 1")
        ascending = all(a < b for a, b in pairwise(self.blocks))
        require(bool(self.blocks) and ascending, WHERE, f"{self.blocks}", "numbers of blocks, ascending")

    def kept(self, tokens: int) -> int:
        """How many of the `tokens` behind the class token pass.

        >>> Drops(blocks=(3,), keep=0.7).kept(10), Drops(blocks=(3,), keep=0.5).kept(196)
        (7, 98)
        """
        return ceil(Fraction(str(self.keep)) * tokens)


def drop_tokens(graph: Graph, drops: Drops) -> tuple[Graph, dict[str, Array]]:
    """The graph with tokens dropped, and the tensors of its new operators (float32, by `<operator>.value`).

    The layers, their names and tensors stay; so does what comes before the first drop. Where nothing is to drop
    (`keep` 1, or so few tokens that all pass) the graph stays as it is.

    Raises `UsageError` where there is no class token or no attention among all tokens, for blocks that are not there
    or the last one, and for an operator that needs the dropped tokens: a layer over tokens, a map made of them, a
    position that may be gone, a mask, a value from before the drop.
    """
    require(
        all(op.kind != "drop_tokens" for op in graph.ops), WHERE, "a model that drops tokens already", "one without"
    )
    start, attentions = _sequence(graph)
    last = len(attentions) - 1
    beyond = [number for number in drops.blocks if not 0 <= number < last]
    fix = "only the class token leaves the last one" if beyond == [last] else ""
    require(not beyond, WHERE, f"block {min(beyond, default=0)}", f"0 to {last - 1}", fix)
    ends = [*attentions[1:], graph.ops[-1]]
    places = {_addition(graph, attentions[n], ends[n], start): attentions[n] for n in drops.blocks}
    work = _Rewriting(graph, start.shape[0])
    for op in graph.ops:
        work.resize(op)
        if op.name in places:
            work.drop(op, places[op.name], drops)
    features = work.made[work.name(graph.output)].shape
    require(features == graph.ops[-1].shape, WHERE, f"features of shape {features}", f"{graph.ops[-1].shape} as before")
    return Graph(tuple(work.made.values()), graph.blocks), work.tensors


# ------------------------------------------------------------------------------------------------------- what is found


def _sequence(graph: Graph) -> tuple[Op, list[Op]]:
    """The operator that puts the class token in front, and the attentions among all tokens behind it, in order."""
    among = [op for op in graph.ops if _is_among(graph, op)]
    require(bool(among), WHERE, "no attention among tokens", "a vision transformer")
    starts = [op for op in graph.ops if _puts_in_front(graph, op)]
    for start in starts:
        behind = graph.downstream({start.name})
        found = [op for op in among if op.name in behind and op.in_shape[-2] == start.shape[0] and len(op.shape) < 4]
        if len(found) > 1:
            return start, found
    windows = not starts and any(len(op.shape) > 3 for op in among)
    reason = "tokens that form a map, with attention within windows of it" if windows else "no class token"
    if starts:
        reason = f"no two blocks with attention among {starts[0].name}'s {starts[0].shape[0]} tokens"
    raise UsageError(WHERE, reason, "a class token in front of the tokens, whose attention scores them")


def _puts_in_front(graph: Graph, op: Op) -> bool:
    """Whether an operator puts one parameter in front of tokens (N, C)."""
    along = op.kind == "concat" and len(op.shape) == 2 and op["axis"] == 0
    return along and op.inputs[0] in graph.constants and op.in_shape[0] == 1 and len(op.inputs) > 1


def _is_among(graph: Graph, op: Op) -> bool:
    """Attention in which every token is asked for by every token: one operator, or a softmax times the values."""
    if op.kind == "attention":
        return op.in_shapes[0][-2] == op.in_shapes[1][-2]
    square = op.kind == "softmax" and len(op.shape) > 1 and op.shape[-1] == op.shape[-2]
    readers = [graph[name] for name in graph.consumers[op.name]] if square else []
    last = square and op["axis"] == len(op.shape) - 1
    return last and any(reader.kind == "matmul" and reader.inputs[0] == op.name for reader in readers)


def _addition(graph: Graph, attention: Op, end: Op, start: Op) -> str:
    """Where what an attention gives is added to the tokens that it read: after it and before `end`."""
    if attention.kind == "attention" and (attention["causal"] or len(attention.inputs) > 3):
        raise UsageError(WHERE, f"{attention.name} has a mask", "attention without one")
    behind = graph.downstream({attention.name})
    for op in graph.ops[graph.position[attention.name] : graph.position[end.name]]:
        own = [name for name in op.inputs if name not in behind and name not in graph.constants]
        if op.kind == "add" and op.shape == start.shape and op.name in behind and len(own) == 1:
            return op.name
    raise UsageError(WHERE, f"what {attention.name} gives is not added to its tokens", "a residual block")


# ---------------------------------------------------------------------------------------------------------- the rewrite


@dataclass
class _Rewriting:
    """The new graph as it grows."""

    graph: Graph
    tokens: int
    """How many there were, the class token included."""
    made: dict[str, Op] = field(default_factory=dict)
    tensors: dict[str, Array] = field(default_factory=dict)
    counting: dict[str, Axes] = field(default_factory=dict)
    """Values with fewer tokens than before -> the axes that count them."""
    instead: dict[str, str] = field(default_factory=dict)

    def name(self, name: str) -> str:
        """What the readers of a value read now."""
        return self.instead.get(name, name)

    def resize(self, op: Op) -> None:
        """Append an operator of the old graph, for as many tokens as there are now."""
        inputs = tuple(map(self.name, op.inputs))
        axes = [self.counting.get(name, frozenset()) for name in inputs]
        if not any(axes):
            self.made[op.name] = op
            return
        shapes = tuple(self.made[name].shape for name in inputs)
        if op.kind not in RULES:
            _refuse(op, "reads tokens in their places")
        args, found = RULES[op.kind](_Step(op, axes, shapes, self.tokens))
        new = replace(op, inputs=inputs, in_shapes=shapes, args=tuple({**dict(op.args), **args}.items()))
        try:
            new = replace(new, shape=new.operator.shape(new))
        except ValueError as error:
            _refuse(op, f"does not fit: {error}")
        if new.operator.tensors(new) != op.operator.tensors(op):
            _refuse(op, "has weights for each token")
        self.made[op.name], self.counting[op.name] = new, found

    def drop(self, at: Op, attention: Op, drops: Drops) -> None:
        """Append the scores of the tokens and what drops them; readers of `at` read that."""
        tokens = self.made[at.name].shape[0]
        keep = drops.kept(tokens - 1)
        if keep == tokens - 1:
            return
        scores = self._scores(at, attention)
        self.instead[at.name] = self._add(at, "drop_tokens", [at.name, scores], keep=keep, fuse=drops.fuse)
        self.counting[self.instead[at.name]] = frozenset({0})

    def _scores(self, at: Op, attention: Op) -> str:
        """s_j = mean over heads of softmax_j(q_class k_j), as the attention has it: (N,)."""
        source = self.made[attention.name]
        rank = len(source.shape)
        row: dict[str, Any] = {"axis": rank - 2, "start": 0, "stop": 1, "step": 1}
        if attention.kind == "softmax":
            shares = self._add(at, "slice", [source.name], **row)
        else:
            query, keys = self._add(at, "slice", [source.inputs[0]], **row), source.inputs[1]
            columns = self._add(at, "permute", [keys], order=(*range(rank - 2), rank - 1, rank - 2))
            factor = self._add(at, "constant", [])
            self.tensors[f"{factor}.value"] = np.array(attention["scale"], np.float32)
            products = self._add(at, "matmul", [query, columns])
            scaled = self._add(at, "multiply", [products, factor])
            shares = self._add(at, "softmax", [scaled], axis=rank - 1)
        return self._add(at, "mean", [shares], axes=tuple(range(rank - 1)), keepdim=False)

    def _add(self, at: Op, kind: str, inputs: Sequence[str], **args: Any) -> str:
        """Append a new operator under a name of its own in the module of `at`."""
        name = f"{at.name.rpartition('.')[0]}.drop.{kind}".lstrip(".")
        while name in self.graph.by_name or name in self.made:
            name += "_"
        op = Op(
            name, kind, tuple(inputs), (), tuple(self.made[source].shape for source in inputs),
            args=tuple((key, args[key]) for key in TABLE[kind].args), block=at.block,
        )  # fmt: skip
        self.made[name] = replace(op, shape=op.operator.shape(op))
        return name


def _refuse(op: Op, reason: str) -> NoReturn:
    raise UsageError(WHERE, f"{op.name} ({op.kind}) {reason}", "operators that any number of tokens passes")


# ------------------------------------------------------------------------------------------------------ fewer tokens


@dataclass(frozen=True, slots=True)
class _Step:
    """An operator of the old graph and its inputs of now."""

    op: Op
    axes: Sequence[Axes]
    """Per input, which axes count tokens."""
    shapes: tuple[Shape, ...]
    """Of the inputs, now."""
    tokens: int
    """How many there were."""


Rule = Callable[[_Step], tuple[Mapping[str, Any], Axes]]
"""What changes of an operator's attributes, and which axes of its output count tokens. Raises `UsageError`."""


def _same(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    return {}, step.axes[0]


def _layernorm(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    if max(step.axes[0]) >= len(step.op.shape) - step.op["axes"]:
        _refuse(step.op, "is over tokens")
    return _same(step)


def _broadcast(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    return {}, _aligned(step, len(step.op.shape))


def _aligned(step: _Step, stop: int) -> Axes:
    """The inputs' axes where their last ones meet, those from `stop` on left out."""
    rank = len(step.op.shape)
    moved = (rank - len(shape) + axis for shape, axes in zip(step.shapes, step.axes, strict=True) for axis in axes)
    return frozenset(axis for axis in moved if axis < stop)


def _product(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    """Rows of the first input, columns of the last: matmul(a, b), attention(q, k, v)."""
    rank, last = len(step.op.shape), 1 if step.op.kind == "matmul" else 2
    rows = {rank - 2} if len(step.shapes[0]) - 2 in step.axes[0] else set()
    columns = {rank - 1} if len(step.shapes[last]) - 1 in step.axes[last] else set()
    return {}, _aligned(step, rank - 2) | rows | columns


def _permute(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    return {}, frozenset(step.op["order"].index(axis) for axis in step.axes[0])


def _reshape(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    """Tokens stay an axis of their own, with as much before it."""
    op, to = step.op, list(step.op.shape)
    found = set()
    for axis in step.axes[0]:
        before, size = prod(op.in_shape[:axis]), op.in_shape[axis]
        at = next((i for i, n in enumerate(op.shape) if n == size and prod(op.shape[:i]) == before), None)
        if at is None:
            _refuse(op, f"makes {op.shape} of {op.in_shape}, a map or a vector of tokens in their places")
        to[at] = step.shapes[0][axis]
        found.add(at)
    return {"to": tuple(to)} if op.kind == "reshape" else {}, frozenset(found)


def _expand(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    op, to = step.op, list(step.op.shape)
    found = {axis + len(op.shape) - len(op.in_shape): axis for axis in step.axes[0]}
    for at, axis in found.items():
        to[at] = step.shapes[0][axis]
    return {"to": tuple(to)}, frozenset(found)


def _slice(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    """The class token, or all behind it."""
    op, axes, axis = step.op, step.axes[0], step.op["axis"]
    if axis not in axes:
        return {}, axes
    places = range(op["start"], op["stop"], op["step"])
    if op.in_shape[axis] == step.tokens and places == range(1):
        return {}, axes - {axis}
    if op.in_shape[axis] == step.tokens and places == range(1, step.tokens):
        return {"stop": step.shapes[0][axis]}, axes
    _refuse(op, f"reads tokens from {places.start} on by their places, and they may be gone")


def _take(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    op, axes, axis = step.op, step.axes[0], step.op["axis"]
    if axis in axes and not (op["index"] == (0,) and op.in_shape[axis] == step.tokens):
        _refuse(op, "reads tokens by their places, and they may be gone")
    return {}, axes - {axis}


def _concat(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    found = frozenset().union(*step.axes)
    if step.op["axis"] in found:
        _refuse(step.op, "puts tokens behind each other anew")
    return {}, found


def _reduction(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    """Over tokens, whichever are left, or beside them."""
    gone, kept = step.op["axes"], step.op["keepdim"]
    left = step.axes[0] - set(gone)
    return {}, left if kept else frozenset(axis - sum(each < axis for each in gone) for axis in left)


def _global_pool(step: _Step) -> tuple[Mapping[str, Any], Axes]:
    return {}, step.axes[0] & {0}


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("relu", "relu6", "clamp", "leaky_relu", "prelu", "hardsigmoid", "sigmoid", "tanh", "elu", "exp", "softmax",
         "log_softmax", "sign", "hardswish", "silu", "softplus", "mish", "gelu", "abs", "log", "power", "batchnorm",
         "scale", "linear"), _same,
    ),
    "layernorm": _layernorm,
    **dict.fromkeys(("add", "subtract", "multiply", "divide"), _broadcast),
    **dict.fromkeys(("matmul", "attention"), _product),
    "permute": _permute,
    **dict.fromkeys(("reshape", "flatten"), _reshape),
    "expand": _expand,
    "slice": _slice,
    "take": _take,
    "concat": _concat,
    **dict.fromkeys(("mean", "sum", "max", "amax", "vector_norm"), _reduction),
    "global_pool": _global_pool,
}  # fmt: skip
"""Kinds that any number of tokens passes: none of them knows a token by its place, the class token's aside."""
