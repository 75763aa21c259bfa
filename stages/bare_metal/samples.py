"""Samples as an exported program reads them: records of a class, a weight, whether the batch ends, and the values.

int32 row of the head (-1: unknown), float32 weight of the sample's loss, int32 1 where it is the last of its batch;
then the values row by row, channels last: bytes of a picture, or float32 as the model reads them. All little-endian.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.artifacts.records import Array, Block, InputSpec
from stages.bare_metal.program import Source
from stages.errors import DataError
from stages.models import heads
from stages.models.inputs import adapt_block
from stages.training.learner import Batch


@dataclass(frozen=True)
class Batched:
    """Samples of one update, as they are written."""

    values: Array
    """(N, height, width, channels): uint8 pictures, or float32."""
    rows: Array
    """int64 (N,): rows of the head."""
    weights: Array
    """float32 (N,)."""

    def encode(self) -> bytes:
        """The records."""
        size = self.values[0].nbytes if len(self.values) else 0
        kind = np.dtype([("row", "<i4"), ("weight", "<f4"), ("last", "<i4"), ("values", "V", size)])
        records = np.zeros(len(self.rows), kind)
        records["row"], records["weight"] = self.rows, self.weights
        records["last"][-1:] = 1
        for record, values in zip(records, self.values, strict=True):
            record["values"] = values.tobytes()
        return records.tobytes()

    def batch(self, source: Source) -> Batch:
        """The same for training in Python."""
        head, x = source.head, model_input(self.values, source.backbone.input)
        names = dict(zip(head.labels.tolist(), head.names, strict=True)) if head.names else None
        return Batch(x, head.labels[self.rows], self.weights, names)


def batches(blocks: Iterable[Block], source: Source, most: int) -> Iterator[Batched]:
    """The samples of blocks, each block an update, or several where it has more than `most` samples.

    Weights are the block's, or 1 / N. Raises `DataError` for samples that the model cannot read, labels that the head
    does not have, or pictures that are not bytes.
    """
    spec = source.backbone.input
    for block in blocks:
        for part in block.slices(most):
            if not len(part):
                continue
            weights = part.columns.get("weight")
            shares = np.full(len(part), 1 / len(part)) if weights is None else np.asarray(weights)
            rows = heads.rows(source.head, part.y, heads.class_names(part))
            yield Batched(_values(part, spec), rows, shares.astype(np.float32))


def _values(block: Block, spec: InputSpec) -> Array:
    """(N, height, width, channels): pictures as bytes of the model's size, others as the model reads them."""
    if spec.kind != "image":
        x = adapt_block(block, spec)
        return np.ascontiguousarray(_channels_last(x))
    if block.x.dtype != np.uint8:
        fix = "pack them with `edgetrain pack --dtype uint8`"
        raise DataError("x", f"pictures of {block.x.dtype}", "uint8, as an exported program reads", fix)
    plain = replace(spec, scale=(1.0,), offset=(0.0,))
    bytes_wide = np.clip(np.rint(adapt_block(block, plain)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(bytes_wide.transpose(0, 2, 3, 1))


def _channels_last(x: Array) -> Array:
    """(N, C, ...) -> (N, height, width, C), a line of time as one row, a vector as one pixel."""
    shape: Sequence[int] = x.shape[2:]
    wide = x.reshape(*x.shape[:2], *((1, 1, *shape)[-2:]))
    return wide.transpose(0, 2, 3, 1)


def model_input(values: Array, spec: InputSpec) -> Array:
    """What the program makes of the values: model inputs (N, *spec.shape), float32."""
    x = values.transpose(0, 3, 1, 2)
    if spec.kind == "image":
        channels = spec.shape[0]
        scale, offset = (
            np.resize(np.asarray(each, np.float32), channels)[:, None, None] for each in (spec.scale, spec.offset)
        )
        x = x.astype(np.float32) * scale + offset
    return np.ascontiguousarray(x.reshape(len(x), *spec.shape), np.float32)


def made_up(source: Source, count: int, batch: int, rng: np.random.Generator) -> Iterator[Batched]:
    """Random samples of every class in turn, to try a program with."""
    channels, height, width = source.lowering.input_map
    for start in range(0, count, batch):
        size = min(batch, count - start)
        shape = (size, height, width, channels)
        values: Array = (
            rng.integers(0, 256, shape, dtype=np.uint8)
            if source.takes_bytes
            else rng.standard_normal(shape, dtype=np.float32)
        )
        rows = np.arange(start, start + size) % len(source.head.labels)
        yield Batched(values, rows, np.full(size, 1 / size, np.float32))
