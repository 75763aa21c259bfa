"""Samples that a command is given: blocks, or whatever `pack` can open, prepared as the run record says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgetrain_cli.streams import Stage
    from stages.artifacts.records import Block, Preparation, Run


def blocks_of(
    io: Stage, path: str, run: Run, *, labelled: bool = True, like: Preparation | None = None
) -> Iterator[Block]:
    """The samples of a stream of blocks, a folder, a picture, a recording or a table.

    What is guessed or left out is said on stderr. `like` says how samples are prepared instead of the run record.
    """
    from stages.artifacts.stream import is_stream

    if path == "-" or is_stream(Path(path)):
        yield from _told(io, run, io.read_stream(path)[1])
        return
    from stages.data.doors import blocks_for_model
    from stages.data.samples import Notes

    notes = Notes()
    io.named(path)
    yield from _told(io, run, blocks_for_model(Path(path), run.model.input, like, labelled=labelled, notes=notes))
    for line in notes.lines():
        io.note(f"{Path(path).name}: {line}")


def block_of(io: Stage, path: str, run: Run, *, like: Preparation | None = None) -> Block:
    """The same as one labelled block; blocks of a file stay on disk until they are sliced."""
    from stages.data.blocks import join_blocks
    from stages.errors import DataError

    found = list(blocks_of(io, path, run, like=like))
    if not found:
        raise DataError(Path(path).name, "no sample blocks", "samples", "make them with `edgetrain pack`")
    return found[0] if len(found) == 1 else join_blocks(found, in_memory=False, where=Path(path).name)


def _told(io: Stage, run: Run, blocks: Iterator[Block]) -> Iterator[Block]:
    """The blocks; where the model knows classes by name and they have numbers, what is taken for what is said once."""
    from stages.models.heads import numbers_of

    head, said = run.model.head, False
    for block in blocks:
        numbered = head is not None and head.names and block.names is None and not numbers_of(head.names)
        if numbered and not said and head is not None and head.names and (block.y >= 0).any():
            pairs = [f"{label} for {name!r}" for label, name in zip(head.labels[:3], head.names, strict=False)]
            io.note(f"samples have no class names: class {', '.join(pairs)}{', ...' * (len(head.names) > 3)}")
            said = True
        yield block
