from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.artifacts.records import Block, Head, Model, Preparation, Run
from stages.errors import BudgetError, DataError, UsageError
from stages.evaluation import evaluate
from stages.methods.registry import METHODS
from stages.methods.results import header_line, merge_results, read_results, row_line, summarise
from stages.models.modules import state
from stages.models.registry import build, input_spec
from stages.task_evaluation import Tasks, evaluate_tasks, identity
from tests.rounding import gamma
from tests.test_pretraining import random_run, squares

QUICK = Tasks(
    tasks=3,
    methods=("none", "last-layer", "tinytrain"),
    ways=3,
    shots=3,
    queries=2,
    iterations=2,
    folds=2,
    measure=False,
)


def linear_run(head):
    """A net whose two features are its two inputs, at least where they are positive."""
    spec = input_spec("mlp", {"dim": 2, "width": 2})
    module = build("mlp", {"dim": 2, "width": 2})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.eye(2) if parameter.ndim == 2 else torch.zeros(2))
    return Run(Model("mlp", {"dim": 2, "width": 2}, spec, "batchnorm", state(module), head))


def points(*rows):
    """Samples (a, b) with their labels."""
    x = np.array([row[:2] for row in rows], np.float32)
    return Block(x, np.array([row[2] for row in rows], np.int64), "ND")


TWO = Head("linear", np.array([3, 8]), np.eye(2, dtype=np.float32), np.zeros(2, np.float32), np.ones(2, bool))
ENGINES = pytest.mark.parametrize("engine", ["native", "torch"])
SAMPLES = points((2, 1, 3), (1, 2, 3), (0, 1, 8), (0, 3, 8))


# ---------------------------------------------------------------------------------------------------------- on samples


@ENGINES
def test_accuracy_by_hand(engine):
    result = evaluate(linear_run(TWO), [SAMPLES], engine=engine)
    assert [(each.label, each.samples, each.hits) for each in result.classes] == [(3, 2, 1), (8, 2, 2)]
    assert result.interval.value == 0.75
    # cross-entropy of differences +1, -1, +1, +3
    assert result.loss == pytest.approx(np.mean(np.log1p(np.exp([-1.0, 1.0, -1.0, -3.0]))))


def test_chunks_and_blocks_do_not_matter():
    whole = evaluate(linear_run(TWO), [SAMPLES])
    parts = evaluate(linear_run(TWO), list(SAMPLES.slices(3)), chunk=2)
    assert parts.classes == whole.classes
    assert parts.loss == pytest.approx(whole.loss, abs=gamma(64) * 3)  # of logits up to 3


@ENGINES
def test_class_means_of_a_support_answer(engine):
    support = points((5, 0, 3), (0, 1, 8), (0, 9, 8))
    result = evaluate(linear_run(None), [SAMPLES], support=support, engine=engine)
    assert [each.hits for each in result.classes] == [1, 2]


@pytest.mark.parametrize(
    ("head", "blocks", "error", "message"),
    [
        (None, [SAMPLES], UsageError, "knows no class"),
        (TWO, [], DataError, "none, expected labelled samples"),
        (TWO, [points((1, 1, 5))], DataError, "class 5"),
    ],
    ids=["no head", "no samples", "unknown class"],
)
def test_what_cannot_be_evaluated(head, blocks, error, message):
    with pytest.raises(error, match=message):
        evaluate(linear_run(head), blocks)


# ------------------------------------------------------------------------------------------------------------ on tasks


def test_rows_repeat_and_shards_join():
    run, data = random_run(), squares(classes=5)
    whole = evaluate_tasks(run, data, QUICK, seed=4, dataset="squares")
    assert whole == evaluate_tasks(run, data, QUICK, seed=4, dataset="squares")
    assert len(whole) == 9
    shards = []
    for number in range(2):
        part = Tasks(**{**settings(QUICK), "shard": (number, 2)})
        rows = evaluate_tasks(run, data, part, seed=4, dataset="squares")
        text = header_line(identity(run, {"squares": data}, part, 4)) + "".join(map(row_line, rows))
        shards.append((f"shard{number}", *read_results(text, f"shard{number}")))
    joined = merge_results(shards)
    assert sorted(joined, key=lambda row: (row.task, whole.index(row))) == whole
    assert [each.accuracy for each in summarise(joined, "none")] == [each.accuracy for each in summarise(whole, "none")]


def test_an_evaluation_is_the_same_one_with_other_methods_but_not_with_other_settings():
    run, sets = random_run(), {"squares": squares(classes=5)}

    def told(**changed):
        found = identity(run, sets, Tasks(**{**settings(QUICK), **changed}), 4)
        return {key: value for key, value in found.items() if key != "methods"}

    assert told(methods=("full",)) == told(shard=(1, 2)) == told()
    assert told(iterations=7) != told()


def settings(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@ENGINES
def test_what_rows_say(engine):
    rows = evaluate_tasks(random_run(), squares(classes=5), replace(QUICK, engine=engine), seed=0)
    by_method = {row.method: row for row in rows if row.task == 0}
    none, last, tiny = (by_method[name] for name in QUICK.methods)
    assert (none.backward_macs, none.memory_bytes, none.layers, none.learning_rate) == (0, 0, 0, 0.0)
    # the last convolution of a Conv-4 of width 4 on 2 x 2 positions: 4 * 4 * 9 weights, each used 4 times
    assert (last.live_values, last.backward_macs, last.layers) == (144, 576, 1)
    assert tiny.layers >= 1
    assert {row.support for row in rows} == {9}
    assert {row.query for row in rows} == {6}


def test_a_task_list_gives_the_tasks():
    from stages.task_evaluation import draw_tasks

    run, data = random_run(), squares(classes=5)
    drawn = list(draw_tasks(data, QUICK, 4))
    assert evaluate_tasks(run, data, QUICK, seed=4, episodes=drawn) == evaluate_tasks(run, data, QUICK, seed=4)


def test_budgets_that_nothing_fits_are_named():
    config = Tasks(**{**settings(QUICK), "methods": ("tinytrain:memory=1KB",)})
    with pytest.raises(BudgetError, match="no plan fits"):
        evaluate_tasks(random_run(), squares(classes=5), config, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [{"methods": ()}, {"methods": ("none", "none")}, {"methods": ("magic",)}, {"shard": (2, 2)}, {"tasks": 0}],
    ids=str,
)
def test_settings_are_checked(wrong):
    with pytest.raises(UsageError):
        Tasks(**{**settings(QUICK), **wrong})


def test_there_are_methods():
    published = {"none", "full", "last-layer", "sparse-update", "tinytrain", "transductive", "tinytl"}
    assert published | {f"adapter-drop-{percent}" for percent in (75, 50, 25)} <= set(METHODS)


def test_the_help_names_every_method():
    from edgetrain_cli.commands.evaluate import evaluate as command

    named = command.__doc__.split("Methods:")[1].split("and every named plan")[0].replace(",", " ").split()
    assert set(METHODS) - set(named) == set()


def test_samples_that_were_prepared_in_another_way_are_refused():
    run, plain, ink = linear_run(TWO), Preparation(of="pictures"), Preparation(of="pictures", invert=True)
    spec = replace(run.model.input, prepared=plain)
    learnt = replace(run, model=replace(run.model, input=spec))
    with pytest.raises(DataError, match="inverted pictures, expected as they are, as in those that the model learnt"):
        evaluate(learnt, [replace(SAMPLES, prepared=ink)])
    same = [evaluate(learnt, [replace(SAMPLES, prepared=how)]).classes for how in (None, plain)]
    assert same == [evaluate(run, [SAMPLES]).classes] * 2
    support = replace(SAMPLES, prepared=ink)
    assert evaluate(learnt, [replace(SAMPLES, prepared=ink)], support=support).samples == 4
    with pytest.raises(DataError, match="pictures as they are, expected inverted"):
        evaluate(learnt, [replace(SAMPLES, prepared=plain)], support=support)


def test_samples_without_a_label_are_not_counted_as_wrong():
    with pytest.raises(DataError, match="1 of 4 samples have no label"):
        evaluate(linear_run(TWO), [replace(SAMPLES, y=np.array([3, 3, 8, -1]))])
