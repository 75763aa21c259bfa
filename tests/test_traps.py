"""Models written in ways that invite silent errors: imported right, trained and exported right, or refused by name."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from stages.artifacts.records import InputSpec, Model
from stages.engines.choice import make_net
from stages.errors import UsageError
from stages.exporting import export
from stages.graphs.capture import capture
from stages.graphs.updates import whole_update
from stages.importing import Imported, Importing, Weights, import_noting
from stages.models.deploy import deploy, store

HERE = "edgetrain_traps"


class Trap(nn.Module):
    """Two linear layers of six features, a parameter `w` and what a case adds."""

    def __init__(self, call: Callable[[Any, Tensor], Any], add: Callable[[Any], Any], w: tuple[int, ...]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.w = nn.Parameter(torch.randn(w) * 0.3)
        self.call = call
        add(self)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def nothing(m: Any) -> None:
    pass


def imported(
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[Any, Tensor], Any],
    add: Callable[[Any], Any] = nothing,
    w: tuple[int, ...] = (6, 6),
    result: int | None = None,
) -> tuple[Trap, Imported]:
    """A trap with random weights, and what `import` makes of it and of them."""
    code = ModuleType(HERE)
    code.build = lambda: Trap(call, add, w)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, HERE, code)
    torch.manual_seed(3)
    module = Trap(call, add, w).eval()
    state = module.state_dict().items()
    weights = {name: value.float().numpy() for name, value in state if not name.endswith("num_batches_tracked")}
    settings = Importing(arch=f"{HERE}:build", input=InputSpec("features", (6,)), result=result)
    return module, import_noting(settings, Weights(weights, True))


def agree(model: Model, module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The record computes what the module does, on the engine that a user gets and on torch's."""
    with torch.no_grad():
        expected = module(x).numpy()
    for engine in ("auto", "torch"):
        found = deploy(model, engine=engine).features(x.numpy())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=engine)


def x_of(samples: int) -> Tensor:
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(samples))


def check_export(model: Model, call: Callable[[Any, Tensor], Any], add: Any, w: tuple[int, ...]) -> Trap:
    """The exported state dict loads strictly, and the module then computes what the record computes."""
    state = torch.load(io.BytesIO(export(model, "pth").data), weights_only=True)
    module = Trap(call, add, w).eval()
    module.load_state_dict(state, strict=True)
    agree(model, module, x_of(3))
    assert {name: value.dtype for name, value in state.items()} == {
        name: value.dtype for name, value in module.state_dict().items()
    }
    return module


def trained(model: Model) -> Model:
    """The record after one gradient step on every layer."""
    backbone = deploy(model)
    net = make_net(backbone, [whole_update(op) for op in backbone.graph.layers])
    features, kept = net.forward(net.prefix(x_of(4).numpy()))
    net.backward(kept, 2 * features)  # of the sum of squares
    for parameter in net.parameters():
        parameter.value -= 0.01 * parameter.gradient / np.abs(parameter.gradient).max()
    return store(model, replace(backbone, tensors=net.tensors()))


def masks(m: Any) -> None:
    m.register_buffer("whole", torch.tensor([1, 0, 2, 1, 0, 1]))
    m.register_buffer("mask", torch.tensor([True, False, True, True, True, True]))


def end(m: Any, y: Tensor) -> Tensor:
    return F.relu(m.b(F.relu(y)))


CASES: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any], Any], tuple[int, ...]]] = {
    "rows from the end": (lambda m, x: end(m, F.linear(m.a(x), m.w[-6:])), nothing, (12, 6)),
    "rows of rows": (lambda m, x: end(m, F.linear(m.a(x), m.w[2:][1:7])), nothing, (12, 6)),
    "halves": (lambda m, x: end(m, F.linear(m.a(x), m.w.chunk(2)[1]) + F.linear(x, m.w[:6])), nothing, (12, 6)),
    "in the order it had": (lambda m, x: end(m, F.linear(m.a(x), m.w.permute(0, 1))), nothing, (6, 6)),
    "a square from the right": (lambda m, x: end(m, m.a(x) @ m.w), nothing, (6, 6)),
    "lengths of columns": (
        lambda m, x: end(m, m.a(x) + m.w), lambda m: setattr(m, "a", weight_norm(m.a, dim=1)), (6,)),
    "one length": (lambda m, x: end(m, m.a(x) + m.w), lambda m: setattr(m, "a", weight_norm(m.a, dim=None)), (6,)),
    "masks of whole numbers": (lambda m, x: end(m, m.a(x) * m.whole * m.mask + m.w), masks, (6,)),
    "a path with a slash": (
        lambda m, x: end(m, m.part["a/b"](m.a(x)) + m.w),
        lambda m: setattr(m, "part", nn.ModuleDict({"a/b": nn.Linear(6, 6)})), (6,)),
    "a norm of statistics alone": (
        lambda m, x: end(m, m.bn(m.a(x) + x) + m.w),
        lambda m: setattr(m, "bn", nn.BatchNorm1d(6, eps=0.1, affine=False)), (6,)),
    "a fixed mask": (lambda m, x: end(m, m.a(x).masked_fill(m.mask == 0, 0.7) + m.w), masks, (6,)),
    "a fixed choice": (
        lambda m, x: end(m, torch.where(m.mask, torch.where(m.whole > 1, m.a(x), 2 * x), m.w)), masks, (6,)),
    "a mask before a softmax": (
        lambda m, x: end(m, m.a(x).masked_fill(~m.mask, float("-inf")).softmax(1) + m.w), masks, (6,)),
    "wide constants": (
        lambda m, x: end(m, (m.a(x) * torch.linspace(0, 1, 6, dtype=torch.float64)).float() + m.w), nothing, (6,)),
}  # fmt: skip


TIED: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any], Any], tuple[int, ...]]] = {
    "a weight and its transpose": (lambda m, x: end(m, F.linear(m.a(x), m.w) @ m.w), nothing, (6, 6)),
    "a factor and an offset": (lambda m, x: end(m, m.a(x) * m.w) + m.w, nothing, (6,)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_record_computes_trains_and_exports_what_the_module_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, add, w = CASES[name]
    module, found = imported(monkeypatch, call, add, w)
    for samples in (1, 3, 7):
        agree(found.run.model, module, x_of(samples))
    check_export(found.run.model, call, add, w)
    after = check_export(trained(found.run.model), call, add, w)
    moved = [name for name, value in after.state_dict().items() if not torch.equal(value, module.state_dict()[name])]
    assert any(name.startswith("b.") for name in moved)
    assert not {"whole", "mask"} & set(moved)


@pytest.mark.parametrize("name", TIED)
def test_what_is_used_in_several_ways_is_said_and_never_exported_apart(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two forms do not train as one, and no state dict could hold both."""
    call, add, w = TIED[name]
    _, found = imported(monkeypatch, call, add, w)
    assert [note for note in found.notes if "w is used in several ways" in note]
    check_export(found.run.model, call, add, w)
    with pytest.raises(UsageError, match="onnx"):
        export(trained(found.run.model), "pth")


def test_a_detach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured constants are detached too: those are nobody's business."""
    _, found = imported(monkeypatch, lambda m, x: m.b(m.a(x).detach() * m.w.detach()), w=(6,))
    assert len([note for note in found.notes if "detach() is passed over" in note]) == 1


def test_a_classifier_alone_leaves_nothing_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"only layer.*--classifier features"):
        imported(monkeypatch, lambda m, x: m.a(x))


@pytest.mark.parametrize("axes", [(2, 3), (0, 1)])
def test_a_turned_kernel_is_not_taken_for_the_entry(axes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a square kernel shape and memory are those of the entry, and only the strides tell."""

    def call(m: Any, x: Tensor) -> Tensor:
        return end(m, F.conv2d(m.a(x).view(-1, 2, 3, 1), m.w.transpose(*axes), padding=1).flatten(1)[:, :6])

    module, found = imported(monkeypatch, call, w=(2, 2, 2, 2))
    agree(found.run.model, module, x_of(3))


def test_a_layer_whose_first_call_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen result uses the second call, which held the first one's tensors."""
    module, found = imported(monkeypatch, lambda m, x: (m.b(m.a(x)), F.relu(m.a(m.a(x * 2)) + m.w)), w=(6,), result=1)
    agree(found.run.model, lambda x: module(x)[1], x_of(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_imported_in_single(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = imported(monkeypatch, lambda m, x: end(m, m.a(x) + m.w), lambda m: m.to(dtype), (6,))
    assert {array.dtype.name for array in found.run.model.tensors.values()} == {"float32"}


class Maps(nn.Module):
    """A convolution and the given rest."""

    def __init__(self, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.c, self.call = nn.Conv2d(2, 2, 1), call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, self.c(x))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, y: F.alpha_dropout(y, 0.5, training=True).mean((2, 3)), "active in evaluation mode"),
        (lambda m, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2).mean((2, 3)), "a second result"),
        (lambda m, y: y.flatten(0, 1).mean(2), r"returns \(N\*2, 8\)"),
        (lambda m, y: y.flatten(0, 1).flatten(1) * torch.no_grad()(lambda: m.c(y))().mean(), "torch.no_grad"),
    ],
)  # fmt: skip
def test_what_would_compute_something_else_is_refused_by_name(call: Callable[[Any, Tensor], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        capture(Maps(call), (2, 8, 8))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, y: y.masked_fill(y > 0, 0.0).mean((2, 3)),
        lambda m, y: y.int().float().mean((2, 3)),
        lambda m, y: F.interpolate(y, scale_factor=1.3).mean((2, 3)),
        lambda m, y: F.interpolate(y, scale_factor=1.3, mode="bilinear").mean((2, 3)),
    ],
)
def test_forms_that_a_kind_does_not_have_are_kept_as_they_are(call: Callable[[Any, Tensor], Any]) -> None:
    """`capture` itself compares them with the module."""
    assert any(op.kind == "opaque" for op in capture(Maps(call), (2, 8, 8)).graph.ops)


def test_sizes_that_come_out_whole_are_resized() -> None:
    graph = capture(Maps(lambda m, y: F.interpolate(y, scale_factor=1.1).mean((2, 3))), (2, 10, 10)).graph
    assert graph.by_name["upsample"].shape == (2, 11, 11)
