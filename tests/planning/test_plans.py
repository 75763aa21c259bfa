"""Named plans, hand-made plans, and the record."""

import json
from dataclasses import replace

import numpy as np
import pytest

from stages.artifacts.records import LayerUpdate
from stages.cost.training import live_values, memory_bytes, native_memory, plan_backward_macs
from stages.errors import DataError, UsageError
from stages.graphs.graph import Graph
from stages.operators import Op
from stages.planning.baselines import SCHEMES, named_plan, plan_names
from stages.planning.plans import check_plan, check_updates, make_plan, parse_plan
from tests.cost.nets import backbone, inverted_residual

ARCHS = {"mcunet": "mcunet-5fps", "mbv2": "mobilenetv2-w0.35", "proxyless": "proxyless-w0.3"}


def weights(graph: Graph) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"{op.name}.weight": rng.normal(size=op.weight_shape) for op in graph.layers}


def scheme_net(name: str, *, mix: bool = False) -> Graph:
    return backbone(ARCHS[name.split("-")[0]], mix=mix)


def without_biases(updates: tuple[LayerUpdate, ...]) -> list[LayerUpdate]:
    return [replace(update, bias=()) for update in updates if update.channels]


@pytest.mark.parametrize(
    ("name", "weight_gradient", "input_gradient", "values"),
    [("49kb", 0.77, 8.22, 12_096), ("74kb", 1.88, 9.41, 29_440), ("99kb", 2.47, 9.41, 52_480),
     ("124kb", 2.61, 9.41, 75_328), ("148kb", 3.21, 9.41, 98_560)],
)  # fmt: skip
def test_published_mcunet_schemes_cost_what_the_tables_say(name, weight_gradient, input_gradient, values):
    graph = scheme_net("mcunet")
    updates = without_biases(named_plan(f"mcunet-{name}", graph, tensors_l2=weights(graph)))
    assert live_values(graph, updates) == values
    assert plan_backward_macs(graph, updates) / 1e6 == pytest.approx(weight_gradient + input_gradient, abs=0.011)


def test_table_2_sparse_update_on_mcunet():
    graph = scheme_net("mcunet")
    updates = without_biases(named_plan("mcunet-99kb", graph, tensors_l2=weights(graph)))
    assert memory_bytes(graph, updates) / 2**20 == pytest.approx(1.43, abs=0.005)
    assert memory_bytes(graph, updates, optimizer="sgd") / 2**20 == pytest.approx(1.03, abs=0.005)
    assert plan_backward_macs(graph, updates) / 1e6 == pytest.approx(11.9, abs=0.05)


def test_there_are_fifteen_schemes():
    assert len(SCHEMES) == 15


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("mix", [False, True])
def test_schemes_count_layers_from_the_stem_without_the_mix_layer(name, mix):
    graph = scheme_net(name, mix=mix)
    updates = named_plan(name, graph, tensors_l2=weights(graph))
    check_updates(updates, graph)
    scheme = SCHEMES[name]
    number = {op.name: i for i, op in enumerate(op for op in graph.layers if op.name != "mix")}
    assert {number[u.layer]: round(u.ratio, 3) for u in updates if u.channels} == {
        i: round(ratio, 3) for i, ratio in scheme.ratios.items()
    }
    biased = sorted(number[u.layer] for u in updates if u.bias)
    assert biased == list(range(scheme.layers - scheme.biases, scheme.layers))


def test_schemes_take_input_channels_of_largest_norm():
    graph = scheme_net("mcunet")
    tensors = weights(graph)
    layer = graph.layers[39]
    tensors[f"{layer.name}.weight"][:, [3, 5, 90]] *= 100
    update = next(u for u in named_plan("mcunet-99kb", graph, tensors_l2=tensors) if u.layer == layer.name)
    assert update.axis == "input"
    assert len(update.channels) == 24
    assert {3, 5, 90} <= set(update.channels)


def test_a_scheme_of_another_net_or_without_weights_is_refused():
    with pytest.raises(UsageError, match="42 layers"):
        named_plan("mcunet-99kb", scheme_net("mbv2"))
    with pytest.raises(UsageError, match="no weights"):
        named_plan("mcunet-99kb", scheme_net("mcunet"))


@pytest.mark.parametrize(
    ("name", "layers", "values", "biases"),
    [("full", 4, 4 * 27 + 32 + 72 + 32, 24), ("last-layer", 1, 32, 0), ("last-1", 1, 32, 0), ("last-3", 3, 136, 0),
     ("bias", 4, 0, 24)],
)  # fmt: skip
def test_plain_plans(name, layers, values, biases):
    graph = inverted_residual()
    updates = named_plan(name, graph)
    assert len(updates) == layers
    assert live_values(graph, updates, biases=False) == values
    assert live_values(graph, updates) == values + biases


@pytest.mark.parametrize("name", ["last-0", "last-5", "last-", "everything", "mcunet"])
def test_unknown_plans(name):
    with pytest.raises(UsageError):
        named_plan(name, inverted_residual())


def test_biases_of_a_model_without_any():
    graph = inverted_residual()
    bare = Graph(tuple(replace(op, bias=False) for op in graph.ops), graph.blocks)
    with pytest.raises(DataError, match="bias"):
        named_plan("bias", bare)
    assert "mbv2-138kb" in plan_names()


# ---------------------------------------------------------------------------------------------------------- the record


def test_make_plan_sorts_costs_and_keeps_facts():
    graph = inverted_residual()
    updates = list(reversed(named_plan("last-3", graph)))
    plan = make_plan("mine", updates, graph, memory_model="saved", batch=2, optimizer="sgd", facts={"score": 1.5})
    assert plan.layers == ("b.expand", "b.depthwise", "b.project")
    assert plan.memory_bytes == memory_bytes(graph, updates, model="saved", batch=2, optimizer="sgd")
    assert plan.backward_macs == plan_backward_macs(graph, updates)
    native = native_memory(graph, plan.updates)
    assert plan.facts == {
        "batch": 2,
        "optimizer": "sgd",
        "score": 1.5,
        "workers": 1,
        "keep_bits": 32,
        "arena_bytes": native.arena,
        "image_bytes": native.image,
        "arena_training_bytes": memory_bytes(graph, plan.updates, model="arena", batch=2, optimizer="sgd"),
    }
    check_plan(plan, graph)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (LayerUpdate("b.gate", "output", (0,), 4), "b.gate"),
        (LayerUpdate("b.add", "output", (0,), 4), "b.add"),
        (LayerUpdate("b.project", "output", (0,), 8), "8 output channels"),
        (LayerUpdate("b.project", "output", (4,), 4), "0 to 3"),
        (LayerUpdate("b.project", "output", (-1, 2), 4), "0 to 3"),
        (LayerUpdate("b.project", "output", (2, 1), 4), "ascending"),
        (LayerUpdate("b.project", "output", (1, 1), 4), "ascending"),
        (LayerUpdate("b.project", "output", (), 4, (4,)), "0 to 3"),
        (LayerUpdate("b.project", "sideways", (1,), 4), "sideways"),
        (LayerUpdate("b.project", "output", (), 4), "nothing trains"),
    ],
)
def test_plans_of_another_model_are_refused(update, message):
    with pytest.raises(DataError, match=message):
        check_updates([update], inverted_residual())


def test_layers_come_once_and_in_order():
    graph = inverted_residual()
    first, second = named_plan("last-2", graph)
    for wrong in ([second, first], [first, first]):
        with pytest.raises(DataError, match="order"):
            check_updates(wrong, graph)


# --------------------------------------------------------------------------------------------------------- plan files

TOML = """
name = "mine"

[[layer]]
layer = "b.project"
ratio = 0.5
bias = true

[[layer]]
layer = "b.expand"
channels = [3, 1]
axis = "input"

[[layer]]
layer = "stem"
bias = true
"""


def by_index(op: Op, axis: str) -> np.ndarray:
    return np.arange(float(op.out_channels if axis == "output" else op.in_channels))


EXPECTED = (
    LayerUpdate("stem", "output", (), 4, (0, 1, 2, 3)),
    LayerUpdate("b.expand", "input", (1, 3), 4),
    LayerUpdate("b.project", "output", (2, 3), 4, (0, 1, 2, 3)),
)


def test_a_toml_plan():
    assert parse_plan(TOML, "plan.toml", inverted_residual(), by_index) == ("mine", EXPECTED)


def test_the_same_in_json():
    rows = [
        {"layer": "b.project", "ratio": 0.5, "bias": True},
        {"layer": "b.expand", "channels": [1, 3], "axis": "input"},
        {"layer": "stem", "bias": True},
    ]
    assert parse_plan(json.dumps({"layer": rows}), "plan.json", inverted_residual(), by_index) == (
        "hand-made",
        EXPECTED,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer = ", "plan.toml"),
        ("", "plan.toml"),
        ("layer = []", "empty"),
        ("layer = [1]", "malformed"),
        ("layers = []", "layers"),
        ('[[layer]]\nlayer = "nope"\nratio = 1', "nope"),
        ('[[layer]]\nlayer = "stem"\nratios = 1', "ratios"),
        ('[[layer]]\nlayer = "stem"\nratio = 0', "ratio 0"),
        ('[[layer]]\nlayer = "stem"\nratio = true', "ratio True"),
        ('[[layer]]\nlayer = "stem"\nratio = 1\nchannels = [1]', "both"),
        ('[[layer]]\nlayer = "stem"\nchannels = [9]', "0 to 3"),
        ('[[layer]]\nlayer = "stem"\nchannels = [1.5]', "channels"),
        ('[[layer]]\nlayer = "stem"\naxis = "up"', "axis 'up'"),
        ('[[layer]]\nlayer = "stem"', "nothing trains"),
        ('[[layer]]\nlayer = "stem"\nratio = 1\n[[layer]]\nlayer = "stem"\nratio = 1', "order"),
        ('name = 3\n[[layer]]\nlayer = "stem"\nratio = 1', "name 3"),
    ],
)
def test_plan_files_that_cannot_be_read(text, message):
    with pytest.raises(DataError, match=message):
        parse_plan(text, "plan.toml", inverted_residual(), by_index)
