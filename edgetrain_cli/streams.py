"""The only user of stdin and stdout: a stage's inputs, its outputs, and the step it adds to the history."""

from __future__ import annotations

import fcntl
import io
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from edgetrain_cli import __version__, console
from edgetrain_cli.manners import Manners, NoInput, Stopped, check_terminal, pin
from edgetrain_cli.options import STDIO
from stages.errors import DataError, InputMissing, StreamBroken, TransferError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stages.artifacts.records import Block, End, Record, Run

PIPE_BYTES = 1 << 20
"""What a pipe that a stage reads from holds: what Linux allows everybody."""


class Stage(Manners):
    """What a command's function uses to read, write and report."""

    def __init__(
        self,
        command: str,
        recorded: Mapping[str, Any],
        *,
        quiet: bool = False,
        history: bool = True,
        max_record: str = "1GiB",
    ) -> None:
        from stages.planning.budget import parse_memory

        super().__init__(command, quiet=quiet)
        self.max_record_bytes = parse_memory(max_record, "--max-record")
        self._arguments = {name: base_names(value) for name, value in recorded.items()}
        self._keep_history = history
        self._inputs: dict[str, str] = {}
        self.text_only = False
        """Whether the command shows its result instead of writing records."""

    @classmethod
    @contextmanager
    def of(
        cls,
        command: str,
        recorded: Mapping[str, Any],
        *,
        out: str | None = None,
        writes: str = "records",
        cpus: str | None = None,
        **manners: Any,
    ) -> Iterator[Stage]:
        """A command's stage for as long as its function runs.

        Args:
            command: as the user types it.
            recorded: the arguments that affect the result, for the history.
            out: where its result goes, if there is one.
            writes: `records` (refused on a terminal) or `text`.
        """
        pin(cpus)
        if out is not None and writes == "records":
            check_terminal(out)
        made, well = cls(command, recorded, **manners), False
        made.text_only = writes == "text"
        try:
            yield made
            well = True
        finally:
            made.close(well=well)

    # -- reading

    def read_run(self, source: str = STDIO, run_file: str | None = None) -> Run:
        """The run record of `source`, or of `run_file` when that is given."""
        run, blocks = self.read_stream(run_file or source, lone=True)
        if run is None:
            fix = "make one with `edgetrain import` or `edgetrain pretrain-fsl`"
            raise DataError(name_of(run_file or source), "sample blocks", "a run record", fix)
        if next(blocks, None) is not None:
            fix = f"`edgetrain {self.command}` takes no stream"
            raise DataError(name_of(run_file or source), "blocks after the run record", "the run record alone", fix)
        return run

    def read_stream(
        self, source: str = STDIO, run_file: str | None = None, *, lone: bool = False
    ) -> tuple[Run | None, Iterator[Block]]:
        """The run record that a stream begins with (or `run_file` holds), and its blocks, read one by one.

        The blocks' iterator raises `StreamBroken` when a stream of rounds ends without its end mark, or when nothing
        follows the run record at all, unless that may stand `lone`.
        """
        from stages.artifacts.records import Run

        where, records = name_of(source), self._records(source)
        run = self.read_run(run_file) if run_file is not None else None
        first = next(records)
        if isinstance(first, Run):
            if run is not None:
                found, fix = "a run record at the start of the stream", "leave out one of the two"
                raise DataError(where, found, "blocks only beside --run", fix)
            run = self._known(first, source)
            return run, rounds(records, where, lone=lone)
        return run, rounds(_with_first(first, records), where)

    def read_samples(self, path: str) -> Block:
        """The samples of a file, or of stdin, as one block; a file of one block stays on disk until it is sliced."""
        from stages.artifacts.records import Run
        from stages.data.blocks import join_blocks

        _, blocks = self.read_stream(path, lone=True)
        found = list(blocks)
        if not found or any(isinstance(block, Run) for block in found):
            raise DataError(name_of(path), "no sample blocks", "samples", "make them with `edgetrain pack`")
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
        return records(file, name_of(source), max_record_bytes=self.max_record_bytes)

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
            writer = Writer(self, write_stdout)
            yield writer
        else:
            with AtomicFile(Path(out)) as file:
                writer = Writer(self, file.write)
                yield writer
        if out == STDIO and stat.S_ISFIFO(os.fstat(1).st_mode):
            return  # the stage behind this one says what came of it
        self.written = f"{console.size(writer.bytes)} to {'stdout' if out == STDIO else os.path.basename(out)}"

    def stamped(self, run: Run) -> Run:
        """The run with this step in its history."""
        from stages.artifacts.history import with_step

        if not self._keep_history:
            return run
        return with_step(run, self.command, __version__, self._arguments, self._inputs)

    def write_text(self, text: str, out: str = STDIO) -> None:
        """Write text as the command's result."""
        self.write_bytes(text.encode(errors="surrogateescape"), out)

    def write_bytes(self, data: bytes, out: str = STDIO) -> None:
        """Write a file of another format as the command's result."""
        with self.writer(out) as writer:
            writer.put(data)
        if out == STDIO:
            self.written = ""

    def show(self, renderable: RenderableType, out: str = STDIO) -> None:
        """A table as the command's result: on stdout, styled where that is a terminal, or in a file."""
        styled = out == STDIO and sys.stdout is not None and sys.stdout.isatty()
        self.write_text(console.render(renderable, to_terminal=styled), out)

    def result(self, renderable: RenderableType) -> None:
        """A table that is the result where no record is written, and else tells about it."""
        if self.text_only:
            self.show(renderable)
        else:
            self.note_table(renderable)


class Writer:
    """Writes records to one output."""

    def __init__(self, owner: Stage, put: Callable[[bytes | memoryview], None]) -> None:
        self._owner, self._put = owner, put
        self.bytes = 0

    def write(self, record: Record) -> None:
        """Write one record, a run with its history brought up to date."""
        from stages.artifacts.hdf5 import encode
        from stages.artifacts.records import Run

        self.put(encode(self._owner.stamped(record) if isinstance(record, Run) else record))

    def write_text(self, text: str) -> None:
        """Write a piece of text."""
        self.put(text.encode(errors="surrogateescape"))

    def put(self, data: bytes | memoryview) -> None:
        """Write bytes; the progress line makes room for them on a terminal."""
        self._owner.clear()
        self.bytes += len(data)
        self._put(data)


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


def widen(descriptor: int) -> None:
    """Let a pipe take a whole batch of pictures, so that its writer can go on while the reader is busy."""
    with suppress(OSError, AttributeError):  # an option of Linux, within limits of the system's
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def rounds(records: Iterator[Record], where: str, *, lone: bool = True) -> Iterator[Block]:
    """The blocks of a stream; checks what follows what.

    Raises:
        DataError: a second run record, or anything behind the end mark.
        StreamBroken: rounds without an end mark, or, unless the run record may stand `lone`, nothing at all.
    """
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
        last_round, lone = record.round if record.round is not None else last_round, True
        yield record
        del record  # before the next one is read: blocks may be large
    if last_round is not None or not lone:
        found = "nothing after the run record" if last_round is None else f"the stream broke after round {last_round}"
        expected = "sample blocks" if last_round is None else "an end mark"
        raise StreamBroken(where, found, expected, "if the stage before this one failed, its message says why")


def _with_first(first: Block | End, rest: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from rest


def read_checkpoint(path: str, command: str = "train-sparse") -> Run:
    """The checkpoint in a file."""
    from stages.artifacts.records import Run
    from stages.artifacts.stream import open_records

    record = next(open_records(path))
    if not isinstance(record, Run):
        raise DataError(path, "sample blocks", f"a checkpoint of `edgetrain {command} --checkpoint`")
    return record


def write_stdout(data: bytes | memoryview) -> None:
    """Every byte to stdout."""
    from stages.artifacts.files import write_all

    if sys.stdout is None:  # closed by `>&-`: descriptor 1 may be another file by now
        raise TransferError("stdout", "closed", "an open stdout", "name a file with -o")
    write_all(1, data)


def base_names(value: Any) -> Any:
    """An argument as the history keeps it: paths as base names."""
    if isinstance(value, list | tuple):
        return [base_names(item) for item in value]
    if isinstance(value, str) and os.sep in value and os.path.exists(value):
        return os.path.basename(value)
    return value


def name_of(source: str) -> str:
    """What messages call an input."""
    return "stdin" if source == STDIO else os.path.basename(source)
