"""The pictures of methods and of training: every point named, no two methods alike, nothing smeared."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from edgetrain_cli.plots.methods import draw_methods, look, plot_methods, spread
from edgetrain_cli.plots.training import draw_training, plot_training
from stages.artifacts.records import InputSpec, Model, Run
from stages.errors import DataError
from stages.methods.results import MethodSummary

NAMES = [f"method-{number}" for number in range(17)]


def summary(number, name):
    """Accuracies in three heaps, so that names would lie on each other."""
    return MethodSummary(
        dataset="digits", method=name, tasks=20, accuracy=0.5 + 0.1 * (number % 3), half_width=0.02, difference=0.0,
        difference_half_width=0.01, memory_bytes=2**20 * number, saved_bytes=1024, backward_macs=10**6 * number,
        seconds=0.1,
    )  # fmt: skip


def drawn(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


def test_every_method_is_named_beside_its_point_and_no_name_covers_another():
    from matplotlib.text import Text

    figure = drawn(draw_methods([summary(*each) for each in enumerate(NAMES)]))
    for axes in figure.axes:
        labels = [text for text in axes.texts if text.get_text() in NAMES]
        assert [label.get_text() for label in labels] == NAMES
        boxes = sorted((Text.get_window_extent(label) for label in labels), key=lambda box: box.y0)  # without its line
        for below, above in pairwise(boxes):
            assert above.y0 >= below.y1 - 3  # a name's box is a little higher than its letters


def test_no_two_methods_look_alike():
    looks = [tuple(look(number).items()) for number in range(80)]
    assert all(one != other for one, other in combinations(looks, 2))


def test_names_keep_their_order_and_their_distance():
    assert spread([5.0, 5.0, 5.0], 1.0, 0.0, 6.0) == [4.0, 5.0, 6.0]
    assert spread([1.0, 9.0], 1.0, 0.0, 10.0) == [1.0, 9.0]


def trained(**columns):
    model = Model("mlp", {}, InputSpec("features", (2,)), "deploy", {}, None)
    return Run(model).with_metrics(
        "train-sparse", {name: np.asarray(values, float) for name, values in columns.items()}
    )


def test_training_is_drawn_with_what_was_watched(tmp_path):
    alone = draw_training(trained(version=[1, 2, 3], loss=[1.0, 0.6, 0.5]))
    assert [axes.get_title(loc="left") for axes in alone.axes] == ["train-sparse: loss 1 to 0.5"]
    watched = draw_training(trained(version=[1, 2], loss=[1.0, 0.5], accuracy=[np.nan, 0.75]))
    assert watched.axes[1].get_title(loc="left").endswith(": 75.0 %")
    for name in ("a.svg", "b.svg"):
        plot_training(trained(version=[1, 2, 3], loss=[1.0, 0.6, 0.5]), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_run_that_was_never_trained_has_no_curve(tmp_path):
    run = Run(Model("mlp", {}, InputSpec("features", (2,)), "deploy", {}, None))
    with pytest.raises(DataError, match="no metrics"):
        plot_training(run, tmp_path / "t.png")


def test_a_comparison_is_written_whole(tmp_path):
    plot_methods([summary(*each) for each in enumerate(NAMES[:3])], tmp_path / "m.png")
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]
