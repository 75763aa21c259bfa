"""The schema of EdgeTrain's records: one table, checked on write and on read.

Datasets are listed with dtype, dimensions and unit. A dimension letter stands for a size: within one group, equal
letters must have equal sizes. `*` is any number of further dimensions. Text is fixed-width UTF-8 (`S`). Names that the
table does not know are carried through untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.artifacts.records import Group
from stages.errors import SchemaError

VERSION = 2
"""Written as attribute `schema`; a reader takes lower ones and refuses a higher one.

2: runs carry their graph (`/model/graph`, `/model/state`, `/model/rest`); blocks say how their samples were prepared
and of which file each came (`prepared`, `source`), labels may be -1.
"""


@dataclass(frozen=True)
class Column:
    """One dataset: allowed dtypes (numpy codes joined by `|`), dimensions and unit."""

    dtype: str
    dims: tuple[str, ...]
    doc: str
    unit: str = ""
    required: bool = True


@dataclass(frozen=True)
class Attr:
    """One attribute. Types: str, int, float, ints, floats, json (JSON as text)."""

    type: str
    doc: str
    required: bool = True


@dataclass(frozen=True)
class Table:
    """One group: its attributes and datasets; `others` says what datasets of further names must be."""

    attrs: Mapping[str, Attr] = field(default_factory=dict)
    arrays: Mapping[str, Column] = field(default_factory=dict)
    others: Column | None = None
    required: bool = False


_ROOT = {
    "edgetrain": Attr("str", "kind of record: `run` or `block`"),
    "schema": Attr("int", "version of this schema"),
}

RUN: Mapping[str, Table] = {
    "": Table(_ROOT, required=True),
    "model": Table(
        {
            "arch": Attr("str", "where the graph came from: a registry name, package.module:factory or a file"),
            "arch_args": Attr("json", "arguments of the architecture"),
            "form": Attr("str", "`batchnorm` (as captured) or `deploy` (BatchNorm folded)"),
            "version": Attr("int", "number of updates since the run began"),
        },
        required=True,
    ),
    "model/input": Table(
        {
            "kind": Attr("str", "`image`, `sound`, `signal`, `features` or `tokens`"),
            "shape": Attr("ints", "input of the model: C, H, W or 1, frames, bands or C, T or D"),
            "scale": Attr("floats", "per channel: model input = raw * scale + offset"),
            "offset": Attr("floats", "per channel"),
            "crop": Attr("float", "images: share of the resized shorter side that is cut out", required=False),
            "interpolation": Attr("str", "images: `bilinear` (without it) or `bicubic`", required=False),
            "sample_rate_hz": Attr("int", "sound: samples per second", required=False),
            "window_samples": Attr("int", "sound: length of an analysis window", required=False),
            "hop_samples": Attr("int", "sound: distance between windows", required=False),
            "prepared": Attr("json", "how the samples it learnt from were made of their files", required=False),
        },
        required=True,
    ),
    "model/tensors": Table(others=Column("f4|f8|i8", ("*",), "one tensor of the model"), required=True),
    "model/graph": Table(
        arrays={
            "operator": Column("S", ("O",), "one JSON object per operator, in execution order"),
            "block": Column("S", ("B",), "names of the blocks, in order", required=False),
        }
    ),
    "model/state": Table(
        arrays={"entry": Column("S", ("E",), "one JSON object per entry of the user's own state dict")}
    ),
    "model/rest": Table(
        others=Column("f4|f8|f2|i8|i4|i2|i1|u1|b1", ("*",), "an entry of the state dict that the graph does not use")
    ),
    "model/head": Table(
        {
            "kind": Attr("str", "`prototypes` (scale * cosine) or `linear`"),
            "scale": Attr("float", "cosine scale"),
        },
        {
            "labels": Column("i8", ("C",), "class label of each row, ascending"),
            "weight": Column("f4", ("C", "D"), "class means, or rows of the linear classifier"),
            "bias": Column("f4", ("C",), "bias of each row"),
            "known": Column("u1", ("C",), "1 where the row has met its class"),
            "names": Column("S", ("C",), "class names", required=False),
        },
    ),
    "profile": Table(
        arrays={"layer": Column("S", ("L",), "stable layer name")},
        others=Column("f8|i8|S", ("L",), "a cost per layer; the unit is in the name"),
    ),
    "scores": Table(
        {"criterion": Attr("str", "what `score` is")},
        {
            "layer": Column("S", ("L",), "inspected layers in execution order"),
            "score": Column("f8", ("L",), "what the planner maximises"),
            "fisher": Column("f8", ("L",), "Fisher potential of the layer (TinyTrain section 2.2)"),
            "output_channels": Column("i8", ("L",), "how many entries of output_fisher belong to the layer"),
            "output_fisher": Column("f4", ("T",), "Fisher information per output channel, layers one after another"),
            "input_channels": Column("i8", ("L",), "how many entries of input_fisher belong to the layer"),
            "input_fisher": Column("f4", ("U",), "Fisher information per input channel, layers one after another"),
        },
    ),
    "plan": Table(
        {
            "name": Attr("str", "selector or named plan"),
            "memory_bytes": Attr("int", "cost of the plan by the memory model"),
            "memory_model": Attr("str", "`paper`, `saved`, `peak` or `arena`"),
            "backward_macs": Attr("int", "multiply-accumulates of one backward pass per sample"),
        },
        {
            "layer": Column("S", ("P",), "layers that train or end the gradient, in execution order"),
            "axis": Column("S", ("P",), "`output` or `input`: what `channels` counts"),
            "axis_channels": Column("i8", ("P",), "channels of the layer along the axis"),
            "channel_count": Column("i8", ("P",), "how many entries of `channels` belong to the layer"),
            "channels": Column("i8", ("K",), "live channels, layers one after another, ascending in each"),
            "bias_count": Column("i8", ("P",), "how many entries of `bias` belong to the layer"),
            "bias": Column("i8", ("B",), "output channels whose bias trains"),
            "detached": Column("u1", ("P",), "1 where the layer passes no gradient on to its input", required=False),
        },
    ),
    "history": Table(arrays={"step": Column("S", ("H",), "one JSON object per stage, oldest first")}),
}

BLOCK: Mapping[str, Table] = {
    "": Table(
        {
            **_ROOT,
            "layout": Attr(
                "str", "axes of x: NHW, NHWC, NCHW, NT (sound), NTC, NCT (signals) or ND (features)", required=False
            ),
            "round": Attr("int", "round of the streaming pipeline, from 0", required=False),
            "end": Attr("int", "present in the closing block only: number of rounds in the stream", required=False),
            "prepared": Attr(
                "json",
                "how samples were made of their files: of (pictures, recordings, arrays), size (height, width), fit, "
                "colour, invert, dtype, scale, seconds, shape, layout; what is left out was not done",
                required=False,
            ),
            "sample_rate_hz": Attr("float", "sound and signals: samples per second", required=False),
        },
        {
            "x": Column("u1|i2|f4", ("N", "*"), "samples"),
            "y": Column("i8", ("N",), "class labels; -1: no label yet"),
            "source": Column("S", ("N",), "file that the sample came from", required=False),
            "index": Column("i8", ("N",), "position in the stream", required=False),
            "score": Column("f4", ("N",), "value given by a strategy", required=False),
            "weight": Column(
                "f4", ("N",), "importance weight: the block's loss is the sum of weight * loss", required=False
            ),
            "seen": Column("i8", ("C",), "samples per class in the window", "samples", required=False),
            "classes": Column("S|i8", ("C",), "class names, or class labels", required=False),
            "labels": Column(
                "i8", ("C",), "class labels, where `classes` are names and labels are not 0..C-1", required=False
            ),
        },
        required=True,
    ),
    "per_class": Table(others=Column("f4|f8|i8|u1", ("C",), "one value per class")),
}

SCHEMAS: Mapping[str, Mapping[str, Table]] = {"run": RUN, "block": BLOCK}


def check(kind: str, root: Group, where: str = "") -> None:
    """Check a record's tree against the table; values of unknown name pass.

    Raises:
        SchemaError: a required group, dataset or attribute is missing, or one has the wrong type or shape.
    """
    for path, table in SCHEMAS[kind].items():
        group = descend(root, path)
        if group is None:
            if table.required:
                raise SchemaError(
                    f"{where}/{path}", "no such group", f"a {kind} record's /{path}", "was it written by `edgetrain`?"
                )
            continue
        _check_attrs(table, group, f"{where}/{path}")
        _check_arrays(table, group, f"{where}/{path}".rstrip("/"))


def descend(root: Group, path: str) -> Group | None:
    """The sub-group at a slash-separated path, or None."""
    group: Group | None = root
    for name in filter(None, path.split("/")):
        group = group.groups.get(name) if group is not None else None
    return group


def leftover(kind: str, root: Group) -> Group:
    """What of a record's tree the table does not know, in the same places: carried through untouched."""
    return _unknown(SCHEMAS[kind], root, "")


def _unknown(tables: Mapping[str, Table], group: Group, path: str) -> Group:
    table = tables.get(path, Table())
    open_arrays = path in tables and table.others is not None
    groups = {}
    for name, child in group.groups.items():
        below = f"{path}/{name}".lstrip("/")
        if below == "metrics":
            continue
        rest = _unknown(tables, child, below)
        if below not in tables or rest.attrs or rest.arrays or rest.groups:
            groups[name] = rest
    arrays = {} if open_arrays else {n: a for n, a in group.arrays.items() if n not in table.arrays}
    free_attrs = path in FREE_ATTRS
    attrs = {} if free_attrs else {n: a for n, a in group.attrs.items() if n not in table.attrs}
    return Group(attrs, arrays, groups)


FREE_ATTRS = frozenset({"profile", "plan", "model/tensors", "model/rest"})
"""Groups whose further attributes are part of the record itself (totals, facts, 0-d tensors)."""

_ATTR_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "json": (str,),
    "int": (int, np.integer),
    "float": (float, int, np.floating, np.integer),
}


def _check_attrs(table: Table, group: Group, where: str) -> None:
    for name, attr in table.attrs.items():
        if name not in group.attrs:
            if attr.required:
                raise SchemaError(f"{where}@{name}", "no such attribute", attr.doc)
            continue
        value = group.attrs[name]
        if attr.type in ("ints", "floats"):
            kinds = "iu" if attr.type == "ints" else "iuf"
            fits = np.asarray(value).ndim == 1 and np.asarray(value).dtype.kind in kinds
        else:
            fits = isinstance(value, _ATTR_TYPES[attr.type]) and not isinstance(value, bool)
        if not fits:
            raise SchemaError(f"{where}@{name}", f"{type(value).__name__} {value!r:.60}", f"{attr.type}: {attr.doc}")


def _check_arrays(table: Table, group: Group, where: str) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for name, column in table.arrays.items():
        if name in group.arrays:
            _check_array(f"{where}/{name}", group.arrays[name], column, sizes)
        elif column.required:
            raise SchemaError(f"{where}/{name}", "no such dataset", f"{column.dtype} ({', '.join(column.dims)})")
    if table.others is not None:
        for name in group.arrays.keys() - table.arrays.keys():
            _check_array(f"{where}/{name}", group.arrays[name], table.others, sizes)


def _check_array(where: str, array: Any, column: Column, sizes: dict[str, tuple[int, str]]) -> None:
    code = "S" if array.dtype.kind == "S" else array.dtype.str[1:]
    shape, dims = tuple(array.shape), column.dims
    fixed = dims[:-1] if dims[-1] == "*" else dims
    expected = f"{column.dtype} ({', '.join(dims)})"
    if code not in column.dtype.split("|") or len(shape) < len(fixed) or (fixed == dims and len(shape) != len(dims)):
        raise SchemaError(where, f"{array.dtype} {shape}", expected)
    for letter, size in zip(fixed, shape, strict=False):
        known, other = sizes.setdefault(letter, (size, where))
        if known != size:
            raise SchemaError(where, f"{array.dtype} {shape}", f"{expected} with {letter}={known} from {other}")
