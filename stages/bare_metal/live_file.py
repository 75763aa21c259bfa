"""What an exported program leaves (docs/native.md, "What training leaves"), and the run that it makes."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stages.artifacts.records import Run
from stages.bare_metal.program import Source
from stages.engines.native.net import NativeNet
from stages.engines.native.program import MAGIC
from stages.engines.parameter import Floats
from stages.errors import DataError
from stages.models.deploy import store

WORDS = 8
NOTHING = "nothing saved by an exported program"
CHECKSUM = 12
"""Where an image's own checksum lies."""


class Slot(NamedTuple):
    """One save: how many there were, the live values in the engine's order, and the head's."""

    number: int
    live: Floats
    head: Floats


def marks_of(source: Source) -> tuple[int, int, int, int, int]:
    """The words of a slot that only this run's program writes: magic, plan, image, live floats, head floats."""
    image = int.from_bytes(source.image[CHECKSUM : CHECKSUM + 4], "little")
    lowering = source.lowering
    return MAGIC ^ 0xFFFFFFFF, lowering.plan_mark, image, lowering.live_floats, source.head_values.size


def read_live(data: bytes, source: Source, where: str) -> Slot:
    """The last whole save of a file of two slots.

    Raises `DataError` for a file of another plan, model or head, and for one that is cut off or damaged.
    """
    marks = marks_of(source)
    live, head = marks[3:]
    size = 4 * (WORDS + live + head)
    found = [_slot(data[at : at + size], marks) for at in (0, size)]
    whole = [slot for slot in found if isinstance(slot, Slot)]
    if whole:
        return max(whole, key=lambda slot: slot.number)
    why = next((str(reason) for reason in found if reason != NOTHING), NOTHING)
    expected = "what this run's exported program left"
    raise DataError(where, why, expected, "is it of this run, as it was exported?")


def _slot(data: bytes, marks: tuple[int, ...]) -> Slot | str:
    """A save, or what is wrong with it."""
    words = np.frombuffer(data[: 4 * WORDS], "<u4").tolist() if len(data) >= 4 * WORDS else []
    if not words or words[0] != marks[0]:
        return NOTHING
    for place, what in ((1, "live values of another plan"), (4, "a head of other classes"), (2, "of another model")):
        if words[place] != marks[place]:
            return what
    live, head = marks[3:]
    if len(data) < 4 * (WORDS + live + head):
        return "cut off"
    if zlib.crc32(data[4 * WORDS :], zlib.crc32(data[: 4 * (WORDS - 1)])) != words[WORDS - 1]:
        return "damaged (its checksum differs)"
    values = np.frombuffer(data[4 * WORDS :], "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        return "a value that is not finite"
    return Slot(words[5], values[:live], values[live:])


def trained(run: Run, source: Source, slot: Slot) -> Run:
    """The run with these values in their places, its version further by the saves."""
    net = NativeNet(source.backbone.graph, source.backbone.tensors, source.updates, lowering=source.lowering, threads=1)
    net.live[:] = slot.live
    backbone = replace(source.backbone, tensors={name: np.asarray(value) for name, value in net.tensors().items()})
    rows = source.head.weight.size
    head = replace(
        source.head, weight=slot.head[:rows].reshape(source.head.weight.shape).copy(), bias=slot.head[rows:].copy()
    )
    model = replace(store(run.model, backbone), head=head, version=run.model.version + slot.number)
    return replace(run, model=model)
