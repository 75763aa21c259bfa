"""The user's own state dict beside the graph's tensors: written down at import, so that export needs no code of theirs.

Each entry of the state dict is a row, a JSON object with its `name` and one of

* `tensor`: it is that tensor of the graph; with `start` and `rows` those rows of the entry, `transposed` turned, with
  `shape` in that shape;
* `norm`: it belongs to a BatchNorm, which deploy form folds away. `tensor` names it in batchnorm form; in deploy form
  the BatchNorm changes nothing but what the layer before it cannot hold: weight 1, bias 0, running_var = 1 - eps, and
  running_mean = -(folded bias) where that layer has no bias of its own. One that is a layer itself keeps its weight and
  bias, or has them as statistics where it has no others;
* `gates_of`: the columns `columns` of a recurrent layer's weight, every gate's rows one below the other;
* `length_of` or `direction_of`: the two parts of a weight under torch's weight_norm;
* `also` beside `tensor`: a constant of the graph was computed from the entry as well (an unrolled first step), so it
  can be written only as it was loaded;
* `computed`: the graph's tensor that was computed from it, which cannot be turned back;
* `classifier`: the weight or bias of the layer that the record's head stands for;
* nothing else: the graph does not use it, and it is kept as it was loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.artifacts.records import Array, Model
from stages.errors import UsageError
from stages.graphs.folding import folds_into

if TYPE_CHECKING:
    from torch import nn

    from stages.graphs.capture import Captured

Row = dict[str, Any]

WEIGHT_NORM = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
"""How torch names a weight's lengths and directions, in its older and its newer form."""


def state_rows(
    module: nn.Module, state: Mapping[str, Array], captured: Captured, classifier: str
) -> tuple[tuple[Row, ...], dict[str, Array]]:
    """The rows of a module's state dict with the values `state`, and what must be kept beside the graph's tensors.

    `classifier` is the layer that the record leaves to its head; empty where there is none.
    """
    same = _names_of_one_tensor(module)
    places: dict[str, list[Row]] = {}
    for key, origin in captured.origins.items():
        if origin.trains or state[origin.name].dtype.kind == "f":  # counts and masks stay as they were loaded
            places.setdefault(origin.name, []).append(_placed(captured, key, classifier))
    for (key, start, stop), origin in captured.columns.items():
        places.setdefault(origin.name, []).append(
            {"gates_of": key, "columns": [start, stop], "vector": state[origin.name].ndim == 1}
        )
    normed, doubled = dict(_computed(captured)), _also_constants(captured)
    rows: list[Row] = []
    rest: dict[str, Array] = {}
    for name, array in state.items():
        found = next((places[other] for other in same[name] if other in places), [normed.get(name, {})])
        found = [{**row, "also": True} if name in doubled and "tensor" in row else row for row in found]
        rows += [{"name": name, **row, **_reshaped(row, array, captured)} for row in found]
        if any(
            row.keys().isdisjoint(("tensor", "gates_of")) or "also" in row or row.get("rows", -1) >= 0 for row in found
        ):
            rest[name] = array
    return tuple(rows), rest


def arrays_of(module: nn.Module) -> dict[str, Array]:
    """A module's state dict as arrays of their own."""
    return {name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items()}


def _names_of_one_tensor(module: nn.Module) -> dict[str, list[str]]:
    """Entry -> all entries that are the same tensor, itself first: tied weights, a module under two names."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, value in module.state_dict().items():
        places.setdefault((value.data_ptr(), value.shape, value.stride()), []).append(name)
    return {name: [name, *names] for names in places.values() for name in names}


def _also_constants(captured: Captured) -> frozenset[str]:
    """The entries that a constant of the graph was computed from, beside what they are themselves."""
    constants = (key for key in captured.computed if not captured.graph[key.rpartition(".")[0]].is_layer)
    return frozenset().union(*(captured.computed[key] for key in constants))


def _placed(captured: Captured, key: str, classifier: str) -> Row:
    owner, _, what = key.rpartition(".")
    if owner == classifier:
        return {"classifier": what}
    origin = captured.origins[key]
    extra = {k: v for k, v in asdict(origin).items() if k != "name" and v not in (0, -1, False)}
    row: Row = {"tensor": key, **extra}
    op = captured.graph[owner]
    if op.operator.statistics:
        layer = folds_into(captured.graph, op)
        own = bool(layer) and captured.graph[layer].bias
        row["norm"] = {"what": what, "eps": op["eps"], "layer": layer, "bias": own}
    return row


def _reshaped(row: Row, array: Array, captured: Captured) -> Row:
    """The shape of an entry that the graph holds in another: a class token (1, 1, D) as (D,)."""
    if "tensor" not in row or "rows" in row:
        return {}
    held = tuple(captured.tensors[row["tensor"]].shape)
    held = held[::-1] if row.get("transposed") else held
    return {} if held == array.shape else {"shape": list(array.shape)}


def _computed(captured: Captured) -> Iterator[tuple[str, Row]]:
    """The entries that weights of layers were computed from."""
    for key, sources in captured.computed.items():
        if not captured.graph[key.rpartition(".")[0]].is_layer:
            continue
        ends = next((ends for ends in WEIGHT_NORM if all(name.endswith(ends) for name in sources)), ())
        for name in sorted(sources):
            if len(sources) == 2 and ends:
                yield name, {"length_of" if name.endswith(ends[0]) else "direction_of": key}
            else:
                yield name, {"computed": key}


def trained_keys(model: Model) -> frozenset[str]:
    """The graph's tensors that stand for parameters of the user's; buffers and statistics are none."""
    kinds = ("tensor", "length_of", "gates_of")
    return frozenset(row[k] for row in model.state for k in kinds if k in row and row.get("trains", k != "tensor"))


def user_state(model: Model, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The state dict under the user's own names, without the classifier.

    `tensors` are the graph's, of a model in either form.

    Raises:
        UsageError: trained values that the user's entries cannot hold.
    """
    state: dict[str, Array] = {}
    for row in model.state:
        name = row["name"]
        if "classifier" in row:
            continue
        if "norm" in row and model.form == "deploy":
            state[name] = _norm_entry(row, tensors, model)
        elif "tensor" in row:
            _put(state, row, tensors[row["tensor"]], model)
            if "also" in row and not np.array_equal(state[name], model.rest[name]):
                found = "a trained weight of which the graph also holds a constant, such as an unrolled first step"
                raise UsageError(name, found, "the values that were loaded", "export to .onnx instead")
        elif "gates_of" in row:
            gates = _gates(tensors[row["gates_of"]], *row["columns"])
            state[name] = gates.reshape(-1) if row["vector"] else gates
        elif "length_of" in row:
            state[name] = _lengths(tensors[row["length_of"]], model.rest[name])
        elif "direction_of" in row:
            state[name] = tensors[row["direction_of"]]
        else:
            state[name] = model.rest[name]
    return state


def _put(state: dict[str, Array], row: Row, value: Array, model: Model) -> None:
    value = value.T if row.get("transposed") else value
    if row.get("rows", -1) < 0:
        value = value.reshape(row["shape"]) if "shape" in row else value
        if not np.array_equal(state.setdefault(row["name"], value), value):
            found = "a weight that two layers use in different forms, trained in one"
            raise UsageError(row["name"], found, "the same values in both", "export to .onnx instead")
        return
    whole = state.setdefault(row["name"], np.array(model.rest[row["name"]]))
    start = row.get("start", 0)
    whole[start : start + row["rows"]] = value


def _gates(weight: Array, start: int, stop: int) -> Array:
    """Columns of a recurrent layer's weight (H, columns, gates) as torch has them: (gates * H, columns)."""
    rows = np.moveaxis(weight[:, start:stop], 2, 0).reshape(-1, stop - start)
    return np.ascontiguousarray(rows)


def _lengths(weight: Array, like: Array) -> Array:
    """weight_norm's g: the Euclidean norm over the axes along which `like`, the loaded one, has a single entry."""
    axes = tuple(axis for axis in range(weight.ndim) if like.ndim == 0 or like.shape[axis] == 1)
    squares: Array = (weight.astype(np.float64) ** 2).sum(axes, keepdims=True)
    return np.asarray(np.sqrt(squares).reshape(like.shape), weight.dtype)


def _norm_entry(row: Row, tensors: Mapping[str, Array], model: Model) -> Array:
    """What a BatchNorm's entry holds in deploy form."""
    norm, owner = row["norm"], row["tensor"].rpartition(".")[0]
    alone = f"{owner}.weight" in tensors
    if alone and norm["what"] in ("weight", "bias"):
        return tensors[row["tensor"]]
    if alone and not {f"{owner}.weight", f"{owner}.bias"} <= {other.get("tensor") for other in model.state}:
        return _statistic(norm, owner, tensors)
    size = len(tensors[f"{owner}.weight"] if alone else tensors[f"{norm['layer']}.bias"])
    shift = np.zeros(size, np.float32) if alone or norm["bias"] else -tensors[f"{norm['layer']}.bias"]
    fill = {"weight": 1.0, "bias": 0.0, "running_var": 1.0 - norm["eps"]}
    return shift if norm["what"] == "running_mean" else np.full(size, fill[norm["what"]], np.float32)


def _statistic(norm: Row, owner: str, tensors: Mapping[str, Array]) -> Array:
    """A scale and shift as the statistics of a BatchNorm that has nothing else. Raises `UsageError` for others."""
    scale, shift = (tensors[f"{owner}.{what}"].astype(np.float64) for what in ("weight", "bias"))
    if not (scale > 0).all() or (scale**-2 < norm["eps"]).any():
        fix = "affine=True, or export to .onnx"
        raise UsageError(owner, "BatchNorm without weight and bias cannot hold what was trained", "", fix)
    found: Array = -shift / scale if norm["what"] == "running_mean" else scale**-2 - norm["eps"]
    return found.astype(np.float32)


def from_state(captured: Captured, state: Mapping[str, Array]) -> dict[str, Array]:
    """The graph's tensors from a state dict of the captured module; what was computed there stays as it was."""
    found = {key: tensor.detach().cpu().numpy() for key, tensor in captured.tensors.items()}
    for key, origin in captured.origins.items():
        whole = state[origin.name]
        part = whole if origin.rows < 0 else whole[origin.start : origin.start + origin.rows]
        part = np.ascontiguousarray(part.T if origin.transposed else part, found[key].dtype)
        found[key] = part.reshape(found[key].shape)
    for (key, start, stop), origin in captured.columns.items():
        hidden, _, gates = found[key].shape
        rows = state[origin.name].reshape(gates, hidden, stop - start)
        whole = found[key] = np.array(found[key])
        whole[:, start:stop] = np.moveaxis(rows, 0, 2)
    return found
