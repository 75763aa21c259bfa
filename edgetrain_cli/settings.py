"""Commands and their options: a parameter that is a stage's configuration stands for one option per setting.

A command is a function `(io, source, settings, ...)`. Its options are generated from the parameters: a frozen dataclass
of `stages.settings` gives one for each of its fields, everything else is an `Annotated` option of its own. What the
configurations hold is what the history of the run records.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer

from edgetrain_cli import options
from edgetrain_cli.manners import check_input
from edgetrain_cli.streams import Stage
from stages.settings.declared import Setting, declared

Body = Callable[..., None]
Kind = str | Callable[[Mapping[str, Any]], str]
"""What a command writes: `records` or `text`; a function says it for the arguments that were given."""


class Parameter(NamedTuple):
    """A parameter of the command line."""

    name: str
    type: Any
    """With its typer option."""
    default: Any


def command(name: str, *, writes: Kind = "records", history: bool = False) -> Callable[[Body], Body]:
    """Make a function with configurations a command whose arguments are all plain.

    The function gets an `io: Stage` first, which the options --quiet, --cpus and --max-record belong to, and with
    `history` --no-history. Outputs are checked before it is called.
    """

    def decorate(body: Body) -> Body:
        def run(*given: Any, **named: Any) -> None:
            arguments = _bound(run, given, named)
            manners = {each: arguments.pop(each) for each in list(arguments) if each in MANNERS}
            check_input(arguments)
            kind = writes if isinstance(writes, str) else writes(arguments)
            recorded = _recorded(body, arguments)
            for each in _of_type(body, options.Writes):
                options.check_output(arguments[each])
            with Stage.of(name, recorded, out=arguments.get("out"), writes=kind, **manners) as io:
                if any(arguments[each] is not None for each in _of_type(body, options.Former)):
                    io.note(options.Former.note)
                body(io, **_with_settings(body, arguments))

        run.__doc__, run.__name__, run.__module__ = body.__doc__, body.__name__, body.__module__
        run.parameters = lambda: [*_parameters(body), *_manners(history)]  # type: ignore[attr-defined]
        return run

    return decorate


MANNERS: Mapping[str, Any] = {
    "history": options.History,
    "max_record": options.MaxRecord,
    "quiet": options.Quiet,
    "cpus": options.Cpus,
}
_DEFAULTS = {"history": True, "max_record": "1GiB", "quiet": False, "cpus": None}


def _manners(history: bool) -> Iterator[Parameter]:
    for name, kind in MANNERS.items():
        if history or name != "history":
            yield Parameter(name, kind, _DEFAULTS[name])


def for_typer(run: Body) -> Body:
    """The command as typer wants it: a function with all of its options in its signature."""

    def callback(**arguments: Any) -> None:
        run(**arguments)

    callback.__doc__, callback.__name__ = readable(run.__doc__ or ""), run.__name__
    callback.__signature__ = signature(run)  # type: ignore[attr-defined]
    callback.__annotations__ = {each.name: each.type for each in parameters(run)}
    return callback


def readable(doc: str) -> str:
    """A help text whose examples keep their lines: long ones go on after a pipe, as a shell takes them.

    >>> print(readable("Example: edgetrain select | edgetrain train-sparse"))
    Example:
    <BLANKLINE>
    \b
      edgetrain select | edgetrain train-sparse
    """
    parts = []
    for part in inspect.cleandoc(doc).split("\n\n"):
        line = part.removeprefix("Example:").strip()
        if not part.startswith(("Example:", "  ")):
            parts.append(part)
            continue
        if not (parts and parts[-1].startswith("\b")):
            parts.append("Example:")
            parts.append("\b")
        parts[-1] += "\n  " + (line if len(line) <= 74 else line.replace(" | ", " |\n      "))
    return "\n\n".join(parts)


def parameters(run: Body) -> list[Parameter]:
    """All parameters of a command."""
    found: list[Parameter] = run.parameters()  # type: ignore[attr-defined]
    return found


def signature(run: Body) -> inspect.Signature:
    """The command's signature, without any configuration in it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    known = sorted(parameters(run), key=_place)
    return inspect.Signature(
        [inspect.Parameter(each.name, kind, default=each.default, annotation=each.type) for each in known]
    )


def _place(parameter: Parameter) -> tuple[bool, bool, bool]:
    """What must be given comes first, then what its place on the command line names, the output, and options."""
    named = not isinstance(parameter.type.__metadata__[0], typer.models.ArgumentInfo)
    return parameter.default is not inspect.Parameter.empty, named, parameter.name != "out"


def _bound(run: Body, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    bound = signature(run).bind(*given, **named)
    bound.apply_defaults()
    return dict(bound.arguments)


# ----------------------------------------------------------------------------------------------- configurations


@cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _body_parameters(body: Body) -> Iterator[tuple[inspect.Parameter, Any]]:
    """The parameters behind `io`, with their types."""
    hints = _hints(body)
    for parameter in list(inspect.signature(body).parameters.values())[1:]:
        yield parameter, hints[parameter.name]


def _parameters(body: Body) -> Iterator[Parameter]:
    for parameter, kind in _body_parameters(body):
        if is_dataclass(kind):
            yield from (_option(kind, field, known) for field, known in declared(kind))
        else:
            yield Parameter(parameter.name, kind, parameter.default)


def _option(owner: Any, field: Field[Any], known: Setting) -> Parameter:
    """The option of one setting."""
    kind, several = _plain(_hints(owner)[field.name], known)
    default = known.text if known.parse else None if several else field.default
    numbers = int in get_args(kind) or kind is int or float in get_args(kind) or kind is float
    limits: dict[str, Any] = {"min": known.least, "max": known.most} if numbers and not known.parse else {}
    metavar: str | None = known.metavar or "|".join(known.choices) or ("N" if numbers else "TEXT")
    complete: dict[str, Any] = {"autocompletion": _completing(known.choices)} if known.choices else {}
    if kind is bool:
        metavar = None
    names = known.flag or known.option(field.name)
    option = typer.Option(names, help=known.help, metavar=metavar, **limits, **complete)
    return Parameter(field.name, Annotated[kind, option], inspect.Parameter.empty if default is MISSING else default)


def _completing(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _plain(kind: Any, known: Setting) -> tuple[Any, bool]:
    """The type that typer reads a setting as, and whether the option may be repeated."""
    if known.parse:
        return str, False
    parts = [part for part in get_args(kind) if part is not type(None)]
    base = parts[0] if get_origin(kind) in (UnionType, Union) else kind
    if get_origin(base) is tuple:
        return list[get_args(base)[0]] | None, True  # type: ignore[misc]
    return kind, False


def _with_settings(body: Body, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command's function, its configurations made of the options."""
    made = {}
    for parameter, kind in _body_parameters(body):
        made[parameter.name] = _made(kind, arguments) if is_dataclass(kind) else arguments[parameter.name]
    return made


def _made(kind: Any, arguments: Mapping[str, Any]) -> Any:
    return kind(**{field.name: _value(field, known, arguments[field.name]) for field, known in declared(kind)})


def _value(field: Field[Any], known: Setting, given: Any) -> Any:
    """A setting's value from its option's."""
    if known.parse is not None:
        return known.parse(given) if isinstance(given, str) else given
    if isinstance(given, list):
        return tuple(given)
    return field.default if given is None else given


def _of_type(body: Body, marker: type) -> list[str]:
    """Names of the parameters that are annotated with such a marker."""
    return [
        parameter.name
        for parameter, kind in _body_parameters(body)
        if any(isinstance(each, marker) for each in getattr(kind, "__metadata__", ()))
    ]


def _recorded(body: Body, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What affects the result: settings, and other options that say so."""
    names = [field.name for _, kind in _body_parameters(body) if is_dataclass(kind) for field, _ in declared(kind)]
    return {name: arguments[name] for name in [*names, *_of_type(body, options.Recorded)]}
