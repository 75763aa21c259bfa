"""The settings of `pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.settings.declared import check, setting

if TYPE_CHECKING:
    from stages.data.sources import Opening
    from stages.packing import Packing


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How data is read."""

    format: str = setting("auto", "Kind of data, if suffix and content do not tell.", metavar="KIND")
    base: str | None = setting(None, "Folder of the files that a table or annotations name.", metavar="DIR")
    pattern: str | None = setting(None, "Regex over paths with groups `label` and columns; no match: left out.")
    label_column: str | None = setting(None, "Table: the class, by name or position (1 first, -1 last).")
    file_column: str | None = setting(None, "Table: the file name's column.")
    column: tuple[str, ...] = setting((), "Table: keep this column beside the samples; repeatable.")
    box: str | None = setting(None, "Table: four columns, the part of an image to take.", metavar="L,T,R,B")
    box_scale: float = setting(1.0, "Enlarge boxes about their centre.")
    boxes: str = setting(
        "auto",
        "Boxes lie in pictures as stored, or upright by EXIF: auto, stored, upright.",
        metavar="NAME",
    )
    delimiter: str | None = setting(None, "Table: what parts columns.")
    header: str = setting("auto", "Table: the first line names columns: auto, yes or no.", metavar="auto|yes|no")
    decimal: str = setting(".", "Table: decimal point, or comma.")
    x_name: str | None = setting(None, ".npz, HDF5: the array of samples.")
    y_name: str | None = setting(None, ".npz, HDF5: the array of labels.")
    layout: str | None = setting(None, "Axes: NHW, NHWC, NCHW, NT (sound), NTC, NCT (signals), ND.")
    shape: str | None = setting(None, "Shape of flat samples, with --layout where it needs one.", metavar="28x28")
    raw: bool = setting(False, "UCI HAR: sensor signals instead of the 561 features.")
    size: str | None = setting(None, "Resize images: height x width.", metavar="84[x84]")
    fit: str = setting("stretch", "How: stretch, crop or pad.", choices=("stretch", "crop", "pad"))
    colour: str = setting("auto", "gray, rgb, or auto: as the first image.", choices=("auto", "gray", "rgb"))
    rate: int | None = setting(None, "Resample recordings.", metavar="HZ")
    seconds: float | None = setting(None, "Cut or pad recordings to this length.")

    def __post_init__(self) -> None:
        check(self)

    def opening(self, *, skip_empty: bool = False, labelled: bool = True) -> Opening:
        """What `stages.data.sources.open_source` takes. Raises `UsageError` for text that cannot be read."""
        from stages.data.images import ImageForm, dimensions, height_width
        from stages.data.listings import Columns
        from stages.data.sounds import SoundForm
        from stages.data.sources import Opening
        from stages.data.tables import Writing

        box = tuple(self.box.split(",")) if self.box else ()
        size = height_width(self.size) if self.size else None
        return Opening(
            format=self.format,
            base=Path(self.base) if self.base else None,
            pattern=self.pattern,
            columns=Columns(file=self.file_column, label=self.label_column, box=box, kept=self.column),
            x_name=self.x_name,
            y_name=self.y_name,
            layout=self.layout,
            shape=dimensions(self.shape, "--shape") if self.shape else None,
            raw=self.raw,
            image=ImageForm(size=size, fit=self.fit, colour=self.colour, box_scale=self.box_scale, boxes=self.boxes),
            sound=SoundForm(rate_hz=self.rate, seconds=self.seconds),
            writing=Writing(delimiter=self.delimiter, header=self.header, decimal=self.decimal),
            skip_empty=skip_empty,
            labelled=labelled,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Choosing:
    """Which samples, in which order, in which form."""

    invert: bool = setting(False, "255 - value: dark ink becomes light.")
    dtype: str | None = setting(None, "uint8, int16 or float32; values are kept.")
    scale: float = setting(1.0, "Factor on every value, before --dtype.")
    where: tuple[str, ...] = setting((), "Only samples with such values, or COL!=V.", metavar="COL=V[,V]")
    classes: str | None = setting(None, "Only these; @FILE has one name per line.", metavar="A,B|@FILE")
    per_class: int | None = setting(None, "K samples of every class.", metavar="K", least=1)
    skip_per_class: int = setting(0, "First leave out S of every class: disjoint shares.", metavar="S", least=0)
    unlabelled: bool = setting(False, "Keep samples without a class, as y = -1, instead of refusing them.")
    limit: int | None = setting(None, "At most N samples.", metavar="N", least=1)
    shuffle: bool = setting(True, "Order of the stream.", flag="--shuffle/--in-order")
    drift: str | None = setting(None, "One class, or value of a column, after another.", metavar="class|COL")
    label_noise: float = setting(0.0, "Wrong labels, 0 to 1.", metavar="SHARE", least=0, most=1)
    feature_noise: float = setting(0.0, "Samples with Gaussian noise, 0 to 1.", metavar="SHARE", least=0, most=1)
    noise_std: float = setting(0.2, "Its deviation; 1 is the full scale of x.")
    block_length: int = setting(256, "Samples per block.", metavar="N", least=1)

    def __post_init__(self) -> None:
        check(self)

    def packing(self) -> Packing:
        """What `stages.packing.pack` takes. Raises `UsageError` for text that cannot be read."""
        from stages.data.reading import Form
        from stages.packing import Condition, Packing, class_list

        return Packing(
            block_length=self.block_length,
            where=tuple(Condition.parse(text) for text in self.where),
            classes=class_list(self.classes),
            skip_per_class=self.skip_per_class,
            per_class=self.per_class,
            unlabelled=self.unlabelled,
            limit=self.limit,
            shuffle=self.shuffle,
            drift=self.drift,
            form=Form(dtype=self.dtype, scale=self.scale, invert=self.invert),
            label_noise=self.label_noise,
            feature_noise=self.feature_noise,
            noise_std=self.noise_std,
        )
