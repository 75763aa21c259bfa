"""The contracts that every operator of the table keeps, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stages.artifacts.records import InputSpec, LayerUpdate
from stages.cost.training import plan_backward_macs, saved_activation_bytes
from stages.engines.torch import reference
from stages.engines.torch.masks import pack
from stages.engines.torch.net import SparseNet
from stages.engines.torch.reference import apply
from stages.engines.torch.suffix import _run_again
from stages.errors import UsageError
from stages.graphs.capture import capture
from stages.graphs.graph import Graph
from stages.graphs.keeping import held_bytes, holding
from stages.graphs.onnx_patterns import put_together
from stages.graphs.onnx_reader import module_of, parse
from stages.graphs.onnx_writer import onnx_model
from stages.graphs.record import graph_tree, read_graph
from stages.graphs.updates import whole_update
from stages.models.deploy import Backbone
from stages.operators import TABLE, Op
from stages.operators.op import Flow, Kept
from stages.operators.opaque import ONNX_NAMES
from tests.engines.torch.test_net import kept_bytes
from tests.operators.examples import EXAMPLES, SOURCES, Alone, Example, alone, as_vector, make, selected
from tests.operators.formulas import FORMULAS
from tests.operators.formulas import reference as formula

BATCH = 3
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def of(examples: Sequence[Example]) -> Any:
    assert examples
    return pytest.mark.parametrize("example", [pytest.param(example, id=example.id) for example in examples])


DEPLOYED = [example for example in selected() if not example.op.operator.statistics]
"""What stands in a graph that trains or is exported."""


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Every choice of at least one input."""
    return chain.from_iterable(combinations(range(count), size) for size in range(1, count + 1))


def test_every_kind_has_examples_and_a_formula() -> None:
    assert {example.op.kind for example in EXAMPLES} == set(TABLE)
    assert set(FORMULAS) == set(TABLE) - set(SOURCES)
    assert len(EXAMPLES) > 200
    assert len({example.id for example in EXAMPLES}) == len(EXAMPLES)


@of(EXAMPLES)
def test_attributes_are_of_the_types_that_the_record_reads(example: Example) -> None:
    found = {name: type(value) for name, value in example.op.args}
    assert found == dict(example.op.operator.args)


# ---------------------------------------------------------------------------------------------------- forward and shape


@of(selected())
def test_forward_is_the_formula_and_has_the_shape_of_the_rule(example: Example) -> None:
    op, inputs, tensors = example.op, example.inputs(BATCH), example.tensors()
    found = apply(op, inputs, tensors)
    assert found.shape == (BATCH, *op.operator.shape(op))
    torch.testing.assert_close(found, formula(op, inputs, tensors), **EXACT)


@of(selected())
def test_forward_changes_nothing_and_shares_memory_only_where_said(example: Example) -> None:
    inputs, tensors = example.inputs(BATCH), example.tensors()
    before = [x.clone() for x in inputs]
    found = apply(example.op, inputs, tensors)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    if not example.op.operator.alias:
        assert not shares_memory(found, [*inputs, *tensors.values()])


@of([example for example in selected() if example.op.operator.overwrite])
def test_forward_in_place_is_the_same(example: Example) -> None:
    rule, op = example.op.operator.overwrite, example.op
    assert rule is not None
    for into in range(len(op.inputs)):
        if op.in_shapes[into] == op.shape:
            inputs = example.inputs(BATCH)
            expected = apply(op, [x.clone() for x in inputs], {})
            found = rule(op, inputs, into)
            assert torch.equal(found, expected)
            assert found.data_ptr() == inputs[into].data_ptr()


@of([example for example in selected() if example.op.operator.view])
def test_views_hold_the_elements_of_their_input(example: Example) -> None:
    inputs = example.inputs(BATCH)
    found, before = apply(example.op, inputs, {}).reshape(BATCH, -1), inputs[0].reshape(BATCH, -1)
    assert torch.equal(found.sort().values, before.sort().values)
    if example.op.operator.in_order:
        assert torch.equal(found, before)


def test_sources_give_what_they_hold() -> None:
    for example in EXAMPLES:
        if example.op.kind == "constant":
            tensors = example.tensors()
            assert torch.equal(apply(example.op, [], tensors)[0], tensors["op.value"])
            assert apply(example.op, [], tensors).shape == (1, *example.op.shape)


WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("conv", ((4, 6, 5),), {"out": (6, 6, 5), "groups": 4, "kernel": (1, 1)}),
    ("conv", ((4, 6, 5),), {"out": (6, 6, 5), "groups": 0, "kernel": (1, 1)}),
    ("conv", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (7, 7)}),
    ("conv", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (3,)}),
    ("conv", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (3, 3), "stride": (0, 1)}),
    ("conv", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (3, 3), "stride": (-1, 1)}),
    ("conv", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (3, 3), "padding": (-1, 1)}),
    ("conv", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (3, 3), "dilation": (0, 1)}),
    ("conv", ((4,),), {"out": (6,), "kernel": ()}),
    ("conv", ((4, 3, 3, 3),), {"out": (6, 3, 3, 3), "kernel": (1, 1, 1)}),
    ("conv_transpose", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (2, 2), "output_padding": (1, 0)}),
    ("conv_transpose", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (2, 2), "output_padding": (-1, 0)}),
    ("conv_transpose", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (2, 2), "output_padding": (0,)}),
    ("conv_transpose", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (1, 1), "output_padding": (0, 0), "padding": (9, 9)}),
    ("conv_transpose", ((4, 6, 5),), {"out": (6, 6, 5), "kernel": (2, 2), "output_padding": (0, 0), "groups": 3}),
    ("linear", ((),), {"out": (3,), "bias": True}),
    ("matmul", ((3, 4), (5, 4)), {}),
    ("matmul", ((4,), (4, 5)), {}),
    ("matmul", ((2, 3, 4), (3, 4, 5)), {}),
    ("attention", ((5, 4), (5, 3), (5, 4)), {"scale": 1.0, "causal": False}),
    ("attention", ((5, 4), (6, 4), (5, 4)), {"scale": 1.0, "causal": False}),
    ("attention", ((2, 5, 4), (3, 5, 4), (3, 5, 4)), {"scale": 1.0, "causal": False}),
    ("attention", ((4,), (4,), (4,)), {"scale": 1.0, "causal": False}),
    ("attention", ((5, 4), (5, 4), (5, 4), (4, 5)), {"scale": 1.0, "causal": False}),
    ("attention", ((5, 4), (5, 4), (5, 4), (2, 5, 5)), {"scale": 1.0, "causal": False}),
    ("attention", ((5, 4), (5, 4), (5, 4), (5, 5)), {"scale": 1.0, "causal": True}),
    ("batchnorm", ((4, 6),), {"axis": 2, "eps": 1e-5}),
    ("batchnorm", ((4, 6),), {"axis": -1, "eps": 1e-5}),
    ("batchnorm", ((4, 6),), {"axis": 0, "eps": -1.0}),
    ("layernorm", ((4, 6),), {"axes": 3, "eps": 1e-5}),
    ("layernorm", ((4, 6),), {"axes": 0, "eps": 1e-5}),
    ("layernorm", ((4, 6),), {"axes": 1, "eps": -1e-5}),
    ("groupnorm", ((4, 6),), {"groups": 3, "eps": 1e-5}),
    ("groupnorm", ((4, 6),), {"groups": 0, "eps": 1e-5}),
    ("groupnorm", ((4, 6),), {"groups": 2, "eps": -1e-5}),
    ("scale", ((4, 6),), {"axis": 2}),
    ("scale", ((4, 6),), {"axis": -2}),
    ("scale", ((),), {"axis": -1}),
    ("prelu", ((4, 6),), {"slopes": 3}),
    ("prelu", ((4, 6),), {"slopes": 0}),
    ("elu", ((4,),), {"alpha": -1.0, "scale": 1.0}),
    ("elu", ((4,),), {"alpha": 1.0, "scale": -1.0}),
    ("gelu", ((4,),), {"approximate": "exact"}),
    ("softplus", ((4,),), {"beta": 0.0}),
    ("softmax", ((4,),), {"axis": 1}),
    ("softmax", ((4,),), {"axis": -1}),
    ("log_softmax", ((),), {"axis": 0}),
    *((kind, ((4, 3), (4, 2)), {}) for kind in ("add", "subtract", "multiply", "divide")),
    ("max_pool", ((4, 6, 5),), {"kernel": (2, 2), "padding": (2, 0)}),
    ("max_pool", ((4, 6, 5),), {"kernel": (9, 9)}),
    ("max_pool", ((4, 6, 5),), {"kernel": (2, 2), "stride": (0, 0)}),
    ("max_pool", ((6,),), {"kernel": ()}),
    ("avg_pool", ((4, 6, 5),), {"kernel": (2,)}),
    ("avg_pool", ((4, 6, 5),), {"kernel": (0, 2)}),
    *((kind, ((4, 6, 5),), {"size": size}) for kind in ("adaptive_avg_pool", "adaptive_max_pool")
      for size in ((3,), (0, 1), (1, 1, 1))),
    *((kind, ((6,),), {"size": ()}) for kind in ("adaptive_avg_pool", "adaptive_max_pool")),
    *((kind, ((4, 3, 3, 3),), {"size": (1, 1, 1)}) for kind in ("adaptive_avg_pool", "adaptive_max_pool")),
    ("global_pool", ((4,),), {}),
    *((kind, ((4, 6),), {"axes": axes, "keepdim": True}) for kind in ("mean", "sum", "amax", "max")
      for axes in ((), (2,), (-1,), (0, 0))),
    ("max", ((4, 6),), {"axes": (0, 1), "keepdim": True}),
    ("vector_norm", ((4, 6),), {"axes": (2,), "keepdim": True, "order": 2}),
    ("vector_norm", ((4, 6),), {"axes": (1,), "keepdim": True, "order": 3}),
    ("flatten", ((),), {}),
    ("reshape", ((4, 6),), {"to": (5, 5)}),
    ("permute", ((4, 6),), {"order": (0, 0)}),
    ("permute", ((4, 6),), {"order": (0,)}),
    ("expand", ((4, 6),), {"to": (4, 5)}),
    ("expand", ((4, 6),), {"to": (6,)}),
    ("concat", ((4, 6), (3, 5)), {"axis": 0}),
    ("concat", ((4, 6), (4,)), {"axis": 0}),
    ("concat", ((4, 6),), {"axis": 2}),
    ("slice", ((4, 6),), {"axis": 0, "start": 2, "stop": 2, "step": 1}),
    ("slice", ((4, 6),), {"axis": 0, "start": 0, "stop": 5, "step": 1}),
    ("slice", ((4, 6),), {"axis": 0, "start": 0, "stop": 4, "step": 1}),
    ("slice", ((4, 6),), {"axis": 0, "start": -1, "stop": 3, "step": 1}),
    ("slice", ((4, 6),), {"axis": 0, "start": 0, "stop": 3, "step": 0}),
    ("slice", ((4, 6),), {"axis": 2, "start": 0, "stop": 3, "step": 1}),
    ("take", ((4, 6),), {"axis": 0, "index": (4,)}),
    ("take", ((4, 6),), {"axis": 0, "index": (-1,)}),
    ("take", ((4, 6),), {"axis": 0, "index": ()}),
    ("pad", ((4, 6),), {"before": (0,), "after": (0, 0), "mode": "constant", "value": 0.0}),
    ("pad", ((4, 6),), {"before": (-4, 0), "after": (0, 0), "mode": "constant", "value": 0.0}),
    ("pad", ((4, 6),), {"before": (0, 1), "after": (0, 0), "mode": "mirror", "value": 0.0}),
    *(("pad", ((4, 6, 5),), {"before": (1, 0, 0), "after": (0, 0, 0), "mode": mode, "value": 0.0})
      for mode in ("reflect", "replicate", "circular")),
    *(("pad", ((4, 6),), {"before": (0, -1), "after": (0, 1), "mode": mode, "value": 0.0})
      for mode in ("reflect", "replicate", "circular")),
    *(("pad", ((2, 3, 4, 5),), {"before": (0, 0, 0, 1), "after": (0, 0, 0, 0), "mode": mode, "value": 0.0})
      for mode in ("reflect", "replicate", "circular")),
    ("pad", ((4, 6),), {"before": (0, 6), "after": (0, 0), "mode": "reflect", "value": 0.0}),
    ("pad", ((4, 6),), {"before": (0, 7), "after": (0, 0), "mode": "circular", "value": 0.0}),
    ("drop_tokens", ((5, 6), (5,)), {"keep": 4, "fuse": True}),
    ("drop_tokens", ((5, 6), (5,)), {"keep": 0, "fuse": True}),
    ("drop_tokens", ((5, 6), (6,)), {"keep": 2, "fuse": False}),
    ("drop_tokens", ((5, 2, 3), (5,)), {"keep": 2, "fuse": False}),
    ("roll", ((4, 6),), {"shifts": (1, 1), "axes": (0,)}),
    ("roll", ((4, 6),), {"shifts": (1,), "axes": (2,)}),
    ("upsample", ((4, 6, 5),), {"size": (12,), "mode": "nearest", "align_corners": False}),
    ("upsample", ((4, 6, 5),), {"size": (12, 10), "mode": "linear", "align_corners": False}),
    ("upsample", ((4, 6),), {"size": (12,), "mode": "bicubic", "align_corners": False}),
    ("upsample", ((4, 6),), {"size": (12,), "mode": "area", "align_corners": False}),
    ("upsample", ((4, 6),), {"size": (0,), "mode": "nearest", "align_corners": False}),
    ("upsample", ((6,),), {"size": (), "mode": "nearest", "align_corners": False}),
]  # fmt: skip
"""Kind, input shapes, attributes: what no operator can be."""


@pytest.mark.parametrize(("kind", "shapes", "attributes"), WRONG, ids=str)
def test_a_wrong_attribute_is_refused_by_the_shape_rule(kind: str, shapes: Any, attributes: dict[str, Any]) -> None:
    axes = len(attributes.get("kernel", ()))
    plain = {"stride": (1,) * axes, "padding": (0,) * axes, "dilation": (1,) * axes}
    fields = {name: plain[name] for name in TABLE[kind].fields if name in plain}
    with pytest.raises(ValueError, match=r"."):
        make(kind, *shapes, **(fields | attributes))


# ------------------------------------------------------------------------------------------------------ backward rules


def shares_memory(x: Tensor, others: Sequence[Tensor]) -> bool:
    return any(x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in others)


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of a tensor lie in one place."""
    return any(size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True))


def kept_for(op: Op, inputs: Sequence[Tensor], output: Tensor, wanted: frozenset[int]) -> Kept:
    """What the engine hands to a backward rule: copies of what the rule says, and nothing else."""
    keep, operator = op.operator.keeps(op, wanted), op.operator
    passes = place = None
    if keep.bits:
        assert operator.passes is not None
        passes = operator.passes(op, inputs, output).to(torch.uint8)
    if keep.index_bytes:
        assert operator.index is not None
        place = operator.index(op, inputs, output)
    held = {i: inputs[i].clone() for i in keep.inputs}
    return Kept(held, output.clone() if keep.output else None, passes, place)


def tensors_of(kept: Kept) -> list[Tensor]:
    rest = [part for part in (kept.output, kept.passes, kept.place) if part is not None]
    return [*kept.inputs.values(), *rest]


def expected_gradients(op: Op, inputs: Sequence[Tensor], tensors: Mapping[str, Tensor], g: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = torch.autograd.grad(formula(op, leaves, tensors), leaves, g, allow_unused=True)
    return [torch.zeros_like(x) if part is None else part for x, part in zip(inputs, found, strict=True)]


@of(DEPLOYED)
@pytest.mark.parametrize("fresh", [False, True])
def test_the_backward_rule_is_autograds_and_honest_about_memory(example: Example, fresh: bool) -> None:
    op, inputs, tensors = example.op, example.inputs(BATCH), example.tensors()
    output = apply(op, inputs, tensors)
    g = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = expected_gradients(op, inputs, tensors, g)
    rule = (op.operator.pull or _run_again)(op, tensors)
    for wanted in map(frozenset, subsets(len(inputs))):
        kept = kept_for(op, inputs, output, wanted)
        lives = [*tensors_of(kept), *tensors.values()]
        before = [x.clone() for x in lives]
        given = g.clone()
        parts = [part for i, part in enumerate(rule(kept, Flow(given, fresh))) if i in wanted]
        assert len(parts) == len(wanted)
        for i, part in zip(sorted(wanted), parts, strict=True):
            torch.testing.assert_close(part.gradient, expected[i], **EXACT)
        assert fresh or torch.equal(given, g), "a gradient that others hold is overwritten"
        assert all(torch.equal(x, y) for x, y in zip(lives, before, strict=True)), "what is kept is overwritten"
        for number, part in enumerate(parts):
            others = [other.gradient for k, other in enumerate(parts) if k != number]
            if part.fresh:
                assert not overlaps_itself(part.gradient)
                assert not shares_memory(part.gradient, [*lives, *others, *([] if fresh else [given])])


@of(DEPLOYED)
def test_what_a_rule_keeps_is_as_large_as_it_says(example: Example) -> None:
    op, inputs, tensors = example.op, example.inputs(BATCH, torch.float32), example.tensors(torch.float32)
    output = apply(op, inputs, tensors)
    for wanted in map(frozenset, subsets(len(inputs))):
        keep, kept = op.operator.keeps(op, wanted), kept_for(op, inputs, output, wanted)
        own = [] if kept.place is None else [kept.place]
        own += [] if kept.passes is None else [pack(kept.passes, channels_last=False)]
        assert keep.own_bytes(op, BATCH) == sum(part.nbytes for part in own)


# ----------------------------------------------------------------------------------------------------------- the engine


def engine(case: Alone, updates: Sequence[LayerUpdate], **options: Any) -> SparseNet:
    arrays = {name: value.numpy() for name, value in case.tensors.items()}
    return SparseNet(Backbone(case.graph, arrays, InputSpec("features", case.graph.input_shape)), updates, **options)


def weighted(features: Tensor) -> Tensor:
    """A loss whose gradient differs for every feature of every sample."""
    weights = torch.linspace(-1, 2, features.numel(), dtype=features.dtype).reshape(features.shape)
    return (features * weights).sum()


def dense(case: Alone) -> dict[str, Tensor]:
    """Every tensor's gradient by stock autograd, of the formula where the example stands."""
    tensors = {name: value.clone().requires_grad_() for name, value in case.tensors.items()}
    values = {"input": case.x}
    for op in case.graph.ops[1:]:
        rule = formula if op.owner == "op" else apply
        values[op.name] = rule(op, [values[name] for name in op.inputs], tensors)
    found = torch.autograd.grad(weighted(values[case.graph.output]), list(tensors.values()), allow_unused=True)
    parts = zip(tensors.items(), found, strict=True)
    return {name: torch.zeros_like(value) if part is None else part for (name, value), part in parts}


@of(DEPLOYED)
def test_the_engine_around_an_operator_equals_autograd(example: Example) -> None:
    case = alone(example, BATCH)
    expected = dense(case)
    for wanted in subsets(len(example.op.inputs)):
        net = engine(case, case.updates(wanted))
        features = net.suffix(net.prefix(case.x))
        torch.testing.assert_close(features, reference.run(case.graph, case.tensors, case.x), **EXACT)
        weighted(features).backward()
        for i, parameter in zip(wanted, net.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[f"live{i}.weight"], **EXACT)


@of(DEPLOYED)
def test_bytes_kept_around_an_operator_are_the_predicted_ones(example: Example) -> None:
    case = alone(example, BATCH, torch.float32)
    for wanted in subsets(len(example.op.inputs)):
        updates = case.updates(wanted)
        found = kept_bytes(engine(case, updates), case.x)
        held = holding(case.graph, updates)
        assert found == held_bytes(case.graph, held, BATCH) == saved_activation_bytes(case.graph, updates, BATCH)


# ---------------------------------------------------------------------------------------------------------------- MACs


@of(selected())
def test_macs_are_those_that_torch_counts(example: Example) -> None:
    op, inputs, tensors = example.op, example.inputs(BATCH), example.tensors()
    with FlopCounterMode(display=False) as counter:
        formula(op, inputs, tensors)
    counted, rest = divmod(counter.get_total_flops(), 2 * BATCH)
    assert rest == 0
    if isinstance(op.operator.macs, str):
        assert op.operator.macs, "a reason"
        assert op.operator.macs_of(op) == counted == 0
    elif op.kind in ("scale", "batchnorm"):
        assert (op.operator.macs_of(op), counted) == (op.elements, 0)
    else:
        assert op.operator.macs_of(op) == counted
        assert counted > 0 or op.kind in ("opaque", "drop_tokens")


# --------------------------------------------------------------------------------------------------------------- layers

LAYERS = selected(trains=True)


def plans(op: Op) -> list[LayerUpdate]:
    """Some output and input channels, all of them, biases with and without."""
    found = []
    axes = (("output", op.out_channels), ("input", op.in_channels))
    for axis, count in axes[:1] if op.operator.by_output else axes:
        some = sorted({0, count // 2, count - 1})
        found += [LayerUpdate("op", axis, tuple(some), count), LayerUpdate("op", axis, tuple(range(count)), count)]
    if op.bias:
        few = (0, op.out_channels - 1)
        found += [replace(update, bias=few) for update in found]
        found.append(LayerUpdate("op", "output", (), op.out_channels, few))
    return found


@of(LAYERS)
@pytest.mark.parametrize("scales", [False, True], ids=["first", "behind a live layer"])
def test_gradients_of_live_channels_equal_autograd(example: Example, scales: bool) -> None:
    from stages.engines.torch.live import Live

    case = alone(example, BATCH, scales=scales)
    gradients = dense(case)
    before = case.updates([0]) if scales else ()
    for update in plans(example.op):
        net = engine(case, (*before, update))
        weighted(net.suffix(net.prefix(case.x))).backward()
        expected = [
            value
            for one in (*before, update)
            for value in Live(case.graph[one.layer], one, gradients).parameters().values()
        ]
        for parameter, value in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, value.detach(), **EXACT)


@of(LAYERS)
def test_bytes_kept_by_a_live_layer_are_the_predicted_ones(example: Example) -> None:
    case = alone(example, BATCH, torch.float32)
    for update in plans(example.op):
        updates = (*case.updates([0]), update)
        assert kept_bytes(engine(case, updates), case.x) == saved_activation_bytes(case.graph, updates, BATCH)


def twice(example: Example) -> Alone:
    """The layer called on one part of the input, and again on another: (y, y') side by side."""
    one = alone(example, BATCH, scales=False)
    size = one.graph.input_shape[0]
    shape, flat = example.op.in_shape, (int(np.prod(example.op.shape)),)
    ops = [Op("input", "input", (), (2 * size,))]
    for i, name in enumerate(("op", "again")):
        args = (("axis", 0), ("start", i * size), ("stop", (i + 1) * size), ("step", 1))
        ops += [
            Op(f"part{i}", "slice", ("input",), (size,), ((2 * size,),), args=args),
            Op(f"x{i}", "reshape", (f"part{i}",), shape, ((size,),), args=(("to", shape),)),
            replace(example.op, name=name, inputs=(f"x{i}",), shares="op" if i else ""),
            replace(as_vector(name, example.op.shape), name=f"flat{i}"),
        ]
    ops.append(Op("both", "concat", ("flat0", "flat1"), (2 * flat[0],), (flat, flat), args=(("axis", 0),)))
    return Alone(Graph(tuple(ops)), one.tensors, torch.cat([one.x, one.x.flip(0) * 0.7 + 0.1], 1))


@of(LAYERS)
def test_a_layer_that_is_called_twice_trains_once(example: Example) -> None:
    from stages.engines.torch.live import Live

    case = twice(example)
    assert [op.name for op in case.graph.layers] == ["op"]
    assert case.graph["again"].tensors == {}
    gradients = dense(case)
    for update in plans(example.op):
        net = engine(case, (update,))
        weighted(net.suffix(net.prefix(case.x))).backward()
        expected = Live(example.op, update, gradients).parameters().values()
        for parameter, value in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, value.detach(), **EXACT)
        small = replace(case, tensors={k: v.float() for k, v in case.tensors.items()}, x=case.x.float())
        assert kept_bytes(engine(small, (update,)), small.x) == saved_activation_bytes(case.graph, (update,), BATCH)
    whole = whole_update(example.op)
    assert plan_backward_macs(case.graph, (whole,)) == 2 * example.op.operator.macs_of(example.op)


# ----------------------------------------------------------------------------------------------------------------- ONNX


def onnx_outputs(case: Alone) -> Tensor:
    arrays = {name: value.float().numpy() for name, value in case.tensors.items()}
    data = onnx_model(case.graph, arrays, None, {})
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"input": case.x.float().numpy()})[0])


def is_beyond_onnx(example: Example) -> bool:
    """Whether opset 17 cannot express it: maxima of bins of unequal size, functions of torch without a form there."""
    if example.op.kind == "opaque":
        return example.op["function"] not in ONNX_NAMES
    if example.op.kind != "adaptive_max_pool":
        return False
    return any(size % out for size, out in zip(example.op.in_shape[1:], example.op["size"], strict=True))


@of([example for example in DEPLOYED if is_beyond_onnx(example)])
def test_what_onnx_cannot_express_is_named(example: Example) -> None:
    with pytest.raises(UsageError, match="op: ONNX has no"):
        onnx_outputs(alone(example, 1, scales=False))


@of([example for example in DEPLOYED if not is_beyond_onnx(example)])
@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_computes_the_same(example: Example, batch: int) -> None:
    case = alone(example, batch, scales=False)
    found = onnx_outputs(case)
    exact = reference.run(case.graph, case.tensors, case.x)
    single = reference.run(case.graph, {k: v.float() for k, v in case.tensors.items()}, case.x.float())
    size, eps = float(exact.abs().max()), torch.finfo(torch.float32).eps
    bound = 8 * float((single - exact).abs().max()) + 16 * eps * size
    assert found.shape == exact.shape
    assert float((found - exact).abs().max()) <= bound


@of([example for example in DEPLOYED if not is_beyond_onnx(example) and max(map(np.prod, example.op.in_shapes)) > 1])
def test_what_is_written_as_onnx_reads_as_the_same_function(example: Example) -> None:
    case = alone(example, BATCH, scales=example.op.kind != "embedding")  # whose numbers nothing may scale
    arrays = {name: value.float().numpy() for name, value in case.tensors.items()}
    parsed = put_together(parse(onnx_model(case.graph, arrays, None, {}), "model.onnx"))
    module, x = module_of(parsed, case.graph.input_shape, "model.onnx").eval(), case.x.float()
    captured = capture(module, case.graph.input_shape)
    exact = reference.run(case.graph, case.tensors, case.x)
    single = reference.run(case.graph, {k: v.float() for k, v in case.tensors.items()}, x)
    size, eps = float(exact.abs().max()), torch.finfo(torch.float32).eps
    bound = 8 * float((single - exact).abs().max()) + 16 * eps * size
    found = [module(x).detach()]
    if not example.op.operator.probabilities:  # the last softmax is left to the head
        found.append(reference.run(captured.graph, captured.tensors, x).detach())
    for y in found:
        assert y.shape == exact.shape
        assert float((y - exact).abs().max()) <= bound
    if example.op.kind not in TAKEN_APART:
        assert example.op.kind in {op.kind for op in captured.graph.ops}


TAKEN_APART = {
    "adaptive_avg_pool": "products with averaging matrices: ONNX has no such pooling",
    "adaptive_max_pool": "a plain pooling, or a maximum over all positions",
    "avg_pool": "with ceil_mode a padding, a pooling and a product",
    "concat": "of one value is that value",
    "drop_tokens": "an order by score and a choice by it",
    "elu": "times a scale",
    "expand": "where nothing is repeated",
    "flatten": "of a vector is that vector",
    "global_pool": "may come back as a mean",
    "groupnorm": "InstanceNorm between two reshapes",
    "layernorm": "over more than the last axis",
    "max": "a maximum whose equals share the gradient",
    "mean": "over all positions it is a global pooling",
    "pad": "wrapped ends are slices side by side; zeros go into a convolution",
    "reshape": "views that follow each other become one",
    "roll": "slices side by side, or nothing",
    "scale": "a product and a sum",
    "softmax": "before the features the head brings its own",
    "log_softmax": "before the features the head brings its own",
    "softplus": "times a number",
    "upsample": "nearest by a whole factor may be a choice of entries",
}
"""Kinds that may come back in pieces or as others, and why; the function is the same."""


# --------------------------------------------------------------------------------------------------------------- record


@of(EXAMPLES)
def test_the_record_of_an_operator_reads_as_it_was(example: Example) -> None:
    case = alone(example, 1, scales=False) if example.op.inputs else None
    graph = case.graph if case else source_graph(example)
    assert read_graph(graph_tree(graph)) == graph


def source_graph(example: Example) -> Graph:
    """A graph around an operator that reads nothing."""
    first = Op("input", "input", (), example.op.shape if example.op.kind == "input" else (3, 1, 1, 1))
    shape = (*(3 for _ in first.shape[:1]), *example.op.shape) if example.op.kind == "constant" else first.shape
    ops = [first]
    if example.op.kind == "constant":
        shape = TABLE["add"].shape(replace(first, in_shapes=(first.shape, example.op.shape)))
        ops += [example.op, Op("sum", "add", ("input", "op"), shape, (first.shape, example.op.shape))]
    return Graph((*ops, as_vector(ops[-1].name, shape)))
