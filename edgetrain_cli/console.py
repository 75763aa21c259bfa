"""What people see: notes, tables and progress on stderr, results as text."""

from __future__ import annotations

import os
import shutil
import sys
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from tqdm import tqdm

PLAIN_WIDTH = 100
"""Least width of a table that no terminal limits."""


def note(text: str) -> None:
    """One line on stderr; characters that the locale cannot write are escaped."""
    print(text, file=sys.stderr, flush=True)


def render(renderable: RenderableType, *, to_terminal: bool) -> str:
    """A rich table or tree as text; styled for a terminal unless NO_COLOR is set, plain and wide enough otherwise."""
    from io import StringIO

    from rich.console import Console

    width = shutil.get_terminal_size().columns if to_terminal else max(PLAIN_WIDTH, _columns())
    file = StringIO()
    console = Console(file=file, force_terminal=to_terminal, width=width, highlight=False, markup=False, emoji=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _columns() -> int:
    """The width that COLUMNS states; 0 where that is no number."""
    stated = os.environ.get("COLUMNS", "")
    return int(stated) if stated.isdecimal() else 0


def note_table(renderable: RenderableType) -> None:
    """A table on stderr."""
    sys.stderr.write(render(renderable, to_terminal=sys.stderr.isatty()))
    sys.stderr.flush()


class Progress:
    """One line on stderr that says what is being done, how far it is and how long it will take; it leaves no trace."""

    def __init__(self, doing: str, total: int | None, unit: str) -> None:
        self._doing, self._total, self.unit = doing, total, unit
        self._bar: tqdm[Any] | None = None
        self._start_s = monotonic()
        self.done = 0

    def __call__(self, done: int, **figures: Any) -> None:
        self.done = done
        if self._bar is None:  # with the first step, so that another stage's notes before it stand alone
            from tqdm import tqdm

            unit = f" {self.unit}"
            self._bar = tqdm(total=self._total, desc=self._doing, unit=unit, unit_scale=True, file=sys.stderr,
                             leave=False, dynamic_ncols=True)  # fmt: skip
        if figures:
            self._bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in figures.items()), refresh=False)
        self._bar.update(done - self._bar.n)

    def rate(self) -> str:
        """How fast it went; empty where nothing was done."""
        seconds = monotonic() - self._start_s
        return f"{self.done / seconds:,.3g} {self.unit}/s" if self.done and seconds > 0 else ""

    def clear(self) -> None:
        """Take the line away until it is drawn again."""
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        """Take the line away for good."""
        if self._bar is not None:
            self._bar.close()


def size(count: float) -> str:
    """Bytes in binary units.

    >>> size(900), size(1536), size(5 * 2**20)
    ('900 B', '1.5 KiB', '5 MiB')
    """
    names = ["B", "KiB", "MiB", "GiB"]
    while count >= 1024 and len(names) > 1:
        count, names = count / 1024, names[1:]
    return f"{count:.4g} {names[0]}"


def silent(done: int, **figures: Any) -> None:
    """The progress callback that shows nothing."""
