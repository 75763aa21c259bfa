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
from stages.errors import DataError, EdgeTrainError, require

T = TypeVar("T")

SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".bmp", ".tif", ".tiff", ".webp"]
)
FORMATS = ("PNG", "JPEG", "PPM", "GIF", "BMP", "TIFF", "WEBP")
"""What Pillow may decode; the rest of its list includes formats that start other programs (EPS: Ghostscript)."""

GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N"})
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

    def __post_init__(self) -> None:
        require(self.fit in FITS, "--fit", repr(self.fit), "one of " + ", ".join(FITS))
        require(self.colour in ("auto", *MODES), "--colour", repr(self.colour), "auto, " + ", ".join(MODES))
        require(self.size is None or min(self.size) > 0, "--size", str(self.size), "positive sizes")
        require(self.box_scale > 0, "--box-scale", str(self.box_scale), "a positive factor")


def resolve_colour(paths: Sequence[Path], form: ImageForm) -> ImageForm:
    """`auto` made definite by the first image that can be opened."""
    if form.colour != "auto":
        return form
    for path in paths:
        try:
            colour = "gray" if _open(path, lambda image: image.mode) in GREY_MODES else "rgb"
        except DataError:
            continue
        return replace(form, colour=colour, strict=True)
    raise DataError(str(paths[0].parent), f"none of {len(paths)} images can be read", ", ".join(FORMATS))


def read_image(path: Path, form: ImageForm, box: Box | None = None) -> Array:
    """One image as uint8 (H, W) for `gray` and (H, W, 3) for `rgb`; `form.colour` must be definite.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey keeps its upper 8 bits, of a moving
    image the first frame counts. `box` is (left, top, right, bottom) in pixels of the upright image. Raises
    `DataError`, naming the file, for whatever cannot be read.
    """
    image = _open(path, _eight_bit)
    if form.strict and form.colour == "gray" and image.mode == "RGB":
        raise DataError(str(path), "a colour image", "grey as the first one", "state `--colour rgb` or `--colour gray`")
    if box is not None:
        image = image.crop(_inside(box, form.box_scale, image.size, str(path)))
    return np.asarray(resized(image.convert(MODES[form.colour]), form))


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


def _eight_bit(image: Image.Image) -> Image.Image:
    """The upright image in mode L or RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        return _from_16_bit(upright)
    if "A" in upright.mode or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("L" if upright.mode == "LA" else "RGB")
    return upright.convert("L" if upright.mode in GREY_MODES else "RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"grey values {values.min()} to {values.max()} need more than 16 bits")
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
