"""Kernels cut to the taps that meet the map compute what torch computes with all of them."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from stages.engines.torch.reference import apply
from stages.operators import Op
from stages.operators.reach import within_reach


def convolution(sizes, kernel, stride, padding, dilation=(1, 1), channels=4, groups=4):
    """A convolution on a map of these sizes; None where the kernel is larger than the padded map."""
    facts = zip(sizes, kernel, stride, padding, dilation, strict=True)
    out = [(size + 2 * pad - apart * (taps - 1) - 1) // step + 1 for size, taps, step, pad, apart in facts]
    if min(out) < 1:
        return None
    return Op(
        "c", "conv", (), (channels, *out), ((channels, *sizes),), kernel, stride, padding, dilation, groups=groups
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "kernel", "stride", "padding", "left", "kept"),
    [
        # by hand: on 2 x 2, outputs 0 and 1 read positions -3..4 of which 0 and 1 exist: taps 2..4
        ((2, 2), (7, 7), (1, 1), (3, 3), (1, 1), [slice(2, 5)] * 2),
        # a single position meets the middle tap alone
        ((1, 1), (5, 5), (1, 1), (2, 2), (0, 0), [slice(2, 3)] * 2),
        # two outputs 2 apart on 4 positions: the first reads -3..3, the second -1..5: taps 1..6
        ((4, 4), (7, 7), (2, 2), (3, 3), (2, 2), [slice(1, 7)] * 2),
        # one axis is small, the other is not
        ((2, 8), (5, 5), (1, 1), (2, 2), (1, 2), [slice(1, 4), slice(0, 5)]),
    ],
)
def test_taps_by_hand(sizes, kernel, stride, padding, left, kept):
    op = convolution(sizes, kernel, stride, padding)
    weight = torch.randn(4, 1, *kernel)
    cut, smaller = within_reach(op, weight)
    assert (cut.kernel, cut.padding) == (tuple(taps.stop - taps.start for taps in kept), left)
    assert torch.equal(smaller, weight[:, :, kept[0], kept[1]])
    assert smaller.data_ptr() >= weight.data_ptr()  # a view: what trains in place is seen
    assert (cut.shape, cut.in_shape) == (op.shape, op.in_shape)


def test_kernels_that_meet_the_map_are_left_alone():
    op, weight = convolution((8, 8), (3, 3), (1, 1), (1, 1)), torch.randn(4, 1, 3, 3)
    assert within_reach(op, weight)[0] is op
    assert within_reach(op, weight)[1] is weight
    line = Op("l", "linear", (), (2,), ((3,),))
    assert within_reach(line, weight) == (line, weight)


whole = st.integers(1, 9)


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.tuples(whole, whole),
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.sampled_from([1, 2, 4]),
)
def test_outputs_and_gradients_are_those_of_the_whole_kernel(sizes, kernel, stride, padding, dilation, groups):
    op = convolution(sizes, kernel, stride, padding, dilation, groups=groups)
    assume(op is not None)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(op.weight_shape, dtype=torch.float64, generator=draw).requires_grad_()
    x = torch.randn(2, *op.in_shape, dtype=torch.float64, generator=draw).requires_grad_()
    expected = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    found = apply(op, [x], {"c.weight": weight})
    assert found.shape == expected.shape
    assert torch.allclose(found, expected)
    pull = torch.randn(expected.shape, dtype=torch.float64, generator=draw)
    wanted = torch.autograd.grad(expected, (x, weight), pull)
    for one, other in zip(torch.autograd.grad(found, (x, weight), pull, allow_unused=True), wanted, strict=True):
        assert torch.allclose(torch.zeros_like(other) if one is None else one, other)
