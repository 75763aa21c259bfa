"""The command line as a whole: what starting one command reads, and that a shell can complete all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from edgetrain_cli.app import COMMANDS, application

ROOT = Path(__file__).parents[2]


def options(wanted):
    """Command -> its options, beside --help."""
    found = typer.main.get_command(application(wanted)).commands
    return {
        name: {option for parameter in command.params for option in parameter.opts} for name, command in found.items()
    }


def test_a_command_reads_only_its_own_options():
    every = options(None)
    assert every.keys() == COMMANDS.keys()
    assert all(every[name] for name in COMMANDS)
    for wanted in ("filter", "train-sparse", ""):
        assert options(wanted) == {name: every[name] if name == wanted else set() for name in COMMANDS}


def test_the_list_of_commands_does_not_depend_on_what_is_read():
    groups = [typer.main.get_command(application(wanted)) for wanted in (None, "", "filter")]
    texts = {group.get_help(typer.Context(group)) for group in groups}
    assert len(texts) == 1
    assert "Keep the candidates of a stream" in texts.pop()


@pytest.mark.parametrize(
    ("words", "expected"), [("edgetrain fil", "filter"), ("edgetrain select --impor", "--importance")]
)
def test_a_shell_completes_commands_and_options(words, expected):
    code = "import sys; sys.argv = ['edgetrain']; from edgetrain_cli.app import main; main()"
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_EDGETRAIN_COMPLETE": "complete_bash"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == [expected]


def test_what_follows_a_dash_dash_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "edgetrain_cli", "--", "filter", "--keep", "0"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 2
    assert b"--keep" in result.stderr
