"""Token dropping (BSR): the rewritten graph against a transformer written down a second time, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.artifacts.records import InputSpec
from stages.cost.training import saved_activation_bytes
from stages.engines.torch import reference
from stages.engines.torch.net import SparseNet
from stages.errors import DataError, UsageError
from stages.graphs.capture import Captured, capture
from stages.graphs.graph import Graph
from stages.graphs.keeping import held_bytes, holding
from stages.graphs.record import graph_tree, read_graph
from stages.graphs.tokens import Drops, drop_tokens
from stages.graphs.updates import whole_update
from stages.models.deploy import Backbone
from stages.models.vit import VitTiny
from stages.operators import Op
from tests.engines.torch.test_net import kept_bytes
from tests.operators.examples import make
from tests.zoo import ZOO

PATCHES, WIDTH, HEADS, DEPTH = 16, 8, 2, 4
EXACT = {"rtol": 1e-9, "atol": 1e-9}
"""float64: a hundred sums of at most 32 products in a row err by 100 * 32 * 2^-53 = 4e-13 of the values' size (Higham
3.1); the rest is room for cancellation. Heads of 4 channels make the scale 0.5, which float32 holds exactly."""


class Layer(nn.Module):
    """A user's own block: query, key and value apart, attention fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, HEADS, WIDTH // HEADS).transpose(1, 2)

    def forward(self, x: Tensor, keep: float = 1.0, fuse: bool = False, detach: bool = False) -> Tensor:
        """With `keep` below 1 what section 2 of BSR says, token by token."""
        y = self.before(x)
        q, k, v = (self.heads(part(y)) for part in (self.query, self.key, self.value))
        shares = (q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(3)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else shares @ v
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        if keep < 1:
            scores = shares[:, :, 0].mean(1)
            scores = scores.detach() if detach else scores
            x = torch.stack([dropped(*one, keep, fuse) for one in zip(x, scores, strict=True)])
        return x + self.narrow(F.gelu(self.wide(self.after(x))))


def dropped(x: Tensor, scores: Tensor, keep: float, fuse: bool) -> Tensor:
    """One sample's tokens (N, C) and scores (N,)."""
    order = sorted(range(1, len(x)), key=lambda j: -scores[j].item())
    count = ceil(keep * (len(x) - 1))
    rows = [x[0], *(x[j] for j in order[:count])]
    return torch.stack([*rows, sum(scores[j] * x[j] for j in order[count:])] if fuse else rows)


class User(nn.Module):
    """A transformer over 16 patches of 4 x 4 with a class token."""

    def __init__(self, fused: bool, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.embed = nn.Conv2d(1, WIDTH, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.where = nn.Parameter(torch.randn(1, PATCHES + 1, WIDTH))
        self.layers = nn.ModuleList(Layer(fused) for _ in range(DEPTH))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, at: tuple[int, ...] = (), **how: Any) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.first.expand(len(h), 1, WIDTH), h], 1) + self.where
        for number, layer in enumerate(self.layers):
            h = layer(h, **how) if number in at else layer(h)
        h = self.last(h)
        return h[:, 1:].mean(1) if self.pooled else h[:, 0]


def user(fused: bool, **options: Any) -> User:
    torch.manual_seed(3)
    module = User(fused, **options).double().eval()
    for value in module.parameters():
        nn.init.normal_(value, std=0.5)
    return module


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shortened(captured: Captured, drops: Drops) -> tuple[Graph, dict[str, Tensor]]:
    graph, new = drop_tokens(captured.graph, drops)
    like = next(iter(captured.tensors.values()))
    return graph, captured.tensors | {name: torch.from_numpy(value).to(like) for name, value in new.items()}


def test_a_drop_by_hand() -> None:
    op = make("drop_tokens", (5, 2), (5,), keep=2, fuse=True).op
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 10.0]]])
    scores = torch.tensor([[0.9, 0.125, 0.5, 0.25, 0.5]])
    # 0.5 stands twice: the first of equals comes first; 0.25 * [7, 8] + 0.125 * [3, 4] is fused
    found = reference.apply(op, [x, scores], {})
    assert found.tolist() == [[[1.0, 2.0], [5.0, 6.0], [9.0, 10.0], [2.125, 2.5]]]
    assert (op.shape, op.operator.macs_of(op)) == ((4, 2), 4)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["written out", "one operator"])
@pytest.mark.parametrize("options", [{}, {"pooled": True}], ids=["class token", "mean of the others"])
def test_forward_and_gradients_are_those_of_another_transformer(fused: bool, fuse: bool, options: Any) -> None:
    module, x, at = user(fused, **options), pictures(), (0, 2)
    captured = capture(module, (1, 16, 16))
    graph, tensors = shortened(captured, Drops(blocks=at, keep=0.5, fuse=fuse))
    arrays = {name: value.detach().numpy() for name, value in tensors.items()}
    updates = [whole_update(op) for op in graph.layers]
    net = SparseNet(Backbone(graph, arrays, InputSpec("image", (1, 16, 16))), updates)
    expected = module(x, at, keep=0.5, fuse=fuse)
    assert not torch.allclose(expected, module(x), **EXACT)
    torch.testing.assert_close(reference.run(graph, tensors, x), expected, **EXACT)
    features = net.suffix(net.prefix(x))
    torch.testing.assert_close(features, expected, **EXACT)
    weights = torch.linspace(-1, 2, features.numel(), dtype=torch.float64).reshape(features.shape)
    (features * weights).sum().backward()
    gradients = gradients_of(module, expected, weights)
    names = [f"{update.layer}.{what}" for update in updates for what in ("weight", "bias")]
    for name, parameter in zip(names, net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradients[name], **EXACT)
    apart = gradients_of(module, module(x, at, keep=0.5, fuse=fuse, detach=True), weights)
    assert fuse == any(not torch.allclose(apart[name], gradients[name], **EXACT) for name in names)


def gradients_of(module: nn.Module, output: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
    names, values = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((output * weights).sum(), values), strict=True))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["written out", "one operator"])
def test_bytes_kept_are_the_predicted_ones(fused: bool, fuse: bool) -> None:
    captured = capture(user(fused).float(), (1, 16, 16))
    graph, tensors = shortened(captured, Drops(blocks=(0, 2), keep=0.5, fuse=fuse))
    arrays = {name: value.detach().numpy() for name, value in tensors.items()}
    for layers in (graph.layers, [op for op in graph.layers if op.name.startswith("layers.2")]):
        updates = [whole_update(op) for op in layers]
        net = SparseNet(Backbone(graph, arrays, InputSpec("image", (1, 16, 16))), updates)
        predicted = saved_activation_bytes(graph, updates, 3)
        assert kept_bytes(net, pictures().float()) == predicted == held_bytes(graph, holding(graph, updates), 3)
        assert predicted < saved_activation_bytes(captured.graph, updates, 3)


def test_all_tokens_are_the_net_as_it_was() -> None:
    captured = capture(user(True), (1, 16, 16))
    for drops in (Drops(blocks=(0, 1), keep=1), Drops(blocks=(0,), keep=0.95, fuse=True)):  # ceil(15.2) = 16
        graph, new = drop_tokens(captured.graph, drops)
        assert (graph, new) == (captured.graph, {})
    assert Drops(blocks=(0,), keep=0.55).kept(100) == 55  # in binary 55.00000000000001
    assert Drops(blocks=(0,), keep=0.001).kept(100) == 1


@pytest.mark.parametrize(("keep", "counts"), [(0.5, (197, 100, 52, 28)), (0.7, (197, 140, 100, 72))])
def test_token_counts_and_macs_are_those_of_the_paper(keep: float, counts: tuple[int, ...]) -> None:
    """bsr.md, section 2: tokens of attention by block with drops at 3, 6, 9; 1.25 and (kappa 0.5) 0.63 G MACs."""
    graph, _ = drop_tokens(vit_tiny(), Drops(blocks=(3, 6, 9), keep=keep, fuse=True))
    found = tuple(op.in_shape[-2] for op in graph.ops if op.kind == "attention")
    first, second, third, fourth = counts
    assert found == (*(first,) * 4, *(second,) * 3, *(third,) * 3, *(fourth,) * 2)
    products = [op.operator.macs_of(op) for op in graph.ops if op.kind in ("conv", "linear", "attention")]
    by_hand = 3 * 16**2 * 192 * 196
    for block in range(12):
        n, after = found[block], found[min(block + 1, 11)]
        by_hand += 4 * n * 192**2 + 2 * n * n * 192 + 8 * after * 192**2
    assert sum(products) == by_hand
    assert keep == 0.7 or round(by_hand / 1e9, 2) == 0.63


@cache
def vit_tiny() -> Graph:
    return capture(VitTiny().requires_grad_(False), (3, 224, 224)).graph


@pytest.mark.parametrize(
    "name", ["vit", "vit-fused", "vit-torchvision", "vit-hf", "encoder-pre-norm", "encoder-post-norm"]
)
def test_transformers_of_other_libraries_are_rewritten(name: str) -> None:
    """Three heads of 32 patches and a class token; one drop, whatever the graph's own blocks are."""
    specimen = ZOO[name]
    captured = capture(specimen.build(), specimen.input_shape)
    graph, tensors = shortened(captured, Drops(blocks=(0,), keep=0.25, fuse=True))
    read = read_graph(graph_tree(graph))
    assert read == graph
    assert [op.shape[0] for op in graph.ops if op.kind == "drop_tokens"] == [6]
    assert [op.name for op in graph.layers] == [op.name for op in captured.graph.layers]
    x = torch.randn(2, *specimen.input_shape, generator=torch.Generator().manual_seed(0))
    before, after = reference.run(captured.graph, captured.tensors, x), reference.run(graph, tensors, x)
    assert after.shape == before.shape
    assert not torch.allclose(after, before, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deit", "reads tokens from 1 on by their places"),
        ("cait", "no attention among tokens"),
        ("mlp-mixer", "no attention among tokens"),
        ("swin", "tokens that form a map"),
        ("mobilevit", "tokens that form a map"),
        ("levit", "no class token"),
        ("cct", "no class token"),
    ],
)
def test_where_tokens_cannot_go_the_reason_is_one_line(name: str, reason: str) -> None:
    graph = capture(ZOO[name].build(), ZOO[name].input_shape).graph
    with pytest.raises(UsageError, match=reason) as caught:
        drop_tokens(graph, Drops(blocks=(0,), keep=0.5))
    assert "\n" not in str(caught.value)


class Habit(nn.Module):
    """A user's transformer in which something happens behind the first block."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.whole, self.between = user(True).float(), between
        self.over = nn.Linear(PATCHES + 1, PATCHES + 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.whole
        h = whole.embed(x).flatten(2).transpose(1, 2)
        h = torch.cat([whole.first.expand(len(h), 1, WIDTH), h], 1) + whole.where
        start = h
        h = whole.layers[1](whole.layers[0](h))
        return whole.last(whole.layers[2](self.between(self, h, start)))[:, 0]


HABITS: Mapping[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], str]] = {
    "a layer over tokens": (lambda net, h, start: net.over(h.mT).mT, "weights for each token"),
    "positions again": (lambda net, h, start: h + net.whole.where, "does not fit"),
    "a value from before": (lambda net, h, start: h + start, "does not fit"),
    "shifted": (lambda net, h, start: h.roll(1, 1), "reads tokens in their places"),
    "a map": (lambda net, h, start: h[:, :1] + h[:, 1:].reshape(len(h), 4, 4, WIDTH).mean((1, 2))[:, None],
              "a map or a vector of tokens in their places"),
    "in pairs": (lambda net, h, start: torch.cat([h, h], 1), "behind each other anew"),
    "normed": (lambda net, h, start: F.layer_norm(h, (PATCHES + 1, WIDTH)), "is over tokens"),
    "by number": (lambda net, h, start: h[:, torch.arange(PATCHES, -1, -1)], "by their places"),
}  # fmt: skip


@pytest.mark.parametrize("habit", HABITS)
def test_an_operator_that_needs_the_dropped_tokens_is_named(habit: str) -> None:
    between, reason = HABITS[habit]
    graph = capture(Habit(between), (1, 16, 16)).graph
    with pytest.raises(UsageError, match=reason):
        drop_tokens(graph, Drops(blocks=(0,), keep=0.5))


class Masked(Habit):
    """Attention with numbers added."""

    def forward(self, x: Tensor) -> Tensor:
        whole = self.whole
        h = whole.embed(x).flatten(2).transpose(1, 2)
        h = torch.cat([whole.first.expand(len(h), 1, WIDTH), h], 1) + whole.where
        for layer in whole.layers[:2]:
            q, k, v = (layer.heads(part(h)) for part in (layer.query, layer.key, layer.value))
            h = h + F.scaled_dot_product_attention(q, k, v, self.over.weight).transpose(1, 2).flatten(2)
        return h[:, 0]


def test_masks_are_refused() -> None:
    graph = capture(Masked(lambda *_: _[1]), (1, 16, 16)).graph
    with pytest.raises(UsageError, match="has a mask"):
        drop_tokens(graph, Drops(blocks=(0,), keep=0.5))


def test_blocks_and_shares_are_checked() -> None:
    graph = capture(user(True), (1, 16, 16)).graph
    for blocks, message in (
        ((DEPTH - 1,), "only the class token leaves the last one"),
        ((9,), "block 9, expected 0 to 2"),
    ):
        with pytest.raises(UsageError, match=message):
            drop_tokens(graph, Drops(blocks=blocks, keep=0.5))
    for keep in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(UsageError, match="a share above 0 and at most 1"):
            Drops(blocks=(0,), keep=keep)
    for blocks in ((), (1, 1), (2, 1)):
        with pytest.raises(UsageError, match="ascending"):
            Drops(blocks=blocks, keep=0.5)
    once, _ = drop_tokens(graph, Drops(blocks=(0,), keep=0.5))
    with pytest.raises(UsageError, match="drops tokens already"):
        drop_tokens(once, Drops(blocks=(1,), keep=0.5))
    with pytest.raises(DataError, match=r"expected \(N, 1, 16, 16\)"):  # another length than the capture's
        reference.run(once, {}, torch.zeros(1, 1, 20, 20))


def test_the_order_of_patches_changes_nothing_but_rounding() -> None:
    """Patches permuted with their positions (bsr.md, fact 3)."""
    module, x = user(True), pictures(1)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(2))
    captured = capture(module, (1, 16, 16))
    graph, tensors = shortened(captured, Drops(blocks=(0, 1), keep=0.5, fuse=True))
    expected = reference.run(graph, tensors, x)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(1, PATCHES, 4, 4)[:, order]
    moved = patches.reshape(1, 1, 4, 4, 4, 4).transpose(3, 4).reshape(1, 1, 16, 16)
    where = tensors["where.value"]
    turned = tensors | {"where.value": torch.cat([where[:1], where[1:][order]])}
    torch.testing.assert_close(reference.run(graph, turned, moved), expected, **EXACT)


def test_new_operators_stand_in_the_block_of_the_drop() -> None:
    graph, new = drop_tokens(capture(user(True), (1, 16, 16)).graph, Drops(blocks=(1,), keep=0.5))
    added: list[Op] = [op for op in graph.ops if ".drop." in op.name]
    assert [op.kind for op in added] == [
        "slice", "permute", "constant", "matmul", "multiply", "softmax", "mean", "drop_tokens",
    ]  # fmt: skip
    assert {graph.blocks[op.block] for op in added} == {"layers.1"}
    assert new == {"layers.1.drop.constant.value": np.array(0.5, np.float32)}
