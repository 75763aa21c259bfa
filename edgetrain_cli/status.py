"""What a streaming stage tells about its rounds: a live line on a terminal, JSON lines for scripts."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetrain_cli.streams import Stage
    from stages.artifacts.records import Block


class Status:
    """Reports rounds as they pass. A stage that writes into a pipe leaves the line to the stage behind it."""

    def __init__(self, io: Stage, metrics: str | None, doing: str, *, last: bool = False) -> None:
        self._io, self._metrics = io, metrics
        alone = last or not stat.S_ISFIFO(os.fstat(1).st_mode)
        self._line = io.progress(doing, unit="rounds") if alone else None
        self._start_s = perf_counter()
        self._rounds = self._seen = 0
        self._latest: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}

    def passed(self, block: Block) -> None:
        """A round has been written."""
        figures = self._take(block)
        if self._metrics is not None:
            append(self._metrics, {**figures, "seconds": round(perf_counter() - self._start_s, 6)})
        self.show()

    def watch(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks as they are; `show` then tells about the latest."""
        for block in blocks:
            self._take(block)
            yield block

    def show(self, **figures: Any) -> None:
        """The line, with further figures."""
        self._shown = figures
        if self._line is not None:
            self._line(self._rounds, **self._figures(), **figures)

    def close(self) -> None:
        """The figures of the whole go to the closing line, where this stage is the one that speaks."""
        if self._line is not None:
            figures = {**self._figures(), **self._shown}
            self._io.did(f"{self._rounds:,} rounds", *(f"{value} {name}" if name == "samples/s" else f"{name} {value}"
                                                       for name, value in figures.items()))  # fmt: skip

    def _figures(self) -> dict[str, Any]:
        rate = self._seen / max(perf_counter() - self._start_s, 1e-9)
        shown = {"samples/s": f"{rate:,.0f}"} if self._seen else {}
        if "dropped" in self._latest:
            shown["dropped"] = f"{100 * self._latest['dropped'] / self._latest['seen']:.0f} %"
        if "variance_gain" in self._latest:
            shown["gradient noise"] = f"1/{self._latest['variance_gain']:.3g} of random choice's"
        return shown

    def _take(self, block: Block) -> dict[str, Any]:
        self._rounds += 1
        self._latest = round_figures(block)
        self._seen += self._latest.get("seen", len(block))
        return self._latest


def round_figures(block: Block) -> dict[str, Any]:
    """What a block of the pipeline says about its round.

    `samples` in the block; of the window `seen`, `dropped` by the filter and, at `--pace demand`, `missed` unlooked at;
    `candidates`, how many of them were `scored`, and `variance_gain`, the variance of random choice over that of this;
    what `select --strategy auto` decided.
    """
    figures: dict[str, Any] = {"samples": len(block)}
    if block.round is not None:
        figures["round"] = block.round
    figures["candidates"] = int(block.facts.get("candidates", len(block)))
    if "scored" in block.facts:
        figures["scored"] = int(block.facts["scored"])
    if "auto_batch" in block.facts:
        figures["strategy"] = str(block.facts["strategy"])
        figures |= {name: value for name, value in block.facts.items() if name.startswith("auto_")}
    for name in ("seen", "missed"):
        if name in block.per_class:
            figures[name] = int(block.per_class[name].sum())
    if figures.get("seen"):
        figures["dropped"] = figures["seen"] - figures["candidates"]
    variance, random = block.facts.get("variance"), block.facts.get("variance_random")
    if variance and random is not None:
        figures["variance_gain"] = float(random) / float(variance)
    return figures


def append(path: str, row: dict[str, Any]) -> None:
    """One JSON line at the end of a file."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
