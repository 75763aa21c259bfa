"""Files that are given to a model: opened as `pack` opens them, prepared as the samples that it learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from stages.artifacts.records import Block, InputSpec, Preparation, check_labelled
from stages.data import images, sounds
from stages.data.reading import Form, read_blocks
from stages.data.samples import Notes, Source
from stages.data.sources import FLAT, STORED, Opening, detect, open_source
from stages.errors import DataError

MADE_OF = {
    "images": ("pictures",),
    "sounds": ("recordings",),
    "coco": ("pictures",),
    "list": ("pictures", "recordings"),
}
"""Kind of data -> what `Preparation.of` may call it; every other kind is arrays."""


def blocks_for_model(
    path: Path,
    spec: InputSpec,
    prepared: Preparation | None = None,
    *,
    labelled: bool = True,
    notes: Notes | None = None,
    block_length: int = 256,
) -> Iterator[Block]:
    """The samples of a folder, a picture, a recording, a table or arrays, in the order of their names or rows.

    Args:
        spec: the model's input, which says what samples are brought to where nobody has said how they were prepared.
        prepared: how the samples were that it learnt from; `spec.prepared` unless given.
        labelled: False takes samples without classes, and leaves those of folders aside: y = -1.
        notes: gets what was guessed and left out; it is complete when the last block has come.

    Raises:
        DataError: nothing that this model reads, or files that cannot be prepared in the same way.
    """
    prepared = prepared or spec.prepared
    opening = _opening(path, _kind(path), spec, prepared, notes)
    source = open_source([path], replace(opening, labelled=labelled))
    if labelled:
        check_labelled(source.y, source.where)
    else:
        source = replace(source, y=np.full(len(source), -1, np.int64), names=None, labels=None)
    length = block_length if opening.one_shape else 1
    yield from read_blocks(source, np.arange(len(source)), _form(source, prepared), block_length=length)
    if notes is not None:
        for line in source.notes.lines():
            notes.say(line)


def _kind(path: Path) -> str:
    """The key of `sources.OPENERS`, single pictures and recordings among them."""
    suffix = path.suffix.lower()
    if path.is_file() and suffix in images.SUFFIXES | sounds.SUFFIXES:
        return "images" if suffix in images.SUFFIXES else "sounds"
    return "npy" if suffix == ".npy" and path.is_file() else detect([path], Opening())


def _opening(path: Path, kind: str, spec: InputSpec, prepared: Preparation | None, notes: Notes | None) -> Opening:
    """How the data is opened: as that which the model learnt from, where that was of its kind."""
    of = MADE_OF.get(kind, ("arrays",))
    prepared = prepared if prepared is not None and prepared.of in of else None
    plain = Opening(format=kind)
    if of == ("arrays",):
        return plain if prepared is None else _array_opening(plain, kind, prepared)
    if "pictures" in of and spec.kind == "image":
        return _picture_opening(plain, spec, prepared, notes)
    if "recordings" in of and spec.kind in ("sound", "signal"):
        return replace(plain, sound=_sound(spec, prepared))
    raise DataError(str(path), f"{of[0]}, for a model that reads {spec.kind}", "samples that it can read")


def _form(source: Source, prepared: Preparation | None) -> Form:
    """What is done to values. Raises `DataError` where the model learnt from something else, and that was changed."""
    mine = "" if source.prepared is None else source.prepared.of
    if prepared is None or mine in ("", prepared.of):
        return Form() if prepared is None else Form.of(prepared)
    if prepared.invert or prepared.scale != 1:
        done = "inverted" if prepared.invert else f"scaled by {prepared.scale:g}"
        found = f"{mine}, for a model that learnt from {prepared.of or 'samples'} {done}"
        raise DataError(source.where, found, "the same", "bring them to blocks with `edgetrain pack`")
    return Form()


def _picture_opening(plain: Opening, spec: InputSpec, prepared: Preparation | None, notes: Notes | None) -> Opening:
    channels, height, width = spec.shape
    own = "gray" if channels == 1 else "rgb"
    if prepared is None:
        if notes is not None:
            notes.say(f"nothing says how this model's pictures were prepared: they are stretched to {height} x {width}")
        return replace(plain, image=images.ImageForm(size=(height, width), colour=own))
    form = images.ImageForm(size=prepared.size, fit=prepared.fit, colour=prepared.colour or own)
    return replace(plain, image=form, one_shape=prepared.size is not None)


def _sound(spec: InputSpec, prepared: Preparation | None) -> sounds.SoundForm:
    """The rate and length of the recordings that the model learnt from, or else of its input."""
    rate = spec.sample_rate_hz or (prepared.sample_rate_hz if prepared is not None else 0)
    seconds = prepared.seconds if prepared is not None else 0.0
    if not seconds and rate:
        steps = spec.shape[1] if spec.kind == "signal" else spec.window_samples + (spec.shape[1] - 1) * spec.hop_samples
        seconds = steps / rate
    return sounds.SoundForm(rate_hz=rate or None, seconds=seconds or None)


def _array_opening(plain: Opening, kind: str, prepared: Preparation) -> Opening:
    size = images.ImageForm(size=prepared.size, fit=prepared.fit)
    shape = prepared.shape if kind in FLAT else None
    layout = prepared.layout or None if shape or kind in STORED else None
    return replace(plain, image=size, shape=shape, layout=layout)
