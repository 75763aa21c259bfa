"""Program images: what a lowering is made of, and its bytes (docs/native.md is their description).

A `Lowering` knows a graph and a plan but no weights: its constants are recipes. So its sizes are known before any
tensor is read, and one lowering serves every version of the weights.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Tensors = Mapping[str, Floats]
Recipe = Callable[[Tensors], NDArray[np.generic]]

MAGIC, VERSION, HEADER_BYTES, ALIGN = 0x494E5445, 3, 128, 64
NONE = 0xFFFFFFFF
ARENA, CONSTANT, LIVE, GRADIENT = range(4)
PANEL, CHUNK = 16, 16
MOST_ROWS, MOST_STAGES, MOST_CHANNELS, MOST_COLUMNS = 64, 16, 1 << 24, 1 << 15
"""What the C library takes: taps along rows, steps of a chain, channels, taps along columns."""

KINDS = {
    "input": 1, "chain": 2, "conv": 3, "depthwise": 4, "max_pool": 5, "avg_pool": 6, "mean": 7, "unary": 8, "add": 9,
    "copy": 10, "transpose": 11, "merge": 12, "mask": 13, "features": 14, "multiply": 15, "fill": 16, "softmax": 17,
    "norm": 18, "nearest": 19, "gather": 20, "scatter": 21, "amax": 22, "matmul": 23,
    "pack": 26, "unpack": 50, "page_out": 27, "page_in": 51,
    "gru": 24, "lstm": 25, "gradient": 32, "mask_back": 33,
    "conv_dx": 34, "conv_dw": 35, "depthwise_dx": 36, "depthwise_dw": 37, "bias_dw": 38, "max_pool_dx": 39,
    "avg_pool_dx": 40, "mean_dx": 41, "unary_dx": 42, "dot": 43, "softmax_dx": 44, "norm_dx": 45, "nearest_dx": 46,
    "amax_dx": 47, "gru_dx": 48, "lstm_dx": 49,
}  # fmt: skip
"""Names of steps and their codes."""

FIELDS = (
    "kind", "flags", "x", "y", "w", "b", "r", "m", "ci", "co", "ldx", "ldy", "ldr", "hi", "wi", "ho", "wo", "kh", "kw",
    "sh", "sw", "ph", "pw", "dh", "dw", "act", "act2", "xr", "yr", "n", "a0", "a1",
)  # fmt: skip
"""The 32 words of a step."""
REFERENCES = ("x", "y", "w", "b", "r", "m")
SAVING, ACCUMULATE, COUNT_PAD, ADAPTIVE = 1, 2, 4, 8
TURN_SHIFT, MOST_TURNS = 8, 255
"""Where the flags have the turn of a weight gradient."""
ACTIVATIONS = {
    "": 0, "relu": 1, "relu6": 2, "leaky_relu": 3, "elu": 4, "hardswish": 5, "hardsigmoid": 6, "silu": 7, "gelu": 8,
    "gelu_tanh": 9, "sigmoid": 10, "tanh": 11, "clamp": 12, "exp": 13, "softplus": 14, "mish": 15, "abs": 16,
}  # fmt: skip


def float_word(value: float) -> int:
    """A number as the word of a step."""
    return int(np.float32(value).view(np.int32))


@dataclass(eq=False)
class Buffer:
    """Floats of the arena that hold one value, from the first step that names it to the last."""

    name: str
    floats: int
    first: int = -1
    last: int = -1
    over: Buffer | None = None
    """The buffer in whose place it lies, because that one ends where this one begins."""
    at: int = -1
    """Offset in floats, once planned."""

    def use(self, time: int) -> None:
        """Extend the lifetime to a step."""
        self.first = time if self.first < 0 else min(self.first, time)
        self.last = max(self.last, time)

    def __getitem__(self, offset: int) -> Ref:
        return Ref(ARENA, offset, self)


@dataclass(frozen=True, slots=True)
class Ref:
    """A place in one of the four spaces."""

    space: int
    offset: int
    buffer: Buffer | None = None

    def word(self) -> int:
        """The reference as the image has it."""
        return self.space << 30 | (self.offset + (self.buffer.at if self.buffer else 0))


@dataclass
class Step:
    """One step: its kind and the words that differ from the defaults."""

    kind: str
    words: dict[str, int | Ref]
    op: str = ""
    """Name of the operator that it belongs to."""
    time: int = -1

    @property
    def saves(self) -> bool:
        """Whether it runs only where a backward pass follows."""
        return bool(int(self.words.get("flags", 0)) & SAVING)  # type: ignore[arg-type]

    @property
    def piece(self) -> int:
        """Floats that it adds to the gradients of live values."""
        number = {name: word for name, word in self.words.items() if not isinstance(word, Ref)}
        if self.kind == "bias_dw":
            return number["n"]
        if self.kind == "depthwise_dw":
            return number["kh"] * number["kw"] * number["ci"]
        panels = -(-number.get("co", 0) // PANEL) * PANEL
        return number["kh"] * number["kw"] * number["ci"] * panels if self.kind == "conv_dw" else 0

    def refs(self) -> list[Ref]:
        return [word for word in self.words.values() if isinstance(word, Ref)]

    def pack(self) -> list[int]:
        """The 32 words."""
        words = dict.fromkeys(FIELDS, 1) | {
            "flags": 0, "ldr": 0, "ph": 0, "pw": 0, "act": 0, "act2": 0, "n": 0, "a0": 0, "a1": 0,
        }  # fmt: skip
        words |= dict.fromkeys(REFERENCES, NONE) | {"kind": KINDS[self.kind]}
        words |= {
            name: word.word() if isinstance(word, Ref) else int(word) % 2**32 for name, word in self.words.items()
        }
        words.setdefault("co", words["ci"])
        words["xr"] = int(self.words.get("xr", words["hi"]))  # type: ignore[arg-type]
        words["yr"] = int(self.words.get("yr", words["ho"]))  # type: ignore[arg-type]
        return [words[name] for name in FIELDS]


@dataclass(frozen=True)
class Parameter:
    """One live tensor: its shape, and where in the live values each of its elements lies."""

    name: str
    place: Integers
    """(live, in / groups, *kernel) or, along the input axis, (live, out / groups, *kernel); biases (live,)."""
    ids: Integers
    """The same shape: which element of the flattened whole tensor each one is."""


@dataclass
class Lowering:
    """A graph and a plan as steps, buffers and recipes."""

    input_map: tuple[int, int, int]
    """(channels, height, width)."""
    features: int
    prefix: list[Step] = field(default_factory=list)
    suffix: list[Step] = field(default_factory=list)
    backward: list[Step] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    boundary: list[Buffer] = field(default_factory=list)
    boundary_shapes: list[tuple[int, ...]] = field(default_factory=list)
    """(height, width, channels) of each value that enters the trained part, per sample."""
    kept: list[Buffer] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    constants: list[tuple[int, Recipe]] = field(default_factory=list)
    constant_floats: int = 0
    zeros: int = 0
    live: list[tuple[int, Recipe]] = field(default_factory=list)
    live_floats: int = 0
    page_floats: int = 0
    """What lies outside of the arena between the passes of a sample, by the caller's doing."""
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    """(turn, first, floats) of what trains of the live values: turn 0 always, the others when it is theirs."""
    sum_floats: int = 0
    """What the backward pass sums up beside gradients of live values: behind them in their space."""
    arena_floats: int = 0
    bound_floats: int = 0
    """No arena could be smaller with these steps: the most that is held at one time."""
    plan_mark: int = 0

    @property
    def arena_bytes(self) -> int:
        return 4 * self.arena_floats

    @property
    def kept_bytes(self) -> int:
        """What stays between the forward and the backward pass of one sample."""
        return 4 * sum(buffer.floats for buffer in self.kept)

    @property
    def piece_floats(self) -> int:
        """The most that one step of the backward pass adds to the gradients."""
        return max((step.piece for step in self.backward), default=0)

    @property
    def image_bytes(self) -> int:
        """Length of what `encode` makes."""
        steps = len(self.prefix) + len(self.suffix) + len(self.backward)
        words = (len(FIELDS) * steps, self.constant_floats, self.live_floats, 2 * len(self.boundary + self.kept))
        return HEADER_BYTES + sum(-(-4 * count // ALIGN) * ALIGN for count in words)


def filled(recipes: Sequence[tuple[int, Recipe]], floats: int, tensors: Tensors) -> NDArray[np.uint32]:
    """A section of so many words, each recipe's array in its place, zeros between."""
    section = np.zeros(floats, np.uint32)
    for at, recipe in recipes:
        values = recipe(tensors)
        flat = np.ascontiguousarray(values, np.int32 if values.dtype.kind == "i" else np.float32).reshape(-1)
        section[at : at + flat.size] = flat.view(np.uint32)
    return section


def encode(lowering: Lowering, tensors: Tensors) -> bytes:
    """The program image of a lowering with these tensors (float32, PyTorch's shapes)."""
    steps = [*lowering.prefix, *lowering.suffix, *lowering.backward]
    table = np.array([step.pack() for step in steps], np.uint64).astype(np.uint32).reshape(-1, len(FIELDS))
    parts = [(buffer.at, buffer.floats) for buffer in (*lowering.boundary, *lowering.kept)]
    sections, at = [], HEADER_BYTES
    offsets = []
    for section in (
        table,
        filled(lowering.constants, lowering.constant_floats, tensors),
        filled(lowering.live, lowering.live_floats, tensors),
        np.array(parts, np.uint32).reshape(-1),
    ):
        data = section.astype("<u4").tobytes()
        offsets.append(at)
        sections.append(data + bytes(-len(data) % ALIGN))
        at += len(sections[-1])
    channels, height, width = lowering.input_map
    rest = struct.pack(
        "<28I", at, lowering.plan_mark, 0, lowering.zeros, lowering.arena_floats, lowering.constant_floats,
        lowering.live_floats, lowering.kept_bytes // 4, channels, height, width, lowering.features,
        sum(buffer.floats for buffer in lowering.boundary), len(lowering.boundary), len(lowering.kept),
        lowering.sum_floats, len(steps), len(lowering.prefix), len(lowering.suffix), len(lowering.backward), *offsets,
        0, 0, 0, 0,
    )  # fmt: skip
    body = b"".join([rest, *sections])
    return struct.pack("<4I", MAGIC, VERSION, HEADER_BYTES, zlib.crc32(body)) + body
