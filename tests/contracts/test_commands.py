"""The command line as a whole: what starting one command reads, and that a shell can complete all of them."""

import os
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import numpy as np
import pytest
import typer

from edgetrain_cli.app import COMMANDS, application, body_of
from edgetrain_cli.options import Writes
from edgetrain_cli.settings import parameters
from stages.errors import OutputError, UsageError
from stages.importance.criteria import CRITERIA
from stages.importance.tasks import TASKS
from stages.methods.layer_scores import SEARCHES
from stages.planning.layers import SELECTORS
from stages.planning.problem import UNITS
from stages.pretraining import AUGMENTATIONS
from stages.settings import (
    evaluation,
    filtering,
    importing,
    packing,
    pretraining,
    profiling,
    scoring,
    selection,
    training,
)
from stages.settings.declared import declared
from stages.training.optimizers import OPTIMIZERS, SCHEDULES
from stages.valuation.coarse import FILTERS
from stages.valuation.fine import SELECTIONS
from stages.valuation.scoring import IMPORTANCES

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


def test_the_list_of_commands_says_what_their_help_does():
    said = {name: " ".join((body_of(name).__doc__ or "").split("\n\n")[0].split()) for name in COMMANDS}
    assert said == {name: listed.summary for name, listed in COMMANDS.items()}


TABLES = {
    filtering.STRATEGIES: FILTERS,
    tuple(name for name in selection.STRATEGIES if name != selection.AUTO): SELECTIONS,
    selection.IMPORTANCES: IMPORTANCES,
    scoring.CRITERIA: CRITERIA,
    scoring.SELECTORS: SELECTORS,
    scoring.SEARCHES: SEARCHES,
    scoring.HEADS: TASKS,
    scoring.UNITS: UNITS,
    pretraining.AUGMENTATIONS: AUGMENTATIONS,
    training.OPTIMIZERS: OPTIMIZERS,
    training.SCHEDULES: SCHEDULES,
}


@pytest.mark.parametrize(("names", "table"), TABLES.items(), ids=str)
def test_the_names_of_settings_are_those_of_the_tables(names, table):
    assert set(names) == set(table)


CONFIGURATIONS = [
    kind
    for module in (evaluation, filtering, importing, packing, pretraining, profiling, scoring, selection, training)
    for kind in vars(module).values()
    if is_dataclass(kind) and kind.__module__ == module.__name__
]


@pytest.mark.parametrize("kind", CONFIGURATIONS, ids=lambda kind: kind.__name__)
def test_every_setting_is_an_option_of_some_command(kind):
    names = {field.name for field, _ in declared(kind)}
    assert names
    assert any(names <= options_of(name) for name in COMMANDS)


@pytest.mark.parametrize("kind", CONFIGURATIONS, ids=lambda kind: kind.__name__)
def test_bounds_and_choices_hold_for_whoever_makes_the_configuration(kind):
    for field, known in declared(kind):
        wrong = [known.least - 1] if known.least is not None else []
        wrong += [known.most + 1] if known.most is not None else []
        wrong += ["nonsense"] if known.choices else []
        for value in wrong:
            with pytest.raises(UsageError, match=re.escape(known.option(field.name))):
                kind(**{field.name: value})


def test_a_misspelt_choice_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean stratified"):
        selection.Selection(strategy="stratifed")


def test_a_command_is_callable_with_plain_arguments(tmp_path):
    source = tmp_path / "x.npz"
    np.savez(source, x=np.zeros((6, 4, 4), np.uint8), y=np.arange(6) % 2)
    body_of("pack")([str(source)], out=str(tmp_path / "x.h5"), block_length=2, quiet=True)
    assert (tmp_path / "x.h5").read_bytes()[:4] == b"\x89HDF"


def options_of(name):
    body = body_of(name)
    return {each.name for each in parameters(body)} if hasattr(body, "parameters") else set()


OUTPUTS = [
    (name, each.name)
    for name in COMMANDS
    if hasattr(body_of(name), "parameters")
    for each in parameters(body_of(name))
    if any(isinstance(mark, Writes) for mark in each.type.__metadata__)
]


@pytest.mark.parametrize(("command", "option"), OUTPUTS, ids=" ".join)
def test_outputs_are_checked_before_inputs_are_read(command, option, tmp_path, monkeypatch):
    """Nothing is computed in vain: an output that cannot be written is named although the input is missing too."""
    monkeypatch.chdir(tmp_path)
    needed = {"sources": ["missing"], "arch": "cnn4"}
    given = {each.name: needed[each.name] for each in parameters(body_of(command)) if each.name in needed}
    with pytest.raises(OutputError, match="no folder"):
        body_of(command)(**given, **{option: "nowhere/x.csv" if option == "out" else "nowhere/x.png"})


def test_there_are_outputs_to_check():
    assert len(OUTPUTS) > 15
