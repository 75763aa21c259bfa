"""From a captured ATen call that the table has no kind for to an `opaque` operator (`operators.opaque`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stages.operators import Op
from stages.operators.opaque import DTYPES

if TYPE_CHECKING:
    from stages.graphs.calls import Call, Value

MOST_NUMBERS = 65536
"""Whole numbers of one constant that are written into the call."""
LEFT_OUT = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
"""Arguments that say where a tensor lies."""


def opaque_call(call: Call, args: Sequence[Any], kwargs: Any) -> Any:
    """The operator, or one for each of several results. Refuses what is no pure function of real numbers."""
    target = call.node.target
    tags = set(target.tags)
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in tags or target.namespace != "aten":
        call.refuse(f"operator {call.written()}", "a pure function of the input")
    writing = _Writing(call)
    named = {name: part for name, part in kwargs.items() if name not in LEFT_OUT}
    content = {"args": [writing.of(part) for part in args], "kwargs": {k: writing.of(v) for k, v in named.items()}}
    results, macs = _tried(call, args, named)
    several = isinstance(results, list | tuple)
    found = []
    for number, result in enumerate(results if several else [results]):
        dtype = _dtype(call, result.dtype)
        full = tuple(result.shape)
        text = json.dumps(
            {**content, "full": call.marked(full), "dtype": dtype, "result": number}, separators=(",", ":")
        )
        shape = call.per_sample(full)
        value = call.emit(
            "opaque", writing.values, own=writing.own, called=call.name.partition(".")[0], out_shape=shape,
            function=call.name, arguments=text, macs=macs,
        )  # fmt: skip
        found.append(value._replace(full=full, dtype=dtype))
    return found if several else found[0]


def _tried(call: Call, args: Sequence[Any], kwargs: Any) -> tuple[Any, int]:
    """What the call gives, without numbers, and its MACs per sample where torch's counter knows them."""
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            results = call.node.target(
                *call.like(args), **{name: call.like([part])[0] for name, part in kwargs.items()}
            )
    except Exception as error:  # whatever a function makes of tensors without numbers
        text = " ".join(str(error).split())[:120]
        call.refuse(f"operator {call.written()}: {text}", "one of docs/operators.md, or a function of fixed sizes")
    parts = results if isinstance(results, list | tuple) else [results]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        call.refuse(f"operator {call.written()}", "tensors as results")
    return results, counter.get_total_flops() // (2 * call.batch)


def _dtype(call: Call, dtype: torch.dtype) -> str:
    if dtype.is_complex:
        call.refuse(f"complex numbers ({call.written()})", "real ones")
    return "float32" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int64"


def notes_on(ops: Sequence[Op]) -> tuple[str, ...]:
    """What a user should know of the opaque operators of a graph."""
    called = [op for op in ops if op.operator.called]
    if not called:
        return ()
    named = ", ".join(f"{op.name} ({_function(op)})" for op in called)
    uncounted = sorted({_function(op) for op in called if _uncounted(op)})
    notes: tuple[str, ...] = (f"no kind of the table, so the torch engine alone runs the model: {named}",)
    holding = [op.name for op in called if op.tensors]
    notes += (f"no plan trains the tensors that {', '.join(holding)} reads",) if holding else ()
    unknown = f"torch's counter knows no MACs of {', '.join(uncounted)}: counted as none"
    return (*notes, unknown) if uncounted else notes


def _function(op: Op) -> str:
    name: str = op["function"].partition(".")[0]
    return name


def _uncounted(op: Op) -> bool:
    name, _, overload = op["function"].partition(".")
    return not op["macs"] and torch.Tag.pointwise not in getattr(getattr(torch.ops.aten, name), overload).tags


class _Writing:
    """Arguments as JSON, and what they refer to."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.values: list[Value] = []
        self.own: dict[str, Any] = {}

    def of(self, part: Any) -> Any:
        call = self._call
        if call.is_value(part):
            if part.op not in [value.op for value in self.values]:
                self.values.append(part)
            number = [value.op for value in self.values].index(part.op)
            return {"x": number, "full": call.marked(part.full), "dtype": part.dtype}
        if hasattr(part, "tensor"):
            return self._constant(part)
        if isinstance(part, list | tuple):
            return [self.of(inner) for inner in part]
        if isinstance(part, bool) or part is None or isinstance(part, str):
            return part
        if isinstance(part, int):
            return {"batch": part // call.batch} if part and part % call.batch == 0 else part
        if isinstance(part, float):
            return part if isfinite(part) else {"float": repr(part)}
        if isinstance(part, torch.dtype):
            return {"dtype": _dtype(call, part)}
        return call.refuse(f"{call.written()} with {part!r:.40}", "numbers and tensors")

    def _constant(self, part: Any) -> Any:
        tensor: Tensor = part.tensor
        shape = list(tensor.shape)
        if 0 in shape or len(shape) > 8:
            self._call.refuse(f"{self._call.written()} with a constant {tuple(shape)}", "one that is not empty")
        if tensor.is_floating_point():
            name = f"value{len(self.own)}"
            self.own[name] = part
            return {"tensor": name, "shape": shape}
        if tensor.numel() > MOST_NUMBERS or tensor.is_complex():
            self._call.refuse(f"{self._call.written()} with {tensor.numel()} numbers", f"at most {MOST_NUMBERS}")
        dtype = DTYPES[2] if tensor.dtype == torch.bool else DTYPES[1]
        return {"numbers": [int(n) for n in tensor.flatten().tolist()], "shape": shape, "dtype": dtype}
