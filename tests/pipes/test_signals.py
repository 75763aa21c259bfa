"""A signal ends a command wherever it arrives."""

import signal
import subprocess
import sys

from tests.pipes.conftest import ROOT

SWALLOWED = """
import os, signal, time, weakref
from edgetrain_cli import app
class Thing: pass
def work(prog_name):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del thing
    time.sleep(60)
app.application = lambda wanted: work
app.main()
"""


def test_a_signal_inside_a_weak_references_callback_is_not_lost():
    """Python drops what such a callback raises, and HDF5's handles have thousands of them."""
    command = [sys.executable, "-c", SWALLOWED]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=50, check=False)
    assert result.returncode == 128 + signal.SIGTERM
    assert result.stderr == b"edgetrain: interrupted\n"


TURNED = """
import os, signal, sys, typer
from edgetrain_cli import app
app.raise_on_signals()
def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        raise SystemError("a function returned a result with an exception set") from error
try:
    app.guarded("filter", work)()
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


def test_a_signal_that_a_library_turns_into_another_error_is_still_a_signal():
    """Python makes a SystemError of it where it strikes in compiled code that does not look at exceptions."""
    result = subprocess.run([sys.executable, "-c", TURNED], cwd=ROOT, capture_output=True, timeout=50, check=False)
    assert result.returncode == 128 + signal.SIGINT
    assert result.stderr == b"edgetrain filter: interrupted\n"
