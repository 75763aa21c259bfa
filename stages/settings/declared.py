"""How a setting is declared: a field of a frozen dataclass with what it means and what it may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any, TypeVar

from stages.errors import UsageError, require

T = TypeVar("T")
_KEY = "setting"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of a setting besides its name, type and default."""

    help: str
    flag: str = ""
    """The option's name where it is not the field's: `--no-this` or `--this/--that` for a switch."""
    metavar: str = ""
    """What stands for the value in the help text."""
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    own: bool = False
    """Besides the choices, `package.module:function` names a method of the user's own."""
    parse: Callable[[str], Any] | None = None
    """Text of the command line -> value; raises `UsageError`."""
    text: str = ""
    """The default as such text, where there is `parse`."""

    def option(self, name: str) -> str:
        """The option's long name, for messages."""
        return self.flag.split("/")[0].split(",")[0] or "--" + name.replace("_", "-")

    def check(self, name: str, value: Any) -> None:
        """Raise `UsageError` for a value that the declaration rules out; None stands for a default found later."""
        if value is None:
            return
        where = self.option(name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float):
                require(isfinite(one), where, str(one), "a finite number")
            if isinstance(one, int | float) and not isinstance(one, bool):
                require(self.least is None or one >= self.least, where, f"{one}", f"at least {self.least}")
                require(self.most is None or one <= self.most, where, f"{one}", f"at most {self.most}")
            if self.choices and not (self.own and ":" in one):
                self._check_choice(where, one)

    def _check_choice(self, where: str, value: str) -> None:
        if value not in self.choices:
            near = get_close_matches(value, self.choices, 1)
            own = " or package.module:function" if self.own else ""
            hint = f"did you mean {near[0]}?" if near else ""
            raise UsageError(where, repr(value), f"one of {', '.join(self.choices)}{own}", hint)


def setting(
    default: T,
    help: str,
    *,
    flag: str = "",
    metavar: str = "",
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    own: bool = False,
    parse: Callable[[str], Any] | None = None,
    text: str = "",
) -> T:
    """A field of a configuration; see `Setting`. To a type checker it is its default."""
    known = Setting(help, flag, metavar, least, most, choices, own, parse, text)
    return field(default=default, metadata={_KEY: known})


def declared(configuration: Any) -> Iterator[tuple[Field[Any], Setting]]:
    """The settings of a configuration or of its class, in the order of their declaration."""
    for each in fields(configuration):
        if _KEY in each.metadata:
            yield each, each.metadata[_KEY]


def check(configuration: Any) -> None:
    """Raise `UsageError` for a value that its declaration rules out; for `__post_init__`."""
    for each, known in declared(configuration):
        known.check(each.name, getattr(configuration, each.name))


def micro_batch(text: str) -> int | None:
    """Samples in memory at once: a number, or None for `auto`, the most that fit.

    >>> micro_batch("auto"), micro_batch("8")
    (None, 8)
    """
    if text == "auto":
        return None
    require(text.isdecimal(), "--micro-batch", repr(text), "auto or a number of samples")
    return int(text)


MICRO_BATCH = "Samples in memory at once; auto: as many as fit. The result is the same."
"""What a micro-batch is, wherever there is one."""

ENGINES = ("auto", "native", "torch")
"""The names of `engines.choice.ENGINES`; a test holds them equal."""
ENGINE = "What computes: the C library (native), or torch; auto: native wherever it covers the model."
DEVICE = "Where torch computes; cuda never ran in EdgeTrain's own tests."


def engine_setting() -> str:
    """The field `engine` of a stage that computes."""
    return setting("auto", ENGINE, metavar="auto|native|torch", choices=ENGINES)


SAME_BITS = "The same features and gradients on every machine; slower. Native alone has this."


def same_bits_setting() -> bool:
    """The field `same_bits` of a stage that computes."""
    return setting(False, SAME_BITS)


def device_setting() -> str:
    """The field `device` of a stage that computes."""
    return setting("cpu", DEVICE, metavar="cpu|cuda")
