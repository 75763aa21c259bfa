"""The errors of EdgeTrain: one line each, and the exit code that the command line returns for them.

A message says where it happened, what was found, what was expected and what to do about it:

>>> print(DataError("support.h5:/x", "float64 (25, 3)", "uint8, int16 or float32", "convert it with `edgetrain pack`"))
support.h5:/x: float64 (25, 3), expected uint8, int16 or float32; convert it with `edgetrain pack`
"""

from __future__ import annotations


class EdgeTrainError(Exception):
    """The root: an error with a place, a finding, an expectation and a remedy. `exit_code` follows sysexits.h."""

    exit_code = 70

    def __init__(self, where: str, found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        super().__init__(where, found, expected, fix)

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}" if self.where else self.found
        text += f", expected {self.expected}" if self.expected else ""
        return text + (f"; {self.fix}" if self.fix else "")


class UsageError(EdgeTrainError):
    """An option or argument that cannot be honoured."""

    exit_code = 2


class DataError(EdgeTrainError):
    """Input that is there but wrong: truncated, corrupt, malformed, out of range."""

    exit_code = 65


class SchemaError(DataError):
    """A record that does not fit the schema."""


class StreamBroken(DataError):
    """A stream that ended before it was complete. What had arrived before has been used."""


class InputMissing(EdgeTrainError):
    """The named input does not exist or holds nothing."""

    exit_code = 66


class PartMissing(EdgeTrainError):
    """Something this machine lacks: an accelerator, an optional package."""

    exit_code = 69


class OutputError(EdgeTrainError):
    """The output cannot be created."""

    exit_code = 73


class TransferError(EdgeTrainError):
    """Reading or writing failed half-way: a full disk, a vanished device."""

    exit_code = 74


class BudgetError(EdgeTrainError):
    """No plan fits the budgets."""

    exit_code = 75


def require(condition: bool, where: str, found: str, expected: str = "", fix: str = "") -> None:
    """Raise `UsageError` unless `condition` holds; for configurations that check themselves."""
    if not condition:
        raise UsageError(where, found, expected, fix)
