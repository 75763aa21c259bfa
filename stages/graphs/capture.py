"""From a torch module to a `Graph`: what the module computes in evaluation mode, with stable names.

torch.export captures the module for a batch of `BATCH` samples, a prime, on shapes alone: wherever a size is a multiple
of it, the batch is in that axis. Each ATen call is then handed to the table's translators (`Operator.aten`), which
emit operators on single samples (`graphs.calls`). What depends on no input is computed here and becomes a tensor of
the graph: weights made by hooks and parametrisations, masks, position tables.

A layer is named by the path of the module whose weight it uses, any other operator by the path of its module, with its
kind where the module holds others too (`blocks.02.add`).
"""

from __future__ import annotations

import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import UsageError
from stages.graphs.blocks import with_blocks
from stages.graphs.calls import (
    BATCH,
    FORWARD,
    Call,
    Constant,
    Construction,
    Missing,
    Value,
    as_written,
    called,
    full_shape,
    is_known,
    module_path,
    shown,
)  # fmt: skip
from stages.graphs.graph import Graph, needed
from stages.graphs.opaque import notes_on
from stages.graphs.origins import Origin
from stages.operators import Op, Shape
from stages.operators.shapes import DROPPED

AGREEMENT = 1e-3
"""Largest difference between a value of the module and the graph's, relative to its own size: rounding, not another
function (float32, hundreds of layers)."""


@dataclass(frozen=True)
class Captured:
    """A captured module: its graph with BatchNorm in place, its tensors, and where each lies in the module."""

    graph: Graph
    tensors: dict[str, Tensor]
    """`<operator>.<what>`; parameters and buffers share the module's memory."""
    origins: dict[str, Origin]
    """Key of `tensors` -> its place in the module's state dict; what was computed has none."""
    computed: dict[str, frozenset[str]]
    """Key of `tensors` -> the entries of the state dict that it was computed from, where it was."""
    columns: dict[tuple[str, int, int], Origin] = field(default_factory=dict)
    """Columns of a recurrent layer's weight (key of `tensors`, start, stop) -> the entry of the state dict."""
    notes: tuple[str, ...] = ()
    """What a user should know."""

    @property
    def reads_tokens(self) -> bool:
        """Whether an embedding reads the input."""
        first = self.graph.ops[0].name
        return any(self.graph.root(op.inputs[0]) == first for op in self.graph.ops if op.operator.entries(op))

    @property
    def entries(self) -> int:
        """Whole numbers below this may be an embedding's input; 0 where there is no embedding."""
        return min((count for op in self.graph.ops if (count := op.operator.entries(op))), default=0)


def capture(module: nn.Module, input_shape: Shape, *, result: int | None = None) -> Captured:
    """What `module` computes for samples of `input_shape`, checked against the module on random samples.

    Args:
        result: which of several outputs is meant; None where there is one.

    Raises:
        UsageError: torch.export cannot capture the module, an operator is not in the table, the output is not one
            tensor with a batch, or graph and module disagree.
    """
    with _evaluating(module):
        program = _exported(module, input_shape)
        _refuse_mutation(program)
        construction = Construction(program)
        output = _walk(construction, program, result)
        found = _finished(construction, output)
        _check(module, found, construction, output, input_shape, result)
    return found


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode; its own modes come back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _exported(module: nn.Module, input_shape: Shape) -> Any:
    first = next(iter(module.parameters()), torch.zeros(()))
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and (value.is_complex() or value.is_quantized or value.is_sparse):
            raise UsageError(name, f"a tensor of {value.dtype}, {value.layout}", "plain real numbers")
    try:
        try:
            return _exported_for(module, input_shape, first.dtype)
        except Exception as error:
            if not _wants_whole_numbers(error):
                raise
            return _exported_for(module, input_shape, torch.int64)
    except UsageError:
        raise
    except Exception as error:
        raise _not_captured(module, input_shape, error) from error


def _exported_for(module: nn.Module, input_shape: Shape, dtype: torch.dtype) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with _silently(), FakeTensorMode(allow_non_fake_inputs=True):
        sample = torch.empty(BATCH, *input_shape, dtype=dtype)
    with _silently():
        exported = torch.export.export(module, (sample,), strict=False)
        _refuse_sizes(exported)
        _refuse_inner(exported)
        return exported if _is_plain(exported) else exported.run_decompositions(_decompositions(exported))


def _wants_whole_numbers(error: Exception) -> bool:
    """Whether a module could not run because it reads its input as numbers of entries."""
    text = str(error)
    return "for embedding" in text or "argument #1 'indices'" in text


@contextmanager
def _silently() -> Iterator[None]:
    """What torch says of its own internals is not for users: what is wrong becomes one line of ours.

    It prints graphs on standard output, too, where a command's data may be.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _refuse_sizes(program: Any) -> None:
    """Refuse values whose number of elements depends on the values of others."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for part in value if isinstance(value, list | tuple) else (value,):
            sizes = part.shape if isinstance(part, Tensor) else (part,)
            if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
                found = f"{as_written(node, called(node))} gives a size that depends on the input's values"
                raise UsageError(module_path(node) or FORWARD, found, "sizes that are fixed", "use a mask")


def _is_plain(program: Any) -> bool:
    """Whether every call can be read as it stands: in the table, and without side effects that something could see.

    Where not, torch takes composite calls apart and in-place ones out, which takes longer than the capture itself.
    """
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    calls = [node for node in place if node.op == "call_function" and node.target is not operator.getitem]
    return all(is_known(called(node)) and (not _changes(node) or _unseen(node, place)) for node in calls)


def _refuse_inner(program: Any) -> None:
    """Refuse what is no call of an operator: a region of its own, as `with torch.no_grad()` makes."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem and not hasattr(node.target, "_schema"):
            found, fix = f"a region of its own ({node.target})", "leave torch.no_grad() out: the plan says what trains"
            raise UsageError(module_path(node) or FORWARD, found, "operators alone", fix)


def _changes(node: Any) -> bool:
    return node.target._schema.is_mutable and called(node) not in DROPPED


def _decompositions(program: Any) -> dict[Any, Callable[..., Any]]:
    """How torch takes the calls apart that the table does not have."""
    unknown = {node.target for node in program.graph.nodes if node.op == "call_function" and not _reads(node)}
    known = torch.export.default_decompositions()
    table = {op: known[op] for op in unknown if op in known}
    return table | {op: op.decompose for op in unknown - table.keys() if op._can_decompose()}


def _reads(node: Any) -> bool:
    return node.target is operator.getitem or is_known(called(node))


def _unseen(node: Any, place: Mapping[Any, int]) -> bool:
    """Whether nobody reads later what an in-place call changes, under this or another name."""
    changed = node.args[0]
    if changed.op != "call_function" or changed.target is operator.getitem or _aliases(changed):
        return False
    readers = [reader for reader in changed.users if reader is not node]
    return all(
        place[reader] < place[node] and reader.op == "call_function" and not _aliases(reader) for reader in readers
    )


def _aliases(node: Any) -> bool:
    """Whether a call's result may share memory with something else; a value changed in place is the same value."""
    if node.target is operator.getitem or called(node) in DROPPED:
        return True
    schema = node.target._schema
    return any(result.alias_info for result in schema.returns) and not (schema.is_mutable and _fresh(node.args[0]))


def _fresh(node: Any) -> bool:
    return node.op == "call_function" and not _aliases(node)


def _not_captured(module: nn.Module, input_shape: Shape, error: Exception) -> UsageError:
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace(str(BATCH), "N")
    dependent = "data-dependent" in text or "GuardOnDataDependent" in text or "DataDependent" in text
    place = re.search(r'File "(.+?)", line (\d+)', str(error))
    fix = "the forward must take one tensor of that shape and return tensors"
    if dependent:
        at = f" ({Path(place[1]).name}, line {place[2]})" if place else ""
        text, fix = f"a branch or a size that depends on the input's values{at}", "use torch.where, or masks"
    shortened = text if len(text) <= 300 else text[:300].rsplit(" ", 1)[0] + " ..."
    return UsageError(type(module).__name__, f"cannot be captured for input {input_shape}: {shortened}", "", fix)


def _refuse_mutation(program: Any) -> None:
    changed = list(program.graph_signature.buffers_to_mutate.values())
    if changed:
        raise UsageError(FORWARD, f"changes its own buffer {changed[0]}", "a function of the input alone")


# ------------------------------------------------------------------------------------------------------- the walk


def _walk(b: Construction, program: Any, result: int | None) -> Value:
    """Translates every call; the value that the module returns."""
    held: dict[Any, Any] = {}
    for node in _read(program):
        if node.op == "placeholder":
            held[node] = b.placeholder(node)
        elif node.op == "call_function":
            held[node] = _call(b, node, held)
        elif node.op == "output":
            return _chosen(_outputs(node.args[0], program, held), result)
    raise UsageError(FORWARD, "returns nothing", "one tensor (N, ...) computed from the input")


def _read(program: Any) -> list[Any]:
    """The nodes that the outputs depend on, in order."""
    wanted: set[Any] = set()
    for node in reversed(program.graph.nodes):
        if node.op in ("output", "placeholder") or node in wanted:
            wanted.add(node)
            wanted.update(node.all_input_nodes)
    return [node for node in program.graph.nodes if node in wanted]


def _call(b: Construction, node: Any, held: Mapping[Any, Any]) -> Any:
    args = torch.fx.node.map_arg(node.args, held.__getitem__)
    kwargs = torch.fx.node.map_arg(node.kwargs, held.__getitem__)
    if node.target is operator.getitem:
        found = args[0][args[1]] if args[1] < len(args[0]) else Missing(called(node.args[0]))
        return b.settled(found, full_shape(node)) if isinstance(found, Value) else found
    missing = [arg.call for arg in torch.utils._pytree.tree_leaves((args, kwargs), _is_missing) if _is_missing(arg)]
    if missing:
        raise UsageError(module_path(node) or FORWARD, f"a second result of {missing[0]}", "its first alone")
    call = Call(b, node, called(node), module_path(node), full_shape(node))
    return call.run(args, kwargs)


def _is_missing(arg: Any) -> bool:
    return isinstance(arg, Missing)


def _outputs(returned: Any, program: Any, held: Mapping[Any, Any]) -> list[Any]:
    """What the user's forward returns, without the changed inputs that torch.export returns beside it."""
    user = set(program.graph_signature.user_outputs)
    spec = program.call_spec.out_spec
    nodes = [node for node in returned if getattr(node, "name", node) in user]
    if spec is not None and getattr(spec, "type", None) is dict:
        raise UsageError(FORWARD, f"returns a dict of {len(nodes)}", "one tensor (N, ...)", "return the tensor itself")
    return [held.get(node, node) if isinstance(node, torch.fx.Node) else node for node in nodes]


def _chosen(outputs: Sequence[Any], result: int | None) -> Value:
    if result is None and len(outputs) > 1:
        expected = "one tensor (N, ...) computed from the input"
        raise UsageError(FORWARD, f"returns {len(outputs)} values", expected, "choose one with --result 0, 1, ...")
    number = result or 0
    if not 0 <= number < len(outputs):
        raise UsageError("--result", str(result), f"0 to {len(outputs) - 1}")
    value = outputs[number]
    if not isinstance(value, Value) or not value.batch_alone:
        raise UsageError(FORWARD, f"returns {_described(value)}", "one tensor (N, ...) computed from the input")
    if value.dtype != "float32":
        raise UsageError(
            FORWARD, f"returns {value.dtype}, which has no gradient", "scores", "return the scores themselves"
        )
    return value


def _described(value: Any) -> str:
    if isinstance(value, Value):
        return f"{shown(value.full)}"
    return "a tensor that no input changes" if isinstance(value, Constant) else repr(value)[:120]


# ----------------------------------------------------------------------------------------------------- the finish


def _finished(b: Construction, output: Value) -> Captured:
    ops = _owning(list(needed(b.ops, [output.op])))
    ops, notes = _without_softmax(ops)
    notes += _own_scaling(ops)
    if not any(op.is_layer for op in ops):
        raise UsageError(FORWARD, "no convolution or linear layer", "at least one")
    ops = _vectors_at_once(ops)
    if len(ops[-1].shape) != 1:
        notes += (f"the output has shape {ops[-1].shape} per sample: its mean over positions is the feature vector",)
        ops.append(_as_vector(ops))
    held = {op.owner for op in ops}
    tensors = {key: value for key, value in b.tensors.items() if key.rpartition(".")[0] in held}
    origins = {key: origin for key, origin in b.origins.items() if key in tensors}
    columns = {place: origin for place, origin in b.columns.items() if place[0] in tensors}
    known = {key for key, _, _ in columns}
    computed = {key: names for key, names in b.computed.items() if key in tensors and key not in known}
    notes += (*b.notes, *notes_on(ops))
    notes += tuple(
        f"{entry} is used in several ways ({', '.join(keys)}): trained they come apart, and only .onnx is exported then"
        for entry, keys in _tied(origins, computed).items()
    )
    return Captured(with_blocks(tuple(ops)), tensors, origins, computed, columns, notes)


def _tied(origins: Mapping[str, Origin], computed: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
    """Entries that became several tensors of the graph (a weight and its transpose), which do not train as one.

    Rows of an entry that lie apart are several weights of the user's own.
    """
    uses: dict[str, list[str]] = {}
    for key, names in [*((key, {origin.name}) for key, origin in origins.items()), *computed.items()]:
        for name in names:
            uses.setdefault(name, []).append(key)
    return {name: sorted(keys) for name, keys in uses.items() if not _apart([origins.get(key) for key in keys])}


def _apart(parts: Sequence[Origin | None]) -> bool:
    """Whether an entry's uses have no value in common."""
    if len(parts) == 1:
        return True
    ranges = sorted((part.start, part.start + part.rows) for part in parts if part is not None and part.rows >= 0)
    return len(ranges) == len(parts) and all(a[1] <= b[0] for a, b in pairwise(ranges))


def _owning(ops: list[Op]) -> list[Op]:
    """The operators, the first that is left of those with common tensors under the name of the one that held them."""
    names = {op.name for op in ops}
    renamed: dict[str, str] = {}
    found = []
    for op in ops:
        op = replace(op, inputs=tuple(renamed.get(name, name) for name in op.inputs))
        if op.owner not in names:
            renamed[op.name] = op.shares
            names.add(op.shares)
            op = replace(op, name=op.shares, shares="")
        found.append(op)
    return found


def _without_softmax(ops: list[Op]) -> tuple[list[Op], tuple[str, ...]]:
    """A classifier's last softmax says nothing that its logits do not: losses bring their own."""
    by_name = {op.name: op for op in ops}
    last = ops[-1]
    while last.operator.view:
        last = by_name[last.inputs[0]]
    if not last.operator.probabilities or len(ops[-1].shape) != 1:
        return ops, ()
    moved = [
        replace(op, inputs=tuple(last.inputs[0] if name == last.name else name for name in op.inputs)) for op in ops
    ]
    end = ops[-1].name if last is not ops[-1] else last.inputs[0]
    note = f"the final {last.kind} ({last.name}) is left out: heads bring their own"
    return list(needed([op for op in moved if op.name != last.name], [end])), (note,)


def _own_scaling(ops: Sequence[Op]) -> tuple[str, ...]:
    """What to say where a model begins by scaling its input itself: samples are scaled before it, too."""
    constants = {op.name for op in ops[1:] if not op.inputs}
    value, steps = ops[0].name, []
    for op in ops[1:]:
        mine = value in op.inputs and len(op.inputs) == 2 and not constants.isdisjoint(op.inputs)
        if mine or (op.inputs == (value,) and op.is_depthwise and not op.operator.candidate):
            value = op.name
            steps.append(op.kind)
    if not steps:
        return ()
    return (
        f"the model scales its input itself ({', '.join(steps)}): samples are scaled before that, too; say by --scale "
        "and --offset what it expects, --scale 1 --offset 0 for raw values",
    )


def _vectors_at_once(ops: list[Op]) -> list[Op]:
    """Operators whose readers only reshape them into vectors give them at once: a mean over all positions."""
    readers: dict[str, list[Op]] = {}
    for op in ops:
        for source in op.inputs:
            readers.setdefault(source, []).append(op)
    found: list[Op] = []
    renamed: dict[str, str] = {}
    for op in ops:
        op = replace(op, inputs=tuple(renamed.get(name, name) for name in op.inputs))
        vector = op.operator.as_vector(op) if op.operator.as_vector is not None else None
        mine = readers.get(op.name, [])
        if vector is not None and mine and all(r.operator.view and r.shape == vector.shape for r in mine):
            renamed |= {reader.name: op.name for reader in mine}
            found.append(vector)
        elif op.name not in renamed:
            found.append(op)
    return list(needed(found, [renamed.get(ops[-1].name, ops[-1].name)]))


def _as_vector(ops: Sequence[Op]) -> Op:
    """Features are a vector: what positions are left are averaged; tokens over the tokens, maps over the map."""
    last = ops[-1]
    names = {op.name for op in ops}
    name = next(n for n in ("global_pool", *(f"global_pool_{i}" for i in range(len(ops)))) if n not in names)
    if not last.shape:
        raise UsageError(FORWARD, "returns a number per sample", "features: a vector, tokens or a map per sample")
    if _channels_last(ops):
        axes = tuple(range(len(last.shape) - 1))
        return Op(name, "mean", (last.name,), last.shape[-1:], (last.shape,), args=(("axes", axes), ("keepdim", False)))
    return Op(name, "global_pool", (last.name,), last.shape[:1], (last.shape,))


def _channels_last(ops: Sequence[Op]) -> bool:
    """Whether the last axis of the output counts channels: whether the last layer before it works on tokens."""
    layer = next(op for op in reversed(ops) if op.is_layer)
    return len(layer.shape) > 1 and layer.channel_axis % len(layer.shape) == len(layer.shape) - 1


# ------------------------------------------------------------------------------------------------------ the check

SAMPLES = 3
"""Few, and seldom another axis' size: a value may have its batch anywhere."""


def _check(
    module: nn.Module, found: Captured, b: Construction, output: Value, input_shape: Shape, result: int | None
) -> None:
    """Raise `UsageError` unless the graph computes what the module computes, at every layer and at the end.

    Each value is compared relative to its own size, so that a small one hides nothing.
    """
    generator = torch.Generator().manual_seed(0)
    first = next(iter(module.parameters()), torch.zeros(()))
    sample = torch.randn(SAMPLES, *input_shape, generator=generator).to(first)
    entries = found.entries
    if entries:
        sample = torch.randint(entries, (SAMPLES, *input_shape), generator=generator)
    theirs: dict[str, Tensor] = {}
    layers = {op.name: op for op in found.graph.layers if len(found.graph.uses(op.name)) == 1}
    hooks = [
        part.register_forward_hook(_noting(theirs, name)) for name, part in module.named_modules() if name in layers
    ]
    try:
        with torch.no_grad():
            returned = module(sample.clone() if b.whole_numbers or not entries else sample.to(first))
            ours = _values(found.graph, found.tensors, sample.to(first), set(theirs))
            _check_alone(found, sample.to(first))
    finally:
        for hook in hooks:
            hook.remove()
    for name, value in theirs.items():
        if value.numel() == ours[name].numel():
            _compare(name, ours[name], _of_samples(value, ours[name].shape))
    whole = replace_output(found.graph, b, output)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
    if whole is not None and leaves:
        mine = _values(whole, b.tensors, sample.to(first), {whole.output})[whole.output]
        theirs_last = leaves[result or 0]
        if theirs_last.numel() == mine.numel():
            _compare(FORWARD, mine, _of_samples(theirs_last, mine.shape))


def _check_alone(found: Captured, x: Tensor) -> None:
    """Raise `UsageError` where an opaque function makes of a sample something else when others lie beside it."""
    names = {op.name for op in found.graph.ops if op.operator.called}
    if not names:
        return
    together = _values(found.graph, found.tensors, x, names)
    for i in range(len(x)):
        for name, value in _values(found.graph, found.tensors, x[i : i + 1], names).items():
            one, other = value[0], together[name][i]
            size = float(other.abs().nan_to_num(0, 0, 0).max()) or 1.0
            if not torch.allclose(one, other, rtol=0, atol=AGREEMENT * size, equal_nan=True):
                function = found.graph[name]["function"]
                raise UsageError(name, f"{function} mixes the samples of a batch", "each sample by itself")


def replace_output(graph: Graph, b: Construction, output: Value) -> Graph | None:
    """The graph up to what the module returns."""
    return Graph(needed(b.ops, [output.op]))


def _noting(values: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(part: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            values[name] = output.detach().clone()

    return hook


def _values(graph: Graph, tensors: Mapping[str, Tensor], x: Tensor, names: set[str]) -> dict[str, Tensor]:
    from stages.engines.torch.reference import apply

    values = {graph.ops[0].name: x}
    for op in graph.ops[1:]:
        values[op.name] = apply(op, [values[source] for source in op.inputs], tensors)
    return {name: values[name] for name in names}


def _of_samples(value: Tensor, shape: torch.Size) -> Tensor | None:
    """The module's value in the graph's shape: the batch, wherever it stands, is brought to the front.

    None where the module gives its value in another order (a norm that turns its input first).
    """
    if value.shape == shape:
        return value
    for axis, size in enumerate(value.shape):
        if size == SAMPLES and prod(value.shape) == prod(shape):
            moved = value.movedim(axis, 0)
            if tuple(moved.shape[1:]) == tuple(shape[1:]):
                return moved
    return value.reshape(shape) if value.shape[0] == SAMPLES and min(value.ndim, len(shape)) < 3 else None


def _compare(where: str, found: Tensor, expected: Tensor | None) -> None:
    if expected is None:
        return
    if not bool(torch.isfinite(expected).all()):
        return  # weights that are not finite are named where the record is made
    size = float(expected.abs().max())
    difference = float((found - expected).abs().max()) if found.numel() else 0.0
    if not difference <= AGREEMENT * size:
        raise UsageError(
            where,
            f"differs from its operators one by one by {difference:.2g} of {size:.2g}",
            "the same function",
            "please report this model",
        )
