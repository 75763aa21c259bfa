"""The stage score-layers: searched and given plans, budgets to the byte, and what the user is told."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Block, Head, InputSpec, Model, Profile, Run
from stages.cost.model import last_blocks
from stages.cost.training import live_values, memory_bytes, plan_backward_macs
from stages.engines.choice import Engine, fisher_bytes, make_inspector
from stages.errors import BudgetError, DataError, UsageError
from stages.importance.criteria import CRITERIA
from stages.importance.fisher import fisher_pass
from stages.importance.tasks import build_task
from stages.importing import Importing, import_model
from stages.methods.layer_scores import SEARCHES
from stages.models import registry
from stages.models.deploy import deploy, store
from stages.planning.channels import top_channels
from stages.planning.knapsack import Limits
from stages.planning.layers import SELECTORS
from stages.planning.shortcuts import residual_entries
from stages.scoring import Scoring, score_layers
from tests.realdata import real

ARCH, ARGS = "mobilenetv2-w0.1", {"size": 32}
EVERYTHING = {"memory": "1GB", "macs": "100%"}


def a_model():
    module = registry.build(ARCH, ARGS, seed=3)
    tensors = {k: v.numpy() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    return Model(ARCH, ARGS, registry.input_spec(ARCH, ARGS), "batchnorm", tensors)


def a_support(ways=3, shots=3, seed=0):
    """Classes that differ in their pattern, as uint8 images."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, size=(ways, 32, 32, 3))
    y = np.repeat(np.arange(ways), shots)
    x = 0.7 * patterns[y] + 0.3 * rng.integers(0, 256, size=(len(y), 32, 32, 3))
    return Block(x.astype(np.uint8), y, "NHWC")


SUPPORT = a_support()
BACKBONE = deploy(a_model())
RUN = Run(store(a_model(), BACKBONE))
GRAPH = BACKBONE.graph
LAYERS = tuple(op.name for op in GRAPH.layers)


def score(*, run=RUN, support=SUPPORT, seed=0, **settings):
    config = Scoring(**{"micro_batch": 9} | settings)
    return score_layers(run, support, config, rng=np.random.default_rng(seed))


def linear_head(classes, dim=GRAPH.feature_dim):
    weight = np.random.default_rng(1).normal(size=(classes, dim)).astype(np.float32) / dim
    return Head("linear", np.arange(classes), weight, np.zeros(classes, np.float32), np.ones(classes, bool))


# --------------------------------------------------------------------------------------------------- a plan searched


def test_a_shortcut_search_trains_entries_of_blocks_and_detaches_residual_branches():
    found = score(search="shortcut", memory="1MB", macs="15%")
    residual = residual_entries(GRAPH)
    assert (found.scores.criterion, found.plan.name) == ("fisher", "knapsack")
    assert set(found.plan.layers) <= {name for name in LAYERS if name.endswith("expand")}
    assert {update.ratio for update in found.plan.live} <= {1.0, 0.5}
    ends = {update.layer for update in found.plan.updates if update.detached}
    first = min(LAYERS.index(name) for name in found.plan.layers)
    assert ends == {name for name in residual if LAYERS.index(name) > first} | (residual & set(found.plan.layers))
    assert found.plan.backward_macs == plan_backward_macs(GRAPH, found.plan.updates) <= found.plan.facts["budget_macs"]
    exact = [replace(update, detached=False) for update in found.plan.live]
    assert plan_backward_macs(GRAPH, exact) > found.plan.backward_macs


def test_parts_of_a_search_can_be_changed():
    found = score(search="shortcut", layers="all", select="greedy", ratios=(0.25,), **EVERYTHING)
    assert found.plan.name == "greedy"
    assert any(name.endswith("depthwise") for name in found.plan.layers)


def test_a_given_plan_can_take_shortcuts():
    plain, short = score(plan="last-9"), score(plan="last-9", gradient="shortcut")
    assert plain.plan.layers == short.plan.layers
    assert short.plan.backward_macs < plain.plan.backward_macs


@pytest.mark.parametrize(
    ("criterion", "select"), [*((name, "greedy") for name in CRITERIA), *(("score", name) for name in SELECTORS)]
)
def test_every_criterion_and_selector_gives_a_plan_within_the_budgets(criterion, select):
    memory, macs = 250 * 1024, 500_000
    plan = score(criterion=criterion, select=select, blocks=1, memory=str(memory), macs=str(macs)).plan
    assert plan.updates
    assert plan.memory_bytes == memory_bytes(GRAPH, plan.updates) <= memory
    assert plan.backward_macs == plan_backward_macs(GRAPH, plan.updates) <= macs
    assert plan.facts["live_values"] == live_values(GRAPH, plan.updates)
    assert plan.facts["optimum_score"] >= plan.facts["score"] * (1 - 1e-6)
    assert plan.facts["samples"] == len(SUPPORT)
    assert plan.facts["fisher_pass_bytes"] == fisher_bytes(BACKBONE.engine, GRAPH, last_blocks(GRAPH, 1), 9)


def fisher_of(backbone, window):
    """The Fisher pass of the whole support, sample by sample."""
    task = build_task("prototypes", backbone, SUPPORT, None, np.random.default_rng(0))
    return fisher_pass(make_inspector(backbone, window), task.batches(1), task.loss)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_the_scores_are_the_criterion_of_the_fisher_pass(engine):
    found = score(blocks=2, engine=engine)
    other = {"native": "torch", "torch": "native"}[engine]
    fisher = fisher_of(replace(BACKBONE, engine=Engine(other)), found.scores.layer)
    ops = [GRAPH[name] for name in found.scores.layer]
    macs = {op.name: op.weights * int(np.prod(op.shape[1:])) for op in GRAPH.layers}
    most_weights, most_macs = max(op.weights for op in GRAPH.layers), max(macs.values())
    expected = [fisher.output[op.name].sum() / (op.weights / most_weights * macs[op.name] / most_macs) for op in ops]
    np.testing.assert_allclose(
        found.scores.score, expected, rtol=1e-3
    )  # another engine, other micro-batches; in digits: test_fisher
    assert len(found.scores.layer) == 6 == len(found.scores.output_fisher)
    assert {len(values) for values in found.scores.input_fisher} == {op.in_channels for op in ops}


DENSE = "tests.models.nets:dense_net"


@pytest.fixture(scope="module")
def dense():
    """A small DenseNet: its BatchNorms that stand behind a concatenation stay layers of their own."""
    spec = InputSpec("image", (3, 32, 32), (1 / 127.5,) * 3, (-1.0,) * 3)
    return import_model(Importing(arch=DENSE, arch_args={"growth": 4, "depth": 2}, input=spec))


def dense_score(run, **settings):
    config = Scoring(**{"micro_batch": 9, "blocks": 100} | settings)
    return score_layers(run, SUPPORT, config, rng=np.random.default_rng(0))


def scale_only(run):
    graph = deploy(run.model).graph
    return {op.name for op in graph.layers if not op.operator.candidate}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_batchnorm_kept_as_a_layer_is_no_candidate(dense, search):
    found = dense_score(dense, search=search)
    norms = scale_only(dense)
    assert len(norms) == 9
    assert norms.isdisjoint(found.scores.layer)
    assert len(found.scores.layer) >= 6
    assert norms.isdisjoint(found.plan.layers)


def test_a_batchnorm_kept_as_a_layer_is_a_candidate_where_it_is_asked_for(dense):
    """It wins then, by its few weights and MACs: the reason why it has to be asked for."""
    scores = dense_score(dense, layers="all").scores
    best = dict(zip(scores.layer, scores.score, strict=True))
    norms = scale_only(dense)
    assert max(best, key=best.__getitem__) in norms
    assert norms < best.keys()
    others = np.median([best[name] for name in best if name not in norms])
    assert np.median([best[name] for name in norms]) > 10 * others


def test_where_only_norms_are_left_the_message_says_what_to_do():
    spec = InputSpec("image", (3, 32, 32), (1 / 127.5,) * 3, (-1.0,) * 3)
    normed = import_model(Importing(arch="tests.models.nets:normed_net", input=spec))
    with pytest.raises(UsageError, match=r"--layers filters.*none in the last 1.*--layers all"):
        dense_score(normed, blocks=1)
    assert dense_score(normed, blocks=1, layers="all").scores.layer == ("2",)
    assert dense_score(normed, blocks=2).scores.layer == ("0",)


def test_an_optimum_that_is_only_compared_with_may_be_given_up(monkeypatch):
    """The plan is the same; it does not claim to know the optimum."""
    plain = score(blocks=2).plan
    monkeypatch.setattr("stages.scoring.COMPARISON", Limits(100, 10))
    found = score(blocks=2).plan
    assert "optimum_score" not in found.facts
    assert found == replace(
        plain, facts={name: value for name, value in plain.facts.items() if name != "optimum_score"}
    )


def test_live_channels_are_those_of_highest_fisher():
    found = score(ratios=(0.5,), **EVERYTHING)
    place = {name: i for i, name in enumerate(found.scores.layer)}
    assert len(found.plan.updates) > 5
    for update in found.plan.updates:
        values = found.scores.output_fisher[place[update.layer]]
        assert update.channels == top_channels(values, len(update.channels))
        frozen = np.delete(values, update.channels)
        assert len(frozen)
        assert values[list(update.channels)].min() >= frozen.max()


def test_settings_of_the_channels_reach_the_plan():
    plan = score(channels="input", ratios=(0.5,), train_bias=True, **EVERYTHING).plan
    assert {update.axis for update in plan.updates} == {"input", "output"}  # depthwise channels are both
    assert all(update.bias for update in plan.updates)
    assert not any(update.bias for update in score(**EVERYTHING).plan.updates)


def test_the_micro_batch_does_not_change_the_result():
    one, all_at_once = score(micro_batch=1, **EVERYTHING), score(micro_batch=100, **EVERYTHING)
    np.testing.assert_allclose(one.scores.fisher, all_at_once.scores.fisher, rtol=1e-3)  # in digits: test_fisher


def test_one_seed_gives_the_same_bytes_and_leaves_the_input_alone():
    before = encode(RUN)
    first, second, other = encode(score(seed=5)), encode(score(seed=5)), encode(score(seed=6))
    assert first == second != other
    assert encode(RUN) == before


def test_scores_and_plan_survive_the_artifact():
    found = score()
    back = decode(encode(found))
    assert back.plan == found.plan
    np.testing.assert_array_equal(back.scores.score, found.scores.score)
    for ours, theirs in zip(found.scores.output_fisher, back.scores.output_fisher, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_progress_counts_samples():
    done = []
    score_layers(RUN, SUPPORT, Scoring(micro_batch=4), rng=np.random.default_rng(0), on_step=done.append)
    assert done == [4, 8, 9]


@pytest.mark.parametrize("select", SELECTORS)
def test_one_byte_or_one_mac_less_gives_another_plan(select):
    settings = {"select": select, "blocks": 1}
    plan = score(memory="250KB", macs="20%", **settings).plan
    tight = score(memory=str(plan.memory_bytes), macs=str(plan.backward_macs), **settings).plan
    assert tight.updates == plan.updates
    for memory, macs in ((plan.memory_bytes - 1, plan.backward_macs), (plan.memory_bytes, plan.backward_macs - 1)):
        other = score(memory=str(memory), macs=str(macs), **settings).plan
        assert other.updates != plan.updates
        assert other.memory_bytes <= memory
        assert other.backward_macs <= macs


@pytest.mark.parametrize(("budget", "unit"), [("memory", "bytes"), ("macs", "backward MACs")])
def test_the_error_says_the_smallest_budget_that_fits(budget, unit):
    settings = {**EVERYTHING, budget: "1"}
    with pytest.raises(BudgetError) as caught:
        score(**settings)
    smallest = int(re.search(rf"at least .*?([\d,]+) {unit}", str(caught.value))[1].replace(",", ""))
    assert score(**{**settings, budget: str(smallest)}).plan.updates
    with pytest.raises(BudgetError):
        score(**{**settings, budget: str(smallest - 1)})


def test_a_latency_budget_is_kept_by_the_profiles_measurements():
    count = len(LAYERS)
    columns = {"forward_s": 1e-3, "input_gradient_s": 2e-3, "weight_gradient_s": 4e-3}
    profile = Profile(LAYERS, {name: np.full(count, seconds) for name, seconds in columns.items()}, {})
    run = replace(RUN, profile=profile)
    free, bounded = score(run=run, **EVERYTHING).plan, score(run=run, latency="70ms", **EVERYTHING).plan
    assert bounded.facts["latency_s"] <= bounded.facts["budget_latency_s"] == 0.07
    assert len(bounded.updates) < len(free.updates)
    assert bounded.facts["latency_s"] > count * 1e-3
    with pytest.raises(DataError, match="edgetrain profile"):
        score(latency="70ms")


@pytest.mark.parametrize(
    ("support", "message"),
    [(a_support(ways=1), "single class"), (a_support(shots=0), "no samples"), (None, "--support")],
    ids=["one class", "empty", "none"],
)
def test_a_search_needs_samples_of_two_classes(support, message):
    with pytest.raises((DataError, UsageError), match=message):
        score(support=support)


# ------------------------------------------------------------------------------------------------------ linear heads


def test_a_linear_head_is_part_of_what_a_plan_costs():
    run = replace(RUN, model=replace(RUN.model, head=linear_head(5)))
    plain, headed = score(**EVERYTHING), score(run=run, **EVERYTHING)
    assert headed.model == run.model
    same = headed.plan.updates
    weights = 5 * GRAPH.feature_dim
    assert headed.plan.memory_bytes - memory_bytes(GRAPH, same) == 4 * weights * 4  # value, gradient, two moments
    assert headed.plan.backward_macs - plan_backward_macs(GRAPH, same) == 2 * weights
    assert headed.plan.facts["model_layers"] == plain.plan.facts["model_layers"] == len(LAYERS)
    assert not np.allclose(headed.scores.fisher, plain.scores.fisher)


def test_the_kind_of_head_may_be_stated():
    run = replace(RUN, model=replace(RUN.model, head=linear_head(5)))
    np.testing.assert_array_equal(score(run=run, head="prototypes").scores.fisher, score().scores.fisher)
    assert score(head="linear").plan.memory_bytes > 0


# ------------------------------------------------------------------------------------------------------ a plan given


@pytest.mark.parametrize("name", ["full", "last-layer", "last-3", "bias"])
def test_a_named_plan_needs_neither_samples_nor_budgets(name):
    found = score(support=None, plan=name)
    assert found.plan.name == name
    assert found.scores is None
    assert found.plan.memory_bytes == memory_bytes(GRAPH, found.plan.updates)
    assert "budget_memory_bytes" not in found.plan.facts


def test_a_named_plan_is_held_to_the_budgets_that_are_set():
    plan = score(support=None, plan="last-3").plan
    assert score(support=None, plan="last-3", memory=str(plan.memory_bytes)).plan.updates == plan.updates
    for settings in ({"memory": str(plan.memory_bytes - 1)}, {"macs": str(plan.backward_macs - 1)}):
        with pytest.raises(BudgetError, match="plan last-3"):
            score(support=None, plan="last-3", **settings)


TOML = """
name = "mine"
[[layer]]
layer = "blocks.16.project"
ratio = 0.25
[[layer]]
layer = "blocks.15.expand"
ratio = 0.5
axis = "input"
bias = true
[[layer]]
layer = "blocks.16.depthwise"
channels = [2, 0]
"""


def as_json(text=TOML):
    import tomllib

    return json.dumps(tomllib.loads(text))


@pytest.mark.parametrize(("text", "file"), [(TOML, "mine.toml"), (as_json(), "mine.json")])
def test_a_hand_made_plan(text, file):
    plan = score(support=None, plan_text=text, plan_file=file).plan
    assert plan.name == "mine"
    assert plan.layers == ("blocks.15.expand", "blocks.16.depthwise", "blocks.16.project")
    assert plan["blocks.16.depthwise"].channels == (0, 2)
    expand, project = plan["blocks.15.expand"], plan["blocks.16.project"]
    weight = BACKBONE.tensors["blocks.16.project.weight"]
    weight = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
    assert project.channels == top_channels(weight, len(project.channels))
    assert project.ratio == pytest.approx(0.25, abs=0.1)
    assert expand.axis == "input"
    assert len(expand.bias) == GRAPH["blocks.15.expand"].out_channels


def test_a_given_plan_takes_its_channels_by_fisher_where_asked():
    by_norm = score(support=None, plan_text=TOML).plan
    by_fisher = score(plan_text=TOML, channel_rule="fisher").plan
    fisher = fisher_of(BACKBONE, LAYERS)
    expand, project = by_fisher["blocks.15.expand"], by_fisher["blocks.16.project"]
    assert expand.channels == top_channels(fisher.input["blocks.15.expand"], len(expand.channels))
    assert project.channels == top_channels(fisher.output["blocks.16.project"], len(project.channels))
    assert by_fisher["blocks.16.depthwise"] == by_norm["blocks.16.depthwise"]  # listed by hand
    assert [len(u.channels) for u in by_fisher.updates] == [len(u.channels) for u in by_norm.updates]
    with pytest.raises(UsageError, match="--support"):
        score(support=None, plan_text=TOML, channel_rule="fisher")


def test_random_channels_follow_the_seed():
    def channels(seed):
        plan = score(support=None, plan_text=TOML, channel_rule="random", seed=seed).plan
        return [update.channels for update in plan.updates]

    assert channels(1) == channels(1)
    assert channels(1) != channels(2)


def test_a_published_scheme_keeps_its_ratios_under_another_channel_rule():
    arch, args = "mcunet-5fps", {"size": 64}
    module = registry.build(arch, args)
    tensors = {k: v.numpy() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    run = Run(Model(arch, args, registry.input_spec(arch, args), "batchnorm", tensors))  # as imported
    by_norm = score(run=run, support=None, plan="mcunet-99kb").plan
    by_chance = score(run=run, support=None, plan="mcunet-99kb", channel_rule="random").plan
    assert [(u.layer, u.axis, u.ratio, u.bias) for u in by_norm.updates] == [
        (u.layer, u.axis, u.ratio, u.bias) for u in by_chance.updates
    ]
    changed = [name for name in by_norm.layers if by_norm[name].channels != by_chance[name].channels]
    assert changed == ["blocks.12.expand", "blocks.13.expand"]
    assert by_norm.facts["live_values"] - sum(len(u.bias) for u in by_norm.updates) == 52_480  # the paper's 0.2 MB


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "magic"},
        {"select": "magic"},
        {"search": "magic"},
        {"layers": "magic"},
        {"gradient": "magic"},
        {"plan": "full", "search": "shortcut"},
        {"head": "magic"},
        {"channels": "sideways"},
        {"channel_rule": "magic"},
        {"ratios": (0.0,)},
        {"ratios": ()},
        {"memory": "1 furlong"},
        {"macs": "-3"},
        {"latency": "soon"},
        {"memory_model": "magic"},
        {"optimizer": "magic"},
        {"batch": 0},
        {"blocks": 0},
        {"micro_batch": 0},
        {"plan": "full", "plan_text": TOML},
        {"plan": "full", "criterion": "fisher"},
        {"plan_text": TOML, "blocks": 3},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_at_once(settings):
    with pytest.raises(UsageError):
        Scoring(**settings)


def test_an_unknown_plan_names_those_there_are():
    with pytest.raises(UsageError, match="last-layer"):
        score(support=None, plan="magic")


# --------------------------------------------------------------------------------------------------------- real data


def test_mcunet_on_omniglot_chooses_the_layers_of_the_reference_experiment():
    """1 MB and 15 % at ratio 1/2: convolutions 30, 31, 34, 37 and 40, counted from the stem."""
    import h5py

    from stages.importing import Importing, import_model, read_weights

    weights = read_weights(real("weights/mcunet-5fps.h5"))
    run = import_model(Importing(arch="mcunet-5fps", arch_args={"size": 128}), weights)
    with h5py.File(real("data/omniglot.h5")) as file:
        x, y = file["x"][-200::4], file["y"][-200::4].astype(np.int64)
    plan = score(run=run, support=Block(x, y, "NHW"), ratios=(0.5,), micro_batch=10).plan
    names = [op.name for op in deploy(run.model).graph.layers]
    assert [names.index(layer) for layer in plan.layers] == [30, 31, 34, 37, 40]
    assert plan.memory_bytes <= 2**20
