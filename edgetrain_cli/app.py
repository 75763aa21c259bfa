"""The command `edgetrain`: which commands there are, and how an error becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import typer

from edgetrain_cli import __version__
from edgetrain_cli.libraries import import_numpy, keep_freed_memory
from edgetrain_cli.manners import NoInput, Stopped
from edgetrain_cli.settings import for_typer
from stages.errors import EdgeTrainError, TransferError


class Listed(NamedTuple):
    """A command as the list of commands has it."""

    target: str
    """`module:function` in `edgetrain_cli.commands`."""
    summary: str
    """The first line of its help text (a test holds them equal): a list of commands imports none of them."""


COMMANDS: dict[str, Listed] = {
    "pretrain-fsl": Listed("pretrain_fsl:pretrain_fsl", "Meta-train a backbone for few-shot learning."),
    "profile": Listed("profile:profile", "Measure what a model costs on this device."),
    "score-layers": Listed("score_layers:score_layers", "Choose the layers and channels that train."),
    "filter": Listed("filter_samples:filter_samples", "Keep the candidates of a stream worth scoring."),
    "select": Listed("select_samples:select_samples", "Choose the batches worth training on."),
    "train-sparse": Listed("train_sparse:train_sparse", "Train exactly the live channels of a plan."),
    "adapt": Listed("adapt:adapt", "From photos to a model: profile, plan, train and check."),
    "evaluate": Listed("evaluate:evaluate", "Accuracy with its 95 % interval."),
    "predict": Listed("predict:predict", "Label samples, a folder of pictures or a single one."),
    "pack": Listed("pack:pack", "Turn your data into sample blocks."),
    "import": Listed("import_weights:import_weights", "Make a run record from a model or its weights."),
    "export": Listed("export:export", "Write the trained model for other tools, or as a C program."),
    "inspect": Listed("inspect_artifact:inspect_artifact", "Show what is in an artifact or a stream."),
    "join": Listed("join:join", "Join blocks into one."),
    "run": Listed("run:run", "Run a pipeline of stages as one command."),
}

STAGES = ("pretrain-fsl", "profile", "score-layers", "filter", "select", "train-sparse")
"""The six stages; the other commands are their companions."""


def application(wanted: str | None = None) -> typer.Typer:
    """The command line with the command `wanted`, or with every one; the others only have their names and first lines.

    Importing fifteen commands and reading their options takes longer than importing typer.
    """
    app = typer.Typer(
        name="edgetrain",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
        help="Train neural networks on edge devices: which samples, which layers, which channels.\n\n"
        "Stages exchange HDF5 artifacts through files or pipes:\n\n"
        "\b\n  edgetrain filter < stream.h5 | edgetrain select |\n      edgetrain train-sparse -o adapted.h5",
    )
    app.callback()(_options)
    for name, listed in COMMANDS.items():
        app.command(name)(guarded(name, body_of(name)) if wanted in (None, name) else _only_listed(listed))
    return app


def body_of(command: str) -> Callable[..., None]:
    """A command's function. Modules of commands import nothing heavy at the top."""
    module, function = COMMANDS[command].target.split(":")
    body: Callable[..., None] = getattr(importlib.import_module(f"edgetrain_cli.commands.{module}"), function)
    return body


def _version(wanted: bool) -> None:
    if wanted:
        print(f"edgetrain {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def _only_listed(listed: Listed) -> Callable[[], None]:
    """What a list of commands shows of one."""

    def command() -> None: ...

    command.__doc__ = listed.summary
    return command


signals: list[int] = []
"""Those that asked the running command to end."""


def guarded(command: str, body: Callable[..., None]) -> Callable[..., None]:
    """The command's function with every error turned into one line on stderr and its exit code."""

    body = for_typer(body) if hasattr(body, "parameters") else body

    @functools.wraps(body)
    def run(*args: Any, **arguments: Any) -> None:
        keep_freed_memory()
        import_numpy()
        signals.clear()
        try:
            body(*args, **arguments)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            fail(command, "interrupted", 130)
        except (Stopped, Exception) as error:
            if signals:  # a library may have made another error of what the signal raised
                fail(command, "interrupted", 128 + signals[0])
            explain(command, error)

    return run


def explain(command: str, error: BaseException) -> None:
    """End with a line about the error and its exit code."""
    if isinstance(error, NoInput):
        print(usage(command), file=sys.stderr)
        fail(command, "nothing to read; name a file or pipe one in", 2)
    if isinstance(error, EdgeTrainError):
        fail(command, str(error), error.exit_code)
    if isinstance(error, Stopped):
        fail(command, "interrupted", 128 + error.signal)
    if isinstance(error, BrokenPipeError):
        leave_by(signal.SIGPIPE)
        return
    if isinstance(error, OSError):
        fail(command, os_error_line(error), TransferError.exit_code)
    if isinstance(error, MemoryError):
        fail(command, "out of memory; use a smaller --micro-batch or --block-length", 70)
    if os.environ.get("EDGETRAIN_DEBUG"):
        raise error
    text = " ".join(f"{type(error).__name__}: {error}".split())
    fail(command, f"internal error: {text}; set EDGETRAIN_DEBUG=1 for the traceback and report it", 70)


def usage(command: str) -> str:
    """The command's help text."""
    found = typer.main.get_command(application(command)).commands[command]  # type: ignore[attr-defined]
    text: str = found.get_help(typer.Context(found, info_name=f"edgetrain {command}"))
    return text


def fail(command: str, message: str, code: int) -> None:
    """One line on stderr, then the exit code."""
    say(f"edgetrain {command}: {message}")
    raise typer.Exit(code) from None


def os_error_line(error: OSError) -> str:
    """An operating system's error in the form of ours."""
    what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def leave_by(number: int) -> None:
    """End as if the signal had not been handled, so that the shell sees 128 + number."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def main() -> None:
    """Entry point of the console script."""
    raise_on_signals()
    # a shell that completes a line asks by a variable and names the command elsewhere
    completes = any(name.startswith("_") and name.endswith("_COMPLETE") for name in os.environ)
    named = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        application(None if completes else named)(prog_name="edgetrain")
    except Stopped as stop:  # before a command's body began, or after it ended
        say("edgetrain: interrupted")
        sys.exit(128 + stop.signal)


def say(line: str) -> None:
    """One line on stderr; where that is a file on a full disk, the exit code must do."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def raise_on_signals() -> None:
    """SIGINT and SIGTERM end a command the same way, at any moment."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stopped)
    sys.unraisablehook = _not_raised


def _not_raised(what: Any) -> None:
    """What a weak reference's callback raises, Python drops; a signal that came just then is raised a moment later."""
    if not isinstance(what.exc_value, Stopped):
        sys.__unraisablehook__(what)
        return
    number = what.exc_value.signal
    signal.signal(signal.SIGALRM, lambda *_: _stopped(number, None))
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _stopped(number: int, frame: object) -> None:
    signals.append(number)
    raise Stopped(number)
