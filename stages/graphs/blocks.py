"""The blocks of a network: its repeating unit, found from the graph and from the names of the user's modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from stages.graphs.graph import Graph
from stages.operators import Op


def with_blocks(ops: tuple[Op, ...]) -> Graph:
    """The graph of these operators, each given its block.

    A block is the module in which branches join again, by an addition or a concatenation (`blocks.07`, `layer1.0`,
    `features.denseblock1.denselayer2`), and every module whose path differs from such a one by numbers alone: units
    with a stride have no addition. A network without such modules has its shortest numbered paths (`features.3`) as
    blocks, without numbers each child of the model that holds a layer. What runs before the second block belongs to
    the first (a stem), what runs between two blocks to the earlier one, what runs after the last one to none.
    """
    layers = [op for op in ops if op.is_layer]
    rule = _rule(ops, layers)
    blocks = tuple(dict.fromkeys(name for op in layers if (name := rule(op.name))))
    index: Mapping[str, int] = {name: i for i, name in enumerate(blocks)}
    last = max((i for i, op in enumerate(ops) if rule(op.name) in index), default=-1)
    current, placed = 0, []
    for i, op in enumerate(ops):
        current = index.get(rule(op.name), current)
        placed.append(replace(op, block=-1 if i == 0 or i > last else current))
    return Graph(tuple(placed), blocks)


def inside(graph: Graph, block: int) -> tuple[Op, ...]:
    """The layers of one block's own module, in execution order: without a stem or what runs behind the block."""
    path = graph.blocks[block]
    return tuple(op for op in graph.layers if op.block == block and f"{op.name}.".startswith(f"{path}."))


def _rule(ops: tuple[Op, ...], layers: list[Op]) -> Callable[[str], str]:
    """Name of an operator -> its block, or an empty text."""
    units = _units(ops, layers)
    if len(units) > 1:
        patterns = {_pattern(unit) for unit in units}
        return lambda name: next((path for path in _paths(name) if _pattern(path) in patterns), "")
    if any(_numbered(op.name) for op in layers):
        return _numbered
    return lambda name: name.partition(".")[0]


def _units(ops: tuple[Op, ...], layers: list[Op]) -> set[str]:
    """Paths of the modules with at least two layers in which branches join."""
    inside = Counter(path for op in layers for path in _paths(op.name))
    joins = [op.name for op in ops if op.operator.joins and len(set(op.inputs)) > 1]
    found = (next((path for path in _paths(name) if inside[path] > 1), "") for name in joins)
    return {path for path in found if path}


def _paths(name: str) -> Iterator[str]:
    """The modules that an operator stands in, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _numbered(name: str) -> str:
    """The shortest prefix of a path that ends in a number, `layer1.0.conv1` -> `layer1.0`; empty if there is none."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if end is None else ".".join(parts[: end + 1])
