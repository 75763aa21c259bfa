import numpy as np
import pytest

from stages.artifacts.records import Model
from stages.cost.training import memory_bytes
from stages.errors import UsageError
from stages.fsl.episodes import FixedShape, draw_episodes, pool_of
from stages.fsl.protonet import cosine_logits, prototypes, transductive_loss
from stages.methods.plans import TinyTrain, scheme_for
from stages.methods.registry import METHODS, find_method
from stages.methods.task import make_task
from stages.methods.transductive import Transductive
from stages.models.deploy import deploy
from stages.models.modules import state
from stages.models.registry import build, input_spec
from stages.planning.baselines import named_plan
from stages.randomness import generator
from stages.training.adaptation import Adapting
from tests.test_pretraining import random_run, squares

HOW = Adapting(iterations=3, learning_rates=(3e-3,), micro_batch=8)


@pytest.fixture(scope="module", params=["native", "torch"])
def backbone(request):
    return deploy(random_run().model, engine=request.param)


@pytest.fixture(scope="module")
def task(backbone):
    data = squares(classes=4)
    (episode,) = draw_episodes(pool_of(data), FixedShape(ways=3, shots=3, queries=3), 0, [0])
    return make_task(data, episode, backbone)


EVERY = [name for name in METHODS if name != "sparse-update"]  # for the three published nets only


@pytest.mark.parametrize("name", [*EVERY, "last-2", "tinytrain:rule=random+ratios=0.5+memory=100KB"])
def test_every_method_answers_repeatably_and_leaves_the_backbone_alone(name, backbone, task):
    before = {key: tensor.copy() for key, tensor in backbone.tensors.items()}
    method = find_method(name)
    one, again = (method(backbone, task, HOW, generator(0, "adapt", 0)) for _ in range(2))
    assert all(np.array_equal(before[key], tensor) for key, tensor in backbone.tensors.items())
    np.testing.assert_array_equal(one.predicted, again.predicted)
    assert one.updates == again.updates
    assert one.predicted.shape == (9,)
    assert 0 <= int(one.predicted.min()) <= int(one.predicted.max()) < 3
    assert bool(one.updates) or one.cost is not None or name == "none"


def test_none_is_the_nearest_prototype(backbone, task):
    answer = find_method("none")(backbone, task, HOW, generator(0, "adapt", 0))
    means = prototypes(backbone.features(task.support_x), task.support_y, 3)
    expected = cosine_logits(backbone.features(task.query_x), means, 10.0).argmax(1)
    np.testing.assert_array_equal(answer.predicted, expected)
    assert answer.learning_rate == 0


def test_tinytrain_keeps_its_budgets_and_uses_its_settings(backbone, task):
    rng = generator(0, "adapt", 0)
    updates = TinyTrain(memory="30KB", macs="100%", ratios=(0.5,))(backbone, task, HOW, rng)
    assert 0 < memory_bytes(backbone.graph, updates, model="paper") <= 30 * 2**10
    assert {update.ratio for update in updates} == {0.5}
    whole = TinyTrain(memory="1MB", macs="100%", ratios=(1.0,))(backbone, task, HOW, rng)
    assert len(whole) == len(backbone.graph.layers)
    assert TinyTrain(blocks=1, macs="100%", ratios=(1.0,))(backbone, task, HOW, rng)[0].layer == "blocks.03.conv"


def test_transductive_loss_by_hand():
    features = np.tile(np.eye(2, dtype=np.float32), (2, 1))
    features[3] = 1.0
    # support logits (1, 0) and (0, 1); query distributions softmax(1, 0) and (1/2, 1/2)
    p = 1 / (1 + np.exp(-1))
    entropy = (-(p * np.log(p) + (1 - p) * np.log(1 - p)) + np.log(2)) / 2
    found, _ = transductive_loss(features, np.array([0, 1]), 2, 1.0)
    assert found == pytest.approx(-np.log(p) + entropy, rel=1e-10)


def test_transductive_training_lowers_its_loss(backbone, task):
    updates, losses = named_plan("full", backbone.graph), []
    for passes in (1, 12):
        net = Transductive(rate=3e-3, passes=passes).train(backbone, updates, task, HOW)
        features = net.features(np.concatenate([task.support_x, task.query_x]))
        losses.append(transductive_loss(features, task.support_y, 3, HOW.scale)[0])
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [("mcunet-5fps", "mcunet-99kb"), ("mobilenetv2-w0.35", "mbv2-99kb"), ("proxyless-w0.3", "proxyless-98kb")],
)
def test_the_three_nets_have_their_published_schemes(arch, scheme):
    model = Model(arch, {"size": 32}, input_spec(arch, {"size": 32}), "batchnorm", state(build(arch, {"size": 32})))
    assert scheme_for(deploy(model).graph) == scheme


def test_other_nets_have_none(backbone, task):
    with pytest.raises(UsageError, match="a net of 4 layers"):
        find_method("sparse-update")(backbone, task, HOW, generator(0, "adapt", 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "'magic'"),
        ("last-x", "'last-x'"),
        ("tinytrain:colour=red", "keys criterion"),
        ("tinytrain:blocks=many", "blocks=many"),
        ("tinytrain:criterion=beauty", "criterion 'beauty'"),
        ("none:rate=1", "keys none"),
    ],
)
def test_names_and_settings_that_do_not_exist(text, message):
    with pytest.raises(UsageError, match=message):
        find_method(text)
