"""The command `adapt`: a recipe of `run`, the few command lines that lead from photos to a model."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetrain_cli.options import Seed, check_output

if TYPE_CHECKING:
    from stages.artifacts.records import InputSpec

MEMORY_SHARE = 0.5
"""Of the memory that is free on this device, the plan may use so much."""


def adapt(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A run record: the model to start from.")],
    photos: Annotated[
        str, typer.Argument(metavar="PHOTOS", help="A folder with a folder of pictures, or recordings, per class.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Where the adapted model goes.")],
    held_out: Annotated[
        int, typer.Option("--held-out", metavar="K", min=1, help="Of each class, kept back to check on.")
    ] = 2,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Budget of training; default half of what is free here."),
    ] = None,
    macs: Annotated[
        str, typer.Option("--macs", metavar="N|SHARE", help="Budget of the backward pass, as for score-layers.")
    ] = "15%",
    seed: Seed = 0,
) -> None:
    """From photos to a model: profile, plan, train and check.

    Runs the command lines that it prints, with files of its own in between; copy them to go on by hand.

    Some photos of each class are held out (--held-out); the plan fits into this device's memory, and the last line says
    how many of the held-out photos the adapted model gets right.

    Example: edgetrain adapt base.h5 photos/ -o mine.h5
    """
    from edgetrain_cli.commands.run import run_words

    check_output(out)
    spec = _input_of(base)
    with tempfile.TemporaryDirectory(prefix="edgetrain-adapt-") as folder:
        for words in recipe(base, photos, out, spec, held_out, memory or _memory(), macs, seed):
            print("$ " + shlex.join(["edgetrain", *words]), file=sys.stderr, flush=True)
            code = run_words(_in_folder(words, Path(folder), keep={base, photos, out}))
            if code:
                raise typer.Exit(code)


def recipe(
    base: str, photos: str, out: str, spec: InputSpec, held_out: int, memory: str, macs: str, seed: int
) -> Iterator[list[str]]:
    """The command lines, the word `edgetrain` left out.

    >>> from stages.artifacts.records import InputSpec
    >>> for words in recipe("b.h5", "p/", "o.h5", InputSpec("image", (3, 96, 96)), 2, "1MB", "15%", 0):
    ...     print(" ".join(words))
    pack p/ --size 96x96 --fit crop --colour rgb --per-class 2 -o check.h5
    pack p/ --size 96x96 --fit crop --colour rgb --skip-per-class 2 -o support.h5
    profile b.h5 --no-measure -q -o run.h5
    score-layers run.h5 --support support.h5 --memory 1MB --macs 15% -o run.h5
    train-sparse run.h5 support.h5 -o o.h5
    evaluate o.h5 check.h5
    """
    seeded = ["--seed", str(seed)] if seed else []
    prepared = _preparing(spec)
    yield ["pack", photos, *prepared, "--per-class", str(held_out), *seeded, "-o", "check.h5"]
    yield ["pack", photos, *prepared, "--skip-per-class", str(held_out), *seeded, "-o", "support.h5"]
    yield ["profile", base, "--no-measure", "-q", "-o", "run.h5"]
    yield ["score-layers", "run.h5", "--support", "support.h5", "--memory", memory, "--macs", macs, *seeded,
           "-o", "run.h5"]  # fmt: skip
    yield ["train-sparse", "run.h5", "support.h5", *seeded, "-o", out]
    yield ["evaluate", out, "check.h5"]


def _preparing(spec: InputSpec) -> list[str]:
    """How `pack` brings files to the model's input: as those that it learnt from, where that is known."""
    if spec.kind == "sound":
        return ["--rate", str(spec.sample_rate_hz)]
    if spec.kind != "image":
        return []
    channels, height, width = spec.shape
    known = spec.prepared if spec.prepared is not None and spec.prepared.of == "pictures" else None
    size = (known.size if known is not None else None) or (height, width)
    fit = "crop" if known is None else known.fit
    colour = (known.colour if known is not None else "") or ("gray" if channels == 1 else "rgb")
    words = ["--size", f"{size[0]}x{size[1]}", "--fit", fit, "--colour", colour]
    return [*words, "--invert"] if known is not None and known.invert else words


def _in_folder(words: Sequence[str], folder: Path, keep: set[str]) -> list[str]:
    """The words with the recipe's own files in a folder; what the user named stays."""
    return [str(folder / word) if word in FILES and word not in keep else word for word in words]


FILES = frozenset(["check.h5", "support.h5", "run.h5"])
"""What the recipe makes on its way."""


def _input_of(base: str) -> InputSpec:
    """The input of the model in a run record."""
    from stages.artifacts.records import Run
    from stages.artifacts.stream import open_records
    from stages.errors import DataError, InputMissing

    if not Path(base).exists():
        raise InputMissing(base, "no such file")
    record = next(open_records(base))
    if not isinstance(record, Run):
        raise DataError(base, "sample blocks", "a run record", "make one with `edgetrain import`")
    return record.model.input


def _memory() -> str:
    from stages.measurement.room import room

    free = room()
    return "64MB" if free is None else f"{max(1, int(MEMORY_SHARE * free) >> 20)}MB"
