"""Capturing user models: what is understood, how it is named, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from stages.engines.torch.reference import run
from stages.errors import UsageError
from stages.graphs.capture import capture
from stages.graphs.origins import Origin
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
    captured = capture(module, shape)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        torch.testing.assert_close(run(captured.graph, captured.tensors, x), module(x))


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
        lambda m, x: torch.sigmoid(m.c(x)),
        lambda m, x: m.hard(m.c(x)),
        lambda m, x: m.c(x).permute(0, 1, 3, 2),
        lambda m, x: m.c(x) * 2,
        lambda m, x: m.c(x)[:, :2],
        lambda m, x: m.c(x) + 1,
        lambda m, x: m.c(x) + m.one(x),
        lambda m, x: m.c(m.c(x)),
        lambda m, x: F.conv2d(m.c(x), m.c.weight),
        lambda m, x: m.wrap(m.c(x)),
        lambda m, x: (lambda y: torch.cat((y, F.relu(y)), -1))(m.c(x)),
        lambda m, x: m.c(x).clamp(-1, 6),
        lambda m, x: F.hardtanh(m.c(x)),
        lambda m, x: m.c(x).clamp(max=6),
        lambda m, x: (lambda y: torch.add(y, F.relu(y), alpha=2))(m.c(x)),
        lambda m, x: m.point(F.adaptive_avg_pool2d(m.c(x), 1)),
        lambda m, x: F.adaptive_avg_pool2d(m.c(x), 4),
        lambda m, x: F.max_pool2d(m.c(x), 2, return_indices=True)[0],
        lambda m, x: [m.c(x)],
        lambda m, x: m.c(x) if x.shape[2] > 3 else x,
        lambda m, x: (m.c(x) + 0).float().view(x.size(0), -1),
        lambda m, x: (lambda y: F.relu(y, inplace=True) + y)(m.c(x)),
        lambda m, x: (lambda y: y.add_(m.pad(y)).relu() + y)(m.c(x)),
    ],
)
def test_other_ways_to_say_it(forward: Callable[[Any, Tensor], Any]) -> None:
    parts = {
        "c2": conv(bias=False),
        "same": conv(padding="same", dilation=2),
        "bn": nn.BatchNorm2d(3),
        "hard": nn.Hardswish(),
        "one": conv(c_out=1),
        "wrap": conv(padding=1, padding_mode="circular"),
        "point": nn.Conv2d(3, 3, 1),
        "pad": conv(padding=1),
    }
    module = randomise(image_net(forward, **parts)).double()
    captured = capture(module, (3, 8, 9))
    x = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = module(x)
    expected = expected[0] if isinstance(expected, list) else expected
    expected = expected.mean((2, 3)) if expected.dim() == 4 else expected
    found = run(captured.graph, captured.tensors, x)
    torch.testing.assert_close(found.to(expected.dtype), expected)  # one of them asks for float32 at the end


@pytest.mark.parametrize(("forward", "axes"), [(lambda m, x: m.lin(m.c(x)), (1, 2)), (lambda m, x: m.c(x).mean(1), 2)])
def test_positions_that_are_left_are_averaged(forward: Callable[[Any, Tensor], Any], axes: Any) -> None:
    """Tokens (behind a layer on the last axis) over the tokens, maps over the map: the features are a vector."""
    module = randomise(image_net(forward, lin=nn.Linear(7, 2)))
    captured = capture(module, (3, 8, 9))
    x = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run(captured.graph, captured.tensors, x), module(x).mean(axes))
    assert any("feature vector" in note for note in captured.notes)


def test_names_are_module_paths_and_callers() -> None:
    graph = capture(Classifier(), (3, 16, 16)).graph
    assert [op.name for op in graph.ops] == [
        *("input", "features.0", "features.1", "features.2", "features.3", "features.4", "features.5", "features.6"),
        *("act", "point", "act_1", "pool", "fc"),
    ]
    assert graph["features.3"].is_depthwise
    assert graph["features.3"].in_shape == graph["features.3"].shape == (8, 8, 8)
    assert graph["pool"].shape == (16,)


def test_blocks_of_numbered_and_of_plain_models() -> None:
    numbered = capture(Classifier(), (3, 16, 16)).graph
    assert numbered.blocks == ("features.0", "features.3")
    assert [numbered[name].block for name in ("features.2", "features.3", "point", "fc")] == [0, 1, -1, -1]
    plain = capture(PreActivation(), (3, 8, 8)).graph
    assert plain.blocks == ("stem", "conv1", "conv2")
    assert [plain[name].block for name in ("stem", "bn1", "conv1", "bn2", "conv2")] == [0, 0, 1, 1, 2]


def test_tensors_know_their_place_in_the_state_dict() -> None:
    captured = capture(Functional(), (1, 37))
    assert captured.origins == {
        "w1.weight": Origin("w1"),
        "w2.weight": Origin("w2"),
        "w2.bias": Origin("b2"),
        "linear.weight": Origin("weight"),
    }


def test_capture_leaves_the_module_alone() -> None:
    module = Classifier().train()
    module.features.eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    capture(module, (3, 16, 16))
    assert module.training
    assert module.fc.training
    assert not module.features[1].training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_what_the_output_does_not_need_is_left_out() -> None:
    module = image_net(lambda m, x: (m.aux(x), m.c(x))[1], aux=conv())
    captured = capture(module, (3, 8, 8))
    assert [op.name for op in captured.graph.ops] == ["input", "c", "global_pool"]
    assert captured.tensors.keys() == {"c.weight", "c.bias"}


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda m, x: torch.fft.rfft(m.c(x)).abs(),
            r"fft_r2c \(in `return self.call\(self, x\)`\).*transform the samples",
        ),
        (
            lambda m, x: m.inner(m.c(x)),
            "^inner: operator rand_like .*, expected one of docs/operators",
        ),
        (lambda m, x: m.c(x).argmax(1), "returns int64, which has no gradient, .*return the scores"),
        (
            lambda m, x: (lambda y: torch.cat((y, F.relu(y)), 0))(m.c(x)),
            "cat .* over the batch",
        ),
        (lambda m, x: m.c(x).mean(0), "over the batch, expected each sample by itself"),
        (lambda m, x: m.c(x)[:1], "slice .* over the batch, expected each sample by itself"),
        (lambda m, x: {"out": m.c(x)}, "returns a dict of 1, expected one tensor.*return the tensor itself"),
        (lambda m, x: (m.c(x), x), "returns 2 values.*--result 0, 1"),
        (lambda m, x: (m.c(x), 3)[1], "cannot be captured|returns 3"),
        (
            lambda m, x: m.c(x) if x.sum() > 0 else x,
            r"a branch .* depends on the input's values \(test_capture.py, line",
        ),
        (lambda m, x: m.c(x)[x.sum() > 0], "depends on the input's values"),
        (lambda m, x: m.lin(m.c(x).flatten(1)), r"cannot be captured for input \(3, 8, 8\).*\[N, 108\]"),
        (lambda m, x: F.relu(x), "no convolution or linear layer"),
        (lambda m, x: m.stat(m.c(x)), "^stat: batch_norm with the batch's own.*track_running_stats=True"),
        (lambda m, x: F.dropout(m.c(x)), "dropout that is active in evaluation mode.*training=self.training"),
        (lambda m, x: m.counts(m.c(x)), "changes its own buffer counts.seen, expected a function of the input alone"),
    ],
)
def test_everything_else_is_refused_by_name(
    forward: Callable[[Any, Tensor], Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "inner": Calls(lambda m, x: x + torch.rand_like(x)),
        "lin": nn.Linear(6, 2),
        "stat": nn.BatchNorm2d(3, track_running_stats=False),
        "counts": Counting(),
    }
    with pytest.raises(UsageError, match=message) as caught:
        capture(image_net(forward, **parts), (3, 8, 8))
    assert "\n" not in str(caught.value)
    assert "65521" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # torch prints graphs and logs its internals; a command's output may be data


class Counting(nn.Module):
    """Changes itself in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * self.seen


def test_one_of_several_outputs_is_chosen() -> None:
    module = randomise(image_net(lambda m, x: (m.c(x), m.c2(x).flatten(1)), c2=conv()))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for result, layers in ((0, ["c"]), (1, ["c2"])):
        captured = capture(module, (3, 8, 8), result=result)
        assert [op.name for op in captured.graph.layers] == layers
        with torch.no_grad():
            expected = module(x)[result]
        expected = expected.mean((2, 3)) if expected.dim() == 4 else expected
        torch.testing.assert_close(run(captured.graph, captured.tensors, x), expected)
    with pytest.raises(UsageError, match="--result: 2, expected 0 to 1"):
        capture(module, (3, 8, 8), result=2)


def test_a_layer_that_is_called_twice_is_one_layer() -> None:
    graph = capture(image_net(lambda m, x: m.c(F.relu(m.c(x)))), (3, 8, 8)).graph
    assert [op.name for op in graph.layers] == ["c"]
    assert [(op.name, op.owner, op.in_shape) for op in graph.uses("c")] == [
        ("c", "c", (3, 8, 8)),
        ("c_1", "c", (3, 6, 6)),
    ]


def test_tied_weights_are_one_layer_or_refused() -> None:
    tied = randomise(image_net(lambda m, x: m.c2(m.c(x)), c2=conv()))
    tied.c2.weight = tied.c.weight
    with pytest.raises(UsageError, match="the weight of c2 is used again with another bias"):
        capture(tied, (3, 8, 8))
    tied.c2.bias = tied.c.bias
    captured = capture(tied, (3, 8, 8))
    assert len(captured.graph.layers) == 1
    assert len(captured.graph.uses(captured.graph.layers[0].name)) == 2
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run(captured.graph, captured.tensors, x), tied(x).mean((2, 3)))


@pytest.mark.parametrize(
    "make",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["hook", "weight_norm", "spectral_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_weights_that_are_made_from_others_follow_what_was_loaded(make: Callable[[nn.Module], nn.Module]) -> None:
    module = image_net(lambda m, x: m.c(x), c=make(conv()))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    captured = capture(module.eval(), (3, 8, 8))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run(captured.graph, captured.tensors, x), module(x).mean((2, 3)))
    assert captured.computed["c.weight"]


def test_a_tiny_head_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is compared relative to its own size: an error behind a head of zeros is found."""
    module = Classifier().eval()
    with torch.no_grad():
        module.fc.weight.zero_()
        module.point.weight.mul_(1e-6)
        module.point.bias.zero_()
    capture(module, (3, 16, 16))
    import stages.operators.op as records

    wrong = replace(records.TABLE["relu6"], forward=lambda op, inputs, tensors: 1.01 * inputs[0].clamp(0, 6))
    monkeypatch.setitem(records.TABLE, "relu6", wrong)
    with pytest.raises(UsageError, match="point: differs from its operators one by one"):
        capture(module, (3, 16, 16))


def test_a_final_softmax_is_left_to_the_head() -> None:
    module = randomise(image_net(lambda m, x: m.c(x).flatten(1).softmax(1)))
    captured = capture(module, (3, 8, 8))
    assert captured.notes == ("the final softmax (softmax) is left out: heads bring their own",)
    assert "softmax" not in {op.kind for op in captured.graph.ops}
