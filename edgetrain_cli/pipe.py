"""The only user of stdin and stdout: a stage's inputs, outputs, history and manners."""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from edgetrain_cli import __version__, console
from stages.errors import DataError, InputMissing, StreamBroken, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stages.artifacts.records import Block, End, Record, Run

STDIO = "-"
PIPE_BYTES = 1 << 20
"""What a pipe that a stage reads from holds: what Linux allows everybody."""
NOT_IN_HISTORY = frozenset(
    {
        "out",
        "quiet",
        "cpus",
        "as_json",
        "only_json",
        "plot",
        "metrics",
        "history",
        "max_record",
        "live",
        "live_keep",
        "resume",
        "replayed",
        "support",
        "cache_file",
        "checkpoint",
        "checkpoint_every",
        "source",
        "run_file",
        "arch",
    }
)
"""Arguments that do not affect the result, or that the history names as inputs."""


class Stopped(BaseException):
    """SIGINT or SIGTERM asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class NoInput(Exception):
    """Nothing was named and stdin is a terminal: the usage is the best answer."""


@contextmanager
def stage(command: str, arguments: Mapping[str, Any], *, writes: str = "records") -> Iterator[Stage]:
    """Run a command's body: pins processors, checks the output before any work, offers inputs and outputs.

    Args:
        command: as the user types it.
        arguments: the command function's `locals()`; those that affect the result enter the history.
        writes: `records` (refused on a terminal) or `text`.
    """
    pin(arguments.get("cpus"))
    out = arguments.get("out")
    if out is not None:
        check_output(out, binary=writes == "records")
    yield Stage(command, dict(arguments))


class Stage:
    """What a command's body uses to read, write and report."""

    def __init__(self, command: str, arguments: dict[str, Any]) -> None:
        from stages.planning.budget import parse_memory

        self.command = command
        self.quiet = bool(arguments.get("quiet"))
        self.max_record_bytes = parse_memory(arguments.get("max_record") or "1GiB", "--max-record")
        self._arguments = {name: _recorded(value) for name, value in arguments.items() if name not in NOT_IN_HISTORY}
        self._keep_history = bool(arguments.get("history", True))
        self._inputs: dict[str, str] = {}
        self._signal = 0
        self._waiting = False

    # -- reading

    def read_run(self, source: str = STDIO, run_file: str | None = None) -> Run:
        """The run record of `source`, or of `run_file` when that is given."""
        run, blocks = self.read_stream(run_file or source)
        if run is None:
            raise DataError(
                _where(run_file or source),
                "sample blocks",
                "a run record",
                "make one with `edgetrain import` or `edgetrain pretrain-fsl`",
            )
        if next(blocks, None) is not None:
            raise DataError(
                _where(run_file or source),
                "blocks after the run record",
                "the run record alone",
                f"`edgetrain {self.command}` takes no stream",
            )
        return run

    def read_stream(self, source: str = STDIO, run_file: str | None = None) -> tuple[Run | None, Iterator[Block]]:
        """The run record that a stream begins with (or `run_file` holds), and its blocks, read one by one.

        The blocks' iterator raises `StreamBroken` when a stream of rounds ends without its end mark.
        """
        from stages.artifacts.records import Run

        where, records = _where(source), self._records(source)
        run = self.read_run(run_file) if run_file is not None else None
        first = next(records)
        if isinstance(first, Run):
            if run is not None:
                raise DataError(
                    where,
                    "a run record at the start of the stream",
                    "blocks only beside --run",
                    "leave out one of the two",
                )
            run = self._known(first, source)
            return run, _rounds(records, where)
        return run, _rounds(_with_first(first, records), where)

    def read_samples(self, path: str) -> Block:
        """The samples of a file, or of stdin, as one block; a file of one block stays on disk until it is sliced."""
        from stages.artifacts.records import Run
        from stages.data.blocks import join_blocks

        _, blocks = self.read_stream(path)
        found = list(blocks)
        if not found or any(isinstance(block, Run) for block in found):
            raise DataError(_where(path), "no sample blocks", "samples", "make them with `edgetrain pack`")
        return found[0] if len(found) == 1 else join_blocks(found)

    def read_records(self, source: str = STDIO) -> Iterator[Record]:
        """Every record of a stream as it comes, the end mark too; for looking at it."""
        return self._records(source)

    def named(self, path: str) -> Path:
        """A named input file: it exists, and its hash enters the history."""
        from stages.artifacts.history import file_hash

        file = Path(path)
        if not file.exists():
            raise InputMissing(path, "no such file")
        if file.is_file():
            self._input(file.name, file_hash(file))
        return file

    def _input(self, name: str, digest: str) -> None:
        """Remember an input; of two with one name both are kept."""
        known, number = name, 2
        while self._inputs.get(known, digest) != digest:
            known, number = f"{name} ({number})", number + 1
        self._inputs[known] = digest

    def _records(self, source: str) -> Iterator[Record]:
        from stages.artifacts.stream import is_regular, open_records, records

        if source != STDIO:
            if not self.named(source).is_fifo():
                return open_records(source, max_record_bytes=self.max_record_bytes)
            descriptor = os.open(source, os.O_RDONLY)
        elif sys.stdin is None or sys.stdin.isatty():
            raise NoInput
        else:
            descriptor = sys.stdin.fileno()
        raw = cast(BinaryIO, io.FileIO(descriptor, closefd=False))
        file = raw if is_regular(raw) else cast(BinaryIO, io.BufferedReader(Watched(self, descriptor), 1 << 16))
        return records(file, _where(source), max_record_bytes=self.max_record_bytes)

    def _known(self, run: Run, source: str) -> Run:
        from stages.artifacts.history import run_hash

        self._inputs["run" if source == STDIO else Path(source).name] = run_hash(run)
        return run

    # -- writing

    def write(self, record: Record, out: str = STDIO) -> None:
        """Write one record; a run record first gets this step in its history."""
        with self.writer(out) as writer:
            writer.write(record)

    @contextmanager
    def writer(self, out: str = STDIO) -> Iterator[Writer]:
        """Write records one after another: a file appears when all are written, a pipe gets each at once."""
        from stages.artifacts.files import AtomicFile

        if out == STDIO:
            yield Writer(self, lambda data: write_stdout(data))
            return
        with AtomicFile(Path(out)) as file:
            yield Writer(self, file.write)

    def stamped(self, run: Run) -> Run:
        """The run with this step in its history."""
        from stages.artifacts.history import with_step

        if not self._keep_history:
            return run
        return with_step(run, self.command, __version__, self._arguments, self._inputs)

    def write_text(self, text: str, out: str = STDIO) -> None:
        """Write text as the command's result."""
        self.write_bytes(text.encode(), out)

    def write_bytes(self, data: bytes, out: str = STDIO) -> None:
        """Write a file of another format as the command's result."""
        from stages.artifacts.files import AtomicFile

        if out == STDIO:
            write_stdout(data)
            return
        with AtomicFile(Path(out)) as file:
            file.write(data)

    def show(self, renderable: RenderableType) -> None:
        """A table as the command's result, on stdout."""
        write_stdout(console.render(renderable, to_terminal=sys.stdout.isatty()).encode())

    # -- reporting

    def note(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        if not self.quiet:
            console.note(f"edgetrain {self.command}: {text}")

    def note_table(self, renderable: RenderableType) -> None:
        """A table on stderr, unless quiet."""
        if not self.quiet:
            console.note_table(renderable)

    def progress(self, label: str, total: int | None = None) -> Callable[..., None]:
        """A progress bar on stderr when that is a terminal; call it with the number done so far."""
        if self.quiet or not sys.stderr.isatty():
            return console.silent
        return console.progress(label, total)

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


class Writer:
    """Writes records to one output."""

    def __init__(self, owner: Stage, put: Callable[[bytes | memoryview], None]) -> None:
        self._owner, self._put = owner, put

    def write(self, record: Record) -> None:
        """Write one record, a run with its history brought up to date."""
        from stages.artifacts.hdf5 import encode
        from stages.artifacts.records import Run

        self._put(encode(self._owner.stamped(record) if isinstance(record, Run) else record))

    def write_text(self, text: str) -> None:
        """Write a piece of text."""
        self._put(text.encode())


def widen(descriptor: int) -> None:
    """Let a pipe take a whole batch of pictures, so that its writer can go on while the reader is busy."""
    with suppress(OSError, AttributeError):  # an option of Linux, within limits of the system's
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


class Watched(io.RawIOBase):
    """A pipe, read while watching stdout: when the reader of our output leaves, waiting is over."""

    def __init__(self, owner: Stage, descriptor: int) -> None:
        widen(descriptor)
        self._owner, self._descriptor = owner, descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._poll.register(1, 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._owner._waiting = True
        try:
            while True:
                if self._owner.stop_requested():
                    return 0
                events = dict(self._poll.poll())
                if events.get(1, 0) & select.POLLERR:
                    raise BrokenPipeError
                if self._descriptor in events:
                    break
            return os.readv(self._descriptor, [buffer])
        except Stopped:
            if not self._owner.stop_requested():
                raise
            return 0
        finally:
            self._owner._waiting = False


def _rounds(records: Iterator[Record], where: str) -> Iterator[Block]:
    """The blocks of a stream; checks what follows what."""
    from stages.artifacts.records import End, Run

    last_round: int | None = None
    for record in records:
        if isinstance(record, Run):
            raise DataError(where, "a second run record", "blocks after the first", "join one run with one stream")
        if isinstance(record, End):
            after = next(records, None)
            if after is not None:
                raise DataError(where, "records after the end mark", "the end of the stream")
            return
        last_round = record.round if record.round is not None else last_round
        yield record
        del record  # before the next one is read: blocks may be large
    if last_round is not None:
        raise StreamBroken(
            where,
            f"the stream broke after round {last_round}",
            "an end mark",
            "the stage before this one died; its message says why",
        )


def _with_first(first: Block | End, rest: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from rest


def read_checkpoint(path: str) -> Run:
    """The checkpoint in a file."""
    from stages.artifacts.records import Run
    from stages.artifacts.stream import open_records

    record = next(open_records(path))
    if not isinstance(record, Run):
        raise DataError(path, "sample blocks", "a checkpoint of `edgetrain train-sparse --checkpoint`")
    return record


def write_stdout(data: bytes | memoryview) -> None:
    """Every byte to stdout."""
    from stages.artifacts.files import write_all

    write_all(1, data)


def check_output(out: str, *, binary: bool) -> None:
    """Refuse an output that cannot work before anything is computed."""
    from stages.artifacts.files import check_writable

    if out != STDIO:
        check_writable(Path(out))
    elif binary and sys.stdout is not None and sys.stdout.isatty():
        raise UsageError("stdout", "a terminal", "a file or a pipe for HDF5", "use -o FILE or > FILE")


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


def _recorded(value: Any) -> Any:
    """An argument as the history keeps it: paths as base names."""
    if isinstance(value, list | tuple):
        return [_recorded(item) for item in value]
    if isinstance(value, str) and os.sep in value and os.path.exists(value):
        return os.path.basename(value)
    return value


def _where(source: str) -> str:
    return "stdin" if source == STDIO else os.path.basename(source)
