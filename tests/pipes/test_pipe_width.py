"""A pipe that a stage reads from holds a whole batch."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from edgetrain_cli.streams import PIPE_BYTES

ROOT = Path(__file__).parents[2]
ALLOWED = Path("/proc/sys/fs/pipe-max-size")


@pytest.mark.skipif(not ALLOWED.exists() or int(ALLOWED.read_text()) < PIPE_BYTES, reason="the system's limit is lower")
def test_the_reader_widens_its_pipe():
    reading, writing = os.pipe()
    command, environment = [sys.executable, "-m", "edgetrain_cli", "inspect"], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=reading, stdout=PIPE, stderr=PIPE, env=environment)
    try:
        deadline = time.monotonic() + 60
        while fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ) < PIPE_BYTES:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for descriptor in (reading, writing):
            os.close(descriptor)
        _, message = process.communicate(timeout=60)
    assert b"an empty stream" in message
