from dataclasses import replace

import pytest
import torch

from stages.artifacts.records import InputSpec
from stages.errors import UsageError
from stages.fsl.augment import HANDWRITING, PSEUDO_QUERY, Augmentation, augment

IMAGE = InputSpec("image", (3, 8, 8))
SOUND = InputSpec("sound", (1, 10, 4))
SIGNAL = InputSpec("signal", (3, 20))
FEATURES = InputSpec("features", (6,))
STILL = Augmentation(probability=1.0, color=False, translation=0.0)
EVERYTHING = replace(HANDWRITING, color=True, flip=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(spec, count=6):
    return torch.rand(count, *spec.shape, generator=rng(99))


@pytest.mark.parametrize("spec", [IMAGE, SOUND, SIGNAL, FEATURES], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("how", [PSEUDO_QUERY, EVERYTHING], ids=["pseudo-query", "everything"])
def test_same_seed_same_result_and_the_input_stays(spec, how):
    x = samples(spec)
    before = x.clone()
    how = replace(how, probability=1.0)
    once, again, other = (augment(x, spec, rng(seed), how) for seed in (1, 1, 2))
    assert torch.equal(x, before)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert not torch.equal(once, x)
    assert once.shape == x.shape
    assert once.isfinite().all()


def test_probability_zero_changes_nothing():
    x = samples(IMAGE)
    assert torch.equal(augment(x, IMAGE, rng(), replace(EVERYTHING, probability=0.0)), x)


def changed_rows(coin, seed):
    x = samples(IMAGE, 40)
    how = Augmentation(probability=0.5, coin=coin)
    return (augment(x, IMAGE, rng(seed), how) != x).flatten(1).any(1)


def test_one_coin_for_the_batch_or_one_per_sample():
    for seed in range(10):
        rows = changed_rows("batch", seed)
        assert rows.all() or not rows.any()
    assert {bool(changed_rows("batch", seed).all()) for seed in range(10)} == {True, False}
    assert 5 < changed_rows("sample", 0).sum() < 35


def test_flip_mirrors():
    x = samples(IMAGE)
    how = replace(STILL, flip=True, coin="sample")
    y = augment(x, IMAGE, rng(3), how)
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert (mirrored | (y == x).flatten(1).all(1)).all()
    assert 0 < mirrored.sum() < len(x)


def test_shift_moves_whole_pixels_and_fills_the_rest():
    x = torch.arange(8.0).expand(200, 3, 8, 8)  # every row is 0..7
    edge = augment(x, IMAGE, rng(), replace(STILL, translation=0.125))[:, 0, 0]
    expected = {(0, 0, 1, 2, 3, 4, 5, 6), tuple(range(8)), (1, 2, 3, 4, 5, 6, 7, 7)}
    assert {tuple(row.tolist()) for row in edge} == expected
    zero = augment(x + 1, IMAGE, rng(), replace(STILL, translation=0.125, fill="zero"))[:, 0]
    assert (zero[:, 3, 0] == 0).any()
    assert (zero[:, 3, 7] == 0).any()


def test_sound_shifts_in_time_only():
    bands = torch.arange(4.0).expand(50, 1, 10, 4)
    assert torch.equal(augment(bands, SOUND, rng(), replace(STILL, translation=0.2)), bands)
    frames = torch.arange(10.0).view(1, 1, 10, 1).expand(50, 1, 10, 4)
    assert not torch.equal(augment(frames, SOUND, rng(), replace(STILL, translation=0.2)), frames)


def test_signals_shift_in_time_with_all_channels_together():
    x = torch.arange(20.0).expand(50, 3, 20)
    y = augment(x, SIGNAL, rng(), replace(STILL, translation=0.2))
    assert torch.equal(y[:, 0], y[:, 2])
    assert {int(row[10]) for row in y[:, 0]} == set(range(6, 15))


def test_jitter_follows_each_channels_deviation():
    x = torch.randn(1000, 3, 20, generator=rng()) * torch.tensor([1.0, 10.0, 0.0]).view(-1, 1)
    noise = (augment(x, SIGNAL, rng(1), Augmentation(probability=1.0, translation=0.0, jitter=0.5)) - x).std(dim=(0, 2))
    torch.testing.assert_close(noise, 0.5 * x.std(dim=(0, 2)), rtol=0.05, atol=1e-6)


def test_jitter_follows_each_features_deviation():
    x = torch.randn(4000, 6, generator=rng()) * torch.tensor([1.0, 10.0, 0.0, 1.0, 1.0, 1.0])
    noise = (augment(x, FEATURES, rng(1), Augmentation(probability=1.0, jitter=0.5)) - x).std(dim=0)
    torch.testing.assert_close(noise, 0.5 * x.std(dim=0), rtol=0.05, atol=1e-6)


def test_color_keeps_grey_pictures_grey():
    grey = samples(InputSpec("image", (1, 8, 8))).expand(-1, 3, -1, -1)
    y = augment(grey, IMAGE, rng(), Augmentation(probability=1.0, translation=0.0))
    torch.testing.assert_close(y[:, 0], y[:, 2])


@pytest.mark.parametrize("name", ["rotation_deg", "zoom", "shear", "elastic", "soften"])
def test_distortions_change_shapes_but_not_uniform_pictures(name):
    how = replace(STILL, **{name: 10.0 if name == "rotation_deg" else 0.9})
    flat = torch.full((6, 3, 8, 8), 0.25)
    torch.testing.assert_close(augment(flat, IMAGE, rng(), how), flat)
    assert not torch.allclose(augment(samples(IMAGE), IMAGE, rng(), how), samples(IMAGE))


@pytest.mark.parametrize(
    "settings", [{"probability": 1.5}, {"coin": "dice"}, {"fill": "red"}, {"translation": 0.5}, {"zoom": -1.0}], ids=str
)
def test_settings_are_checked(settings):
    with pytest.raises(UsageError):
        Augmentation(**settings)
