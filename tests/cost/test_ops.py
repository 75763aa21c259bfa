"""Counting rules: hand values, and two independent counters."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stages.cost import ops
from stages.cost.model import forward_macs
from stages.errors import UsageError
from stages.models.registry import ARCHITECTURES, build, input_spec
from stages.operators import TABLE, Op, Operator
from stages.operators.op import keeps_nothing, same_shape
from tests.cost.nets import backbone, conv, op_input

PAPER_NETS = [
    ("mcunet-5fps", {}, 22_453_504),
    ("mobilenetv2-w0.35", {}, 16_646_912),
    ("mobilenetv2-w0.35", {"mix": True}, 17_449_728),
    ("proxyless-w0.3", {}, 18_619_904),
    ("proxyless-w0.3", {"mix": True}, 19_209_728),
]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [(1, 16 * 8 * 3 * 3 * 5 * 5), (4, 16 * 2 * 3 * 3 * 5 * 5)],  # out * in/groups * k * k * out positions
)
def test_convolution_by_hand(groups, expected):
    op = conv("c", op_input(8, 9), 16, k=3, stride=2, groups=groups)
    assert ops.macs(op) == ops.input_gradient_macs(op) == ops.weight_gradient_macs(op) == expected


def test_one_dimensional_convolution_and_linear_by_hand():
    sound = Op("c", "conv", ("x",), (6, 10), ((4, 20),), (5,), (2,), (2,), (1,))
    assert ops.macs(sound) == 6 * 4 * 5 * 10
    assert ops.macs(Op("l", "linear", ("x",), (7,), ((9,),), bias=True)) == 63


@pytest.mark.parametrize("operator", TABLE.values(), ids=TABLE)
def test_every_kind_has_a_rule_or_a_reason(operator):
    assert callable(operator.macs) or (isinstance(operator.macs, str) and operator.macs)


def test_a_kind_without_a_rule_cannot_be_made():
    with pytest.raises(TypeError, match="macs"):
        Operator(kind="gate", doc="", shape=same_shape, keeps=keeps_nothing, forward=None, onnx=None, aten={})


def test_an_operator_without_a_rule_is_refused_by_name():
    op = replace(conv("blocks.3.gate", op_input(2, 4), 2), kind="gate")
    for count in (ops.macs, ops.input_gradient_macs, ops.weight_gradient_macs):
        with pytest.raises(UsageError, match=r"blocks\.3\.gate.*'gate'"):
            count(op)


@pytest.mark.parametrize(("batch", "bits", "indices"), [(1, 7, 50), (2, 13, 100), (8, 50, 400)])
def test_kept_bytes_round_the_bits_of_the_whole_batch_up(batch, bits, indices):
    shape = (2, 5, 5)
    for kind, expected in (("relu", bits), ("relu6", bits), ("max_pool", indices), ("add", 0), ("conv", 0)):
        op = Op("o", kind, ("x",), shape, (shape,))
        assert op.operator.keeps(op, {0}).own_bytes(op, batch) == expected


@pytest.mark.parametrize(("arch", "arguments", "expected"), PAPER_NETS)
def test_papers_networks_have_the_papers_macs(arch, arguments, expected):
    assert forward_macs(backbone(arch, **arguments)) == expected


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "mobilenetv2-w0.35"])
def test_forward_macs_agree_with_torchs_counter(arch):
    module, shape = build(arch, {}), input_spec(arch, {}).shape
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, *shape))  # of the processor's fused attention torch counts nothing
    graph = backbone(arch)
    scaled = sum(
        op.elements for op in graph.ops if op.kind == "scale"
    )  # what a norm's weight multiplies, uncounted there
    assert counter.get_total_flops() == 2 * (forward_macs(graph) - scaled)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["mcunet-5fps", "squeezenet", "ds-cnn"])
def test_forward_macs_agree_with_fvcore(arch):
    fvcore = pytest.importorskip("fvcore.nn")
    module, shape = build(arch, {}), input_spec(arch, {}).shape
    counter = fvcore.FlopCountAnalysis(module, torch.zeros(1, *shape))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted = counter.by_operator()
    assert counted["conv"] + counted["linear"] == forward_macs(backbone(arch))
