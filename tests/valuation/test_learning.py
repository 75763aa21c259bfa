"""Selection on real data: scikit-learn's digits through the whole pipeline, and the last layer as a stand-in."""

import numpy as np
import pytest

from stages.artifacts.records import Block, Model, Run
from stages.filtering import Filtering
from stages.models import heads, registry
from stages.models.deploy import deploy
from stages.models.inputs import adapt
from stages.models.modules import state
from stages.pipeline import Pipeline, simulate
from stages.selection import Selection, Weights
from stages.sparse_training import StreamTraining
from stages.training.optimizers import Optimizing
from stages.valuation import fine
from stages.valuation.designs import divide, importance_spread
from stages.valuation.scoring import scored

ROUNDS, SEEDS = 25, 6
ARCH = ("mlp", {"dim": 64, "width": 32})
RANDOM = (Filtering(strategy="random", keep=10), Selection(strategy="all"))
CLASSIFIED = (Filtering(strategy="random", keep=100), Selection(strategy="c-is"))


@pytest.fixture(scope="module")
def digits():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = found.data[order].astype(np.float32) / 16, found.target[order].astype(np.int64)
    return x, y


def trained(digits, seed, filtering, selection, rounds=ROUNDS):
    x, y = digits
    rows = np.random.default_rng(seed).choice(1400, 100 * rounds)
    module = registry.build(*ARCH, seed=seed)
    run = Run(Model(*ARCH, registry.input_spec(*ARCH), "batchnorm", state(module)))
    training = StreamTraining(plan="full", optimizing=Optimizing(learning_rate=0.1))
    pipeline = Pipeline(filtering=filtering, selection=selection, training=training, filter_seed=seed, select_seed=seed)
    return simulate(run, [Block(x[rows], y[rows], "ND")], pipeline)


def accuracy_of(run, digits):
    backbone, (x, y) = deploy(run.model), digits
    features = backbone.features(adapt(x[1400:], "ND", backbone.input))
    head = run.model.head
    return float(np.mean(head.labels[heads.logits(head, features).argmax(1)] == y[1400:]))


def test_choosing_learns_faster_than_chance(digits):
    """Accuracy early in training, mean over the seeds."""
    accuracies = {
        name: np.mean([accuracy_of(trained(digits, seed, *how), digits) for seed in range(SEEDS)])
        for name, how in {"random": RANDOM, "c-is": CLASSIFIED}.items()
    }
    assert accuracies["c-is"] > accuracies["random"]


def test_last_layer_scores_serve_the_whole_model(digits):
    """Drawn by last-layer norms, the gradient of all parameters varies less too."""
    run = trained(digits, 0, *CLASSIFIED)
    x, y = digits
    pool = Block(x[:100], y[:100], "ND")
    weights, mass = Weights(deploy(run.model), run.model.head), np.full(100, 0.01)
    last, full = (scored(pool, mass, weights, importance, None) for importance in ("last-layer", "full"))
    norms = np.corrcoef(np.sqrt(last.gradients.squared_norms), np.sqrt(full.gradients.squared_norms))[0, 1]
    assert norms > 0.8

    design = fine.classified(last, 10, 0.2)
    assert design.probability is not None
    strata = divide(design.strata.of, mass, full.gradients)
    variance = float((importance_spread(strata, design.probability) / design.places).sum())
    assert variance < 0.6 * fine.reference_variances(full, 10, 0.2)["variance_random"]
    assert variance >= fine.classified(full, 10, 0.0).variance * 0.999
