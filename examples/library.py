"""The stages from Python, without the command line: import, plan, filter, select, train, evaluate.

python examples/library.py
"""

import numpy as np

from stages.artifacts.records import Block
from stages.evaluation import evaluate
from stages.exporting import export
from stages.filtering import Filtering
from stages.importing import Importing, import_model
from stages.pipeline import Pipeline, simulate
from stages.profiling import Profiling, profile_run
from stages.randomness import generator
from stages.scoring import Scoring, score_layers
from stages.selection import Selection
from stages.settings.training import Training
from stages.sparse_training import StreamTraining, train_support
from stages.training.optimizers import Optimizing


def bars(count: int, seed: int) -> Block:
    """Images of three classes: a bright bar at one of three heights, in noise."""
    rng = generator(seed, "example")
    y = rng.integers(0, 3, count)
    x = rng.integers(0, 60, (count, 16, 16))
    for i, label in enumerate(y):
        x[i, 5 * label : 5 * label + 4] += 150
    return Block(x.astype(np.uint8), y, "NHW")


def adapt() -> None:
    """A model adapts to a handful of labelled samples: plan, train, check, export."""
    run = import_model(Importing(arch="cnn4", arch_args={"width": 16, "size": 16}, seed=1))
    support, query = bars(24, 0), bars(300, 2)
    run = profile_run(run, Profiling(measure=False))
    run = score_layers(run, support, Scoring(memory="96KB", macs="60%"), rng=generator(0, "score-layers"))
    config = Training(iterations=10, lr=0.003).on_support(scale=10.0)
    adapted = train_support(run, support, config, rng=generator(0, "train-sparse"))
    print("plan:", ", ".join(f"{update.layer} {100 * update.ratio:.0f} %" for update in run.plan.updates))
    print(f"accuracy after adapting to 24 samples: {100 * evaluate(adapted, [query]).interval.value:.1f} %")
    print(f"exported: {len(export(adapted.model, 'safetensors').data)} bytes")


def stream() -> None:
    """A model learns from a stream: filter, select and train in one process."""
    run = import_model(Importing(arch="cnn4", arch_args={"width": 16, "size": 16}, seed=1))
    run = score_layers(run, bars(24, 0), Scoring(memory="96KB", macs="60%"), rng=generator(0, "score-layers"))
    settings = Pipeline(
        filtering=Filtering(window=50, keep=20),
        selection=Selection(batch=10),
        training=StreamTraining(optimizing=Optimizing(optimizer="sgd", learning_rate=0.05)),
        lag=1,
    )
    trained = simulate(run, [bars(2000, 1)], settings)
    accuracy = evaluate(trained, [bars(300, 2)]).interval.value
    print(f"accuracy after {trained.model.version} updates: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    adapt()
    stream()
