"""Opaque operators: any pure function of torch runs, trains, is counted, and reads back; nothing else is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.artifacts.records import InputSpec, LayerUpdate
from stages.cost.training import saved_activation_bytes
from stages.engines.torch.net import SparseNet
from stages.errors import SchemaError, UsageError
from stages.graphs.capture import capture
from stages.graphs.graph import Graph
from stages.graphs.record import graph_tree, read_graph
from stages.graphs.updates import whole_update
from stages.models.deploy import Backbone
from stages.operators import Op
from stages.operators.opaque import PURE
from tests.engines.torch.test_net import kept_bytes


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x))).mean((2, 3))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "erf": torch.erf,
    "sin cos": lambda x: x.sin() * x.cos(),
    "cumsum": lambda x: x.cumsum(2),
    "sort": lambda x: x.sort(-1).values,
    "gather": lambda x: x.gather(3, x.argsort(3)),
    "topk": lambda x: x.topk(3, -1)[0],
    "var": lambda x: x - x.var((2, 3), keepdim=True),
    "where": lambda x: torch.where(x > 0, x.sin(), 2 * x),
    "maximum": lambda x: torch.maximum(x, x.flip(2)),
    "overlapping windows": lambda x: x.unfold(2, 3, 1).mean(-1),
    "grid": lambda x: nn.functional.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "repeat": lambda x: x.repeat(1, 2, 1, 1)[:, 2:6],
    "einsum": lambda x: torch.einsum("nchw,ncwk->nchk", x, x.transpose(2, 3)),
    "masked": lambda x: x.masked_fill(x > 1, 0.5),
    "index along two axes": lambda x: x + x[:, torch.tensor([0, 2, 1, 3]), torch.tensor([1, 0, 3, 2])].unsqueeze(3),
    "celu": nn.functional.celu,
    "power of two values": lambda x: x.abs().add(0.5) ** x.sigmoid(),
    "divisor": lambda x: nn.functional.avg_pool2d(x, 2, divisor_override=3),
}  # fmt: skip


TAKEN_APART = ("celu", "einsum")
"""torch makes these of functions that the table has."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_in_the_live_part_trains_with_torchs_gradients(name: str) -> None:
    net = Between(FUNCTIONS[name]).eval()
    captured = capture(net, (3, 8, 8))
    assert any(op.kind == "opaque" for op in captured.graph.ops) or name in TAKEN_APART
    assert read_graph(graph_tree(captured.graph)) == captured.graph
    tensors = {key: value.detach().numpy() for key, value in captured.tensors.items()}
    updates = tuple(whole_update(op) for op in captured.graph.layers)
    sparse = SparseNet(Backbone(captured.graph, tensors, InputSpec("image", (3, 8, 8))), updates)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert kept_bytes(sparse, x) == saved_activation_bytes(captured.graph, updates, 5)
    weights = torch.linspace(-1, 2, 15).reshape(5, 3)
    (sparse.suffix(sparse.prefix(x)) * weights).sum().backward()
    exact = Between(FUNCTIONS[name]).double()
    (exact(x.double()) * weights).sum().backward()
    (net(x) * weights).sum().backward()
    for found, single, expected in zip(sparse.parameters(), _ours(net), _ours(exact), strict=True):
        error = float((single - expected).abs().max())
        size = float(expected.abs().max())
        assert float((found.grad - expected).abs().max()) <= 8 * error + 64 * torch.finfo(torch.float32).eps * size


def _ours(net: nn.Module) -> list[Tensor]:
    """Gradients in the order of live parameters: weight and bias of each layer."""
    return [p.grad for layer in (net.first, net.last) for p in (layer.weight, layer.bias)]


def test_what_cheap_functions_make_is_made_again() -> None:
    """Of sin(cos(x)) the engine keeps x alone: cos(x) and sin(cos(x)) come from it."""
    captured = capture(Between(lambda x: x.cos().sin()).eval(), (3, 8, 8))
    updates = tuple(whole_update(op) for op in captured.graph.layers)
    conv_output, sample = 4 * 6 * 6 * 4, 3 * 8 * 8 * 4
    assert saved_activation_bytes(captured.graph, updates, 2) == 2 * (conv_output + sample)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x + torch.rand_like(x), "operator rand_like"),
        (lambda x: x.cumsum(0), "cumsum.default mixes the samples of a batch"),
        (lambda x: x.sort(0).values, "mixes the samples of a batch"),
        (lambda x: torch.view_as_real(torch.fft.fft(x)).sum(-1), "complex|_fft|expected one of docs"),
        (lambda x: x[x > 0], "depend"),
    ],
)
def test_what_is_no_pure_function_of_a_sample_is_refused(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(Between(function).eval(), (3, 8, 8))


def test_notes_name_the_functions_and_what_has_no_macs() -> None:
    notes = capture(Between(lambda x: x.erf().cumsum(2)).eval(), (3, 8, 8)).notes
    assert notes == (
        "no kind of the table, so the torch engine alone runs the model: erf (erf), cumsum (cumsum)",
        "torch's counter knows no MACs of cumsum: counted as none",
    )


def test_every_allowed_function_is_pure() -> None:
    known = 0
    for name in sorted(PURE):
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            function = getattr(packet, overload)
            texts = " ".join(str(argument.type) for argument in function._schema.arguments)
            if function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags:
                continue  # refused when it is called
            known += 1
            assert "Generator" not in texts or overload.endswith(("generator", "generator_out")), name
            assert not {"Storage", "Stream"} & set(texts.split()), name
    assert known > 300


# -------------------------------------------------------------------------------------------------------- hostile files


def graph_with(**args: Any) -> Graph:
    """A graph whose opaque operator has these attributes."""
    call = {"args": [{"x": 0, "full": [{"batch": 1}, 4], "dtype": "float32"}], "kwargs": {},
            "full": [{"batch": 1}, 4], "dtype": "float32", "result": 0}  # fmt: skip
    base = {"function": "erf.default", "arguments": json.dumps(call), "macs": 0}
    ops = [
        Op("input", "input", (), (4,)),
        Op("op", "opaque", ("input",), (4,), ((4,),), args=tuple((base | args).items())),
    ]
    return Graph(tuple(ops))


def with_call(**fields: Any) -> str:
    call = {"args": [{"x": 0, "full": [{"batch": 1}, 4], "dtype": "float32"}], "kwargs": {},
            "full": [{"batch": 1}, 4], "dtype": "float32", "result": 0}  # fmt: skip
    return json.dumps(call | fields)


@pytest.mark.parametrize(
    "args",
    [
        {"function": "from_file.default"},
        {"function": "save.default"},
        {"function": "rand_like.default"},
        {"function": "erf.__class__"},
        {"function": "erf"},
        {"function": "__class__.default"},
        {"arguments": "[]"},
        {"arguments": "{"},
        {"arguments": with_call(args={"x": 0})},
        {"arguments": with_call(dtype="float16")},
        {"arguments": with_call(result=-1)},
        {"arguments": with_call(result=True)},
        {"arguments": with_call(full=[4])},
        {"arguments": with_call(full=[{"batch": 1}, {"batch": 1}])},
        {"arguments": with_call(full=[{"batch": 0}, 4])},
        {"arguments": with_call(args=[{"open": "/etc/passwd"}])},
        {"arguments": with_call(args=[{"numbers": [1, 2], "shape": [3], "dtype": "int64"}])},
        {"arguments": with_call(args=[{"tensor": "value0", "shape": [-4]}])},
        {"arguments": with_call(args=[[[[[[[[1]]]]]]]])},
        {"macs": -1},
    ],
    ids=str,
)
def test_a_file_cannot_call_anything_else(args: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        read_graph(graph_tree(graph_with(**args)))


@pytest.mark.parametrize(
    "arguments",
    [
        with_call(args=[{"x": 5, "full": [{"batch": 1}, 4], "dtype": "float32"}]),
        with_call(args=[{"x": 0, "full": [{"batch": 1}, 7], "dtype": "float32"}]),
        with_call(args=[]),
        with_call(kwargs={"nonsense": 3}),
    ],
)
def test_a_call_that_does_not_fit_is_refused_when_it_runs(arguments: str) -> None:
    graph = read_graph(graph_tree(graph_with(arguments=arguments)))
    with pytest.raises(UsageError, match=r"^op: erf.default cannot run"):
        graph["op"].operator.forward(graph["op"], [torch.zeros(2, 4)], {})


def test_a_result_of_another_size_is_refused_before_it_is_made() -> None:
    huge = with_call(args=[{"x": 0, "full": [{"batch": 1}, 4], "dtype": "float32"}, [1, 10**9]])
    graph = graph_with(function="repeat.default", arguments=huge)
    with pytest.raises(UsageError, match=r"cannot run|gives"):
        graph["op"].operator.forward(graph["op"], [torch.zeros(2, 4)], {})


def test_a_plan_never_trains_an_opaque_operator() -> None:
    net = Between(lambda x: nn.functional.conv3d(x.unsqueeze(2), torch.ones(4, 4, 1, 1, 1)).squeeze(2)).eval()
    captured = capture(net, (3, 8, 8))
    assert [op.name for op in captured.graph.layers] == ["first", "last"]
    assert any("no plan trains the tensors that" in note for note in captured.notes)
    opaque = next(op for op in captured.graph.ops if op.kind == "opaque")
    assert opaque["macs"] == 4 * 4 * 6 * 6
    assert isinstance(LayerUpdate("first", "output", (0,), 4), LayerUpdate)
    assert replace(opaque, name="other").tensors == opaque.tensors
    assert np.prod(next(iter(opaque.tensors.values()))) == 16
