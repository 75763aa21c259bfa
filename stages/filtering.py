"""`filter`: a stream of samples -> one block of candidates per round.

Nothing here imports torch: strategies that need no features run in a process of numpy and h5py alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from stages.artifacts.records import Block, End, Model
from stages.data.blocks import join_blocks
from stages.errors import UsageError
from stages.settings.filtering import Filtering as Filtering
from stages.valuation.buffer import CandidateBuffer, Features
from stages.valuation.coarse import filter_named
from stages.valuation.demand import DemandBuffer

CHUNK = 256
"""Samples scored at once: bounds memory for windows of any length."""


def filter_stream(
    blocks: Iterable[Block],
    config: Filtering,
    *,
    features: Features | None = None,
    seed: int = 0,
    on_note: Callable[[str], None] = lambda text: None,
    on_step: Callable[[int], None] = lambda round: None,
) -> Iterator[Block | End]:
    """Candidates of every `config.window` samples, the last window perhaps shorter, then the end mark.

    Each block holds at most `config.keep` samples in order of arrival, with `round`, their `index` in the stream, the
    `weight` that makes them stand for the whole window, and `seen`, the samples per class of the window. Samples are
    taken as they come: how the input is cut into blocks changes nothing.

    Args:
        features: samples -> shallow features (n, F), for strategies that need them (`valuation.shallow`).
        on_note: gets one line when the strategy deserves a warning.
        on_step: gets the number of rounds closed so far.

    Raises:
        UsageError: the strategy needs features and there are none.
        DataError: unlabelled samples, features that are not finite, blocks that do not fit each other.
    """
    buffer = _buffer(config, features, seed, on_note)
    for chunk, closes in arrivals(blocks, config.window):
        buffer.add(chunk)
        del chunk  # while a round is written, nothing but its candidates is held
        if closes:
            yield buffer.close_round()
            on_step(buffer.round)
    if buffer.arrived:
        yield buffer.close_round()
        on_step(buffer.round)
    yield End(buffer.round)


def filter_on_demand(
    config: Filtering,
    *,
    features: Features | None = None,
    seed: int = 0,
    on_note: Callable[[str], None] = lambda text: None,
) -> DemandBuffer:
    """What `filter_stream` does where rounds end when downstream asks, to be fed and emptied by the caller.

    Raises `UsageError` as `filter_stream`.
    """
    return DemandBuffer(_buffer(config, features, seed, on_note), config.window)


def _buffer(config: Filtering, features: Features | None, seed: int, on_note: Callable[[str], None]) -> CandidateBuffer:
    if config.needs_model and features is None:
        raise UsageError(
            "--strategy",
            f"{config.strategy!r} without a model",
            "a run record for its features",
            "put the run record first in the stream, or give --run FILE",
        )
    warning = filter_named(config.strategy).warning
    if warning:
        on_note(warning)
    return CandidateBuffer(config.strategy, config.keep, features=features, decay=config.decay, seed=seed)


def arrivals(blocks: Iterable[Block], window: int) -> Iterator[tuple[Block, bool]]:
    """The stream in chunks of at most `CHUNK` samples that never cross a window's end, and whether one ends there.

    Large blocks are read slice by slice, small ones are joined; the chunks are the same however the input is cut.
    """
    pieces: list[Block] = []
    waiting = position = 0
    for block in blocks:
        start = 0
        while start < len(block):
            room = min(CHUNK, window - position) - waiting
            pieces.append(block.take(slice(start, start + room)))
            taken = len(pieces[-1])
            start, waiting = start + taken, waiting + taken
            if taken == room:
                position = (position + waiting) % window
                yield _emptied(pieces), position == 0
                waiting = 0
    if waiting:
        yield _emptied(pieces), False


def _emptied(pieces: list[Block]) -> Block:
    """The pieces as one block; the list holds none of them any more."""
    joined = pieces[0] if len(pieces) == 1 else join_blocks(pieces, where="stream")
    pieces.clear()
    return joined


def model_features(
    model: Model,
    config: Filtering,
    *,
    allow: str | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Features | None:
    """The shallow features that the strategy looks at, of a model; None for a strategy that needs none.

    `allow` names user code that may be imported; `on_note` gets a line where another engine computes than a user would
    expect. An engine is imported only where features are needed.
    """
    if not config.needs_model:
        return None
    from stages.models.deploy import deploy
    from stages.valuation.shallow import shallow_features

    return shallow_features(deploy(model, allow=allow, engine=config.engine, on_note=on_note), config.blocks)
