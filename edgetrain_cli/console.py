"""What people see: notes, tables and progress on stderr, results as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def render(renderable: RenderableType, *, to_terminal: bool) -> str:
    """A rich table or tree as text; styled for a terminal unless NO_COLOR is set, plain and wide enough otherwise."""
    from io import StringIO

    from rich.console import Console

    width = None if to_terminal else max(100, int(os.environ.get("COLUMNS", 100)))
    file = StringIO()
    Console(file=file, force_terminal=to_terminal, width=width, highlight=False).print(renderable)
    return file.getvalue()


def note_table(renderable: RenderableType) -> None:
    """A table on stderr."""
    sys.stderr.write(render(renderable, to_terminal=sys.stderr.isatty()))
    sys.stderr.flush()


def progress(label: str, total: int | None) -> Callable[..., None]:
    """A progress bar: call it with the number done so far and, if you like, figures to show beside it."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc=label, file=sys.stderr, leave=True, dynamic_ncols=True)

    def report(done: int, **figures: Any) -> None:
        if figures:
            bar.set_postfix(figures, refresh=False)
        bar.update(done - bar.n)
        if total is not None and done >= total:
            bar.close()

    return report


def silent(done: int, **figures: Any) -> None:
    """The progress callback that shows nothing."""
