"""Image files as arrays: upright, 8 bits, grey or RGB, cropped and resized. Pillow does the decoding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from stages.artifacts.records import Array
from stages.data.samples import Notes
from stages.errors import DataError, EdgeTrainError, require

T = TypeVar("T")

SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".bmp", ".tif", ".tiff", ".webp"]
)
FORMATS = ("PNG", "JPEG", "PPM", "GIF", "BMP", "TIFF", "WEBP")
"""What Pillow may decode; the rest of its list includes formats that start other programs (EPS: Ghostscript)."""

GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
ORIENTATION = 0x0112
"""EXIF's tag of how a picture is to be turned."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Its values -> what turns the stored picture upright."""
FIRST_SIDEWAYS = 5
"""From here on they swap width and height."""
MODES = {"gray": "L", "rgb": "RGB"}
Size = tuple[int, int]
Box = tuple[float, float, float, float]


def dimensions(text: str, option: str) -> tuple[int, ...]:
    """Sizes as people write them.

    >>> dimensions("28x28", "--shape")
    (28, 28)
    """
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sizes = ()
    require(bool(sizes) and min(sizes, default=0) > 0, option, repr(text), "sizes such as 84 or 96x128")
    return sizes


def height_width(text: str) -> Size:
    """`84` is a square, `96x128` is height x width.

    >>> height_width("84")
    (84, 84)
    """
    sizes = dimensions(text, "--size")
    require(len(sizes) <= 2, "--size", repr(text), "one size or height x width")
    return sizes[0], sizes[-1]


def stretch(image: Image.Image, size: Size) -> Image.Image:
    """Resize without regard to the aspect ratio, as Meta-Dataset does (arXiv:1903.03096)."""
    return image.resize(size, Image.Resampling.BILINEAR)


def crop(image: Image.Image, size: Size) -> Image.Image:
    """Fill the size and cut off what is over, evenly on both sides."""
    return ImageOps.fit(image, size, Image.Resampling.BILINEAR)


def pad(image: Image.Image, size: Size) -> Image.Image:
    """Fit inside the size and fill up with black, evenly on both sides."""
    return ImageOps.pad(image, size, Image.Resampling.BILINEAR)


FITS: dict[str, Callable[[Image.Image, Size], Image.Image]] = {"stretch": stretch, "crop": crop, "pad": pad}
"""Ways to bring an image to a size. All are antialiased (Pillow widens its bilinear kernel when it shrinks)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageForm:
    """What every image is brought to."""

    size: Size | None = None
    """(height, width) in pixels; None keeps each image's own."""
    fit: str = "stretch"
    colour: str = "auto"
    """`gray`, `rgb`, or `auto`: what the first image is; a colour image among grey ones is then an error."""
    strict: bool = False
    """Refuse colour where `colour` is `gray`, instead of converting; set by `resolve_colour`."""
    box_scale: float = 1.0
    """Crop boxes are enlarged about their centre by this factor (Meta-Dataset takes 1.2 for MSCOCO)."""
    boxes: str = "auto"
    """Whether boxes were drawn in pictures as they are stored, or turned upright by their EXIF orientation; `auto`
    tells by the size that the annotations state, and refuses a turned picture where that says nothing."""

    def __post_init__(self) -> None:
        require(self.fit in FITS, "--fit", repr(self.fit), "one of " + ", ".join(FITS))
        require(self.colour in ("auto", *MODES), "--colour", repr(self.colour), "auto, " + ", ".join(MODES))
        require(self.size is None or min(self.size) > 0, "--size", str(self.size), "positive sizes")
        require(self.box_scale > 0, "--box-scale", str(self.box_scale), "a positive factor")
        require(self.boxes in ("auto", "stored", "upright"), "--boxes", repr(self.boxes), "auto, stored or upright")


def resolve_colour(paths: Sequence[Path], form: ImageForm) -> ImageForm:
    """`auto` made definite by the first image that can be opened. Raises `DataError`, the first one's, if none can."""
    if form.colour != "auto":
        return form
    first: DataError | None = None
    for path in paths:
        try:
            colour = "gray" if _open(path, _is_grey) else "rgb"
        except DataError as error:
            first = first or error
            continue
        return replace(form, colour=colour, strict=True)
    raise first or DataError("images", "none", "at least one")


def read_image(
    path: Path, form: ImageForm, box: Box | None = None, drawn: Size | None = None, notes: Notes | None = None
) -> Array:
    """One image as uint8 (H, W) for `gray` and (H, W, 3) for `rgb`; `form.colour` must be definite.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey keeps its upper 8 bits, of a file that
    holds several images the first counts.

    Args:
        box: (left, top, right, bottom) in pixels, as `form.boxes` says.
        drawn: width and height of the picture that the box was drawn in; zeros where nobody has said.
        notes: gets which files were taken in part.

    Raises:
        DataError: names the file, for whatever cannot be read without losing what counts.
    """

    def look(opened: Image.Image) -> Image.Image:
        _tell(opened, path, notes)
        turn = opened.getexif().get(ORIENTATION, 1)
        image = _eight_bit(opened, path)
        stored = box is not None and _is_stored(form.boxes, turn, image.size, drawn, path)
        if box is not None and stored:
            image = image.crop(_inside(box, form.box_scale, image.size, str(path)))
        image = image.transpose(TURNS[turn]) if turn in TURNS else image
        if box is not None and not stored:
            image = image.crop(_inside(box, form.box_scale, image.size, str(path)))
        return image

    image = _open(path, look)
    if form.strict and form.colour == "gray" and image.mode == "RGB":
        raise DataError(str(path), "a colour image", "grey as the first one", "state `--colour rgb` or `--colour gray`")
    return np.asarray(resized(image.convert(MODES[form.colour]), form))


def _tell(opened: Image.Image, path: Path, notes: Notes | None) -> None:
    if notes is None:
        return
    if getattr(opened, "n_frames", 1) > 1:
        notes.count("took the first image of {} files that hold several", path.name)
    if opened.mode.startswith("I;16"):
        notes.count("kept the upper 8 of the 16 bits of {} images", path.name)


def _is_stored(boxes: str, turn: int, size: Size, drawn: Size | None, path: Path) -> bool:
    """Whether a box counts in the picture as it is stored (`size`: width, height), not as it is turned upright."""
    upright = size[::-1] if turn >= FIRST_SIDEWAYS else size
    known = drawn is not None and min(drawn) > 0
    if known and drawn not in (size, upright):
        found = f"{size[0]} x {size[1]} pixels, annotated as {drawn[0]} x {drawn[1]}" if drawn else ""
        raise DataError(str(path), found, "the picture that the boxes were drawn in")
    if turn not in TURNS or boxes != "auto":
        return boxes == "stored"
    if not known or size == upright:
        found = f"a box, in a picture that its EXIF orientation ({turn}) turns"
        fix = "state whether boxes were drawn before or after with `--boxes stored` or `--boxes upright`"
        raise DataError(str(path), found, "a picture that is stored upright", fix)
    return drawn == size


def resized(image: Image.Image, form: ImageForm) -> Image.Image:
    """The image at the form's size, or as it is."""
    if form.size is None or image.size == form.size[::-1]:
        return image
    return FITS[form.fit](image, form.size[::-1])


def resize_arrays(x: Array, layout: str, form: ImageForm) -> Array:
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float32, at the form's size; the layout stays."""
    if form.size is None or not len(x):
        return x
    if x.dtype not in (np.uint8, np.float32):
        raise DataError("--size", f"images of {x.dtype}", "uint8 or float32", "convert them first")
    channels = _channels_first(x, layout)
    planes = [
        [np.asarray(resized(Image.fromarray(np.ascontiguousarray(plane)), form)) for plane in image]
        for image in channels
    ]
    return _channels_back(np.asarray(planes, dtype=x.dtype), layout)


def _channels_first(x: Array, layout: str) -> Array:
    """(N, C, H, W) view of images in any layout."""
    if layout == "NHW":
        return x[:, None]
    return x.transpose(0, 3, 1, 2) if layout == "NHWC" else x


def _channels_back(x: Array, layout: str) -> Array:
    if layout == "NHW":
        return x[:, 0]
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if layout == "NHWC" else x


def _open(path: Path, look: Callable[[Image.Image], T]) -> T:
    """`look` at the opened image; everything that goes wrong in decoding is a `DataError` that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return look(image)
    except EdgeTrainError:
        raise
    except FileNotFoundError as error:
        raise DataError(str(path), "there is no such file") from error
    except Exception as error:  # Pillow's decoders raise almost anything for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(str(path), f"cannot be read as an image ({reason})", ", ".join(FORMATS)) from error


def _eight_bit(image: Image.Image, path: Path) -> Image.Image:
    """The image in mode L or RGB, not turned."""
    if image.mode.startswith(("I", "F")):
        return _from_wide(image, path)
    mode = "L" if _is_grey(image) else "RGB"
    if "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        over = Image.alpha_composite(paper, layer).convert(mode)
        low, high = layer.getchannel("A").getextrema()
        if low != high and over.convert("L").getextrema() == (255, 255):
            fix = "lay it over another colour first"
            raise DataError(str(path), "white on transparent: nothing is left of it on white", "what can be seen", fix)
        return over
    return image.convert(mode)


def _is_grey(image: Image.Image) -> bool:
    """Whether the image has no colours: by its mode, or by those of its palette that it uses."""
    if image.mode != "P":
        return image.mode in GREY_MODES
    palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    used = [int(index) for _, index in image.getcolors(256) or [] if isinstance(index, int)]
    return bool(len(palette)) and bool((palette[used] == palette[used][:, :1]).all())


def _from_wide(image: Image.Image, path: Path) -> Image.Image:
    """16-bit grey by its upper 8 bits. Raises `DataError` for what those do not hold."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    fix = "save it with 8 bits stretched over its range, or save arrays (.npy) and pack them with `--scale`"
    if values.dtype.kind == "f" or low < 0 or high > 0xFFFF:
        kind = "floating-point" if values.dtype.kind == "f" else "32-bit"
        raise DataError(str(path), f"{kind} grey values from {low:g} to {high:g}", "8 or 16 bits", fix)
    if 0 < high < 0x100:
        raise DataError(str(path), f"16-bit grey values up to {high}", "some that 8 bits do not make black", fix)
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def _inside(box: Box, scale: float, size: Size, where: str) -> tuple[int, int, int, int]:
    """The enlarged box in whole pixels, cut off at the image's borders; `size` is (width, height)."""
    left, top, right, bottom = box
    grow_x, grow_y = (right - left) * (scale - 1) / 2, (bottom - top) * (scale - 1) / 2
    corners = np.array([left - grow_x, top - grow_y, right + grow_x, bottom + grow_y])
    if np.isfinite(corners).all():
        x1, y1, x2, y2 = (int(v) for v in np.clip(np.round(corners), 0, [*size, *size]))
        if x2 > x1 and y2 > y1:
            return x1, y1, x2, y2
    raise DataError(where, f"crop box {tuple(box)}", f"left, top, right, bottom inside {size[0]} x {size[1]} pixels")
