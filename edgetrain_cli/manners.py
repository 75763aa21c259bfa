"""A command's manners: processors, signals, what it says on stderr, and the refusal of outputs that cannot work."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from edgetrain_cli import console
from edgetrain_cli.options import STDIO
from stages.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stages.measurement.room import Fit

VIEWERS = frozenset(["cat", "tail", "head", "less", "more", "most", "bat", "tee", "grep", "wc"])
"""Programs that show text: what they read from a pipe ends on the terminal that they write to."""


class Stopped(BaseException):
    """SIGINT or SIGTERM asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class NoInput(Exception):
    """Nothing was named and stdin is a terminal: the usage is the best answer."""


class Manners:
    """What a command says while it runs, and how it ends when it is asked to."""

    def __init__(self, command: str, *, quiet: bool = False) -> None:
        self.command, self.quiet = command, quiet
        self.written = ""
        """What has been written where, for the closing line."""
        self._start_s = perf_counter()
        self._summary: list[str] = []
        self._progress: console.Progress | None = None
        self._signal = 0
        self._waiting = False

    @property
    def talks(self) -> bool:
        """Whether somebody watches: stderr is a terminal, and not told to be quiet."""
        return not self.quiet and _is_terminal(sys.stderr)

    def note(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        if not self.quiet:
            self.clear()
            console.note(f"edgetrain {self.command}: {text}")

    def note_table(self, renderable: RenderableType) -> None:
        """A table on stderr, unless quiet."""
        if not self.quiet:
            self.clear()
            console.note_table(renderable)

    def progress(self, doing: str, total: int | None = None, unit: str = "samples") -> Callable[..., None]:
        """A line on stderr that says what is being done, when that is a terminal; call it with the number done."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        if not self.talks:
            return console.silent
        self._progress = console.Progress(doing, total, unit)
        return self._progress

    def holds(self, fit: Fit) -> None:
        """Say what is going to be held in memory: to a terminal always, elsewhere where it may not be enough."""
        if fit.tight:
            self.note(f"{fit}; it may not suffice: use a smaller model, image or task, or free some memory")
        elif self.talks:
            self.note(str(fit))

    def clear(self) -> None:
        """Take the progress line away, so that what is written next stands alone; it comes back by itself."""
        if self._progress is not None:
            self._progress.clear()

    def did(self, *figures: str) -> None:
        """Figures for the closing line."""
        self._summary = [figure for figure in figures if figure]

    def close(self, *, well: bool) -> None:
        """The end: no progress line is left; on a terminal a line says what was done, how fast, and where it is."""
        seconds, rate = perf_counter() - self._start_s, ""
        if self._progress is not None:
            self._progress.close()
            rate = self._progress.rate()
        if well and self.talks and (self._summary or self.written or rate):
            parts = [*self._summary, f"{seconds:.1f} s", rate, self.written]
            console.note(f"edgetrain {self.command}: " + ", ".join(part for part in parts if part))

    # -- signals and neighbours

    def finish_on_signals(self) -> None:
        """From now on SIGINT and SIGTERM let the running update finish; reading ends as if the input had."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def stop_requested(self) -> int:
        """The signal that asked the command to end, or 0."""
        return self._signal

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = number
        if self._waiting:
            raise Stopped(number)

    def check_downstream(self) -> None:
        """Raise `BrokenPipeError` when the reader of stdout has gone."""
        poll = select.poll()
        poll.register(1, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            raise BrokenPipeError


def figures_only(arguments: Mapping[str, Any]) -> str:
    """What a command that can show its result writes: text for --json, or typed at a terminal, without -o."""
    shows = arguments["out"] == STDIO and (arguments.get("as_json") or _is_terminal(sys.stdout))
    return "text" if shows else "records"


def check_input(arguments: Mapping[str, Any]) -> None:
    """Raise `NoInput` where nothing is named and stdin is a terminal."""
    alone = arguments.get("source") == STDIO and arguments.get("run_file") is None
    if alone and _is_terminal(sys.stdin):
        raise NoInput


def check_terminal(out: str) -> None:
    """Refuse binary output that would end on a terminal, directly or through a program that shows text."""
    if out != STDIO:
        return
    fix = "use -o FILE or > FILE"
    if _is_terminal(sys.stdout):
        raise UsageError("stdout", "a terminal", "a file or a pipe for HDF5", fix)
    viewer = viewer_behind(1)
    if viewer:
        raise UsageError("stdout", f"a terminal behind `{viewer}`", "a file or another stage for HDF5", fix)


def viewer_behind(descriptor: int) -> str:
    """The program that shows on a terminal what it reads from this pipe of ours; empty where there is none known.

    Looks at the processes of this session, where the kernel shows them (Linux).
    """
    try:
        pipe = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
    if not pipe.startswith("pipe:"):
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd" / "0") == pipe and os.readlink(process / "fd" / "1").startswith("/dev/pts/"):
                name = (process / "comm").read_text().strip()
                if name in VIEWERS:
                    return name
        except OSError:  # another user's, or gone
            continue
    return ""


def pin(cpus: str | None) -> None:
    """Pin this process to processors and let torch use as many threads."""
    if cpus is None:
        return
    try:
        wanted = sorted({int(part) for part in cpus.split(",")})
        os.sched_setaffinity(0, wanted)
    except (ValueError, OSError) as error:
        there = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise UsageError("--cpus", repr(cpus), f"processors of this machine, some of {there}") from error
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(len(wanted))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(len(wanted))


def _is_terminal(stream: object) -> bool:
    """Whether a standard stream is a terminal; one that was closed (`>&-`) is none."""
    return stream is not None and stream.isatty()  # type: ignore[attr-defined]
