"""Glyph images: letters of many scripts, rendered from the fonts that ship with matplotlib.

Data for meta-training that every machine has: about 1,600 classes (letters), each with one image per font that has the
letter, up to fifteen. Digits are left out on purpose (only Unicode letters are drawn), so handwritten digits remain
classes that meta-training has never seen. Class names are `script/character`, as Omniglot's are `alphabet/character`.

Pillow draws, so another version of its FreeType may change single pixels; on one installation the images are equal to
the bit. matplotlib is not imported, only its font files are read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFont

from stages.artifacts.records import Array, Block
from stages.errors import PartMissing, require

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
"""The first one decides which letters there are, and which of them look alike."""

_RANGES = ((0x41, 0x3000), (0xA000, 0xAC00))
"""Code points of alphabetic scripts; CJK and presentation forms lie outside."""
_LETTERS = frozenset({"Lu", "Ll", "Lt", "Lo"})
"""Unicode categories; modifier letters are small copies of others."""
_ALIKE = 0.97
"""Cosine between two letters' images from which they count as one shape (o and O, Latin and Cyrillic A)."""
_INK = 40
"""Grey value from which a pixel counts as part of the glyph when its box is cut out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Glyphs:
    """Which glyph images to render."""

    size: int = 28
    """Height and width in pixels."""
    fill: float = 0.8
    """Longer side of the glyph's box as a share of the size."""
    fonts: tuple[str, ...] = FONTS
    classes: int | None = None
    """At most so many letters, spread evenly over all; None is all of them."""

    def __post_init__(self) -> None:
        require(self.size >= 8, "glyphs", f"size {self.size}", "at least 8 pixels")
        require(0 < self.fill <= 1, "glyphs", f"fill {self.fill}", "more than 0, at most 1")
        require(len(self.fonts) >= 2, "glyphs", f"{len(self.fonts)} fonts", "at least 2: each gives a class one sample")
        require(self.classes is None or self.classes >= 2, "glyphs", f"{self.classes} classes", "at least 2")


def glyphs(how: Glyphs | None = None, on_step: Callable[[int], None] = lambda done: None) -> Block:
    """Glyph images uint8 (N, size, size), ink 255 on 0, in class order; column `font` (N,) counts from 0.

    `on_step` gets the number of letters done. Raises `PartMissing` where matplotlib, or one of its fonts, is missing.
    """
    how = how or Glyphs()
    pens = [_Pen(path, 2 * how.size) for path in font_files(how.fonts)]
    letters = [letter for letter in distinct_letters(pens[0], how) if sum(pen.has(letter) for pen in pens) > 1]
    letters = _spread(letters, how.classes)
    images, labels, fonts = [], [], []
    for label, letter in enumerate(letters):
        for font, pen in enumerate(pens):
            if pen.has(letter):
                images.append(fit(pen.draw(letter), how))
                labels.append(label)
                fonts.append(font)
        on_step(label + 1)
    return Block(
        x=np.stack(images),
        y=np.array(labels, np.int64),
        layout="NHW",
        columns={"font": np.array(fonts, np.int64)},
        labels=np.arange(len(letters), dtype=np.int64),
        names=tuple(class_name(letter) for letter in letters),
        facts={"fonts": ",".join(how.fonts)},
    )


def font_files(names: tuple[str, ...]) -> list[Path]:
    """Paths of fonts that matplotlib ships. Raises `PartMissing`."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise PartMissing("glyphs", "matplotlib is not installed", "its fonts", "pip install matplotlib")
    folder = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    files = [folder / f"{name}.ttf" for name in names]
    for file in files:
        if not file.is_file():
            raise PartMissing("glyphs", f"no font {file.stem} in {folder}", "the fonts of matplotlib 3.8 or later")
    return files


def candidates() -> Iterator[str]:
    """Letters that are no variant of another: not accented, not superscript, no ligature."""
    for first, last in _RANGES:
        for code in range(first, last):
            letter = chr(code)
            if unicodedata.category(letter) in _LETTERS and unicodedata.normalize("NFKD", letter) == letter:
                yield letter


def distinct_letters(pen: _Pen, how: Glyphs) -> list[str]:
    """The candidates that the font has, without those that look like an earlier one."""
    present = [letter for letter in candidates() if pen.has(letter)]
    vectors = np.stack([fit(pen.draw(letter), how).astype(np.float32).ravel() for letter in present])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept: list[int] = []
    shapes = np.empty_like(vectors)  # of the letters kept so far
    for i, vector in enumerate(vectors):
        if (shapes[: len(kept)] @ vector).max(initial=0.0) < _ALIKE:
            shapes[len(kept)] = vector
            kept.append(i)
    return [present[i] for i in kept]


def class_name(letter: str) -> str:
    """`script/character`, the script being the first word of the letter's Unicode name.

    >>> class_name("Ж")
    'cyrillic/U+0416'
    """
    return f"{unicodedata.name(letter, 'unnamed').split()[0].lower()}/U+{ord(letter):04X}"


def fit(ink: Array, how: Glyphs) -> Array:
    """A glyph's box (h, w), its longer side scaled to `fill` of the size, in the middle of a page (size, size)."""
    height, width = ink.shape
    scale = how.size * how.fill / max(height, width)
    box = (max(1, round(width * scale)), max(1, round(height * scale)))
    page = Image.new("L", (how.size, how.size))
    glyph = Image.fromarray(ink).resize(box, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
    page.paste(glyph, ((how.size - box[0]) // 2, (how.size - box[1]) // 2))
    return np.asarray(page)


class _Mark(NamedTuple):
    shape: tuple[int, ...]
    pixels: bytes


class _Pen:
    """One font at one size; remembers what it has drawn."""

    def __init__(self, path: Path, pixels: int) -> None:
        # The basic layout engine draws one code point as one glyph and is part of every build of Pillow.
        self._font = ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)
        self._drawn: dict[str, Array] = {}
        self._absent = self._mark("\U0010fffe")

    def draw(self, letter: str) -> Array:
        """The glyph cut to its ink: uint8 (h, w), empty for a blank one."""
        if letter not in self._drawn:
            self._drawn[letter] = _cut(self._font, letter)
        return self._drawn[letter]

    def has(self, letter: str) -> bool:
        """Whether the font has a visible glyph for the letter: not its mark for letters that are absent."""
        return self.draw(letter).size > 0 and self._mark(letter) != self._absent

    def _mark(self, letter: str) -> _Mark:
        ink = self.draw(letter)
        return _Mark(ink.shape, ink.tobytes())


def _cut(font: ImageFont.FreeTypeFont, letter: str) -> Array:
    mask = font.getmask(letter, mode="L")
    width, height = mask.size
    image = np.array(mask, np.uint8).reshape(height, width)
    rows, columns = np.flatnonzero((image >= _INK).any(1)), np.flatnonzero((image >= _INK).any(0))
    if not len(rows):
        return np.zeros((0, 0), np.uint8)
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _spread(letters: list[str], count: int | None) -> list[str]:
    if count is None or count >= len(letters):
        return letters
    return [letters[i * len(letters) // count] for i in range(count)]
