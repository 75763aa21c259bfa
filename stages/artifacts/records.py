"""What stages exchange, as frozen values: a `Run` (what is known) and `Block`s (batches of samples).

Records are plain numpy and Python values; how they lie in HDF5 is `schema.py` and `hdf5.py`'s business. Every record
class maps to one group of the schema, field by field.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stages.errors import DataError, SchemaError

Array: TypeAlias = NDArray[Any]
Json: TypeAlias = Any


class Samples(Protocol):
    """What `Block.x` must offer: a numpy array, or a dataset of a regular file that is read slice by slice."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Group:
    """A node of an artifact: attributes, datasets and sub-groups. The neutral form between records and HDF5."""

    attrs: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------- how samples were prepared

PREPARED_FROM = ("", "pictures", "recordings", "arrays")
"""What samples can have been made from; empty where nobody has said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """How samples were brought from their files into a block: what further samples for the same model need too.

    It travels with blocks, enters `/model/input` where a model has learnt from them, and is repeated on whatever files
    the model is then given.
    """

    of: str = ""
    """`pictures`, `recordings` or `arrays` (tables too); empty where nobody has said."""
    size: tuple[int, int] | None = None
    """Pictures: height and width in pixels; None left each at its own."""
    fit: str = "stretch"
    """Pictures: how they came to their size: stretch, crop or pad."""
    colour: str = ""
    """Pictures: gray or rgb."""
    invert: bool = False
    """uint8: 255 - value."""
    dtype: str = ""
    """The type that the values were given; empty kept theirs."""
    scale: float = 1.0
    """Factor on every value, before they took that type."""
    sample_rate_hz: int = 0
    """Recordings and signals: samples per second; 0 where it is not known."""
    seconds: float = 0.0
    """Recordings: the length to which they were cut or filled up; 0 left them as long as they are."""
    shape: tuple[int, ...] | None = None
    """Arrays: the shape that flat samples were given."""
    layout: str = ""
    """Arrays: the layout that was stated for them."""

    def __post_init__(self) -> None:
        if self.of not in PREPARED_FROM:
            raise SchemaError("prepared", f"of {self.of!r}", "one of " + ", ".join(PREPARED_FROM[1:]))

    def conflict(self, other: Preparation, *, grey: bool = False) -> tuple[str, str] | None:
        """What the two do differently to the same file, as words for each; None where they agree or nobody can tell.

        Sizes and lengths may differ, since a model's input adapter brings them to its own; colours too where it is
        `grey` that the model reads.
        """
        rates = self.sample_rate_hz, other.sample_rate_hz
        if all(rates) and rates[0] != rates[1]:
            return f"{rates[0]} samples per second", f"{rates[1]}"
        if not self.of == other.of == "pictures":
            return None
        if self.invert != other.invert:
            return ("inverted pictures", "as they are") if self.invert else ("pictures as they are", "inverted")
        if self.size and other.size and self.fit != other.fit:
            return f"pictures brought to their size by {self.fit}", f"by {other.fit}"
        if not grey and self.colour and other.colour and self.colour != other.colour:
            return f"pictures packed with --colour {self.colour}", f"--colour {other.colour}"
        return None


def check_labelled(y: Array, where: str) -> None:
    """Raise `DataError` where samples have no label yet (y = -1): for whatever learns or counts by class."""
    missing = int(np.sum(np.asarray(y) < 0))
    if missing:
        fix = "label them, or leave them out: `edgetrain pack --where 'class!=-1'`"
        raise DataError(where, f"{missing} of {len(y)} samples have no label (y = -1)", "a class for each", fix)


# ---------------------------------------------------------------------------------------------------- the run record


INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class InputSpec:
    """The input adapter: how raw samples become the model's input.

    `kind` is `image` (shape C, H, W), `sound` (1, frames, mel bands), `signal` (C, T), `features` (D,) or `tokens`
    (L,), the numbers of an embedding's entries. After conversion to float32, channel c becomes value * scale[c] +
    offset[c]; a single entry stands for all channels.
    """

    kind: str
    shape: tuple[int, ...]
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    sample_rate_hz: int = 0
    """Sound only: samples per second of the recordings."""
    window_samples: int = 0
    """Sound only: length of one analysis window."""
    hop_samples: int = 0
    """Sound only: distance between windows."""
    prepared: Preparation | None = None
    """How the samples that the model learnt from had been prepared."""
    crop: float = 0.0
    """Images: the shorter side becomes that of the model divided by this, and the middle is cut out; 0: both sides are
    brought to the model's, whatever the picture's proportions."""
    interpolation: str = "bilinear"
    """Images: `bilinear` or `bicubic`, both with antialiasing where they shrink."""

    def __post_init__(self) -> None:
        ranks = {"image": 3, "sound": 3, "signal": 2, "features": 1, "tokens": 1}
        if self.kind not in ranks:
            raise SchemaError("/model/input", f"kind {self.kind!r}", "one of " + ", ".join(ranks))
        if len(self.shape) != ranks[self.kind] or min(self.shape) < 1:
            raise SchemaError("/model/input", f"shape {self.shape}", f"{ranks[self.kind]} sizes > 0 for {self.kind}")
        if not (self.crop == 0 or 0.1 <= self.crop <= 1) or self.interpolation not in INTERPOLATIONS:
            found = f"crop {self.crop}, interpolation {self.interpolation!r:.40}"
            raise SchemaError("/model/input", found, f"0, or 0.1 to 1; {' or '.join(INTERPOLATIONS)}")


@dataclass(frozen=True)
class Head:
    """What turns features (N, D) into class scores (N, C).

    `linear`: features @ weight.T + bias. `prototypes`: scale * cosine(features, weight), the rows being class means.
    A linear row whose `known` is False has not been imprinted yet: nobody has seen the class.
    """

    kind: str
    labels: Array
    """int64 (C,): the class labels of the rows, ascending."""
    weight: Array
    """float32 (C, D)."""
    bias: Array
    """float32 (C,); zeros for prototypes."""
    known: Array
    """bool (C,)."""
    names: tuple[str, ...] | None = None
    scale: float = 10.0
    """Cosine scale (PMF's initial value, arXiv:2204.07305); unused by `linear`."""


@dataclass(frozen=True)
class Model:
    """A backbone with its weights, its input adapter and, once it has met classes, its head."""

    arch: str
    """A registry name, or `package.module:factory`."""
    arch_args: Mapping[str, Json]
    input: InputSpec
    form: str
    """`batchnorm` (as it was captured) or `deploy` (BatchNorm folded)."""
    tensors: Mapping[str, Array]
    """`<operator>.<what>` of the graph; without a graph in batchnorm form (schema 1) the architecture's state dict."""
    head: Head | None = None
    version: int = 0
    """Number of updates since the run began; train-sparse counts it up."""
    graph: Group | None = None
    """The tree of `/model/graph` (`graphs.record`); None in records of schema 1."""
    state: tuple[Json, ...] = ()
    """How the user's own state dict is made of the tensors, one object per entry (`models.state`)."""
    rest: Mapping[str, Array] = field(default_factory=dict)
    """Entries of that state dict that the graph does not use, as they were loaded."""


@dataclass(frozen=True)
class Profile:
    """Cost per layer and of the whole model; the columns of `columns` have one entry per layer, in execution order."""

    layer: tuple[str, ...]
    columns: Mapping[str, Array]
    """Names carry the unit: parameters, macs, input_gradient_macs, weight_gradient_macs, input_bytes, ..."""
    totals: Mapping[str, Any]
    """Scalars: totals, peak buffer, and the conditions of measurement (threads, repeats) where it was measured."""


@dataclass(frozen=True)
class Scores:
    """Importance of layers and channels for one task (TinyTrain Eq. 2 and 3)."""

    criterion: str
    layer: tuple[str, ...]
    score: Array
    """float64 (L,): what the planner maximises, by `criterion`."""
    fisher: Array
    """float64 (L,): Fisher potential of the layer, the sum over its output channels."""
    output_fisher: tuple[Array, ...]
    """Per layer float32 (C_out,): Fisher information of each output channel."""
    input_fisher: tuple[Array, ...]
    """Per layer float32 (C_in,): Fisher information of each input channel."""


@dataclass(frozen=True)
class LayerUpdate:
    """What trains in one layer."""

    layer: str
    axis: str
    """`output` or `input`: which channels `channels` counts. A depthwise layer's channels are both."""
    channels: tuple[int, ...]
    """Live channels along the axis, ascending; empty when only biases train."""
    axis_channels: int
    """How many channels the layer has along the axis."""
    bias: tuple[int, ...] = ()
    """Output channels whose bias trains, ascending."""
    detached: bool = False
    """The layer passes no gradient on to its input. It may do so without anything of its own that trains."""

    @property
    def trains(self) -> bool:
        """Whether anything is live here."""
        return bool(self.channels or self.bias)

    @property
    def ratio(self) -> float:
        """Share of the channels that are live."""
        return len(self.channels) / self.axis_channels


def detached_layers(updates: Iterable[LayerUpdate]) -> frozenset[str]:
    """The layers that pass no gradient on."""
    return frozenset(update.layer for update in updates if update.detached)


@dataclass(frozen=True)
class Plan:
    """Which layers and channels train, and what that costs under the budgets it was made for."""

    name: str
    """The selector or the named plan: `greedy`, `knapsack`, `last-layer`, `mcunet-99kb`, ..."""
    updates: tuple[LayerUpdate, ...]
    """In execution order, at most one per layer."""
    memory_bytes: int
    memory_model: str
    backward_macs: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Scalars worth keeping: budgets, score reached, optimum's score, predicted latency."""

    def __getitem__(self, layer: str) -> LayerUpdate:
        return next(update for update in self.updates if update.layer == layer)

    @property
    def live(self) -> tuple[LayerUpdate, ...]:
        """The updates without those that only end the gradient."""
        return tuple(update for update in self.updates if update.trains)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that train."""
        return tuple(update.layer for update in self.live)


@dataclass(frozen=True)
class Step:
    """One entry of the history: which stage ran, with what. No clock, no host name."""

    command: str
    version: str
    arguments: Mapping[str, Json]
    seed: int | None
    inputs: Mapping[str, str]
    """Base name -> SHA-256 of the run record and of each named file."""


@dataclass(frozen=True)
class Run:
    """What is known about one training run; each stage adds its part and forwards the rest."""

    model: Model
    profile: Profile | None = None
    scores: Scores | None = None
    plan: Plan | None = None
    metrics: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    """Stage -> column -> float64 (T,). Columns of one stage have one length."""
    history: tuple[Step, ...] = ()
    extra: Group = field(default_factory=Group)
    """Attributes, datasets and groups of unknown name, carried through untouched."""

    def with_metrics(self, stage: str, columns: Mapping[str, Any]) -> Run:
        """The run with `columns` as that stage's metrics."""
        table = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
        return replace(self, metrics={**self.metrics, stage: table})


# -------------------------------------------------------------------------------------------------- the block record

LAYOUTS: Mapping[str, int] = MappingProxyType({"NHW": 3, "NHWC": 4, "NCHW": 4, "NT": 2, "NTC": 3, "NCT": 3, "ND": 2})
"""Meaning of a block's axes -> rank. NT is sound or one signal over time, NTC and NCT several, ND a feature vector."""


@dataclass(frozen=True)
class Block:
    """A batch of samples.

    `columns` has one entry per sample (index, score, weight, group, ...), `per_class` one per class (seen,
    allocation, ...), `facts` are scalars (variance, strategy, ...). Unknown names in any of them are carried through.
    """

    x: Samples
    """uint8, int16 or float32 (N, ...)."""
    y: Array
    """int64 (N,): class labels, or -1 where there is none yet."""
    layout: str
    columns: Mapping[str, Array] = field(default_factory=dict)
    labels: Array | None = None
    """int64 (C,), ascending: the classes that `per_class` counts and `names` names."""
    names: tuple[str, ...] | None = None
    per_class: Mapping[str, Array] = field(default_factory=dict)
    round: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    extra: Group = field(default_factory=Group)
    prepared: Preparation | None = None
    """How the samples came from their files; None where nobody has said."""

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Array | slice) -> Block:
        """The block with only these rows (indices, mask or slice); a slice of a file stays on disk only until here."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        x = self.x[rows] if isinstance(rows, slice) or isinstance(self.x, np.ndarray) else _rows_of_file(self.x, rows)
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, x=x, y=self.y[rows], columns=columns)

    def slices(self, size: int) -> Iterator[Block]:
        """The block in pieces of at most `size` samples, read one at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def name_of(self, label: int) -> str:
        """The class's name, or its integer as text."""
        if self.names is not None and self.labels is not None:
            where = np.flatnonzero(self.labels == label)
            if len(where):
                return self.names[int(where[0])]
        return str(label)


@dataclass(frozen=True)
class End:
    """The mark that closes a stream of rounds: without it the producer died."""

    rounds: int
    facts: Mapping[str, Any] = field(default_factory=dict)


Record: TypeAlias = Run | Block | End


def _rows_of_file(x: Samples, rows: Array) -> Array:
    """Rows of an on-disk dataset in any order and with repeats: HDF5 itself takes only ascending distinct ones."""
    distinct, back = np.unique(rows, return_inverse=True)
    return np.asarray(x[distinct])[back]


def check_layout(layout: str, shape: Sequence[int], where: str) -> None:
    """Raise `DataError` unless `layout` exists and has the rank of `shape`."""
    if LAYOUTS.get(layout) != len(shape):
        fitting = [name for name, rank in LAYOUTS.items() if rank == len(shape)]
        expected = "one of " + (", ".join(fitting) or "none")
        raise DataError(
            where,
            f"layout {layout!r} with shape {tuple(shape)}",
            expected,
            "state the layout with `edgetrain pack --layout`",
        )
