"""A graph under construction: the bookkeeping between torch.fx nodes and operators with stable names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from stages.errors import UsageError
from stages.models.graph import Graph, Op, Shape


@dataclass
class Builder:
    """Rules (`translate.py`) read torch.fx nodes and `emit` operators here."""

    captured: fx.GraphModule
    ops: list[Op] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """`<op>.weight`, `<op>.bias`, for batchnorm also `.running_mean`, `.running_var` and the scalar `.eps`."""
    names: dict[str, str] = field(default_factory=dict)
    """Key of `tensors` -> name in the module's own state dict; constants have none."""
    memory: set[int] = field(default_factory=set)
    """Where the tensors lie, to find weights that are used twice."""
    by_node: dict[fx.Node, Op] = field(default_factory=dict)
    """The operator that computes a node's value, or one that holds the same elements in another shape."""

    def shape(self, node: fx.Node) -> Shape | None:
        """Shape of the node's value without the batch dimension; None for values that are no batch of activations."""
        shape = node.meta.get("shape", ())
        return shape[1:] if len(shape) > 1 and node.op != "get_attr" else None

    def module(self, node: fx.Node) -> nn.Module:
        return self.captured.get_submodule(str(node.target))

    def where(self, node: fx.Node) -> str:
        """Path of the module that calls the node's operator, for messages."""
        return _path(node) or "the model's forward"

    def source(self, value: Any, user: fx.Node) -> Op:
        """The operator whose output `value` is. Raises `UsageError` if it is none or was reshaped in between."""
        op = self.by_node.get(value) if isinstance(value, fx.Node) else None
        if op is None:
            raise UsageError(self.where(user), f"{called(user)} reads {value!r}"[:120], "activations only")
        if op.shape != self.shape(value):
            raise UsageError(
                self.where(user),
                f"{called(user)} reads {op.name} reshaped to {self.shape(value)}",
                "flattening to (N, D) only",
                "flatten right after global pooling",
            )
        return op

    def emit(self, node: fx.Node, kind: str, inputs: Sequence[Any], *, name: str = "", **fields: Any) -> None:
        """Append the operator that computes `node` from the values `inputs`."""
        sources = [self.source(value, node) for value in inputs]
        shape = self.shape(node)
        if shape is None:
            raise UsageError(self.where(node), f"{called(node)} gives no batch of activations", "(N, ...)")
        if kind == "global_pool":
            shape = shape[:1]
        in_shape = sources[0].shape if sources else ()
        names = tuple(source.name for source in sources)
        op = Op(name or self.fresh(node, kind), kind, names, shape, in_shape, **fields)
        self.ops.append(op)
        self.by_node[node] = op

    def alias(self, node: fx.Node, value: Any) -> Op:
        """`node` holds the elements of `value`, perhaps in another shape; returns the operator that computed them."""
        op = self.by_node.get(value) if isinstance(value, fx.Node) else None
        if op is None:
            raise UsageError(self.where(node), f"{called(node)} of {value!r}"[:120], "an activation")
        self.by_node[node] = op
        return op

    def fresh(self, node: fx.Node, kind: str) -> str:
        """A free name: the path of a module call, else `<caller's path>.<kind>`; numbered when taken."""
        base = _path(node) if node.op == "call_module" else f"{_path(node)}.{kind}".lstrip(".")
        taken = {op.name for op in self.ops}
        return next(name for name in (base, *(f"{base}_{i}" for i in range(1, len(taken) + 2))) if name not in taken)

    def hold(self, key: str, tensor: Tensor, name: str | None, user: fx.Node) -> None:
        """Keep a tensor under `<op>.<what>`; `name` is its place in the module's state dict."""
        if name is not None:
            memory = tensor.data_ptr() or id(tensor)
            if memory in self.memory:
                raise UsageError(
                    self.where(user), f"{name} is used twice", "one use per weight", "give each use a layer of its own"
                )
            self.memory.add(memory)
            self.names[key] = name
        self.tensors[key] = tensor.detach()


def called(node: fx.Node) -> str:
    """An operator as its user wrote it: the name of the function, method or module."""
    return getattr(node.target, "__name__", str(node.target))


def per_axis(value: Any, length: int) -> Shape:
    """One entry per spatial axis, as torch reads `3`, `(3,)` and `(3, 3)`."""
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * length if len(value) == 1 else tuple(value)


def _path(node: fx.Node) -> str:
    """Path of the module that a node belongs to; of the module itself for a module call."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


# ------------------------------------------------------------------------------------------------------------ blocks


def with_blocks(ops: tuple[Op, ...]) -> Graph:
    """The graph of these operators, each given its block.

    A block is the shortest module path that ends in a number and holds a layer (`blocks.07`, `layer1.0`,
    `features.3`); without numbered paths, each child of the model that holds a layer. What runs before the second
    block belongs to the first (a stem), what runs between two blocks to the earlier one, what runs outside numbered
    paths after the last one to none.
    """
    layers = [op for op in ops if op.is_layer]
    rule: Callable[[str], str] = _numbered if any(_numbered(op.name) for op in layers) else _child
    blocks = tuple(dict.fromkeys(name for op in layers if (name := rule(op.name))))
    index: Mapping[str, int] = {name: i for i, name in enumerate(blocks)}
    last = max((i for i, op in enumerate(ops) if rule(op.name) in index or _numbered(op.name)), default=-1)
    current, placed = 0, []
    for i, op in enumerate(ops):
        current = index.get(rule(op.name), current)
        placed.append(replace(op, block=-1 if op.kind == "input" or i > last else current))
    return Graph(tuple(placed), blocks)


def _numbered(name: str) -> str:
    """The shortest prefix of a path that ends in a number, `layer1.0.conv1` -> `layer1.0`; empty if there is none."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if end is None else ".".join(parts[: end + 1])


def _child(name: str) -> str:
    return name.partition(".")[0]
