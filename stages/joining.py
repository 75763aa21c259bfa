"""Join: a stream of blocks -> one block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import numpy as np

from stages.artifacts.records import Block
from stages.data.blocks import join_blocks
from stages.errors import DataError


def join(
    blocks: Iterable[Block],
    *,
    by_name: bool = False,
    max_bytes: int,
    where: str = "join",
    on_note: Callable[[str], None] = lambda text: None,
) -> Block:
    """All samples of a stream in one block: see `stages.data.blocks.join_blocks`; `on_note` gets what is left out.

    Raises:
        DataError: more than `max_bytes` of samples, or blocks that do not fit together.
    """
    kept: list[Block] = []
    total_bytes = 0
    for block in blocks:
        total_bytes += prod(block.x.shape) * np.dtype(block.x.dtype).itemsize
        if total_bytes > max_bytes:
            found = f"{total_bytes / 2**20:.1f} MiB of samples after {len(kept) + 1} blocks"
            raise DataError(where, found, f"at most {max_bytes / 2**20:.1f} MiB in one block",
                            "raise --max-record if the memory is there, or leave them a stream")  # fmt: skip
        if len(block):
            kept.append(block)
    joined = join_blocks(kept, by_name=by_name, where=where)
    for what, there, left in (
        ("columns", {name for block in kept for name in block.columns}, joined.columns),
        ("facts", {name for block in kept for name in block.facts}, joined.facts),
        ("counts per class", {name for block in kept for name in block.per_class}, ()),
    ):
        lost = sorted(there - set(left))
        if lost:
            on_note(f"left out {what} that not all blocks share: {', '.join(lost)}")
    return joined
