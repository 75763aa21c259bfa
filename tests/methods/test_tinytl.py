"""Lite residual modules: the same gradients as a plain torch module, the shapes and costs counted by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stages.artifacts.records import InputSpec, Model
from stages.engines.torch.face import ArrayNet
from stages.errors import UsageError
from stages.fsl.episodes import FixedShape, draw_episodes, pool_of
from stages.graphs.graph import Graph
from stages.methods.lite_residual import find_places, with_modules
from stages.methods.lite_residual_net import LiteResidualNet
from stages.methods.registry import find_method
from stages.methods.task import Cost, make_task
from stages.methods.tinytl import TinyTL, cost
from stages.models.deploy import Backbone, deploy
from stages.models.modules import state
from stages.models.registry import build, input_spec
from stages.operators import Op
from stages.randomness import generator
from stages.task_evaluation import Tasks, evaluate_tasks
from stages.training.adaptation import Adapting, adapt_net
from stages.training.updates import cache_prefix, features_of, gradient_update
from tests.engines.protocol import closed
from tests.rounding import plain_features
from tests.test_pretraining import random_run, squares


def conv(name, source, c_in, c_out, size, kernel, stride, block):
    shape, padding = (c_out, size // stride, size // stride), kernel // 2
    pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": 1}
    axes = {key: (value, value) for key, value in pairs.items()}
    return Op(name, "conv", (source,), shape, ((c_in, size, size),), **axes, bias=True, block=block)


def two_blocks() -> Backbone:
    """A strided block (4, 8, 8) -> (8, 4, 4), a residual one, average pooling."""
    small = (8, 4, 4)
    ops = (
        Op("input", "input", (), (4, 8, 8)),
        conv("blocks.0.conv", "input", 4, 8, 8, 3, 2, 0),
        Op("blocks.0.relu", "relu", ("blocks.0.conv",), small, (small,), block=0),
        conv("blocks.1.conv", "blocks.0.relu", 8, 8, 4, 1, 1, 1),
        Op("blocks.1.relu", "relu", ("blocks.1.conv",), small, (small,), block=1),
        Op("blocks.1.add", "add", ("blocks.0.relu", "blocks.1.relu"), small, (small,) * 2, block=1),
        Op("pool", "global_pool", ("blocks.1.add",), (8,), (small,)),
    )
    rng = np.random.default_rng(0)
    tensors = {
        f"{op.name}.{part}": rng.normal(0, 0.5, shape).astype(np.float32)
        for op in ops
        if op.is_layer
        for part, shape in (("weight", op.weight_shape), ("bias", (op.out_channels,)))
    }
    return Backbone(Graph(ops, ("blocks.0", "blocks.1")), tensors, InputSpec("image", (4, 8, 8)))


def module(c_in, c_out, kernel, stride, groups, size):
    """TinyTL's lite residual module as torch's own layers."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(c_in, c_in, kernel, stride, kernel // 2, groups=2, bias=False),
        nn.GroupNorm(groups, c_in),
        nn.ReLU(),
        nn.Conv2d(c_in, c_out, 1, bias=False),
        nn.GroupNorm(1, c_out),
        nn.Upsample(size, mode="bilinear"),
    )


class Plain(nn.Module):
    """`two_blocks` with its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.lite0, self.lite1 = module(4, 8, 3, 2, 1, 4), module(8, 8, 1, 1, 1, 4)

    def forward(self, x):
        h = self.conv0(x).relu() + self.lite0(x)
        return (h + self.conv1(h).relu() + self.lite1(h)).mean((2, 3))

    def named(self):
        """Parameter name of `LiteResidualNet` -> parameter."""
        names = {}
        for i, (layer, lite) in enumerate([(self.conv0, self.lite0), (self.conv1, self.lite1)]):
            own = f"blocks.{i}.lite-residual"
            names[f"blocks.{i}.conv.bias"] = layer.bias
            for part, number in (("spatial", 1), ("pointwise", 4)):
                names[f"{own}.{part}.weight"] = lite[number].weight
                names[f"{own}.{part}.norm.weight"] = lite[number + 1].weight
                names[f"{own}.{part}.norm.bias"] = lite[number + 1].bias
        return names


def in_double(backbone):
    return replace(backbone, tensors={name: value.astype(np.float64) for name, value in backbone.tensors.items()})


def doubled(net):
    """A net of modules over a backbone in float64, in float64 too."""
    for parameter in net.parameters():
        parameter.data = parameter.data.double()
    return net


class FromSingle(ArrayNet):
    """A net in float64 whose inputs, as augmentation makes them, are float32."""

    def prefix(self, x):
        return super().prefix(x.astype(np.float64))


def twins(biased):
    """The net with random modules, and the plain module with the same values, in float64."""
    backbone, draw = in_double(two_blocks()), torch.Generator().manual_seed(1)
    net = doubled(LiteResidualNet(backbone, find_places(backbone.graph), draw, biased=biased))
    plain = Plain().double()
    with torch.no_grad():
        for i, layer in enumerate((plain.conv0, plain.conv1)):
            layer.weight.copy_(torch.from_numpy(backbone.tensors[f"blocks.{i}.conv.weight"]))
            layer.bias.copy_(torch.from_numpy(backbone.tensors[f"blocks.{i}.conv.bias"]))
        for name, parameter in net.named_parameters().items():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
            plain.named()[name].copy_(parameter)
    return net, plain


X = np.random.default_rng(2).normal(size=(10, 4, 8, 8))
LABELS = np.arange(5) % 2


def loss_of_features(features):
    """The ProtoNet loss of [support; query] with equal labels, by stock operators: differentiable."""
    means = torch.stack([features[:5][label == LABELS].mean(0) for label in range(2)])
    scores = 10 * functional.cosine_similarity(features[5:, None], means[None], dim=2)
    return functional.cross_entropy(scores, torch.from_numpy(LABELS))


@pytest.mark.parametrize("micro_batch", [0, 2, 5])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("biased", [(), ("blocks.1.conv",), ("blocks.0.conv", "blocks.1.conv")], ids=len)
def test_gradients_are_those_of_a_plain_torch_module(micro_batch, cached, biased):
    """In float64, where other kernels and orders differ far below the tolerance."""
    net, plain = twins(biased)
    arrays = ArrayNet(net)
    sources = [cache_prefix(arrays, part) if cached else part for part in (X[:5], X[5:])]
    loss = gradient_update(arrays, sources, closed(loss_of_features), micro_batch=micro_batch)
    expected = loss_of_features(plain(torch.from_numpy(X)))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    names = list(net.named_parameters())
    assert len(names) == 12 + len(biased)
    for name, parameter in zip(names, arrays.parameters(), strict=True):
        gradient = plain.named()[name].grad.numpy()
        np.testing.assert_allclose(parameter.gradient, gradient, rtol=1e-8, atol=1e-9 * np.abs(gradient).max())


def test_the_frozen_part_ends_before_the_first_module():
    backbone = two_blocks()
    places = find_places(backbone.graph)
    draw = torch.Generator()
    assert LiteResidualNet(backbone, places, draw).boundary == ("input", "blocks.0.relu")
    assert LiteResidualNet(backbone, places[1:], draw).boundary == ("blocks.0.relu", "blocks.1.add")
    assert LiteResidualNet(backbone, places[1:], draw, biased=["blocks.1.conv"]).boundary == ("blocks.0.relu",)


@pytest.mark.parametrize("settings", [{}, {"drop": 0.5}, {"bias": True}, {"kernel": 1}], ids=str)
def test_an_untrained_net_computes_what_the_backbone_computes(settings):
    backbone = deploy(random_run().model)
    how = TinyTL(**settings)
    places = how.places(backbone.graph)
    biased = [update.layer for update in how.biases(backbone.graph, places)]
    net = LiteResidualNet(backbone, places, torch.Generator().manual_seed(0), biased=biased)
    x = np.random.default_rng(0).normal(size=(5, 1, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(features_of(ArrayNet(net), x), plain_features(backbone, x))


def test_the_modules_shapes_by_hand():
    first, second = find_places(two_blocks().graph)
    # (4, 8, 8) pooled to 4 x 4: the largest odd kernel is 3; the block's stride 2 leaves 2 x 2
    assert (first.entry, first.exit) == ("input", "blocks.0.relu")
    assert (first.spatial.weight_shape, first.spatial.stride, first.spatial.shape) == ((4, 2, 3, 3), (2, 2), (4, 2, 2))
    assert (first.pointwise.weight_shape, first.shape) == ((8, 4, 1, 1), (8, 4, 4))
    # (8, 4, 4) pooled to 2 x 2
    assert (second.entry, second.exit) == ("blocks.0.relu", "blocks.1.add")
    assert (second.spatial.weight_shape, second.spatial.shape) == ((8, 4, 1, 1), (8, 2, 2))
    assert (first.values, second.values) == (72 + 8 + 32 + 16, 32 + 16 + 64 + 16)


def test_costs_by_hand():
    graph = two_blocks().graph
    places = find_places(graph)
    # modules forward: 72 * 4 + 32 * 4 and 32 * 4 + 64 * 4; the first reads the input, which needs no gradient (288);
    # the gradient passes through blocks.1.conv: 64 * 16
    macs = 2 * (288 + 128 + 128 + 256) - 288 + 1024
    # one ReLU behind the first module (128 bits); convolutions' and norms' inputs of both modules, and their ReLUs
    saved = 16 + 4 * (64 + 16 + 16 + 32) + 2 + 4 * (32 + 32 + 32 + 32) + 4
    # paper: 256 values, gradients and two moments; the largest layer's buffers: (4 * 64 + 8 * 16) * 4
    expected = Cost(
        layers=4,
        live_values=256,
        backward_macs=macs,
        memory_bytes=256 * 16 + 1536,
        saved_bytes=256 * 12 + saved,
    )
    assert cost(graph, places) == expected
    # the second alone: nothing flows through the backbone but the addition
    alone = cost(graph, places[1:])
    assert alone.backward_macs == 2 * (128 + 256) - 128
    assert alone.saved_bytes == 128 * 12 + 4 * (32 + 32 + 32 + 32) + 4
    biased = cost(graph, places, TinyTL(bias=True).biases(graph, places))
    assert biased.live_values == 256 + 16
    assert biased.backward_macs == macs  # the first layer's own input gradient is not needed
    assert biased.memory_bytes == expected.memory_bytes  # the paper's model does not count biases
    assert biased.saved_bytes == expected.saved_bytes + 16 * 12 + 16  # and the first block's ReLU


@pytest.mark.parametrize(
    ("arch", "blocks", "kept"),
    [
        ("mcunet-5fps", 14, {"75": 4, "50": 7, "25": 11}),  # 3.5, 7, 10.5
        ("mobilenetv2-w0.35", 17, {"75": 4, "50": 9, "25": 13}),  # 4.25, 8.5, 12.75
        ("proxyless-w0.3", 20, {"75": 5, "50": 10, "25": 15}),
    ],
)
def test_adapter_drop_leaves_out_the_first_blocks(arch, blocks, kept):
    size = {"size": 32}
    graph = deploy(Model(arch, size, input_spec(arch, size), "batchnorm", state(build(arch, size)))).graph
    every = find_method("tinytl").places(graph)
    assert [place.block for place in every] == list(graph.blocks)
    assert len(every) == blocks
    for percent, count in kept.items():
        assert find_method(f"adapter-drop-{percent}").places(graph) == every[-count:]


def test_modules_stand_between_a_block_and_its_readers():
    graph = with_modules(two_blocks().graph, find_places(two_blocks().graph))
    assert graph["blocks.1.conv"].inputs == ("blocks.0.lite-residual",)
    assert graph["blocks.1.add"].inputs == ("blocks.0.lite-residual", "blocks.1.relu")
    assert graph["blocks.1.lite-residual"].inputs == ("blocks.1.add", "blocks.0.lite-residual")
    assert graph["pool"].inputs == ("blocks.1.lite-residual",)


# ------------------------------------------------------------------------------------------------------- the method


@pytest.fixture(scope="module")
def backbone():
    return deploy(random_run().model)


@pytest.fixture(scope="module")
def task(backbone):
    data = squares(classes=4)
    (episode,) = draw_episodes(pool_of(data), FixedShape(ways=3, shots=3, queries=3), 0, [0])
    return make_task(data, episode, backbone)


def test_training_lowers_the_loss_and_moves_modules_alone(backbone, task):
    places = TinyTL().places(backbone.graph)
    how = Adapting(iterations=30, learning_rates=(1e-2,), views=1, micro_batch=4)

    before = {name: value.copy() for name, value in backbone.tensors.items()}

    def fresh():
        return ArrayNet(LiteResidualNet(backbone, places, torch.Generator().manual_seed(0)))

    result = adapt_net(fresh, backbone.input, task.support_x, task.support_y, how, generator(0, "adapt", 0))
    assert result.losses[-1] < 0.5 * result.losses[0]
    pairs = zip(fresh().parameters(), result.net.parameters(), strict=True)
    assert all(not np.array_equal(start.value, trained.value) for start, trained in pairs)
    assert all(np.array_equal(value, before[name]) for name, value in backbone.tensors.items())


def test_without_a_rate_it_is_none(backbone, task):
    how = Adapting(learning_rates=(0.0,))
    answers = [find_method(name)(backbone, task, how, generator(0, "adapt", 0)) for name in ("none", "tinytl")]
    np.testing.assert_array_equal(answers[0].predicted, answers[1].predicted)


def test_adaptation_repeats_for_equal_seeds_whatever_the_micro_batch(backbone, task):
    places = TinyTL().places(backbone.graph)
    double = in_double(backbone)

    def losses(seed, micro_batch):
        def fresh():
            return FromSingle(doubled(LiteResidualNet(double, places, torch.Generator().manual_seed(7))))

        how = Adapting(iterations=4, learning_rates=(3e-3,), micro_batch=micro_batch)
        rng = generator(seed, "adapt", 0)
        return adapt_net(fresh, backbone.input, task.support_x, task.support_y, how, rng).losses

    assert losses(0, 4) == losses(0, 4)
    assert losses(0, 4) != losses(1, 4)
    # features differ in the last bits of float64, so a gradient at them, which is rounded to float32, by 2^-24 of it
    assert losses(0, 4) == pytest.approx(losses(0, 0), rel=1e-6)


def test_the_row_has_the_methods_own_cost():
    run = random_run()
    config = Tasks(
        tasks=1,
        methods=("tinytl", "tinytl:bias=true", "adapter-drop-50"),
        ways=3,
        shots=2,
        queries=2,
        iterations=1,
        lr=1e-3,
        measure=False,
    )
    rows = evaluate_tasks(run, squares(classes=4), config, seed=0)
    graph = deploy(run.model).graph
    whole, biased, half = (
        cost(graph, places, how.biases(graph, places))
        for how in (TinyTL(), TinyTL(bias=True), TinyTL(drop=0.5))
        for places in [how.places(graph)]
    )
    for row, expected in zip(rows, (whole, biased, half), strict=True):
        found = {name: getattr(row, name) for name in vars(expected)}
        assert found == vars(expected)
    assert biased.live_values == whole.live_values + 4 * 4  # four layers of four channels
    assert half.backward_macs < whole.backward_macs
    assert half.memory_bytes < whole.memory_bytes


def test_a_net_without_maps_has_no_place():
    spec = input_spec("mlp", {})
    backbone = deploy(Model("mlp", {}, spec, "batchnorm", state(build("mlp", {}))))
    with pytest.raises(UsageError, match="tinytl, adapter-drop: a net without blocks"):
        TinyTL().places(backbone.graph)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tinytl:drop=1", "drop 1.0"),
        ("tinytl:kernel=4", "kernel 4"),
        ("tinytl:bias=maybe", "bias=maybe"),
        ("tinytl:colour=red", "keys drop, bias, kernel"),
        ("adapter-drop-50:bias=true", "keys none"),
        ("adapter-drop-60", "'adapter-drop-60'"),
    ],
)
def test_settings_that_do_not_exist(text, message):
    with pytest.raises(UsageError, match=message):
        find_method(text)


def test_settings_are_read():
    assert find_method("tinytl:drop=0.5+bias=true+kernel=3") == TinyTL(drop=0.5, bias=True, kernel=3)


def test_initial_modules_differ_between_tasks_but_not_the_views(backbone, task):
    """The modules' seed is spawned: the support's views are those that every method draws."""
    rng, other = generator(0, "adapt", 0), generator(0, "adapt", 0)
    find_method("tinytl")(backbone, task, Adapting(iterations=1, learning_rates=(1e-3,)), rng)
    find_method("last-layer")(backbone, task, Adapting(iterations=1, learning_rates=(1e-3,)), other)
    assert np.array_equal(rng.integers(2**63, size=3), other.integers(2**63, size=3))
