"""How far a floating-point result may lie from the exact one: bounds that hold on every machine.

A tolerance that was measured holds where it was measured. These follow from the number of operations instead. The model
is the standard one of N. J. Higham, Accuracy and Stability of Numerical Algorithms (2nd ed., SIAM 2002): each operation
is exact up to a relative error of the unit roundoff u (2.4), so that n of them in a row are exact up to
gamma_n = n u / (1 - n u) (Lemma 3.1), and a sum of n products, in any order, with or without fused multiply-adds, lies
within gamma_n * sum |a_i| |b_i| of the exact one (section 3.1, eq. 3.5). Instruction sets, threads, blockings, layouts
and batch sizes change the order of sums only, so no choice of kernel leaves these bounds. (What would: fewer bits, as
bfloat16 or TF32, and fast algorithms, as Winograd's. torch uses neither for float32 unless it is asked to.)

`gradient_bounds` carries them through a whole net and back (running error analysis, Higham section 3.3): every value
and every gradient in float64, each with a bound on how far a computation in another precision may lie from it. Through
tens of layers worst cases multiply up to nothing; there `no_worse` compares errors instead.

Whatever is checked, and a backbone's tensors, may be arrays or tensors; exact values are tensors in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.artifacts.records import Array, Head
from stages.engines.torch import reference
from stages.graphs.graph import Graph
from stages.models.deploy import Backbone
from stages.operators import Op

Numbers = Tensor | Array

KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0)}
"""Where the slope of an activation jumps."""

LOSS = 512
"""More operations in a row than any test's loss makes: sums over features and batch, and a softmax."""


def as_tensor(value: Any) -> Tensor:
    """A tensor, or an array as one, of the same precision."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.require(value, requirements="W"))


def as_tensors(values: Mapping[str, Numbers], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Arrays by name as tensors, of another precision where one is given."""
    return {name: as_tensor(value).detach().to(dtype) for name, value in values.items()}


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest: 2^-24 for float32, 2^-53 for float64."""
    return torch.finfo(dtype).eps / 2


def gamma(operations: int, dtype: torch.dtype = torch.float32) -> float:
    """Largest relative error of so many operations in a row, of one computation against another in float64.

    The sum of both computations' unit roundoffs takes the place of u: gamma is convex in u, so this covers both errors.
    """
    error = operations * (unit_roundoff(dtype) + unit_roundoff(torch.float64))
    if error >= 1:
        raise ValueError(f"{operations} operations in {dtype} leave no correct digit")
    return error / (1 - error)


def product_bound(a: Numbers, b: Numbers, dtype: torch.dtype = torch.float32, *, extra: int = 0) -> Tensor:
    """How far `a @ b` (M, K) @ (K, N) in `dtype` may lie from float64, per element: gamma_K |a| |b|, float64 (M, N).

    `extra` counts what else is done to each element: 1 where a bias is added, 2 for a product and a division.
    """
    return gamma(a.shape[-1] + extra, dtype) * (as_tensor(a).double().abs() @ as_tensor(b).double().abs())


def no_worse(found: Numbers, plain: Numbers, exact: Numbers, longest: int) -> None:
    """Assert that `found` errs no more than `plain`, stock operators in the same precision, could have.

    Both against `exact`, float64, by Euclidean norm over all elements. Rounding errors that are independent add up to
    about u in a sum that is blocked into vectors or halves, and to sqrt(n) u in one of n terms in a row (Higham and
    Mary, SIAM J. Sci. Comput. 41, 2019): so the order of summands makes a factor of at most sqrt(n), here doubled.
    """
    found, plain, exact = as_tensor(found), as_tensor(plain), as_tensor(exact)
    assert found.shape == plain.shape == exact.shape
    unit = unit_roundoff(plain.dtype) * float(exact.norm())
    limit = 2 * sqrt(longest) * max(float((plain.double() - exact).norm()), unit)
    error = float((found.double() - exact).norm())
    assert error <= limit, f"error {error:.3g} of {float(exact.norm()):.3g}, at most {limit:.3g}"


def exact_features(backbone: Backbone, x: Numbers) -> Tensor:
    """Features (N, D) of inputs x (N, *input) in float64."""
    return reference.run(backbone.graph, as_tensors(backbone.tensors, torch.float64), as_tensor(x).double())


def plain_features(backbone: Backbone, x: Numbers) -> Tensor:
    """Features (N, D) of inputs x (N, *input) by stock operators, in the backbone's own precision."""
    return reference.run(backbone.graph, as_tensors(backbone.tensors), as_tensor(x))


def check_features(found: Numbers, backbone: Backbone, x: Numbers) -> None:
    """Assert that features (N, D) are the backbone's for inputs x (N, *input), however they were computed."""
    no_worse(found, plain_features(backbone, x), exact_features(backbone, x), longest_sum(backbone.graph))


def check_probabilities(found: Numbers, head: Head, backbone: Backbone, x: Numbers) -> None:
    """Assert that probabilities (N, C) are what the head answers for inputs x, however they were computed."""
    plain = _logits(head, plain_features(backbone, x)).softmax(1)
    exact = exact_logits(head, exact_features(backbone, x)).softmax(1)
    no_worse(found, plain, exact, max(longest_sum(backbone.graph), head.weight.shape[1]))


def exact_logits(head: Head, features: Numbers) -> Tensor:
    """The class scores (N, C) in float64 that a head of known rows gives for features (N, D)."""
    return _logits(head, as_tensor(features).double())


def _logits(head: Head, features: Tensor) -> Tensor:
    """The same by stock operators, in the features' precision."""
    weight, bias = as_tensor(head.weight).to(features.dtype), as_tensor(head.bias).to(features.dtype)
    if head.kind == "linear":
        return features @ weight.T + bias
    return head.scale * functional.normalize(features, dim=1) @ functional.normalize(weight, dim=1).T


def longest_sum(graph: Graph) -> int:
    """Most products that one output of a forward pass adds up."""
    return max((SUMMANDS[op.kind](op) for op in graph.ops if op.kind in SUMMANDS), default=1)


@dataclass(frozen=True)
class Bounded:
    """A value in float64, and how far from it a computation in another precision may lie: both of one shape."""

    value: Tensor
    error: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitude that the other computation may have."""
        return self.value.abs() + self.error

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error)

    def check(self, found: Numbers, what: str = "") -> None:
        """Assert that a result lies within the bound, element by element."""
        found = as_tensor(found)
        assert found.shape == self.value.shape, f"{what}: {tuple(found.shape)}, expected {tuple(self.value.shape)}"
        over = (found.double() - self.value).abs() - self.error
        assert not over.numel() or float(over.max()) <= 0, f"{what}: {float(over.max()):.3g} outside the bound"


def gradient_bounds(
    backbone: Backbone,
    x: Numbers,
    loss: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    detached: Collection[str] = frozenset(),
    loss_dtype: torch.dtype = torch.float64,
) -> tuple[Bounded, dict[str, Bounded]]:
    """Features, and every tensor's gradient by name, of any computation in `dtype` by sums of products.

    The loss's own arithmetic is taken as backward stable, exact for features that `LOSS` operations have moved (dot
    products and norms are, Higham 3.4); let the test's loss compute in float64 where it can (`in_double`), for tighter
    bounds. Its curvature at the exact features stands for the one beside them: an error of second order, far below the
    slack of worst-case sums. Layers in `detached` pass no gradient on to their inputs. The inputs of a max-pool window
    must not tie (`random_graphs.distance_to_kinks`); at the kinks of activations both slopes are allowed for.

    Args:
        backbone: in deploy form; its tensors of `dtype`, or of float64.
        x: the batch (N, *input).
        loss: of the features (N, D), differentiable twice.
        dtype: the precision of the computation to be bounded.
        detached: names of layers.
        loss_dtype: the precision in which the computation takes the loss and its gradient.
    """
    tensors = as_tensors(backbone.tensors, torch.float64)
    ops, values = backbone.graph.ops, value_bounds(backbone.graph, tensors, x, dtype)
    features = values[ops[-1].name]
    pulled = {name: _exact(torch.zeros_like(value.value)) for name, value in values.items()}
    pulled[ops[-1].name] = _at_features(loss, features, dtype, loss_dtype)
    found = {name: _exact(torch.zeros_like(tensor)) for name, tensor in tensors.items()}
    for op in reversed(ops[1:]):
        readers = len(backbone.graph.consumers[op.name])
        gradient = _rounded(pulled[op.name], gamma(max(0, readers - 1), dtype))
        to_inputs, own = _backward(op, [values[name] for name in op.inputs], tensors, gradient, dtype)
        found.update(own)
        if op.name not in detached:
            for name, value in zip(op.inputs, to_inputs, strict=True):
                pulled[name] = pulled[name] + value
    return features, found


def value_bounds(graph: Graph, tensors: Mapping[str, Numbers], x: Numbers, dtype: torch.dtype) -> dict[str, Bounded]:
    """Every operator's output, by its name, of any computation in `dtype` by sums of products; x (N, *input)."""
    doubles = as_tensors(tensors, torch.float64)
    values = {graph.ops[0].name: _exact(as_tensor(x).detach().double())}
    for op in graph.ops[1:]:
        values[op.name] = _forward(op, [values[name] for name in op.inputs], doubles, dtype)
    return values


def in_double(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A loss that computes in float64 whatever the features' precision."""
    return lambda features: loss(features.double())


def loss_bound(
    loss: Callable[[Tensor], Tensor],
    features: Bounded,
    *,
    largest: float = 100.0,
    loss_dtype: torch.dtype = torch.float64,
) -> Bounded:
    """The loss's value, computed in `loss_dtype` at features that lie within their bounds, to first order.

    The loss itself makes at most `LOSS` operations in a row, on numbers (logits) up to `largest`.
    """
    at = features.value.detach().requires_grad_()
    value = loss(at)
    (slope,) = torch.autograd.grad(value, at)
    rounding = gamma(LOSS, loss_dtype) * largest
    return Bounded(value.detach(), (slope.abs() * features.error).sum() + rounding)


# ------------------------------------------------------------------------------------------------------------- forward


def _forward(op: Op, inputs: Sequence[Bounded], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Bounded:
    value = reference.apply(op, [each.value for each in inputs], tensors)
    if op.kind in KINKS:
        up, down = (reference.apply(op, [inputs[0].value + s * inputs[0].error], {}) for s in (1, -1))
        return Bounded(value, torch.maximum(up - value, value - down))
    no_bias = {name: tensor.abs() if name.endswith("weight") else 0 * tensor for name, tensor in tensors.items()}
    passed = reference.apply(op, [each.error for each in inputs], no_bias)
    if op.kind not in SUMMANDS:  # a choice among its inputs, or their order
        return Bounded(value, passed)
    sizes = reference.apply(
        op, [each.size for each in inputs], {name: tensor.abs() for name, tensor in tensors.items()}
    )
    return Bounded(value, passed + gamma(SUMMANDS[op.kind](op), dtype) * sizes)


SUMMANDS: dict[str, Callable[[Op], int]] = {
    "conv": lambda op: prod(op.weight_shape[1:]) + 1,
    "linear": lambda op: op.in_channels + 1,
    "add": lambda op: 1,
    "avg_pool": lambda op: prod(op.kernel) + 2,  # divided by the count, or multiplied by its rounded inverse
    "global_pool": lambda op: prod(op.in_shape[1:]) + 2,
}
"""Operations that an output element's rounding errors come from; kinds that are not here only choose and move."""


# ------------------------------------------------------------------------------------------------------------ backward


def _backward(
    op: Op, inputs: Sequence[Bounded], tensors: Mapping[str, Tensor], gradient: Bounded, dtype: torch.dtype
) -> tuple[list[Bounded], dict[str, Bounded]]:
    """The gradients at an operator's inputs, and at its tensors by name, from the one at its output."""
    own = {name: tensors[name] for name in (f"{op.name}.weight", f"{op.name}.bias") if op.is_layer and name in tensors}
    exact = _pull(op, [each.value for each in inputs], own, gradient.value)
    if not own:
        at = [each.value for each in inputs]
        errors = _pull(op, at, {}, gradient.error)
        sizes = _pull(op, at, {}, gradient.size)
        rounding = gamma(prod(op.kernel) + 2, dtype) if op.kind.endswith("pool") else 0.0  # windows may overlap
        spread = [error + rounding * size for error, size in zip(errors, sizes, strict=True)]
        if op.kind in KINKS:
            spread[0] = spread[0] + _either_side(op, inputs[0]) * gradient.size
        return [Bounded(*pair) for pair in zip(exact, spread, strict=True)], {}
    weights = {name: tensor.abs() for name, tensor in own.items()}
    errors = _pull(op, [inputs[0].size], weights, gradient.error)
    sizes = _pull(op, [inputs[0].size], weights, gradient.size)
    of_input = _pull(op, [inputs[0].error], weights, gradient.value.abs())
    positions = len(gradient.value) * prod(op.shape[1:])
    into = op.out_channels // op.groups * prod(op.kernel)
    counts = [into, *(positions for _ in own)]
    spread = [error + gamma(n, dtype) * size for error, size, n in zip(errors, sizes, counts, strict=True)]
    spread[1] = spread[1] + of_input[1]
    found = [Bounded(*pair) for pair in zip(exact, spread, strict=True)]
    return found[:1], dict(zip(own, found[1:], strict=True))


def _pull(op: Op, inputs: Sequence[Tensor], own: Mapping[str, Tensor], gradient: Tensor) -> list[Tensor]:
    """Gradients at the inputs and then at the tensors, by stock autograd at these values."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    mine = {name: tensor.detach().requires_grad_() for name, tensor in own.items()}
    return list(torch.autograd.grad(reference.apply(op, leaves, mine), [*leaves, *mine.values()], gradient))


def _either_side(op: Op, value: Bounded) -> Tensor:
    """Where a value's error reaches over a kink, so that either slope may be taken: bool of its shape."""
    near = [(value.value - kink).abs() <= value.error for kink in KINKS[op.kind]]
    return torch.stack(near).any(0) & (value.error > 0)


def _at_features(
    loss: Callable[[Tensor], Tensor], features: Bounded, dtype: torch.dtype, loss_dtype: torch.dtype
) -> Bounded:
    """The loss's gradient at the features (N, D): as far off as its curvature times their errors, and one rounding."""
    at = features.value.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    curvature: Tensor = torch.autograd.functional.hessian(loss, features.value, vectorize=True)
    size = features.value.numel()
    moved = features.error + gamma(LOSS, loss_dtype) * features.size
    error = (curvature.reshape(size, size).abs() @ moved.flatten()).reshape(gradient.shape)
    return _rounded(Bounded(gradient, error), gamma(1, dtype) + gamma(LOSS, loss_dtype))


def _rounded(value: Bounded, relative: float) -> Bounded:
    return Bounded(value.value, value.error + relative * value.size)


def _exact(value: Tensor) -> Bounded:
    return Bounded(value, torch.zeros_like(value))
