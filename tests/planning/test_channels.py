"""How many channels, which ones, and along which axis."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import DataError, UsageError
from stages.operators import Op
from stages.planning.channels import (
    CHANNEL_RULES,
    ChannelEvidence,
    channel_count,
    channel_rule,
    fisher,
    l2,
    make_update,
    random,
    top_channels,
)
from tests.cost.nets import conv, op_input

PLAIN = conv("plain", op_input(4, 5), 6, k=3)
DEPTHWISE = conv("dw", op_input(4, 5), 4, k=3, groups=4)
GROUPED = conv("grouped", op_input(4, 5), 6, k=3, groups=2)


@pytest.mark.parametrize(
    ("ratio", "channels", "expected"),
    [(1, 7, 7), (0.5, 7, 4), (0.5, 5, 3), (0.25, 3, 1), (0.125, 4, 1), (0.29, 100, 29), (0.0001, 9, 1), (0.9999, 9, 9)],
)
def test_rounding_half_up_and_never_to_nothing(ratio, channels, expected):
    assert channel_count(ratio, channels) == expected


@given(ratio=st.floats(0, 1, exclude_min=True), channels=st.integers(1, 4096))
def test_counts_stay_inside_and_near(ratio, channels):
    count = channel_count(ratio, channels)
    assert 1 <= count <= channels
    assert count == 1 or abs(count - ratio * channels) <= 0.5 + 1e-9


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(UsageError, match="ratio"):
        channel_count(ratio, 8)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), data=st.data())
def test_top_channels_are_the_largest(values, data):
    count = data.draw(st.integers(1, len(values)))
    top = top_channels(np.array(values), count)
    assert len(set(top)) == count
    assert list(top) == sorted(top)
    assert sorted((values[i] for i in top), reverse=True) == sorted(values, reverse=True)[:count]


def evidence(op: Op, axis: str, weight: torch.Tensor) -> ChannelEvidence:
    channels = op.out_channels if axis == "output" else op.in_channels
    return ChannelEvidence(op, axis, channels, None, weight.numpy(), None)


@pytest.mark.parametrize("op", [PLAIN, DEPTHWISE, GROUPED], ids=lambda op: op.name)
@pytest.mark.parametrize("axis", ["output", "input"])
def test_l2_is_the_norm_of_the_weights_that_read_or_make_a_channel(op, axis):
    weight = torch.randn(op.weight_shape, generator=torch.Generator().manual_seed(0))
    # the oracle: square the weights and let the convolution itself collect them per channel
    x = torch.ones(1, op.in_channels, 3, 3, requires_grad=True)
    output = torch.nn.functional.conv2d(x, weight.double().square().float(), groups=op.groups)
    if axis == "output":
        expected = output.detach().flatten()
    else:
        (gradient,) = torch.autograd.grad(output.sum(), x)
        expected = gradient.sum((0, 2, 3))
    np.testing.assert_allclose(l2(evidence(op, axis, weight)) ** 2, expected.numpy(), rtol=1e-5)


def test_updates_by_axis():
    ranking = np.arange(6.0)
    update = make_update(PLAIN, "output", ranking, 0.5, bias=True)
    assert (update.channels, update.axis_channels, update.bias) == ((3, 4, 5), 6, (3, 4, 5))
    update = make_update(PLAIN, "input", ranking[:4], 0.5, bias=True)
    assert (update.axis, update.channels, update.bias) == ("input", (2, 3), (0, 1, 2, 3, 4, 5))
    assert make_update(DEPTHWISE, "input", ranking[:4], 0.25).axis == "output"


def test_a_whole_layer_needs_no_ranking_and_a_part_does():
    assert make_update(PLAIN, "output", None, 1).channels == (0, 1, 2, 3, 4, 5)
    with pytest.raises(UsageError, match="ranking"):
        make_update(PLAIN, "output", None, 0.5)


def test_rules_say_what_they_miss():
    nothing = ChannelEvidence(PLAIN, "output", 6, None, None, None)
    with pytest.raises(DataError, match="plain"):
        fisher(nothing)
    for rule in (l2, random):
        with pytest.raises(UsageError):
            rule(nothing)
    with pytest.raises(UsageError, match="one of fisher"):
        channel_rule("best")


def test_random_follows_the_generator():
    def draw(seed: int) -> list[float]:
        return list(random(ChannelEvidence(PLAIN, "output", 6, None, None, np.random.default_rng(seed))))

    assert draw(1) == draw(1) != draw(2)
    assert set(CHANNEL_RULES) == {"fisher", "l2", "random"}
