"""A real terminal of 80 columns for commands to be watched in."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path
from time import monotonic
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Seen(NamedTuple):
    """What a command left behind."""

    code: int
    raw: str
    """Every character that was written."""
    screen: list[str]
    """The lines that stand there in the end."""


def watch(arguments, directory, *, columns=80, environment=None, stdin=None, shell=False, timeout_s=180) -> Seen:
    """Run `edgetrain ARGUMENTS`, or with `shell` a line of bash, with a terminal as stdout, stderr and (unless bytes
    are given) stdin."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    names = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    names |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", **(environment or {})}
    prelude = f'edgetrain() {{ "{sys.executable}" -m edgetrain_cli "$@"; }}\n'
    command = ["bash", "-c", prelude + arguments] if shell else [sys.executable, "-m", "edgetrain_cli", *arguments]
    process = subprocess.Popen(
        command, cwd=directory, env=names, stdout=follower, stderr=follower, start_new_session=True,
        stdin=follower if stdin is None else subprocess.PIPE,
    )  # fmt: skip
    os.close(follower)
    if stdin is not None:
        process.stdin.write(stdin)
        process.stdin.close()
    raw = _everything(leader, process, timeout_s)
    return Seen(process.wait(), raw, screen(raw))


def _everything(leader, process, timeout_s) -> str:
    found, end = b"", monotonic() + timeout_s
    while monotonic() < end:
        ready, _, _ = select.select([leader], [], [], 0.2)
        if ready:
            with contextlib.suppress(OSError):
                piece = os.read(leader, 1 << 16)
                found += piece
                if piece:
                    continue
            break
        if process.poll() is not None:
            break
    else:
        process.kill()
    os.close(leader)
    return found.decode("utf-8", "replace")


def screen(raw: str) -> list[str]:
    """What stands on the screen after carriage returns, cursor moves up and erasing; colours are left out."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", raw):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            count = int(part[2:-1]) if part[2:-1].isdecimal() else 0
            if part.endswith("A"):
                row = max(row - max(count, 1), 0)
            elif part.endswith("K"):
                lines[row] = lines[row][:column] if count == 0 else ""
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]
