"""`edgetrain run`: the stages of a pipeline as forks of one process that has imported the libraries once.

Nothing is computed before the fork, so the children share the libraries' memory and start no thread pool they would
not use. They are connected by real pipes and write the same artifacts as the shell's pipeline.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from stages.errors import UsageError

LIVE_VARIABLE = "EDGETRAIN_LIVE"
PRELOADED = (
    "numpy.ma",  # which `numpy.unique` imports: 7 MB in each stage otherwise
    "edgetrain_cli.demand",
    "edgetrain_cli.status",
    "stages.artifacts.stream",
    "stages.engines.native.net",
    "stages.filtering",
    "stages.planning.budget",
    "stages.selection",
    "stages.sparse_training",
)
_SET_PARENT_DEATH_SIGNAL = 1


@dataclass(frozen=True)
class Ended:
    """How one stage of the pipeline ended, in the order in which they did."""

    position: int
    command: str
    code: int


def parse_pipeline(text: str, commands: Sequence[str]) -> list[list[str]]:
    """The argument lists of `'filter --keep 30 | select | train-sparse -o out.h5'`.

    Raises:
        UsageError: an empty stage, an unknown command, unbalanced quotes.
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|")
    lexer.whitespace_split = True
    stages: list[list[str]] = [[]]
    try:
        for token in lexer:
            if token == "|":
                stages.append([])
            else:
                stages[-1].append(token)
    except ValueError as error:
        raise UsageError("PIPELINE", f"{text!r} ({error})", "balanced quotes") from error
    stages = [words[1:] if words[:1] == ["edgetrain"] else words for words in stages]
    for words in stages:
        if not words or words[0] not in commands or words[0] == "run":
            known = ", ".join(name for name in commands if name != "run")
            raise UsageError("PIPELINE", f"stage {' '.join(words) or '(empty)'!r}", f"a command: {known}")
    return stages


def run_pipeline(stages: Sequence[Sequence[str]], run_stage: Callable[[Sequence[str]], int]) -> int:
    """Fork one process per stage, wait for all, and return the pipeline's exit code.

    The code is that of the stage that failed first, a stage that merely lost its reader (SIGPIPE) not counted.
    """
    preload(torch=any("torch" in word or "cuda" in word for words in stages for word in words))
    live = None
    way_back = {"select", "train-sparse"} <= {words[0] for words in stages}
    if way_back and LIVE_VARIABLE not in os.environ and not any("--live" in words for words in stages):
        live = os.environ[LIVE_VARIABLE] = tempfile.mkdtemp(prefix="edgetrain-live-")
    try:
        children = start(stages, run_stage)
        with _forwarding(list(children)):
            return exit_code(_wait(children, stages))
    finally:
        if live is not None:
            shutil.rmtree(live, ignore_errors=True)


def preload(*, torch: bool = False) -> None:
    """Import what the stages share, once, and keep the garbage collector from touching it after the fork.

    `torch`: with PyTorch, where it is installed, because a stage asks for it.
    """
    for module in (*PRELOADED, *(["torch"] if torch and find_spec("torch") else [])):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()


def exit_code(ended: Sequence[Ended]) -> int:
    """What the pipeline reports, from its stages in the order in which they ended.

    >>> exit_code([Ended(2, "train-sparse", 74), Ended(1, "select", 141), Ended(0, "filter", 141)])
    74
    """
    failures = [stage.code for stage in ended if stage.code]
    return next((code for code in failures if code != 128 + signal.SIGPIPE), failures[0] if failures else 0)


def start(stages: Sequence[Sequence[str]], run_stage: Callable[[Sequence[str]], int]) -> dict[int, int]:
    """Fork the stages with pipes between them; process id -> position."""
    children: dict[int, int] = {}
    source = 0
    for position, words in enumerate(stages):
        last = position == len(stages) - 1
        reading, writing = (-1, 1) if last else os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become(words, source, writing, reading, run_stage)
        children[child] = position
        for descriptor in (source, writing):
            if descriptor > 2:
                os.close(descriptor)
        source = reading
    return children


def _become(
    words: Sequence[str], source: int, sink: int, unused: int, run_stage: Callable[[Sequence[str]], int]
) -> None:
    """In the child: take the pipes as stdin and stdout, run the stage, and never return."""
    code = 70
    try:
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent alone, which forwards it once
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if unused > 2:
            os.close(unused)
        if source != 0:
            os.dup2(source, 0)
            os.close(source)
        if sink != 1:
            os.dup2(sink, 1)
            os.close(sink)
        code = run_stage(words)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _forwarding(children: Sequence[int]):  # type: ignore[no-untyped-def]
    def forward(number: int, frame: object) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: dict[int, int], stages: Sequence[Sequence[str]]) -> list[Ended]:
    ended: list[Ended] = []
    while len(ended) < len(children):
        # of several that ended since the last look, one behind another may have failed in consequence
        for child, status in sorted(_reaped(), key=lambda each: children[each[0]]):
            code = os.waitstatus_to_exitcode(status)
            position = children[child]
            ended.append(Ended(position, stages[position][0], 128 - code if code < 0 else code))
            if code < 0 and -code != signal.SIGPIPE:
                name = signal.Signals(-code).name
                print(f"edgetrain run: {stages[position][0]} was ended by {name}", file=sys.stderr, flush=True)
    return ended


def _reaped() -> list[tuple[int, int]]:
    """Process id and status of every child that has ended by now, at least of one."""
    found = [os.wait()]
    with contextlib.suppress(ChildProcessError):
        while (last := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            found.append(last)
    return found
