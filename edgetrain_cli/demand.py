"""`filter --pace demand`: threads that keep the sensor flowing while candidates wait for downstream to ask."""

from __future__ import annotations

import array
import fcntl
import os
import queue
import stat
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgetrain_cli.options import STDIO
from edgetrain_cli.streams import Writer
from stages.errors import UsageError

if TYPE_CHECKING:
    from stages.artifacts.records import Block
    from stages.valuation.demand import DemandBuffer

PAUSE_S = 0.002
"""How long the scorer waits for samples before it looks downstream again."""
PIECE = 256
"""Samples of a file that are read at once."""


def serve(samples: Iterator[Block], demand: DemandBuffer, writer: Writer, on_round: Callable[[Block], None]) -> int:
    """Drain the sensor into the buffer and hand a round over whenever the pipe behind stdout is empty.

    One thread reads, one writes, this one scores. Returns the number of rounds; what has arrived when the stream ends
    makes the last one.
    """
    sensor, sender = Sensor(samples, demand), Sender(writer)
    rounds = 0
    while sensor.running or sensor.pending():
        sender.check()
        with sensor.guard():
            arrived = demand.take()
        if arrived is not None:
            demand.score(arrived)
        if demand.wants_to_close() and sender.idle and unread_bytes(1) == 0:
            rounds += hand_over(demand, sender, on_round)
        elif arrived is None:
            sensor.wait(PAUSE_S)
    if sensor.error is not None:
        raise sensor.error
    rounds += hand_over(demand, sender, on_round)
    sender.finish()
    return rounds


def hand_over(demand: DemandBuffer, sender: Sender, on_round: Callable[[Block], None]) -> bool:
    """Close a round and give it to the sender; whether there was one."""
    block = demand.close()
    if block is None:
        return False
    sender.send(block)
    on_round(block)
    return True


class Sensor:
    """Reads samples in a thread of its own, so that the source never waits for scoring or for downstream."""

    def __init__(self, samples: Iterator[Block], demand: DemandBuffer) -> None:
        self.error: BaseException | None = None
        self.running = True
        self._samples, self._demand = samples, demand
        self._lock, self._news, self._unseen = threading.Lock(), threading.Event(), False
        threading.Thread(target=self._read, daemon=True).start()

    def pending(self) -> bool:
        """Whether something has arrived that nobody has looked at."""
        return self._unseen

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Exclusive access to what has arrived."""
        with self._lock:
            yield
            self._unseen = False
            self._news.clear()

    def wait(self, longest_s: float) -> None:
        """Until something arrives or the stream ends."""
        self._news.wait(longest_s)

    def _read(self) -> None:
        try:
            for block in self._samples:
                for piece in block.slices(PIECE):
                    with self._lock:
                        self._demand.arrive(piece)
                        self._unseen = True
                        self._news.set()
        except BaseException as error:
            self.error = error
        finally:
            self.running = False
            self._news.set()


class Sender:
    """Writes one record at a time in a thread of its own."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._records: queue.Queue[Block | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether everything has been written."""
        return self._records.unfinished_tasks == 0

    def send(self, block: Block) -> None:
        """Have a record written; waits only while another one still is."""
        self._records.put(block)

    def check(self) -> None:
        """Raise what went wrong while writing."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until everything has been written."""
        self._records.put(None)
        self._thread.join()
        self.check()

    def _write(self) -> None:
        while (block := self._records.get()) is not None:
            try:
                if self._error is None:
                    self._writer.write(block)
            except BaseException as error:
                self._error = error
            finally:
                self._records.task_done()


def check_pipe(out: str) -> None:
    """Raise `UsageError` unless stdout is a pipe: only a pipe tells whether its reader is ready."""
    if out != STDIO or not stat.S_ISFIFO(os.fstat(1).st_mode):
        raise UsageError(
            "--pace", "demand without a pipe on stdout", "a stage that asks", "pipe into `edgetrain select`"
        )


def unread_bytes(descriptor: int) -> int:
    """Bytes in a pipe that its reader has not taken yet, seen from either end."""
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]
