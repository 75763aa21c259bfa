"""The sparse engine against dense autograd: same gradients, the promised bytes, and nothing frozen ever moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.artifacts.records import LayerUpdate, Model
from stages.cost.training import saved_activation_bytes
from stages.engines.torch.live import Live
from stages.engines.torch.net import SparseNet
from stages.engines.torch.program import FROZEN_CHUNK
from stages.errors import DataError, UsageError
from stages.graphs.graph import Graph
from stages.models import registry
from stages.models.deploy import Backbone, deploy
from stages.operators import Op
from stages.planning.shortcuts import residual_entries, with_detached
from tests.engines.protocol import bounded, live_entries
from tests.engines.random_graphs import cases, random_backbone, random_input
from tests.rounding import Bounded, check_features, in_double

FEW = settings(max_examples=40, deadline=None, derandomize=True)


def weighted(features: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs for every feature of every sample."""
    weights = torch.linspace(-1, 2, features.numel(), dtype=features.dtype).reshape(features.shape)
    return (features * weights).sum() + (features**2).mean()


def expected_gradients(
    net: SparseNet, backbone: Backbone, dense: dict[str, torch.Tensor], updates
) -> list[torch.Tensor]:
    """The dense gradients, cut to the live slices, in the order of `net.parameters()`."""
    found = []
    for update in sorted(updates, key=lambda update: backbone.graph.position[update.layer]):
        if not update.trains:
            continue
        live = Live(backbone.graph[update.layer], update, dense)
        found += [value.detach() for value in live.parameters().values()]
    return found


def check_gradients(case, dtype: torch.dtype, **options) -> None:
    """Features and live gradients within the rounding bounds of dense autograd's, element by element."""
    backbone, x, features, dense = bounded(case, weighted, dtype)
    updates = case[1]
    net = SparseNet(backbone, updates, **options)
    mine = net.suffix(net.prefix(x))
    features.check(mine.detach(), "features")
    in_double(weighted)(mine).backward()
    values, errors = ({name: getattr(each, what) for name, each in dense.items()} for what in ("value", "error"))
    bounds = [expected_gradients(net, backbone, part, updates) for part in (values, errors)]
    assert len(bounds[0]) == len(net.parameters()) > 0
    for parameter, value, error in zip(net.parameters(), *bounds, strict=True):
        Bounded(value, error).check(torch.zeros_like(value) if parameter.grad is None else parameter.grad)


@FEW
@given(cases())
def test_gradients_equal_dense_autograd_in_double_precision(case):
    check_gradients(case, torch.float64)


@FEW
@given(cases())
def test_gradients_equal_dense_autograd_in_single_precision(case):
    check_gradients(case, torch.float32)


@settings(FEW, max_examples=25)
@given(cases(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_the_memory_layout_does_not_change_gradients(case, channels_last, dtype):
    check_gradients(case, dtype, channels_last=channels_last)


def kept_bytes(net: SparseNet, x: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters aside."""
    storages: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(storage)
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    boundary = net.prefix(x)
    for parameter in net.parameters():
        kept.append(parameter.untyped_storage())
    own = {storage.data_ptr() for storage in kept}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = net.suffix(boundary)
    assert features.requires_grad
    return sum(size for address, size in storages.items() if address not in own)


@FEW
@given(cases())
def test_bytes_kept_are_those_of_the_cost_model(case):
    graph, updates, batch, seed = case
    net = SparseNet(random_backbone(graph, seed, torch.float32), updates)
    x = random_input(graph, batch, seed, torch.float32)
    assert kept_bytes(net, x) == saved_activation_bytes(graph, updates, batch)


@pytest.mark.parametrize("arch", ["mcunet-5fps", "mobilenetv2-w0.35", "proxyless-w0.3", "squeezenet", "mobilenetv1"])
def test_bytes_kept_by_the_architectures(arch):
    backbone = small(arch)
    chosen = [op for op in backbone.graph.layers[-9:] if op.out_channels > 4][::2]
    updates = [LayerUpdate(op.name, "output", tuple(range(0, op.out_channels, 2)), op.out_channels) for op in chosen]
    net = SparseNet(backbone, updates)
    x = torch.rand(3, *backbone.graph.input_shape)
    assert kept_bytes(net, x) == saved_activation_bytes(backbone.graph, updates, 3)
    check_features(net.features(x), backbone, x)


@pytest.mark.parametrize("arch", ["mcunet-5fps", "mobilenetv2-w0.35", "proxyless-w0.3"])
def test_bytes_kept_by_shortcut_plans(arch):
    """Nothing is kept inside the branches that no gradient comes by."""
    backbone = small(arch)
    graph = backbone.graph
    live = [LayerUpdate(op.name, "output", (0, 1), op.out_channels) for op in graph.layers[-30:-10:9]]
    updates = with_detached(graph, live, residual_entries(graph))
    assert any(not update.trains for update in updates)
    x = torch.rand(3, *graph.input_shape)
    kept = kept_bytes(SparseNet(backbone, updates), x)
    assert kept == saved_activation_bytes(graph, updates, 3) < saved_activation_bytes(graph, live, 3)


def test_bytes_kept_beside_a_detached_branch_by_hand():
    """The stem's input, 2 * 6 * 6 float32, and the bits of the ReLU behind it; none of the branch's own ReLU6."""
    updates = (LayerUpdate("stem", "output", (0,), 4), LayerUpdate("middle", "output", (), 4, detached=True))
    backbone, x = random_backbone(chain(), 3, torch.float32), random_input(chain(), 5, 3, torch.float32)
    expected = 5 * 2 * 36 * 4 + 5 * 4 * 36 // 8
    assert kept_bytes(SparseNet(backbone, updates), x) == expected
    assert saved_activation_bytes(chain(), updates, 5) == 5 * 306 == expected
    through = (updates[0],)
    assert kept_bytes(SparseNet(backbone, through), x) == expected + 5 * 4 * 36 // 8


def small(arch: str) -> Backbone:
    """A registry architecture with random weights at a small input size."""
    args = {"size": 64}
    state = registry.build(arch, args).state_dict()
    tensors = {name: value.numpy() for name, value in state.items() if not name.endswith("num_batches_tracked")}
    return deploy(Model(arch, args, registry.input_spec(arch, args), "batchnorm", tensors))


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.1),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.05, weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(FEW, max_examples=8)
@given(cases())
def test_only_live_values_ever_move(name, case):
    graph, updates, batch, seed = case
    backbone = random_backbone(graph, seed, torch.float32)
    before = {name: torch.tensor(value) for name, value in backbone.tensors.items()}
    net = SparseNet(backbone, updates)
    optimizer = OPTIMIZERS[name](net.parameters())
    for step in range(3):
        optimizer.zero_grad()
        weighted(net.suffix(net.prefix(random_input(graph, batch, seed + step, torch.float32)))).backward()
        optimizer.step()
    after = net.tensors()
    allowed = {name: torch.from_numpy(entries) for name, entries in live_entries(graph, updates, before).items()}
    for tensor, value in before.items():
        assert torch.equal(after[tensor][~allowed[tensor]], value[~allowed[tensor]]), tensor
        assert np.array_equal(backbone.tensors[tensor], value), "the caller's backbone changed"
    moved = [(after[tensor] != value) & allowed[tensor] for tensor, value in before.items()]
    assert sum(int(m.sum()) for m in moved) > 0


# ---------------------------------------------------------------------------------------------------- one small graph


def chain() -> Graph:
    """stem -> relu -> (middle -> relu6) + skip -> mean: the earliest live layer may lie inside the residual."""
    ops = (
        Op("input", "input", (), (2, 6, 6)),
        conv("stem", "input", (4, 6, 6), (2, 6, 6)),
        Op("act", "relu", ("stem",), (4, 6, 6), in_shapes=((4, 6, 6),)),
        conv("middle", "act", (4, 6, 6), (4, 6, 6)),
        Op("middle.act", "relu6", ("middle",), (4, 6, 6), in_shapes=((4, 6, 6),)),
        Op("sum", "add", ("middle.act", "act"), (4, 6, 6), in_shapes=((4, 6, 6),) * 2),
        Op("mean", "global_pool", ("sum",), (4,), in_shapes=((4, 6, 6),)),
        Op("last", "linear", ("mean",), (5,), in_shapes=((4,),), bias=True),
    )
    return Graph(ops)


def conv(name: str, source: str, shape: tuple[int, ...], in_shape: tuple[int, ...]) -> Op:
    ones = (1, 1)
    return Op(
        name, "conv", (source,), shape, in_shapes=(in_shape,), kernel=(3, 3), stride=ones, padding=ones, dilation=ones,
        bias=True,
    )  # fmt: skip


MIDDLE = LayerUpdate("middle", "output", (0, 2), 4, (1,))


@pytest.fixture
def backbone() -> Backbone:
    return random_backbone(chain(), 3, torch.float32)


@pytest.fixture
def x() -> torch.Tensor:
    return random_input(chain(), 3, 3, torch.float32)


def test_features_are_the_models(backbone, x):
    net = SparseNet(backbone, [MIDDLE])
    for found in (net.features(x), net.suffix(net.prefix(x)).detach(), SparseNet(backbone, []).features(x)):
        check_features(found, backbone, x)


def test_without_a_plan_nothing_trains(backbone, x):
    net = SparseNet(backbone, [])
    assert net.parameters() == []
    assert not net.suffix(net.prefix(x)).requires_grad


def test_the_boundary_survives_training(backbone, x):
    net, untouched = SparseNet(backbone, [MIDDLE]), x.clone()
    boundary = net.prefix(x)
    before = [value.clone() for value in boundary]
    weighted(net.suffix(boundary)).backward()
    net.features(x)
    assert torch.equal(x, untouched)
    assert all(torch.equal(a, b) for a, b in zip(boundary, before, strict=True))


def test_changed_parameters_change_the_next_features(backbone, x):
    net = SparseNet(backbone, [MIDDLE])
    before = net.features(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5)
    after = net.features(x)
    assert not torch.allclose(after, before, atol=1e-3)
    check_features(after, replace(backbone, tensors=net.tensors()), x)


def test_gradients_accumulate():
    net = SparseNet(random_backbone(chain(), 3, torch.float64), [MIDDLE])
    boundary = net.prefix(random_input(chain(), 3, 3, torch.float64))
    weighted(net.suffix(boundary)).backward()
    once = [parameter.grad.clone() for parameter in net.parameters()]
    weighted(net.suffix(boundary)).backward()
    assert all(torch.allclose(p.grad, 2 * g) for p, g in zip(net.parameters(), once, strict=True))


def test_live_slices_can_be_taken_out_and_put_back(backbone, x):
    net, other = SparseNet(backbone, [MIDDLE]), SparseNet(backbone, [MIDDLE])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(-1)
    taken = net.live_tensors()
    assert {name: tuple(value.shape) for name, value in taken.items()} == {
        "middle.weight": (2, 4, 3, 3),
        "middle.bias": (1,),
    }
    other.load_live(taken)
    assert torch.equal(other.features(x), net.features(x))
    assert net.changed_tensors().keys() == {"middle.weight", "middle.bias"}
    assert torch.equal(other.changed_tensors()["middle.weight"], net.tensors()["middle.weight"])
    with pytest.raises(DataError, match="live slice"):
        other.load_live({"middle.weight": taken["middle.weight"]})
    with pytest.raises(DataError, match=r"middle.weight.*\(1, 4, 3, 3\)"):
        other.load_live({**taken, "middle.weight": taken["middle.weight"][:1]})


@pytest.mark.parametrize(
    ("update", "found"),
    [
        (LayerUpdate("nowhere", "output", (0,), 4), "'nowhere', expected a layer of this model"),
        (LayerUpdate("sum", "output", (0,), 4), "'sum', expected a layer of this model"),
        (replace(MIDDLE, axis_channels=8), "8 output channels"),
        (replace(MIDDLE, axis="sideways"), "sideways"),
        (replace(MIDDLE, channels=(), bias=()), "nothing trains"),
        (replace(MIDDLE, channels=(2, 0)), "ascending"),
        (replace(MIDDLE, channels=(1, 1)), "ascending"),
        (replace(MIDDLE, channels=(4,)), "0 to 3"),
        (replace(MIDDLE, bias=(-1,)), "0 to 3"),
    ],
)
def test_a_plan_of_another_model_is_refused(backbone, update, found):
    with pytest.raises(DataError, match=found):
        SparseNet(backbone, [update])


def test_a_layer_is_updated_once(backbone):
    with pytest.raises(DataError, match="each layer once"):
        SparseNet(backbone, [MIDDLE, MIDDLE])


def test_biases_of_a_layer_without_bias_are_refused():
    graph = Graph(tuple(replace(op, bias=False) if op.name == "middle" else op for op in chain().ops))
    with pytest.raises(DataError, match=r"middle.* bias.*expected none"):
        SparseNet(random_backbone(graph, 0, torch.float32), [MIDDLE])


@pytest.mark.parametrize("kind", ["batchnorm", "fourier"])
@pytest.mark.parametrize("name", ["act", "sum"])
def test_an_operator_out_of_place_is_named(backbone, kind, name):
    ops = tuple(replace(op, kind=kind) if op.name == name else op for op in backbone.graph.ops)
    with pytest.raises(UsageError, match=f"{name}.*{kind}"):
        SparseNet(Backbone(Graph(ops), backbone.tensors, backbone.input), [MIDDLE])


def test_an_input_of_another_shape_is_refused(backbone):
    with pytest.raises(DataError, match=r"\(N, 2, 6, 6\)"):
        SparseNet(backbone, [MIDDLE]).prefix(torch.zeros(1, 2, 5, 6))


def test_gradients_that_branches_share_are_not_overwritten():
    """`sum` sends one gradient both ways; `side` adds to it on one way only, and `act` masks it on the other."""
    shape = (4, 6, 6)
    ops = (
        *chain().ops[:3],
        conv("trunk", "act", shape, shape),
        conv("side", "trunk", shape, shape),
        Op("sum", "add", ("trunk", "act"), shape, in_shapes=(shape,) * 2),
        Op("both", "concat", ("sum", "side"), (8, 6, 6), in_shapes=(shape,) * 2, args=(("axis", 0),)),
        Op("mean", "global_pool", ("both",), (8,), in_shapes=((8, 6, 6),)),
    )
    whole = [LayerUpdate(name, "output", (0, 1, 2, 3), 4) for name in ("stem", "trunk", "side")]
    check_gradients((Graph(ops), whole, 2, 5), torch.float64)


def test_a_gradient_goes_through_a_mask_on_one_branch_only():
    """Both inputs of `sum` get the same gradient; the mask of `middle.act` must not touch what `act` gets."""
    whole = [LayerUpdate(name, "output", (0, 1, 2, 3), 4) for name in ("stem", "middle")]
    check_gradients((chain(), whole, 2, 5), torch.float64)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("axes", [1, 2])
def test_averages_at_the_edge_count_padding_or_not(padded, axes):
    ones, size = (1,) * axes, (6,) * axes
    ops = (
        Op("input", "input", (), (2, *size)),
        Op("stem", "conv", ("input",), (3, *size), ((2, *size),), ones, ones, (0,) * axes, ones, bias=True),
        Op("pool", "avg_pool", ("stem",), (3, *(4,) * axes), ((3, *size),), (3,) * axes, (2,) * axes, ones, ones,
           count_include_pad=padded, ceil_mode=True),
        Op("flat", "flatten", ("pool",), (3 * 4**axes,), ((3, *(4,) * axes),)),
    )  # fmt: skip
    check_gradients((Graph(ops), [LayerUpdate("stem", "output", (0, 2), 3)], 2, 1), torch.float64)


def test_a_tensor_that_two_live_layers_read_is_kept_once(x):
    """By output or by all input channels: both need all of `act`, (3, 4, 6, 6) floats; one ReLU6 mask follows."""
    ops = (
        *chain().ops[:5],
        conv("other", "act", (4, 6, 6), (4, 6, 6)),
        Op("sum", "add", ("middle.act", "other"), (4, 6, 6), in_shapes=((4, 6, 6),) * 2),
        Op("mean", "global_pool", ("sum",), (4,), in_shapes=((4, 6, 6),)),
    )
    plan = [MIDDLE, LayerUpdate("other", "input", (0, 1, 2, 3), 4)]
    net = SparseNet(random_backbone(Graph(ops), 0, torch.float32), plan)
    assert kept_bytes(net, x) == 4 * 3 * 4 * 36 + 3 * 4 * 36 // 8 == saved_activation_bytes(Graph(ops), plan, 3)


def test_no_gradient_flows_below_the_earliest_live_layer(backbone, x, monkeypatch):
    """One 3x3 convolution is live, and its input's gradient is nobody's: no transposed convolution may run."""

    def refuse(*args, **kwargs):
        raise AssertionError("an input gradient was computed")

    monkeypatch.setattr(torch.nn.functional, "conv_transpose2d", refuse)
    net = SparseNet(backbone, [MIDDLE])
    weighted(net.suffix(net.prefix(x))).backward()
    both = SparseNet(backbone, [replace(MIDDLE, layer="stem"), MIDDLE])
    loss = weighted(both.suffix(both.prefix(x)))
    with pytest.raises(AssertionError, match="input gradient"):
        loss.backward()


def test_a_live_layer_that_nothing_reads_gets_no_gradient(x):
    graph = chain()
    dead = conv("dead", "act", (4, 6, 6), (4, 6, 6))
    ops = (*graph.ops[:3], dead, *graph.ops[3:])
    net = SparseNet(random_backbone(Graph(ops), 0, torch.float32), [replace(MIDDLE, layer="dead"), MIDDLE])
    weighted(net.suffix(net.prefix(x))).backward()
    assert [parameter.grad is None for parameter in net.parameters()] == [True, True, False, False]


def test_the_prefix_holds_few_samples_at_a_time(monkeypatch):
    """Memory of the frozen part does not grow with the batch, and what comes out does not depend on the chunks."""
    backbone = small("mobilenetv2-w0.35")
    last = backbone.graph.layers[-1]
    net = SparseNet(backbone, [LayerUpdate(last.name, "output", (0,), last.out_channels)])
    x = random_input(backbone.graph, 2 * FROZEN_CHUNK + 3, 0, torch.float32)
    sizes, run = [], net._prefix
    monkeypatch.setattr(net, "_prefix", lambda values: sizes.append(len(*values.values())) or run(values))
    (together,) = net.prefix(x)
    assert sizes == [FROZEN_CHUNK, FROZEN_CHUNK, 3]
    monkeypatch.undo()
    one_by_one = [net.prefix(sample[None])[0] for sample in x]
    assert torch.equal(together, torch.cat(one_by_one))
