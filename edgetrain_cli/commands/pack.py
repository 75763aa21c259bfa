"""The command `pack`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgetrain_cli import pipe
from edgetrain_cli.options import OnBad, Out, Quiet, Seed


def pack(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="A folder, a file, or a pair x.npy y.npy.")],
    out: Out = "-",
    format: Annotated[str, typer.Option("--format", help="Kind of data, if suffix and content do not tell.")] = "auto",
    base: Annotated[
        str | None, typer.Option("--base", metavar="DIR", help="Folder of the files that a table or annotations name.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", help="Regex over paths with groups `label` and columns; no match: left out."),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="Table: the class, by name or position (1 first, -1 last).")
    ] = None,
    file_column: Annotated[str | None, typer.Option("--file-column", help="Table: the file name's column.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="Table: keep this column beside the samples; repeatable.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option("--box", metavar="L,T,R,B", help="Table: four columns, the part of an image to take."),
    ] = None,
    box_scale: Annotated[float, typer.Option("--box-scale", help="Enlarge boxes about their centre.")] = 1.0,
    boxes: Annotated[
        str, typer.Option("--boxes", help="Boxes lie in pictures as stored, or upright by EXIF: auto, stored, upright.")
    ] = "auto",
    delimiter: Annotated[str | None, typer.Option("--delimiter", help="Table: what parts columns.")] = None,
    header: Annotated[
        str, typer.Option("--header", help="Table: the first line names columns: auto, yes or no.")
    ] = "auto",
    decimal: Annotated[str, typer.Option("--decimal", help="Table: decimal point, or comma.")] = ".",
    x_name: Annotated[str | None, typer.Option("--x-name", help=".npz, HDF5: the array of samples.")] = None,
    y_name: Annotated[str | None, typer.Option("--y-name", help=".npz, HDF5: the array of labels.")] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="Axes: NHW, NHWC, NCHW, NT (sound), NTC, NCT (signals), ND.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="28x28", help="Shape of flat samples, with --layout where it needs one."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="UCI HAR: sensor signals instead of the 561 features.")] = False,
    size: Annotated[
        str | None, typer.Option("--size", metavar="84[x84]", help="Resize images: height x width.")
    ] = None,
    fit: Annotated[str, typer.Option("--fit", help="How: stretch, crop or pad.")] = "stretch",
    colour: Annotated[str, typer.Option("--colour", help="gray, rgb, or auto: as the first image.")] = "auto",
    invert: Annotated[bool, typer.Option("--invert", help="255 - value: dark ink becomes light.")] = False,
    rate: Annotated[int | None, typer.Option("--rate", metavar="HZ", help="Resample recordings.")] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Cut or pad recordings to this length.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="uint8, int16 or float32; values are kept.")] = None,
    scale: Annotated[float, typer.Option("--scale", help="Factor on every value, before --dtype.")] = 1.0,
    where: Annotated[
        list[str] | None, typer.Option("--where", metavar="COL=V[,V]", help="Only samples with such values, or COL!=V.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="A,B|@FILE", help="Only these; @FILE has one name per line.")
    ] = None,
    per_class: Annotated[int | None, typer.Option("--per-class", metavar="K", help="K samples of every class.")] = None,
    skip_per_class: Annotated[
        int, typer.Option("--skip-per-class", metavar="S", help="First leave out S of every class: disjoint shares.")
    ] = 0,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Keep samples without a class, as y = -1, instead of refusing them.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="At most N samples.")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle/--in-order", help="Order of the stream.")] = True,
    drift: Annotated[
        str | None, typer.Option("--drift", metavar="class|COL", help="One class, or value of a column, after another.")
    ] = None,
    label_noise: Annotated[float, typer.Option("--label-noise", metavar="SHARE", help="Wrong labels, 0 to 1.")] = 0.0,
    feature_noise: Annotated[
        float, typer.Option("--feature-noise", metavar="SHARE", help="Samples with Gaussian noise, 0 to 1.")
    ] = 0.0,
    noise_std: Annotated[float, typer.Option("--noise-std", help="Its deviation; 1 is the full scale of x.")] = 0.2,
    block_length: Annotated[int, typer.Option("--block-length", metavar="N", help="Samples per block.")] = 256,
    seed: Seed = 0,
    on_bad: OnBad = "fail",
    quiet: Quiet = False,
) -> None:
    """Turn your data into sample blocks.

    Folders of images or .wav, tables, .npz, .npy, HDF5, published data sets.

    A few-shot support set and its query set are two shares of one seed, disjoint by construction:

      edgetrain pack birds/ --size 84 --per-class 5 -o support.h5

      edgetrain pack birds/ --size 84 --skip-per-class 5 -o query.h5

    docs/data.md has a line for each of many data sets.
    """
    with pipe.stage("pack", locals()) as io:
        from pathlib import Path

        from stages.data.images import ImageForm, dimensions, height_width
        from stages.data.listings import Columns
        from stages.data.reading import Form
        from stages.data.sounds import SoundForm
        from stages.data.sources import Opening, open_source
        from stages.data.tables import Writing
        from stages.packing import BadSamples, Condition, Packing, choose, class_list
        from stages.packing import pack as pack_source
        from stages.randomness import generator

        packing = Packing(
            block_length=block_length,
            where=tuple(Condition.parse(text) for text in where or ()),
            classes=class_list(classes),
            skip_per_class=skip_per_class,
            per_class=per_class,
            unlabelled=unlabelled,
            limit=limit,
            shuffle=shuffle,
            drift=drift,
            form=Form(dtype=dtype, scale=scale, invert=invert),
            label_noise=label_noise,
            feature_noise=feature_noise,
            noise_std=noise_std,
        )
        opening = Opening(
            format=format,
            base=Path(base) if base else None,
            pattern=pattern,
            columns=Columns(
                file=file_column, label=label_column, box=tuple(box.split(",")) if box else (), kept=tuple(column or ())
            ),
            x_name=x_name,
            y_name=y_name,
            layout=layout,
            shape=dimensions(shape, "--shape") if shape else None,
            raw=raw,
            image=ImageForm(
                size=height_width(size) if size else None, fit=fit, colour=colour, box_scale=box_scale, boxes=boxes
            ),
            sound=SoundForm(rate_hz=rate, seconds=seconds),
            writing=Writing(delimiter=delimiter, header=header, decimal=decimal),
            skip_empty=on_bad == "skip",
            labelled=not unlabelled,
        )
        bad = BadSamples(on_bad)
        rng = generator(seed, "pack")
        source = open_source([Path(path) for path in sources], opening)
        rows = choose(source, packing, rng)
        step = io.progress("pack", len(rows))
        with io.writer(out) as writer:
            for block in pack_source(source, packing, rng, rows=rows, on_bad=bad, on_step=step):
                writer.write(block)
        for line in source.notes.lines():
            io.note(line)
        if bad.count:
            io.note(f"skipped {bad.count} of {len(rows)} samples; the first: {bad.first}")
