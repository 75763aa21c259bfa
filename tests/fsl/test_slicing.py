"""SliceOut: a sliced step is one of the masked net, unbiased where it says so, and touches nothing that it left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.artifacts.records import Model
from stages.engines.torch import reference
from stages.errors import UsageError
from stages.fsl.slicing import DRAWS, SlicedSGD, Slicing, drawn_channels, inclusion, kept_channels
from stages.graphs.graph import Graph
from stages.graphs.widths import hidden_widths
from stages.models import registry
from stages.models.deploy import with_graph
from stages.models.modules import Net, state, trainable
from stages.settings.pretraining import Pretraining

FEW = settings(max_examples=40, deadline=None, derandomize=True)
CPU = torch.device("cpu")
NETS = {
    "cnn4-w32": {"size": 16},
    "mlp": {"dim": 12, "width": 40, "depth": 3},
    "ds-cnn": {},
    "mobilenetv2": {"size": 32, "width": 0.35},
}


def net_of(arch: str) -> Net:
    args = NETS[arch]
    module = registry.build(arch, args)
    return trainable(with_graph(Model(arch, args, registry.input_spec(arch, args), "batchnorm", state(module))))


def inputs(net: Net, count: int = 6) -> Tensor:
    return torch.randn(count, *net.graph.input_shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------- by hand


def test_how_often_each_channel_is_kept() -> None:
    often = inclusion(64, 48)
    assert (often[16:48] == 1).all()
    assert often[0] == often[63] == 1 / 17
    for channels, kept in ((5, 2), (7, 7), (9, 4)):
        counts = np.zeros(channels)
        for start in range(channels - kept + 1):
            counts[start : start + kept] += 1
        assert inclusion(channels, kept) == pytest.approx(counts / (channels - kept + 1))
        assert inclusion(channels, kept).sum() == pytest.approx(kept)


@FEW
@given(st.integers(2, 12), st.integers(0, 100), st.sampled_from(DRAWS))
def test_draws_are_so_many_channels(channels: int, seed: int, draw: str) -> None:
    kept = 1 + seed % channels
    found = drawn_channels(channels, kept, draw, np.random.default_rng(seed))
    assert len(set(found.tolist())) == kept
    assert found.min() >= 0
    assert found.max() < channels
    if draw == "contiguous":
        assert (np.diff(found) == 1).all()


@pytest.mark.parametrize("draw", ["wrap", "contiguous"])
def test_the_mean_over_all_starts_is_the_whole_sum(draw: str) -> None:
    """For the next layer's sums; with N / w and the paper's runs it is not, if a channel at the edge is large."""
    channels, kept = 9, 4
    x = np.r_[100.0, np.arange(1.0, 9.0)]
    starts = range(channels if draw == "wrap" else channels - kept + 1)
    runs = [(start + np.arange(kept)) % channels for start in starts]
    often = np.full(channels, kept / channels) if draw == "wrap" else inclusion(channels, kept)
    assert np.mean([(x[run] / often[run]).sum() for run in runs]) == pytest.approx(x.sum())
    if draw == "contiguous":
        assert np.mean([(x[run] * channels / kept).sum() for run in runs]) < 0.6 * x.sum()


def test_hidden_widths_are_read_by_one_layer_alone() -> None:
    graph = net_of("cnn4-w32").graph
    assert [(width.maker, width.reader) for width in hidden_widths(graph)] == [
        (f"blocks.0{i}.conv", f"blocks.0{i + 1}.conv") for i in range(3)
    ]
    mobile = net_of("mobilenetv2").graph
    widths = {width.maker: width for width in hidden_widths(mobile)}
    assert widths["blocks.02.expand"].reader == "blocks.02.project"  # past a depthwise layer
    added = {name for op in mobile.ops if op.operator.joins == "sum" for name in op.inputs}
    assert not any(added & {width.maker, *width.through} for width in widths.values())  # residual streams stay whole
    assert kept_channels(192, 0.5) == 96


# ---------------------------------------------------------------------------------------------------------- a step


def masked_features(net: Net, slicing: Slicing, step: int, x: Tensor) -> Tensor:
    """The whole net, in which what a cut leaves out is 0 where the next layer reads it, the rest scaled."""
    cut = slicing.cut(step)
    values, factors = net.values(), dict[str, Tensor]()
    for width in slicing.widths:
        part = cut.parts[f"{width.reader}.weight"]
        assert part.columns is not None
        assert part.scale is not None
        factors[width.reader] = torch.zeros(width.channels).index_put((part.columns,), part.scale)
    held = {net.graph.ops[0].name: x}
    for op in net.graph.ops[1:]:
        given = [held[name] for name in op.inputs]
        if op.name in factors:
            shape = [1] * given[0].dim()
            shape[op.channel_axis % (given[0].dim() - 1) + 1] = -1
            given = [given[0] * factors[op.name].view(shape)]
        held[op.name] = reference.apply(op, given, values)
    return held[net.graph.output]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("arch", NETS)
def test_a_sliced_step_is_one_of_the_masked_net(arch: str, draw: str) -> None:
    net = net_of(arch).double()
    x, slicing = inputs(net).double(), Slicing(net.graph, 0.5, draw, 3, CPU)
    exact = masked_features(net, slicing, 7, x)
    pull = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((exact * pull).sum(), list(net.parameters()), allow_unused=True)
    cut = slicing.cut(7)
    net.cut = cut
    found = net(x)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)  # scales are float32
    gradients = torch.autograd.grad((found * pull).sum(), list(net.parameters()), allow_unused=True)
    names = {id(value): name for name, value in net.values().items()}
    for parameter, mine, theirs in zip(net.parameters(), gradients, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is None or theirs is None:
            continue
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()) + 1e-9)
        part = cut.parts.get(names[id(parameter)])
        if part is not None:
            outside = torch.ones_like(mine, dtype=torch.bool)
            outside[part.index()] = False
            assert not mine[outside].any()
    sizes = [cut.graph[width.maker].out_channels for width in slicing.widths]
    assert sizes == [kept_channels(width.channels, 0.5) for width in slicing.widths]


@pytest.mark.parametrize("draw", DRAWS)
def test_what_was_left_out_stays_as_it_is(draw: str) -> None:
    """Values, momentum and BatchNorm's statistics."""
    net = net_of("cnn4-w32").train()
    x, slicing = inputs(net), Slicing(net.graph, 0.5, draw, 1, CPU)
    optimizer = SlicedSGD(list(net.parameters()), momentum=0.9, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.1
    for step in range(4):
        cut = slicing.cut(step)
        before = {name: value.detach().clone() for name, value in net.values().items()}
        momentum = {id(p): s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
        net.cut = cut
        values = net.values()
        optimizer.kept = {id(values[name]): part for name, part in cut.parts.items()}
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        moved = 0
        for name, value in net.values().items():
            part = cut.parts.get(name)
            kept = torch.zeros_like(value, dtype=torch.bool)
            kept[part.index() if part is not None else (...,)] = True
            assert torch.equal(value[~kept], before[name][~kept]), name
            moved += int((value[kept] != before[name][kept]).sum())
            if id(value) in momentum:
                found = optimizer.state[value]["momentum_buffer"]
                assert torch.equal(found[~kept], momentum[id(value)][~kept])
        assert moved > 0


def test_a_step_of_all_channels_is_torchs_own() -> None:
    nets = [net_of("cnn4-w32").train() for _ in range(2)]
    x = inputs(nets[0])
    rules = [SlicedSGD(list(nets[0].parameters()), momentum=0.9, weight_decay=0.1),
             torch.optim.SGD(nets[1].parameters(), lr=0.0, momentum=0.9, weight_decay=0.1)]  # fmt: skip
    for net, rule in zip(nets, rules, strict=True):
        rule.param_groups[0]["lr"] = 0.1
        for _ in range(3):
            rule.zero_grad()
            net(x).square().sum().backward()
            rule.step()
    for first, second in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_draws_depend_on_seed_step_and_width_alone() -> None:
    graph: Graph = net_of("cnn4-w32").graph
    first, again = (Slicing(graph, 0.5, "wrap", 5, CPU).cut(3) for _ in range(2))
    other = Slicing(graph, 0.5, "wrap", 6, CPU).cut(3)
    rows = [
        [part.rows.tolist() for part in cut.parts.values() if part.rows is not None] for cut in (first, again, other)
    ]
    assert rows[0] == rows[1] != rows[2]


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UsageError, match="--slice"):
        Pretraining(slice=0.0)
    with pytest.raises(UsageError, match="wrap"):
        replace(Pretraining(), slice_draw="some")
