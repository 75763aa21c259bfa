"""Results of methods on tasks: rows, their JSON lines, shards joined, and the summary with paired differences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

import numpy as np

from stages.artifacts.files import atomic_write, check_writable
from stages.errors import DataError, UsageError
from stages.fsl.intervals import half_width

KIND = "task-results"
VERSION = 1


@dataclass(frozen=True)
class Row:
    """One method on one task."""

    dataset: str
    task: int
    method: str
    accuracy: float
    """Share of right answers on the query, 0..1."""
    ways: int
    support: int
    query: int
    learning_rate: float
    layers: int
    """Layers that trained."""
    live_values: int
    backward_macs: int
    """Per sample."""
    memory_bytes: int
    """By the `paper` model: batch 1, Adam."""
    saved_bytes: int
    """By the `saved` model: what the engine keeps, batch 1, Adam."""
    seconds: float = 0.0
    """Adaptation and answers; 0 where it was not measured."""


# --------------------------------------------------------------------------------------------------------- JSON lines


def header_line(identity: Mapping[str, object]) -> str:
    """The first line of a file of results; `identity` says of what evaluation (`stages.task_evaluation.identity`)."""
    return json.dumps({"edgetrain": KIND, "schema": VERSION, **identity}, sort_keys=True) + "\n"


def row_line(row: Row) -> str:
    """One row as a line."""
    return json.dumps(asdict(row)) + "\n"


def read_results(text: str, where: str) -> tuple[dict[str, object], list[Row]]:
    """Header and rows of a file of results. Raises `DataError` for anything else, with the line."""
    lines = text.splitlines()
    header = _object(lines[0] if lines else "", f"{where}:1")
    if header.get("edgetrain") != KIND or header.get("schema") != VERSION:
        fix = "`edgetrain evaluate --tasks N --rows FILE` writes them"
        raise DataError(f"{where}:1", "no header of task results", f"edgetrain {KIND}, schema {VERSION}", fix)
    return header, [_row_of(line, f"{where}:{number}") for number, line in enumerate(lines[1:], 2) if line.strip()]


@contextmanager
def results_file(
    path: Path, identity: Mapping[str, object], *, resume: bool = False
) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """A file of results that grows row by row: the rows that it has already, and what adds one.

    Without `resume` it begins anew, as soon as there is a first row: until then earlier results stay. With it, what an
    evaluation that was cut short has left is kept, all but a line that it had not finished.

    Raises:
        DataError: to be resumed, and of another evaluation; the file is left as it is.
        OutputError: the file cannot be created.
    """
    header = header_line(identity)
    found = path.read_text("utf-8", "replace") if resume and path.exists() else ""
    whole = found[: found.rfind("\n") + 1] or header
    _, known = read_results(whole, path.name)
    if not whole.startswith(header):
        fix = "name another file, or remove this one to begin anew"
        raise DataError(path.name, "results of another evaluation", "of this model, samples, tasks and methods", fix)
    check_writable(path)
    begun = whole == found
    with ExitStack() as stack:
        file: TextIO | None = None

        def add(row: Row) -> None:
            nonlocal file
            if file is None:
                if not begun:
                    atomic_write(path, whole.encode())
                file = stack.enter_context(path.open("a", encoding="utf-8"))
            file.write(row_line(row))
            file.flush()

        yield known, add


def merge_results(parts: Iterable[tuple[str, dict[str, object], Sequence[Row]]]) -> list[Row]:
    """The rows of several files (name, header, rows): shards, or methods that were measured apart.

    Raises:
        DataError: headers that differ in more than their methods.
    """
    rows: list[Row] = []
    first: tuple[str, dict[str, object]] | None = None
    for name, header, found in parts:
        first = first or (name, header)
        for key in sorted({*header, *first[1]} - {"methods"}):
            if header.get(key) != first[1].get(key):
                expected = f"{first[1].get(key)!r} as in {first[0]}"
                raise DataError(name, f"{key} {header.get(key)!r}", expected, "merge parts of one evaluation")
        rows += found
    return rows


def _object(line: str, where: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DataError(where, "no JSON object", "one per line")
    return value


def _row_of(line: str, where: str) -> Row:
    value = _object(line, where)
    types = {each.name: {"str": str, "int": int}.get(str(each.type), (int, float)) for each in fields(Row)}
    wrong = [name for name, kind in types.items() if not isinstance(value.get(name), kind)]
    if wrong or value.keys() != types.keys():
        raise DataError(where, "not a row of task results", f"the fields {', '.join(types)}")
    return Row(**value)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ summary


@dataclass(frozen=True)
class MethodSummary:
    """One method over the tasks of one data set (or of all of them)."""

    dataset: str
    method: str
    tasks: int
    accuracy: float
    half_width: float
    """Of the mean's 95 % interval (Student's t over tasks); NaN for a single task."""
    difference: float
    """Mean paired difference to the reference method on the same tasks."""
    difference_half_width: float
    memory_bytes: float
    saved_bytes: float
    backward_macs: float
    seconds: float


def summarise(rows: Sequence[Row], against: str) -> list[MethodSummary]:
    """Mean and interval per data set and method, and the paired difference to the method `against`.

    With several data sets the last summaries (`dataset` "average") are means over data sets, each with equal weight;
    their intervals combine the sets' standard errors.

    Raises:
        DataError: no rows, a row twice, or a method that did not do all tasks of a data set.
        UsageError: no rows of the reference method.
    """
    table = _table(rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    if against not in methods:
        raise UsageError("--against", repr(against), "one of " + ", ".join(methods))
    summaries = [
        _summary(dataset, method, by_method[method], by_method[against])
        for dataset, by_method in table.items()
        for method in methods
    ]
    if len(table) > 1:
        summaries += [_average([each for each in summaries if each.method == method]) for method in methods]
    return summaries


def _table(rows: Sequence[Row]) -> dict[str, dict[str, dict[int, Row]]]:
    """Data set -> method -> task -> row, complete."""
    if not rows:
        raise DataError("results", "no rows", "at least one task")
    table: dict[str, dict[str, dict[int, Row]]] = {}
    methods = {row.method for row in rows}
    for row in rows:
        done = table.setdefault(row.dataset, {}).setdefault(row.method, {})
        if row.task in done:
            raise DataError("results", f"task {row.task} of {row.dataset!r} twice for {row.method}", "each once")
        done[row.task] = row
    for dataset, by_method in table.items():
        tasks = set().union(*by_method.values())
        for method in sorted(methods):
            lacking = tasks - by_method.get(method, {}).keys()
            if lacking:
                found = f"{method} lacks {len(lacking)} of the {len(tasks)} tasks of {dataset!r}"
                raise DataError("results", found, "every method on every task", "merge all its shards")
    return table


def _summary(dataset: str, method: str, mine: Mapping[int, Row], other: Mapping[int, Row]) -> MethodSummary:
    tasks = sorted(mine)
    accuracy = np.array([mine[task].accuracy for task in tasks])
    difference = accuracy - np.array([other[task].accuracy for task in tasks])

    def mean(name: str) -> float:
        return float(np.mean([getattr(mine[task], name) for task in tasks]))

    return MethodSummary(
        dataset,
        method,
        len(tasks),
        float(accuracy.mean()),
        half_width(accuracy),
        float(difference.mean()),
        half_width(difference),
        mean("memory_bytes"),
        mean("saved_bytes"),
        mean("backward_macs"),
        mean("seconds"),
    )


def _average(parts: Sequence[MethodSummary]) -> MethodSummary:
    """Mean over data sets; independent sets, so squared half widths add up."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(part, name) for part in parts]))

    def joint(name: str) -> float:
        return float(np.sqrt(sum(getattr(part, name) ** 2 for part in parts)) / len(parts))

    return MethodSummary(
        "average",
        parts[0].method,
        sum(part.tasks for part in parts),
        mean("accuracy"),
        joint("half_width"),
        mean("difference"),
        joint("difference_half_width"),
        mean("memory_bytes"),
        mean("saved_bytes"),
        mean("backward_macs"),
        mean("seconds"),
    )
