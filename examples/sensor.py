"""A sensor: sends the samples of a block file at a fixed rate and counts how often it was made to wait.

    python examples/sensor.py stream.h5 --rate 200 --seconds 10 --run run.h5 |
        edgetrain filter --pace demand --window 30 | edgetrain select | edgetrain train-sparse -o adapted.h5

A stall is a record (one sample, or --per-record) that could not be handed over before the next was due. The clock
starts when the first has been taken in, for a sensor is switched on when there is somebody to listen. It ends with one
line on stderr.
"""

from __future__ import annotations

import argparse
import array
import fcntl
import os
import select
import sys
import termios
import time
from itertools import count, cycle, islice
from pathlib import Path

from stages.artifacts.hdf5 import encode
from stages.artifacts.records import Block
from stages.artifacts.stream import open_records
from stages.data.blocks import rebatch


def images(path: str, most: int, size: int) -> list[bytes]:
    """The first samples of a file, so many to a record."""
    blocks = (record for record in open_records(path) if isinstance(record, Block))
    pieces = (piece for piece in rebatch(blocks, size) if len(piece) == size)
    found = [encode(piece) for piece in islice(pieces, max(1, most // size))]
    if not found:
        raise SystemExit(
            f"{path}: fewer than the {size} samples of a record: give a larger file or a smaller --per-record"
        )
    return found


def unread_bytes() -> int:
    """Bytes on stdout's pipe that nobody has taken yet."""
    number = array.array("i", [0])
    fcntl.ioctl(1, termios.FIONREAD, number)
    return number[0]


def watch_reader() -> None:
    """Raise `BrokenPipeError` when the reader has gone."""
    poll = select.poll()
    poll.register(1, 0)
    if any(event & select.POLLERR for _, event in poll.poll(0)):
        raise BrokenPipeError


def hand_over(data: bytes, due_s: float) -> bool:
    """Write all of it; whether that was done in time."""
    view, late = memoryview(data), False
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:
            select.select([], [1], [], min(max(due_s - time.perf_counter(), 0.001), 1.0))
        late = late or (bool(view) and time.perf_counter() > due_s)
    return not late


def run(samples: list[bytes], rate: float, seconds: float) -> tuple[int, int]:
    """Send records at a rate until the time is up; how many there were and how many stalled."""
    hand_over(samples[0], float("inf"))
    while unread_bytes():
        watch_reader()
        time.sleep(0.01)
    stalls, start_s = 0, time.perf_counter()
    for number, data in zip(count(1), cycle(samples), strict=False):
        due_s = start_s + number / rate
        if due_s > start_s + seconds:
            return number, stalls
        time.sleep(max(due_s - time.perf_counter(), 0.0))
        stalls += not hand_over(data, due_s + 1.0 / rate)
    raise AssertionError("the stream is endless")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("--rate", type=float, default=100.0, help="samples per second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--run", help="a run record to send first")
    parser.add_argument("--per-record", type=int, default=1, help="samples that are handed over together")
    parser.add_argument("--distinct", type=int, default=500, help="samples to read; they are sent over and over")
    options = parser.parse_args()
    os.set_blocking(1, False)
    try:
        if options.run is not None:
            hand_over(Path(options.run).read_bytes(), float("inf"))
        size = options.per_record
        sent, stalls = run(images(options.samples, options.distinct, size), options.rate / size, options.seconds)
    except BrokenPipeError:
        sys.exit(141)
    print(f"sensor: {sent * size} samples, {stalls} stalls", file=sys.stderr)


if __name__ == "__main__":
    main()
