"""What people see of a plan: the tree in the terminal and the picture."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetrain_cli.console import render
from edgetrain_cli.plots.picture import SUFFIXES
from edgetrain_cli.plots.plan import draw_plan, plot_plan
from edgetrain_cli.plots.plan_tree import HEIGHTS, WIDTH, channel_bar, plan_tree
from stages.artifacts.records import InputSpec, LayerUpdate, Model, Plan, Profile, Run, Scores
from stages.errors import PartMissing, UsageError

BUDGETS = {"budget_memory_bytes": 2**20, "budget_macs": 8_000_000}
FACTS = {"model_layers": 61, "live_values": 1234, "full_backward_macs": 40_000_000}


def names(blocks):
    parts = ("expand", "depthwise", "project")
    return ("stem", *(f"blocks.{block:02d}.{part}" for block in range(blocks) for part in parts))


def update(layer, live, total, bias=0):
    return LayerUpdate(layer, "output", tuple(range(live)), total, tuple(range(bias)))


def a_run(blocks=20, criterion="score", budgets=BUDGETS):
    layers = names(blocks)
    rng = np.random.default_rng(0)
    profile = Profile(
        layers, {"weights": rng.integers(1, 90_000, len(layers)), "macs": rng.integers(1, 10**6, len(layers))}, {}
    )
    seen = layers[-18:]
    values = rng.lognormal(size=len(seen))
    scores = Scores(criterion, seen, values, values, (), ())
    updates = (update(seen[1], 120, 240), update(seen[2], 12, 96, bias=96), update(seen[-1], 0, 160, bias=160))
    plan = Plan("greedy", updates, 943_718, "paper", 6_000_000, FACTS | budgets)
    return Run(Model("mcunet-5fps", {}, InputSpec("image", (3, 8, 8)), "deploy", {}), profile, scores, plan)


# ---------------------------------------------------------------------------------------------------------- the tree


@pytest.mark.parametrize(
    ("live", "total", "bar"),
    [
        (range(40), 40, "█" * 20),
        ((), 40, "·" * 20),
        (range(20), 40, "█" * 10 + "·" * 10),
        ((0, 39), 40, "▄" + "·" * 18 + "▄"),
        ((1,), 3, "·█·" + " " * 17),
    ],
)
def test_a_channel_bar_shows_where_channels_lie(live, total, bar):
    assert channel_bar(LayerUpdate("a", "output", tuple(live), total)) == bar


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_a_channel_bar_hides_no_live_channel_and_no_frozen_one(case):
    total, live = case
    bar = channel_bar(LayerUpdate("a", "output", tuple(sorted(live)), total))
    assert len(bar) == WIDTH
    width = min(WIDTH, total)
    for cell in range(width):
        run = {channel for channel in range(total) if channel * width // total == cell}
        assert (bar[cell] == HEIGHTS[-1]) == (run <= live)
        assert (bar[cell] == HEIGHTS[0]) == run.isdisjoint(live)


def test_the_tree_says_what_trains_and_how_much_of_the_budgets_it_takes():
    text = render(plan_tree(a_run().plan), to_terminal=False)
    assert "Plan greedy: 3 of 61 layers train, 1,234 values" in text
    assert "120 of 240 output channels (50 %)" in text
    assert "12 of 96 output channels (12.5 %), 96 biases" in text
    assert "  160 biases" in text
    assert "0.9 of 1 MiB (90 %)" in text
    assert "6 of 8 M MACs (75 %)" in text
    assert "█" * 15 + "░" * 5 in text
    assert text.index("blocks.14") < text.index("blocks.19")


def test_the_tree_of_a_plan_without_budgets_gives_its_cost_alone():
    text = render(plan_tree(a_run(budgets={}).plan), to_terminal=False)
    assert "0.9 MiB" in text
    assert "░" not in text


def test_the_tree_compares_the_score_with_the_optimum():
    text = render(plan_tree(a_run(budgets={"score": 300.0, "optimum_score": 400.0}).plan), to_terminal=False)
    assert "75 % of what the best plan within the budgets has" in text
    text = render(plan_tree(a_run(budgets={"score": 300.0}).plan), to_terminal=False)
    assert "300; the search for the optimum was given up" in text


# -------------------------------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_run_draws_the_same_bytes(tmp_path, suffix):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    plot_plan(few_layers(1), first)
    plot_plan(few_layers(1), second)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 5_000


def shown(run):
    """The figure's texts with their boxes in pixels, tick labels by axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_plan(run)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = {}
    for number, axes in enumerate(figure.axes):
        ticks = [axes, *axes.child_axes]
        labels = [label for part in ticks for label in part.get_xticklabels() if label.get_text().strip()]
        boxes[number] = [(label.get_text().strip(), label.get_window_extent()) for label in labels]
    return figure, boxes


@pytest.mark.parametrize("blocks", [1, 20])
def test_no_label_of_a_layer_covers_another(blocks):
    _, boxes = shown(a_run(blocks) if blocks > 5 else few_layers(blocks))
    labelled = [labels for labels in boxes.values() if len(labels) > 1]
    assert labelled
    for labels in labelled:
        leaves = [box for text, box in labels if "." not in text]
        assert len(leaves) == 3 * blocks + 1
        for box, other in pairwise(leaves):
            assert box.x1 <= other.x0 + 1


def few_layers(blocks):
    run = a_run()
    layers = names(blocks)
    columns = {name: values[: len(layers)] for name, values in run.profile.columns.items()}
    scores = Scores("fisher", layers, np.ones(len(layers)), np.ones(len(layers)), (), ())
    plan = replace(run.plan, updates=(update(layers[-1], 1, 2),))
    return replace(run, profile=Profile(layers, columns, {}), scores=scores, plan=plan)


def test_nothing_leaves_the_figure():
    for run in (few_layers(1), replace(few_layers(2), scores=None)):
        figure, _ = shown(run)
        texts = [
            figure._suptitle,
            *(text for axes in figure.axes for text in (axes.title, axes._left_title, *axes.texts)),
        ]
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= 0, text.get_text()
            assert box.x1 <= figure.bbox.x1, text.get_text()


def test_the_title_says_what_trains():
    figure = draw_plan(a_run())
    assert figure.get_suptitle().startswith("3 of 61 layers train: ")
    assert "0.900 MB" in figure.axes[0].get_title("left")


@pytest.mark.parametrize(("criterion", "panels"), [("score", 4), ("fisher", 3), ("my-own", 4)])
def test_there_is_a_row_for_the_criterion_unless_it_is_the_fisher_potential(criterion, panels):
    figure = draw_plan(a_run(criterion=criterion))
    assert len(figure.axes) == panels + len(BUDGETS)


def test_a_named_plan_without_scores_shows_costs_only():
    figure = draw_plan(replace(a_run(budgets={}), scores=None))
    assert len(figure.axes) == 2


def test_what_keeps_a_picture_from_being_drawn(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"\.png"):
        plot_plan(a_run(), tmp_path / "plan.bmp")
    with pytest.raises(UsageError, match="edgetrain profile"):
        plot_plan(replace(a_run(), profile=None), tmp_path / "plan.png")
    monkeypatch.setattr("edgetrain_cli.plots.picture.find_spec", lambda name: None)
    with pytest.raises(PartMissing, match="matplotlib"):
        plot_plan(a_run(), tmp_path / "plan.png")
