"""AdamW with rates that fall towards the input: the shares by hand, the steps against one torch optimiser a tensor."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Block, Model, Run
from stages.errors import UsageError
from stages.fsl.meta_training import Learner
from stages.fsl.optimizing import make_optimizer, set_rate, shares
from stages.graphs.capture import capture
from stages.models import registry
from stages.models.modules import state, trainable
from stages.pretraining import STAGE, Pretraining, pretrain

ARGS = {"size": 8, "patch": 4, "width": 6, "heads": 2, "depth": 2, "channels": 1}


def vit() -> Model:
    module = registry.build("vit-tiny", ARGS, seed=0)
    return Model("vit-tiny", ARGS, registry.input_spec("vit-tiny", ARGS), "batchnorm", state(module))


def test_rates_fall_by_a_factor_a_block():
    """Two blocks: what follows them takes the whole rate, the embedding 0.5^3 of it."""
    graph = capture(registry.build("vit-tiny", ARGS, seed=0), (1, 8, 8)).graph
    found = shares(graph, 0.5)
    assert found["norm.weight"] == found["norm.bias"] == 1
    assert {found[f"blocks.1.{name}"] for name in ("norm1.weight", "attn.qkv.bias", "mlp.fc2.weight")} == {0.5}
    assert found["blocks.0.mlp.fc1.weight"] == 0.25
    embedding = ("patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token.value", "pos_embed.value")
    assert {found[name] for name in embedding} == {0.125}
    assert set(shares(graph, 1.0).values()) == {1.0}


def test_a_convolutional_nets_blocks_count_too():
    found = shares(capture(registry.build("cnn4", {}, seed=0), (1, 28, 28)).graph, 0.5)
    assert [found[f"blocks.0{block}.conv.weight"] for block in range(4)] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]


def test_steps_are_those_of_torchs_adamw_by_tensor():
    learner, other = (Learner(trainable(vit()), 10.0, torch.ones(3, 6)) for _ in range(2))
    by_name = shares(learner.backbone.graph, 0.5)
    keys = {f"backbone.value{i}": by_name[name] for i, name in enumerate(learner.backbone.names)}
    optimizer = make_optimizer("adamw", learner, momentum=0.9, weight_decay=0.1, layer_decay=0.5)
    each = {
        name: torch.optim.AdamW([value], lr=0.01 * keys.get(name, 1.0), weight_decay=0.1 if value.ndim > 1 else 0.0)
        for name, value in other.named_parameters()
    }
    set_rate(optimizer, 0.01)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        for (name, mine), theirs in zip(learner.named_parameters(), other.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=rng)
            theirs.grad = mine.grad.clone()
            each[name].step()
        optimizer.step()
    for (name, mine), theirs in zip(learner.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


CONFIG = Pretraining(
    epochs=3, steps=3, ways=3, shots=2, queries=2, supervised_epochs=1, supervised_batch=8, optimizer="adamw",
    layer_decay=0.75, weight_decay=0.05, augment="none", validation_tasks=3, validation_ways=3, validation_shots=2,
    validation_queries=2, validation_share=0.3,
)  # fmt: skip


def patterns() -> Block:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 255, (10, 8, 8))
    x = np.clip(np.repeat(kinds, 6, 0) + rng.normal(0, 40, (60, 8, 8)), 0, 255)
    return Block(x.astype(np.uint8), np.repeat(np.arange(10), 6).astype(np.int64), "NHW")


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resumed_training_is_bit_equal(stop_after):
    saved: list[bytes] = []
    whole = pretrain(Run(vit()), [patterns()], CONFIG, seed=0, save=lambda run: saved.append(encode(run)))
    again = pretrain(Run(vit()), [patterns()], CONFIG, seed=0, resume=decode(saved[stop_after - 1]))
    assert encode(again) == encode(whole)


def test_a_transformer_learns():
    config = replace(CONFIG, epochs=8, steps=10, lr=0.005, warmup_epochs=0)
    loss = pretrain(Run(vit()), [patterns()], config, seed=0).metrics[STAGE]["loss"]
    assert loss[-1] < 0.7 * loss[1]  # epoch 0 is the classifier's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_decay": 0.5}, "adamw"),
        ({"optimizer": "adamw", "slice": 0.5}, "sgd"),
        ({"optimizer": "lion"}, "sgd"),
        ({"optimizer": "adamw", "layer_decay": 1.5}, "1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UsageError, match=message):
        Pretraining(**settings)


def test_default_rates_are_those_of_the_optimizer():
    assert (Pretraining().schedule.rate, Pretraining().supervised_rate) == (0.1, 0.05)
    adamw = Pretraining(optimizer="adamw")
    assert (adamw.schedule.rate, adamw.supervised_rate) == (0.001, 0.001)
