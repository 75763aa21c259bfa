"""Tracing user models: what is understood, how it is named, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.engines.torch.reference import run
from stages.errors import UsageError
from tests.models.nets import Classifier, Functional, PreActivation, randomise


class Calls(nn.Module):
    """A model whose forward is the given function of the module and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.call = forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def conv(c_in: int = 3, c_out: int = 3, **arguments: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, **arguments)


def image_net(forward: Callable[[Any, Tensor], Any], **parts: nn.Module) -> nn.Module:
    return Calls(forward, **({"c": conv()} | parts))


@pytest.mark.parametrize(
    ("module", "shape"),
    [(PreActivation(), (3, 8, 8)), (Classifier(), (3, 16, 16)), (Functional(), (1, 37))],
    ids=lambda value: type(value).__name__,
)
def test_the_graph_computes_what_the_module_computes(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = randomise(module).double()
    graph, tensors = trace(module, shape)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        torch.testing.assert_close(run(graph, tensors, x), module(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.relu6(m.c(x)).mean([-1, -2]),
        lambda m, x: m.c(x).flatten(1),
        lambda m, x: m.c(x).reshape(x.shape[0], -1),
        lambda m, x: F.hardtanh(m.c(x), 0.0, 6.0),
        lambda m, x: F.adaptive_avg_pool2d(m.c(x), (3, 7)),
        lambda m, x: F.avg_pool2d(m.c(x), 3, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda m, x: F.max_pool2d(m.c(x), (2, 3), stride=(1, 2), dilation=(2, 1)),
        lambda m, x: F.dropout(torch.cat((m.c(x), m.c2(x)), 1), training=m.training),
        lambda m, x: m.same(x).relu_(),
        lambda m, x: F.batch_norm(m.c(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, eps=0.1),
    ],
)
def test_other_ways_to_say_it(forward: Callable[[Any, Tensor], Any]) -> None:
    parts = {"c2": conv(bias=False), "same": conv(padding="same", dilation=2), "bn": nn.BatchNorm2d(3)}
    module = randomise(image_net(forward, **parts)).double()
    graph, tensors = trace(module, (3, 8, 9))
    x = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = module(x)
    expected = expected.mean((2, 3)) if expected.dim() == 4 else expected
    torch.testing.assert_close(run(graph, tensors, x), expected)


def test_names_are_module_paths_and_callers() -> None:
    graph, _ = trace(Classifier(), (3, 16, 16))
    assert [op.name for op in graph.ops] == [
        *("input", "features.0", "features.1", "features.2", "features.3", "features.4", "features.5", "features.6"),
        *("act", "point", "act_1", "pool", "fc"),
    ]
    assert graph["features.3"].is_depthwise
    assert graph["features.3"].in_shape == graph["features.3"].shape == (8, 8, 8)
    assert graph["pool"].shape == (16,)


def test_blocks_of_numbered_and_of_plain_models() -> None:
    numbered, _ = trace(Classifier(), (3, 16, 16))
    assert numbered.blocks == ("features.0", "features.3")
    assert [numbered[name].block for name in ("features.2", "features.6", "point", "fc")] == [0, 1, -1, -1]
    plain, _ = trace(PreActivation(), (3, 8, 8))
    assert plain.blocks == ("stem", "conv1", "conv2")
    assert [plain[name].block for name in ("stem", "bn1", "conv1", "bn2", "conv2")] == [0, 0, 1, 1, 2]


def test_tensors_know_their_place_in_the_state_dict() -> None:
    traced = trace_module(Functional(), (1, 37))
    assert traced.names == {
        "w1.weight": "w1",
        "w2.weight": "w2",
        "w2.bias": "b2",
        "linear.weight": "weight",
    }


def test_tracing_leaves_the_module_alone() -> None:
    module = Classifier().train()
    module.features.eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    trace(module, (3, 16, 16))
    assert module.training
    assert module.fc.training
    assert not module.features[1].training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_what_the_output_does_not_need_is_left_out() -> None:
    module = image_net(lambda m, x: (m.aux(x), m.c(x))[1], aux=conv())
    graph, tensors = trace(module, (3, 8, 8))
    assert [op.name for op in graph.ops] == ["input", "c", "global_pool"]
    assert tensors.keys() == {"c.weight", "c.bias"}


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: torch.sigmoid(m.c(x)), "operator sigmoid"),
        (lambda m, x: m.bad(m.c(x)), "bad: operator Hardswish"),
        (lambda m, x: m.c(x).permute(0, 2, 3, 1), "operator permute"),
        (lambda m, x: m.c(x) * 2, "operator mul"),
        (lambda m, x: m.c(x)[:, :2], "operator getitem"),
        (lambda m, x: m.c(x) + 1, "addition of a constant"),
        (lambda m, x: m.c(x) + m.c2(x), "equal shapes"),
        (lambda m, x: m.c(m.c(x)), "c is called twice"),
        (lambda m, x: F.conv2d(m.c(x), m.c.weight), "used twice|called twice"),
        (lambda m, x: m.c(x).mean(1), "mean over dimensions 1"),
        (lambda m, x: m.wrap(m.c(x)), "padding_mode 'circular'"),
        (lambda m, x: (lambda y: torch.cat((y, F.relu(y)), 0))(m.c(x)), "dimension 0, expected 1"),
        (lambda m, x: (lambda y: torch.cat((y, F.relu(y)), -1))(m.c(x)), "dimension -1, expected 1"),
        (lambda m, x: m.c(x).clamp(-1, 6), r"clamp to -1\.\.6"),
        (lambda m, x: F.hardtanh(m.c(x)), r"clamp to -1\.0\.\.1\.0"),
        (lambda m, x: m.c(x).clamp(max=6), r"clamp to None\.\.6"),
        (lambda m, x: (lambda y: torch.add(y, F.relu(y), alpha=2))(m.c(x)), "addition of a constant"),
        (lambda m, x: F.avg_pool2d(m.c(x), 2, divisor_override=3), "divisor_override=3"),
        (lambda m, x: m.c(x).view(-1, 3), "one vector per sample"),
        (lambda m, x: m.c3(F.adaptive_avg_pool2d(m.c(x), 1)), "c3: c3 reads .*flatten right after"),
        (lambda m, x: F.adaptive_avg_pool2d(m.c(x), 4), "a divisor"),
        (lambda m, x: m.lin(m.c(x)), "lin: a linear layer on"),
        (lambda m, x: [m.c(x)], "returns"),
        (lambda m, x: m.c(x) if x.sum() > 0 else x, "cannot be traced"),
        (lambda m, x: m.lin(m.c(x).flatten(1)), "cannot be traced for input"),
        (lambda m, x: F.relu(x), "no convolution or linear layer"),
        (lambda m, x: m.stat(m.c(x)), "track_running_stats"),
        (lambda m, x: F.max_pool2d(m.c(x), 2, return_indices=True)[0], "operator"),
    ],
)
def test_everything_else_is_refused_by_name(forward: Callable[[Any, Tensor], Any], message: str) -> None:
    parts = {
        "bad": nn.Hardswish(),
        "c2": nn.Conv2d(3, 1, 3),
        "c3": nn.Conv2d(3, 3, 1),
        "wrap": conv(padding=1, padding_mode="circular"),
        "lin": nn.Linear(6, 2),
        "stat": nn.BatchNorm2d(3, track_running_stats=False),
    }
    with pytest.raises(UsageError, match=message):
        trace(image_net(forward, **parts), (3, 8, 8))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (lambda y: F.relu(y, inplace=True) + y)(m.c(x)),
        lambda m, x: (lambda y: y.add_(m.same(y)).relu() + y)(m.c(x)),
    ],
)
def test_a_value_that_is_changed_in_place_and_read_again_is_refused(forward: Callable[[Any, Tensor], Any]) -> None:
    with pytest.raises(UsageError, match="no in-place change"):
        trace(image_net(forward, same=conv(padding=1)), (3, 8, 8))


def test_tied_weights_are_refused() -> None:
    tied = image_net(lambda m, x: m.c2(m.c(x)), c2=conv())
    tied.c2.weight = tied.c.weight
    with pytest.raises(UsageError, match=r"c2\.weight is used twice"):
        trace(tied, (3, 8, 8))
