"""Whatever else torch can export: pure functions of ATen, kept by name and arguments and run by torch.

The arguments are JSON: numbers, texts and lists as they are, and objects for the rest: `{"x": 0}` is the first input,
`{"tensor": "value0", "shape": [...]}` one of the operator's own tensors, `{"numbers": [...], "shape": [...], "dtype":
"int64"}` whole numbers or truth values, `{"batch": 3}` three times the number of samples, `{"float": "inf"}` a number
that JSON has no form for, `{"dtype": "float32"}` a type. `full` is the shape in which a call sees a value, the batch
somewhere in it.

A file may come from anywhere, so only the functions of `PURE` are ever called: tensors in, tensors out, and nothing
that touches files, processes or random state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from stages.errors import UsageError
from stages.operators.op import Keep, Op, Operator, Pull, Reading, Shape, Tensors, keeps_nothing, register

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = (
    "_adaptive_avg_pool3d _log_softmax _softmax _to_copy _upsample_bicubic2d_aa _upsample_bilinear2d_aa "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d abs acos acosh add addbmm addcdiv addcmul addmm addmv addr "
    "affine_grid_generator all amax amin angle any argmax argmin argsort asin asinh atan atan2 atanh avg_pool2d "
    "avg_pool3d baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor bmm bucketize cat cdist ceil celu "
    "channel_shuffle cholesky clamp clamp_max clamp_min clone col2im constant_pad_nd conv3d conv_transpose3d "
    "convolution copysign cos cosh cosine_similarity cummax cummin cumprod cumsum deg2rad diag diag_embed diagonal "
    "digamma dist div dot einsum elu eq erf erfc erfinv exp exp2 expand expm1 fill flip floor floor_divide fmax "
    "fmin fmod frac full_like gather ge gelu glu grid_sampler grid_sampler_2d grid_sampler_3d gt hardshrink "
    "hardsigmoid hardswish hardtanh heaviside huber_loss hypot i0 im2col index index_add index_copy index_fill "
    "index_put index_select isfinite isinf isnan kthvalue le leaky_relu lerp lgamma linalg_cross linalg_matrix_exp "
    "linalg_vector_norm linear log log10 log1p log2 log_sigmoid log_sigmoid_forward logaddexp logaddexp2 "
    "logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_scatter "
    "matmul max max_pool2d_with_indices max_pool3d_with_indices maximum mean median min minimum mish mm mul mv "
    "nan_to_num nansum narrow ne neg norm ones_like pairwise_distance permute pixel_shuffle pixel_unshuffle "
    "polygamma pow prelu prod rad2deg reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 "
    "remainder renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape roll "
    "rot90 round rsqrt rsub scatter scatter_add scatter_reduce select select_scatter selu sgn sigmoid sign silu sin "
    "sinc sinh slice slice_scatter smooth_l1_loss softmax softplus softshrink sort special_entr special_erfcx "
    "special_i0e special_i1 special_i1e special_log_ndtr special_ndtr special_ndtri special_xlog1py special_zeta "
    "sqrt square squeeze stack std std_mean sub sum t take_along_dim tan tanh threshold tile topk trace transpose "
    "tril triu trunc unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean view where xlogy zeros_like "
)
PURE = frozenset(_NAMES.split())
"""Functions of `torch.ops.aten` that may be called, whatever their overload."""

MOST_DEPTH = 6
"""Lists within lists of an argument."""
DTYPES = ("float32", "int64", "bool")
"""What values inside may be; a whole number or a truth value that leaves an operator is held as a float."""


# ------------------------------------------------------------------------------------------------------------- reading


def parsed(op: Op) -> Mapping[str, Any]:
    """The call: `args`, `kwargs`, `full`, `dtype` and `result`. Raises `ValueError` for what is no call."""
    name, _, overload = op["function"].partition(".")
    if name not in PURE or not overload.isidentifier() or overload.startswith("_"):
        raise ValueError(f"function {op['function']!r:.60}, which is none that may be called")
    return _parsed(op["arguments"])


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Mapping[str, Any]:
    call = json.loads(text)
    if not isinstance(call, dict) or set(call) != {"args", "kwargs", "full", "dtype", "result"}:
        raise ValueError(f"{text[:60]!r}, an object of args, kwargs, full, dtype and result is needed")
    kwargs = call["kwargs"]
    if not isinstance(call["args"], list) or not isinstance(kwargs, dict) or call["dtype"] not in DTYPES:
        raise ValueError(f"{text[:60]!r}, args as a list, kwargs by name, dtype of {', '.join(DTYPES)}")
    if type(call["result"]) is not int or not 0 <= call["result"] < 8:
        raise ValueError(f"result {call['result']!r:.20}")
    _check_full(call["full"])
    for part in (*call["args"], *kwargs.values()):
        _check(part, 0)
    return call


FIELDS = {
    "x": {"x", "full", "dtype"}, "tensor": {"tensor", "shape"}, "numbers": {"numbers", "shape", "dtype"},
    "batch": {"batch"}, "float": {"float"}, "dtype": {"dtype"},
}  # fmt: skip


def _check(part: Any, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError("lists too deep")
    if isinstance(part, list):
        for inner in part:
            _check(inner, depth + 1)
    elif isinstance(part, dict):
        kind = next((name for name in FIELDS if name in part), "")
        if not kind or set(part) != FIELDS[kind] or ("dtype" in part and part["dtype"] not in DTYPES):
            raise ValueError(f"{str(part)[:60]}, no form of an argument")
        if kind == "x":
            _check_full(part["full"])
        if "shape" in part and not _sizes(part["shape"]):
            raise ValueError(f"shape {part['shape']!r:.40}")
        if kind == "numbers" and (
            not all(type(n) is int for n in part["numbers"]) or len(part["numbers"]) != prod(part["shape"])
        ):
            raise ValueError("numbers that do not fill their shape")
    elif part is not None and type(part) not in (bool, int, float, str):
        raise ValueError(f"{part!r:.40}, no form of an argument")


def _sizes(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 < n < 2**31 for n in shape)


def _check_full(full: Any) -> None:
    sizes = isinstance(full, list) and len(full) <= 8
    if not sizes or [type(n) for n in full].count(dict) != 1 or not all(_is_size(n) for n in full):
        raise ValueError(f"a shape {full!r:.60}, sizes with the batch once are needed")


def _is_size(n: Any) -> bool:
    n = n["batch"] if isinstance(n, dict) and set(n) == {"batch"} else n
    return type(n) is int and 0 < n < 2**31


def _tensors(op: Op) -> dict[str, Shape]:
    found: dict[str, Shape] = {}

    def collect(part: Any) -> None:
        if isinstance(part, dict) and "tensor" in part:
            found[str(part["tensor"])] = tuple(part["shape"])
        for inner in part if isinstance(part, list) else ():
            collect(inner)

    call = parsed(op)
    collect([*call["args"], *call["kwargs"].values()])
    return found


def _shape(op: Op) -> Shape:
    """As the file says; the engine checks it before it runs the function."""
    call = parsed(op)
    if not op.inputs or op["macs"] < 0:
        raise ValueError(f"{len(op.inputs)} inputs, {op['macs']} MACs")
    inside = [n["batch"] if isinstance(n, dict) else n for n in call["full"]]
    if prod(inside) != prod(op.shape):
        raise ValueError(f"shape {op.shape} of a value {inside}")
    return op.shape


# ------------------------------------------------------------------------------------------------------------- running


def as_captured(x: Tensor, full: Sequence[Any]) -> Tensor:
    """A value (N, ...) in the shape in which the call sees it, the batch where it stands there."""
    axis = next(i for i, n in enumerate(full) if isinstance(n, dict))
    sizes = [n["batch"] * x.shape[0] if isinstance(n, dict) else n for n in full]
    return x.movedim(0, axis).reshape(sizes) if axis else x.reshape(sizes)


def as_samples(x: Tensor, full: Sequence[Any], batch: int, shape: Shape) -> Tensor:
    """The call's result as (N, *shape)."""
    axis = next(i for i, n in enumerate(full) if isinstance(n, dict))
    parted = x.reshape(*x.shape[:axis], batch, x.shape[axis] // batch, *x.shape[axis + 1 :])
    return parted.movedim(axis, 0).reshape(batch, *shape)


def _run(op: Op, inputs: Sequence[Tensor], tensors: Tensors) -> Tensor:
    import torch

    call = parsed(op)
    batch = max(x.shape[0] for x in inputs)
    if inputs[0].device.type != "meta":
        _check_sizes(op, batch)
    inputs = [x if len(x) == batch else x.expand(batch, *x.shape[1:]) for x in inputs]
    dtypes = {"float32": inputs[0].dtype, "int64": torch.int64, "bool": torch.bool}

    def made(part: Any) -> Any:
        if isinstance(part, list):
            return [made(inner) for inner in part]
        if not isinstance(part, dict):
            return part
        if "x" in part:
            x = as_captured(inputs[part["x"]], part["full"])
            return x if part["dtype"] == "float32" else x.round().to(dtypes[part["dtype"]])
        if "tensor" in part:
            tensor = tensors.get(f"{op.owner}.{part['tensor']}")
            return inputs[0].new_empty(part["shape"]) if tensor is None else tensor.to(inputs[0].dtype)
        if "numbers" in part:
            numbers = torch.tensor(part["numbers"], device=inputs[0].device).reshape(part["shape"])
            return numbers.to(dtypes[part["dtype"]])
        if "batch" in part:
            return part["batch"] * batch
        return float(part["float"]) if "float" in part else dtypes[part["dtype"]]

    found = _target(op["function"])(*made(call["args"]), **{name: made(part) for name, part in call["kwargs"].items()})
    found = found[call["result"]] if isinstance(found, list | tuple) else found
    result: Tensor = as_samples(found.to(inputs[0].dtype), call["full"], batch, op.shape)
    return result


def _target(function: str) -> Any:
    import torch

    name, _, overload = function.partition(".")
    found = getattr(getattr(torch.ops.aten, name), overload, None)
    if (
        not isinstance(found, torch._ops.OpOverload)
        or found._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in found.tags
    ):
        raise UsageError(
            "operator", f"function {function!r}", "one that this torch has", "use another version of torch"
        )
    return found


@lru_cache(maxsize=4096)
def _check_sizes(op: Op, batch: int) -> None:
    """Raise `UsageError` unless the function gives what the graph says, before anything of that size is made."""
    import torch

    like = [torch.empty(batch, *shape, device="meta") for shape in op.in_shapes]
    try:
        found = _run(op, like, {})
    except UsageError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UsageError(op.name, f"{op['function']} cannot run: {text}", "arguments that fit") from error
    if found.shape != (batch, *op.shape):
        raise UsageError(op.name, f"{op['function']} gives {tuple(found.shape[1:])}", f"{op.shape}, as the graph says")


# ------------------------------------------------------------------------------------------------------------ backward


def _whole_inputs(op: Op) -> set[int]:
    """Inputs that are read as whole numbers or truth values: no gradient comes by them."""
    found: set[int] = set()

    def collect(part: Any) -> None:
        if isinstance(part, dict) and part.get("dtype") != "float32" and "x" in part:
            found.add(part["x"])
        for inner in part if isinstance(part, list) else ():
            collect(inner)

    call = parsed(op)
    collect([*call["args"], *call["kwargs"].values()])
    return found


def _passes_none(op: Op, wanted: Set[int]) -> bool:
    return parsed(op)["dtype"] != "float32" or wanted <= _whole_inputs(op)


def _keeps(op: Op, wanted: Set[int]) -> Keep:
    """All inputs: the function is run again and differentiated; nothing where no gradient comes through."""
    return keeps_nothing(op, wanted) if _passes_none(op, wanted) else Keep(inputs=tuple(range(len(op.inputs))))


def _pull(op: Op, tensors: Tensors) -> Pull:
    import torch

    from stages.operators.op import Flow, Kept

    whole = _whole_inputs(op)

    def pull(kept: Kept, flow: Flow) -> list[Flow]:
        g = flow.gradient
        zeros = [g.new_zeros(len(g), *shape) for shape in op.in_shapes]
        if len(kept.inputs) < len(op.inputs):
            return [Flow(zero, fresh=True) for zero in zeros]
        leaves = [kept.inputs[i].detach().requires_grad_(i not in whole) for i in range(len(op.inputs))]
        sought = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad():
            output = _run(op, leaves, tensors)
            if not output.requires_grad:
                raise UsageError(op.name, f"{op['function']} has no gradient", "a function that can be differentiated")
            parts = iter(torch.autograd.grad(output, sought, g, allow_unused=True))
        by_input = [next(parts) if leaf.requires_grad else None for leaf in leaves]
        return [Flow(z if part is None else part, fresh=True) for z, part in zip(zeros, by_input, strict=True)]

    return pull


# ---------------------------------------------------------------------------------------------------------------- ONNX

ONNX_NAMES = {
    "erf.default": "Erf", "sin.default": "Sin", "cos.default": "Cos", "tan.default": "Tan", "asin.default": "Asin",
    "acos.default": "Acos", "atan.default": "Atan", "sinh.default": "Sinh", "cosh.default": "Cosh",
    "asinh.default": "Asinh", "acosh.default": "Acosh", "atanh.default": "Atanh", "floor.default": "Floor",
    "ceil.default": "Ceil", "round.default": "Round", "maximum.default": "Max", "minimum.default": "Min",
}  # fmt: skip
"""Functions of activations alone -> ONNX's operator."""


def _onnx(op: Op, w: Any) -> None:
    if op["function"] == "trunc.default":  # ONNX has it as a cast alone
        w.node("Cast", w.inputs(op), w.inner(op, "whole"), to=7)
        w.node("Cast", [w.inner(op, "whole")], w.output(op), to=1)
        return
    kind = ONNX_NAMES.get(op["function"])
    if kind is None or _tensors(op) or len(op.inputs) != len(parsed(op)["args"]):
        w.refuse(op, f"form here of {op['function']}", "an operator of docs/operators.md")
    w.node(kind, w.ranked_inputs(op), w.output(op))


def _read(name: str) -> Reading:
    def rule(node: Any, x: Any, *others: Any) -> Any:
        import torch

        like = next(part for part in (x, *others) if isinstance(part, torch.Tensor))
        found = x if isinstance(x, torch.Tensor) else torch.from_numpy(x)
        if not others:
            return getattr(torch, name)(found)
        for other in others:
            second = node.tensor(other, like)
            if isinstance(second, torch.Tensor):
                found = getattr(torch, name)(found, second)
            else:
                found = found.clamp_min(second) if name == "maximum" else found.clamp_max(second)
        return found

    return Reading(rule)


def _read_einsum(node: Any, *operands: Any) -> Any:
    import torch

    parts = [part if isinstance(part, torch.Tensor) else torch.from_numpy(part) for part in operands]
    return torch.einsum(node.get("equation"), *parts)


def _read_cumsum(node: Any, x: Any, axis: Any) -> Any:
    if node.get("exclusive", 0) or node.get("reverse", 0):
        node.refuse("exclusive, or from the end", "a plain sum")
    return x.cumsum(int(node.number(axis)))


def _read_triangle(node: Any, x: Any, k: Any = None) -> Any:
    shift = 0 if k is None else int(node.number(k))
    return x.triu(shift) if node.get("upper", 1) else x.tril(shift)


def _read_logsumexp(node: Any, x: Any, axes: Any = None) -> Any:
    return x.logsumexp(node.axes(axes, x.ndim), bool(node.get("keepdims", 1)))


def _read_grid_sample(node: Any, x: Any, grid: Any) -> Any:
    from torch.nn import functional as F

    modes = {"bilinear": "bilinear", "linear": "bilinear", "bicubic": "bicubic", "cubic": "bicubic"}
    mode = modes.get(node.get("mode", "bilinear"), "nearest")
    corners = bool(node.get("align_corners", 0))
    return F.grid_sample(x, grid, mode, node.get("padding_mode", "zeros"), corners)


register(
    Operator(
        kind="opaque",
        doc="any other pure function of torch, by name and arguments; run and differentiated by the torch engine",
        arity=(1, 64),
        args={"function": str, "arguments": str, "macs": int},
        tensors=_tensors,
        shape=_shape,
        macs=lambda op: int(op["macs"]),
        keeps=_keeps,
        called=True,
        made_again=lambda op: op["macs"] == 0,
        forward=_run,
        pull=_pull,
        onnx=_onnx,
        aten={},
        from_onnx={
            **{kind: _read(function.partition(".")[0]) for function, kind in ONNX_NAMES.items()},
            "Einsum": Reading(_read_einsum),
            "CumSum": Reading(_read_cumsum, ("-", "-")),
            "Trilu": Reading(_read_triangle, ("-", "-")),
            "ReduceLogSumExp": Reading(_read_logsumexp, ("-", "-")),
            "GridSample": Reading(_read_grid_sample),
        },
    )
)
