import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import DataError
from stages.fsl.protonet import accuracy, cosine_logits, episode_loss, prototypes, support_loss


def test_prototypes_are_class_means():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    means = prototypes(features, torch.tensor([0, 0, 1]), 2)
    assert torch.equal(means, torch.tensor([[2.0, 0.0], [0.0, 5.0]]))


def test_logits_are_scaled_cosines():
    logits = cosine_logits(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, -4.0]]), 10.0)
    # cos = 3/5, 4/5, -1 whatever the lengths
    torch.testing.assert_close(logits, torch.tensor([[6.0, 8.0, -10.0]]))


def test_a_zero_feature_is_equally_far_from_all():
    assert torch.equal(cosine_logits(torch.zeros(1, 2), torch.eye(2), 10.0), torch.zeros(1, 2))


def test_loss_by_hand():
    support, query = torch.eye(2), torch.tensor([[1.0, 0.0]])
    loss = episode_loss(support, torch.tensor([0, 1]), query, torch.tensor([0]), 2, 1.0)
    # logits (1, 0): -log(e / (e + 1))
    assert loss.item() == pytest.approx(np.log(1 + np.exp(-1)))


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_support_loss_is_the_episode_loss_of_the_joined_features(ways, shots, seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways).repeat_interleave(shots)
    features = torch.randn(2 * len(labels), 5, generator=rng)
    joined = support_loss(labels, labels, ways, 7.0)(features)
    apart = episode_loss(features[: len(labels)], labels, features[len(labels) :], labels, ways, 7.0)
    assert torch.equal(joined, apart)


def test_detach_stops_the_gradient_at_the_prototypes_only():
    labels = torch.tensor([0, 1])
    gradients = {}
    for detach in (False, True):
        features = torch.tensor([[1.0, 0.2], [0.1, 1.0], [1.0, 0.5], [0.3, 1.0]], requires_grad=True)
        support_loss(labels, labels, 2, 10.0, detach=detach)(features).backward()
        gradients[detach] = features.grad
    assert torch.equal(gradients[True][:2], torch.zeros(2, 2))
    assert gradients[False][:2].abs().min() > 0
    assert torch.equal(gradients[True][2:], gradients[False][2:])


def test_a_class_without_samples_is_an_error():
    with pytest.raises(DataError, match="no sample of class 1"):
        prototypes(torch.ones(2, 3), torch.tensor([0, 2]), 3)


@pytest.mark.parametrize(("labels", "message"), [([0, 2], r"labels 0\.\.2"), ([-1, 0], "labels -1"), ([0], "1 labels")])
def test_labels_that_do_not_fit_are_errors(labels, message):
    with pytest.raises(DataError, match=message):
        prototypes(torch.ones(2, 3), torch.tensor(labels), 2)


def test_accuracy_counts_the_largest_logit():
    assert accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1])) == 0.5
