"""`export --format c`: a run as the sources of a program that predicts and trains, for a host or a microcontroller.

What is exported is the native engine's library as it is, the run's program image as constant data, and a small
`main.c`. The program trains as `train-sparse` does on a stream: a linear head and the plan's live values, one update
per batch. With the same bits on both sides (`BITS=same`, `--same-bits`) both end with the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages.artifacts.records import Head, LayerUpdate, Run
from stages.engines.native import library
from stages.engines.native.lowering import lower
from stages.engines.native.program import Lowering, encode
from stages.engines.parameter import Floats
from stages.errors import UsageError, require
from stages.models.deploy import Backbone, deploy
from stages.planning.budget import format_bytes
from stages.planning.plans import check_plan
from stages.training.learner import linear_head
from stages.training.optimizers import Optimizing

FILES = Path(__file__).parent / "files"
LIBRARY = library.HERE / "c"
CONTEXT_BYTES = 256
"""Room for the library's context, on machines of 32 and 64 bits; opening a net fails where it were too small."""
STACK_BYTES = 16384
"""What is left for stack and the C library's own buffers when a board's memory is compared."""
LOT = 4
"""Samples whose gradients are summed before they join the others', as the native engine's workers do."""
OPTIMIZERS = {"sgd": 0, "adam": 1, "adamw": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Programming:
    """How the program trains, and the board that it must fit."""

    optimizing: Optimizing = field(default_factory=lambda: Optimizing(optimizer="sgd", learning_rate=0.02))
    batch: int = 1
    """Most samples of an update."""
    ram_bytes: int | None = None
    flash_bytes: int | None = None

    def __post_init__(self) -> None:
        require(self.batch >= 1, "--batch", f"{self.batch}", "at least 1")
        constant = self.optimizing.schedule == "constant" and not self.optimizing.warmup_updates
        require(constant, "--schedule", "a rate that changes", "a constant one in an exported program")

    @property
    def in_place(self) -> bool:
        """Whether updates are made during the backward pass, without a gradient of all live values."""
        return self.batch == 1 and not self.optimizing.clip_norm


@dataclass(frozen=True)
class Source:
    """What a program is made of: a run's backbone, plan and head, and the image of the first two."""

    backbone: Backbone
    updates: tuple[LayerUpdate, ...]
    head: Head
    lowering: Lowering
    image: bytes

    @property
    def head_values(self) -> Floats:
        """The head as the program has it: rows (C, D), then biases (C,), float32."""
        return np.concatenate([np.ravel(self.head.weight), np.ravel(self.head.bias)]).astype(np.float32)

    @property
    def takes_bytes(self) -> bool:
        """Whether samples are pictures of bytes; else they are floats as the model reads them."""
        return self.backbone.input.kind == "image"


@dataclass(frozen=True)
class Program:
    """An exported program."""

    files: Mapping[str, bytes]
    """Path in the folder -> contents."""
    ram: Mapping[str, int]
    """Bytes of each part of its static memory."""
    flash_bytes: int
    """Of constant data; code comes to it."""

    @property
    def ram_bytes(self) -> int:
        return sum(self.ram.values())


def source_of(run: Run, *, allow: str | None = None, same_bits: bool = False) -> Source:
    """What a program of this run is made of; without a plan only the head trains.

    Raises:
        NotCovered: an operator has no kernel in the native engine.
        DataError: a head over other features, a plan of another model.
        UsageError: no head, or one with classes that nobody has seen.
    """
    keep_bits = 32 if run.plan is None else int(run.plan.facts.get("keep_bits", 32))
    backbone = deploy(run.model, allow=allow, engine="native", same_bits=same_bits, keep_bits=keep_bits)
    updates: tuple[LayerUpdate, ...] = ()
    if run.plan is not None:
        check_plan(run.plan, backbone.graph)
        updates = run.plan.updates
    fix = "train it on samples with `edgetrain train-sparse`"
    if run.model.head is None:
        raise UsageError("/model/head", "no head", "the classes that the program tells apart", fix)
    head = linear_head(run.model.head, backbone.graph.feature_dim)
    unseen = np.flatnonzero(~head.known)
    if len(unseen):
        name = head.names[unseen[0]] if head.names else head.labels[unseen[0]]
        raise UsageError("/model/head", f"class {name} was never seen", "a head that knows its classes", fix)
    lowering = lower(backbone.graph, updates, keep_bits=keep_bits)
    return Source(backbone, updates, head, lowering, encode(lowering, backbone.tensors))


def make_program(source: Source, how: Programming) -> Program:
    """The program's files and what it takes. Raises `UsageError` where a board is too small, with the figures."""
    ram, flash = ram_of(source, how), len(source.image) + 4 * source.head_values.size
    total = sum(ram.values()) + STACK_BYTES
    if how.ram_bytes is not None and total > how.ram_bytes:
        parts = ", ".join(f"{name} {size:,}" for name, size in ram.items())
        found = f"{format_bytes(total)} of RAM are needed: {parts}, stack {STACK_BYTES:,}"
        raise UsageError("--ram", found, f"at most {how.ram_bytes:,}", "give score-layers a smaller --memory")
    if how.flash_bytes is not None and flash > how.flash_bytes:
        found = f"{format_bytes(flash)} of constant data"
        raise UsageError("--flash", found, f"at most {how.flash_bytes:,}", "export a smaller model")
    files = {
        str(path.relative_to(FILES)): path.read_bytes()
        for path in sorted(FILES.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }
    files |= {f"edgetrain/{path.name}": path.read_bytes() for path in sorted(LIBRARY.glob("*.[ch]"))}
    files |= {"edgetrain_net.h": _header(source, how).encode(), "edgetrain_net.c": _data(source)}
    return Program(files, ram, flash)


def ram_of(source: Source, how: Programming) -> dict[str, int]:
    """Bytes of the program's static memory, by part."""
    lowering, head, (channels, _, width) = source.lowering, source.head_values.size, source.lowering.input_map
    states = how.optimizing.state_values
    gradient = lowering.piece_floats if how.in_place else lowering.live_floats * (2 if how.batch > LOT else 1)
    classes = len(source.head.labels)
    row = width * channels * (1 if source.takes_bytes else 4)
    return {
        "arena": lowering.arena_bytes,
        "live values": 4 * lowering.live_floats,
        "gradient": 4 * gradient,
        "optimiser": 4 * states * lowering.live_floats,
        "head": 4 * (2 + states) * head,
        "other": CONTEXT_BYTES + 8 * (lowering.features + classes) + row,
    }


def _header(source: Source, how: Programming) -> str:
    """`edgetrain_net.h`."""
    lowering, optimizing, spec = source.lowering, how.optimizing, source.backbone.input
    channels, height, width = lowering.input_map
    names = source.head.names or [str(label) for label in source.head.labels.tolist()]
    numbers: dict[str, object] = {
        "IMAGE_BYTES": len(source.image),
        "PLAN": f"0x{lowering.plan_mark:08x}",
        "CONTEXT_BYTES": CONTEXT_BYTES,
        "ARENA_BYTES": lowering.arena_bytes,
        "LIVE": lowering.live_floats,
        "PIECE": lowering.piece_floats,
        "FEATURES": lowering.features,
        "CLASSES": len(names),
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "BYTES": int(source.takes_bytes),
        "BATCH": how.batch,
        "IN_PLACE": int(how.in_place),
        "STATES": optimizing.state_values,
        "OPTIMIZER": OPTIMIZERS[optimizing.optimizer],
        "RATE": _number(optimizing.learning_rate),
        "MOMENTUM": _number(optimizing.momentum),
        "WEIGHT_DECAY": _number(optimizing.weight_decay),
        "CLIP": _number(optimizing.clip_norm),
        "SCALE": _numbers(spec.scale, channels) if source.takes_bytes else "{1}",
        "OFFSET": _numbers(spec.offset, channels) if source.takes_bytes else "{0}",
        "CLASS_NAMES": "{" + ", ".join(map(_text, names)) + "}",
    }
    lines = [f"#define ET_NET_{name} {value}" for name, value in numbers.items()]
    return "\n".join([
        "/* A network and a plan, as `edgetrain export` wrote them:",
        " * lengths in floats where the name does not say bytes; OPTIMIZER 0 SGD, 1 Adam, 2 AdamW. */",
        "#ifndef EDGETRAIN_NET_H",
        "#define EDGETRAIN_NET_H",
        "#include <stdint.h>",
        *lines,
        "extern const uint32_t edgetrain_net_image[ET_NET_IMAGE_BYTES / 4];",
        "extern const float edgetrain_net_head[ET_NET_CLASSES * (ET_NET_FEATURES + 1)]; /* rows of weights, biases */",
        "#endif",
        "",
    ])  # fmt: skip


def _data(source: Source) -> bytes:
    """`edgetrain_net.c`: the image and the head as arrays, floats by their bits."""
    head = source.head_values
    return b"".join([
        b'#include "edgetrain_net.h"\n\n',
        b"const uint32_t edgetrain_net_image[ET_NET_IMAGE_BYTES / 4] __attribute__((aligned(64))) = {\n",
        _words(np.frombuffer(source.image, "<u4")),
        b"};\n\nconst float edgetrain_net_head[ET_NET_CLASSES * (ET_NET_FEATURES + 1)] = {\n",
        ",\n".join(_number(value) for value in head.tolist()).encode(),
        b"};\n",
    ])  # fmt: skip


def _words(words: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> bytes:
    """0x........, ten to a line."""
    digits = words.astype(">u4").tobytes().hex()
    each = [f"0x{digits[at : at + 8]}" for at in range(0, len(digits), 8)]
    return "".join(", ".join(each[at : at + 10]) + ",\n" for at in range(0, len(each), 10)).encode()


def _number(value: float) -> str:
    """A float of C with exactly this value in single precision."""
    return float(np.float32(value)).hex() + "f"


def _numbers(values: tuple[float, ...], count: int) -> str:
    return "{" + ", ".join(_number(value) for value in np.resize(np.asarray(values, np.float32), count).tolist()) + "}"


def _text(text: str) -> str:
    """A string of C; what is not plain as octal bytes."""
    plain = "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode())
    return f'"{plain}"'
