"""Registry architectures against the published cost tables, and user models against permission."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.engines.torch.reference import run
from stages.errors import PartMissing, UsageError
from stages.graphs.capture import capture
from stages.graphs.graph import Graph
from stages.models.registry import ARCHITECTURES, build, input_spec
from tests.models.nets import write_module

SMALL: dict[str, dict[str, Any]] = {
    "mcunet-5fps": {"size": 32, "mix": True},
    "mobilenetv2": {"size": 32, "width": 0.35, "mix": True},
    "proxyless-w0.3": {"size": 32},
    "mobilenetv1": {"size": 32, "width": 0.25},
    "mobilenetv3-small": {"size": 32, "mix": True},
    "mobilenetv3-large": {"size": 32},
    "efficientnet-lite0": {"size": 32},
    "resnet18": {"size": 32},
    "vit-tiny": {"size": 32, "depth": 2},
    "squeezenet": {"size": 32},
    "cnn4": {"width": 8},
    "ds-cnn": {"width": 8, "frames": 20, "mel": 16, "sample_rate": 8000},
    "cnn1d": {"width": 8, "channels": 3, "length": 40},
    "mlp": {"dim": 20, "width": 8, "depth": 2},
}
"""Arguments that make every registry architecture small enough for tests."""


def graph_of(arch: str, **arch_args: Any) -> Graph:
    return capture(build(arch, arch_args), input_spec(arch, arch_args).shape).graph


def weights_and_macs(graph: Graph) -> tuple[int, int]:
    return sum(op.weights for op in graph.layers), sum(op.weights * prod(op.shape[1:]) for op in graph.layers)


@pytest.mark.parametrize(
    ("arch", "mix", "weights", "macs", "layers", "blocks"),
    [  # TinyTrain Table 4 and the committed nets it was computed from (arXiv:2307.09988, appendix A.2)
        ("mcunet-5fps", False, 463_216, 22_453_504, 42, 14),
        ("mobilenetv2-w0.35", False, 238_688, 16_646_912, 51, 17),
        ("mobilenetv2-w0.35", True, 288_864, 17_449_728, 52, 17),
        ("proxyless-w0.3", False, 320_816, 18_619_904, 60, 20),
        ("proxyless-w0.3", True, 357_680, 19_209_728, 61, 20),
    ],
)
def test_costs_are_the_published_ones(arch: str, mix: bool, weights: int, macs: int, layers: int, blocks: int) -> None:
    graph = graph_of(arch, mix=mix)
    assert weights_and_macs(graph) == (weights, macs)
    assert (len(graph.layers), len(graph.blocks)) == (layers, blocks)
    assert len({op.name for op in graph.ops if op.is_depthwise}) == blocks


def test_layer_names_are_stable() -> None:
    names = [op.name for op in graph_of("mobilenetv2-w0.35", mix=True, size=32).layers]
    assert names[:4] == ["stem", "blocks.00.depthwise", "blocks.00.project", "blocks.01.expand"]
    assert names[-4:] == ["blocks.16.expand", "blocks.16.depthwise", "blocks.16.project", "mix"]


def test_last_six_blocks_are_eighteen_layers_and_the_stem_is_in_the_first() -> None:
    graph = graph_of("mcunet-5fps", mix=True, size=32)
    assert sum(op.block >= 8 for op in graph.layers) == 18
    assert [op.name for op in graph.ops if op.block == 0 and op.is_layer] == [
        "stem",
        "blocks.00.depthwise",
        "blocks.00.project",
    ]
    assert graph["mix"].block == graph["input"].block == graph["global_pool"].block == -1
    assert graph.blocks[13] == "blocks.13"


def test_every_architecture_has_small_arguments_here() -> None:
    assert SMALL.keys() == ARCHITECTURES.keys()
    assert len(SMALL) == 14


@pytest.mark.parametrize("arch", SMALL)
def test_captured_graph_computes_what_the_module_computes(arch: str) -> None:
    module, shape = build(arch, SMALL[arch]).double(), input_spec(arch, SMALL[arch]).shape
    captured = capture(module, shape)
    graph = captured.graph
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected, found = module(x), run(graph, captured.tensors, x)
    assert expected.shape == (3, graph.feature_dim)
    assert float(expected.std()) > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("arch", SMALL)
def test_initialisation_follows_the_seed_and_leaves_torch_alone(arch: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build(arch, SMALL[arch], seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(*(next(iter(state.values())) for state in (first, other)))


def test_width_in_the_name_is_the_argument() -> None:
    assert graph_of("mobilenetv2-w0.5", size=32) == graph_of("mobilenetv2", width=0.5, size=32)
    assert graph_of("cnn4-w16").feature_dim == 16


def test_the_input_follows_the_arguments() -> None:
    assert input_spec("mcunet-5fps", {"size": [64, 96], "channels": 1}).shape == (1, 64, 96)
    assert input_spec("mlp", {"dim": 12}).shape == (12,)
    sound = input_spec("ds-cnn", {"sample_rate": 8000})
    assert (sound.window_samples, sound.hop_samples, sound.shape) == (320, 160, (1, 49, 40))


@pytest.mark.parametrize(
    ("arch", "arguments", "message"),
    [
        ("mcunet", {}, "unknown architecture"),
        ("mcunet-5fps-w0.5", {}, "unknown architecture"),
        ("mobilenetv2-w0.5", {"width": 0.5}, "the width once"),
        ("mcunet-5fps", {"depth": 3}, "cannot be built"),
        ("cnn4-w0.5", {}, "cannot be built"),
    ],
)
def test_wrong_names_and_arguments_are_usage_errors(arch: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(arch, arguments)


@pytest.mark.parametrize("size", [0, 2.5, True, "big"])
def test_an_impossible_size_is_a_usage_error(size: Any) -> None:
    with pytest.raises(UsageError, match="size"):
        input_spec("mcunet-5fps", {"size": size})


def test_user_code_is_imported_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "permitted_models")
    monkeypatch.syspath_prepend(tmp_path)
    name = "permitted_models:classifier"
    for allow in (None, "other:factory"):
        with pytest.raises(UsageError, match=f"repeat --arch {name}"):
            build(name, {}, allow=allow)
    module = build(name, {"classes": 3}, allow=name)
    assert module(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert not module.training


@pytest.mark.parametrize(
    ("attribute", "error", "message"),
    [
        ("user_models:not_a_module", UsageError, "returned int"),
        ("user_models:value", UsageError, "is a int"),
        ("user_models:missing", UsageError, "cannot be imported"),
        ("no_such_package:factory", PartMissing, "PYTHONPATH"),
    ],
)
def test_a_broken_factory_is_one_clear_error(
    attribute: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=message):
        build(attribute, {}, allow=attribute)
