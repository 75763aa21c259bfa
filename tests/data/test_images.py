"""Image files of every kind come out upright, 8 bits, grey or RGB; damaged ones are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.images import (
    FITS,
    ImageForm,
    dimensions,
    height_width,
    read_image,
    resize_arrays,
    resolve_colour,
)
from stages.data.samples import Notes
from stages.errors import DataError, UsageError

GRAY, RGB = ImageForm(colour="gray"), ImageForm(colour="rgb")


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def test_colour_and_grey_files_keep_their_values(tmp_path: Path) -> None:
    colour = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert np.array_equal(read_image(saved(tmp_path / "c.png", colour), RGB), colour)
    assert np.array_equal(read_image(saved(tmp_path / "g.pgm", grey), GRAY), grey)
    assert np.array_equal(read_image(tmp_path / "g.pgm", RGB), np.repeat(grey[..., None], 3, axis=2))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    upright = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    stored = Image.fromarray(np.rot90(upright, 1).copy())  # turned left; orientation 6 says: turn right to view
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png", GRAY), upright)


def test_one_bit_palette_and_transparent_images(tmp_path: Path) -> None:
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    bits.save(tmp_path / "bits.png")
    assert np.array_equal(read_image(tmp_path / "bits.png", GRAY), [[0, 255], [255, 0]])

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png", RGB), [[[255, 0, 0], [0, 0, 255]]])
    palette.save(tmp_path / "hole.png", transparency=1)
    assert np.array_equal(read_image(tmp_path / "hole.png", RGB), [[[255, 0, 0], [255, 255, 255]]])

    half = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    out = read_image(saved(tmp_path / "alpha.png", half), RGB)
    assert np.array_equal(out[0, :2], [[255] * 3, [0] * 3])
    assert abs(int(out[0, 2, 0]) - 127) <= 1


def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path: Path) -> None:
    deep = np.array([[0, 256, 0x1234], [0xFFFF, 255, 0x8000]], np.uint16)
    for name in ("deep.png", "deep.tif"):
        assert np.array_equal(read_image(saved(tmp_path / name, deep), GRAY), [[0, 1, 0x12], [0xFF, 0, 0x80]])
    wide = saved(tmp_path / "wide.tif", np.array([[0, 70_000]], np.int32))
    with pytest.raises(DataError, match=r"wide\.tif.*16 bits"):
        read_image(wide, GRAY)


def test_auto_takes_the_first_readable_image_and_never_loses_colour(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    grey = saved(tmp_path / "grey.png", np.zeros((2, 2), np.uint8))
    colour = saved(tmp_path / "colour.png", np.zeros((2, 2, 3), np.uint8))
    form = resolve_colour([tmp_path / "broken.png", grey], ImageForm())
    assert form.colour == "gray"
    with pytest.raises(DataError, match="--colour rgb"):
        read_image(colour, form)
    assert read_image(grey, resolve_colour([colour], ImageForm())).shape == (2, 2, 3)
    assert read_image(colour, GRAY).shape == (2, 2)
    with pytest.raises(DataError, match=r"broken\.png: cannot be read as an image"):
        resolve_colour([tmp_path / "broken.png"], ImageForm())


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "missing", "unlisted"])
def test_unreadable_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / f"{damage}.png"
    whole = saved(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).read_bytes()
    Image.new("L", (4, 4)).save(tmp_path / "x.pcx")
    unlisted = (tmp_path / "x.pcx").read_bytes()  # Pillow could read it, but only listed formats are decoded
    content = {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "unlisted": unlisted}
    if damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(DataError, match=f"{damage}\\.png"):
        read_image(path, RGB)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "big.png", np.zeros((50, 50), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(DataError, match=r"big\.png.*pixels"):
        read_image(path, GRAY)


def test_fits_differ_in_what_they_do_with_the_aspect_ratio(tmp_path: Path) -> None:
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 255  # the middle square is white
    path = saved(tmp_path / "wide.png", wide)
    out = {fit: read_image(path, ImageForm(colour="gray", size=(4, 4), fit=fit)) for fit in FITS}
    assert out["crop"].min() == 255
    assert out["pad"][0].max() == 0
    assert out["pad"][1:3, 1:3].min() > 200
    assert out["stretch"].shape == (4, 4)
    assert out["stretch"][0, 0] < 60 < 200 < out["stretch"][0, 1]


def test_boxes_are_cut_out_enlarged_and_kept_inside(tmp_path: Path) -> None:
    image = np.arange(100, dtype=np.uint8).reshape(10, 10)
    path = saved(tmp_path / "i.png", image)
    assert np.array_equal(read_image(path, GRAY, (2, 4, 6, 8)), image[4:8, 2:6])
    larger = ImageForm(colour="gray", box_scale=1.5)
    assert np.array_equal(read_image(path, larger, (2, 4, 6, 8)), image[3:9, 1:7])
    assert np.array_equal(read_image(path, larger, (0, 0, 10, 10)), image)
    for box in ((5, 5, 5, 9), (20, 20, 30, 30), (np.nan, 0, 1, 1)):
        with pytest.raises(DataError, match="crop box"):
            read_image(path, GRAY, box)


@pytest.mark.parametrize(("layout", "shape"), [("NHW", (2, 8, 6)), ("NHWC", (2, 8, 6, 3)), ("NCHW", (2, 3, 8, 6))])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_are_resized_as_files_are(layout: str, shape: tuple[int, ...], dtype: type) -> None:
    x = (np.random.default_rng(1).random(shape) * 255).astype(dtype)
    out = resize_arrays(x, layout, ImageForm(size=(4, 3)))
    first = (1, ..., 0) if layout == "NHWC" else (1, 0) if layout == "NCHW" else 1
    expected = Image.fromarray(np.ascontiguousarray(x[first])).resize((3, 4), Image.Resampling.BILINEAR)
    assert out.dtype == dtype
    assert np.array_equal(out[first], np.asarray(expected))
    assert resize_arrays(x, layout, ImageForm()) is x


def test_sixteen_bit_arrays_are_not_resized() -> None:
    with pytest.raises(DataError, match="int16"):
        resize_arrays(np.zeros((1, 4, 4), np.int16), "NHW", ImageForm(size=(2, 2)))


@pytest.mark.parametrize(
    "wrong", [{"fit": "zoom"}, {"colour": "blue"}, {"size": (0, 3)}, {"box_scale": 0.0}], ids=lambda w: next(iter(w))
)
def test_forms_check_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ImageForm(**wrong)


def test_sizes_as_people_write_them() -> None:
    assert height_width("96x128") == (96, 128)
    assert dimensions("3x32X32", "--shape") == (3, 32, 32)
    for text in ("", "x", "0", "-3", "1x2x3"):
        with pytest.raises(UsageError):
            height_width(text)


# ------------------------------------------------------------------------------------------- nothing is lost unheard


def test_floating_point_pictures_are_refused_not_made_black(tmp_path: Path) -> None:
    path = saved(tmp_path / "f.tif", np.tile(np.linspace(0, 1, 8, dtype=np.float32), (8, 1)))
    with pytest.raises(DataError, match=r"f\.tif: floating-point grey values from 0 to 1, expected 8 or 16 bits"):
        read_image(path, GRAY)
    assert resolve_colour([path], ImageForm()).colour == "gray"


def test_sixteen_bits_keep_their_upper_eight_unless_nothing_would_be_left(tmp_path: Path) -> None:
    notes = Notes()
    path = saved(tmp_path / "w.png", np.array([[0, 256], [0xFFFF, 0x1234]], np.uint16))
    assert read_image(path, GRAY, notes=notes).tolist() == [[0, 1], [255, 0x12]]
    assert notes.lines() == ["kept the upper 8 of the 16 bits of 1 images: w.png"]
    with pytest.raises(DataError, match="16-bit grey values up to 200, expected some that 8 bits do not make black"):
        read_image(saved(tmp_path / "dark.png", np.array([[0, 200]], np.uint16)), GRAY)
    assert read_image(saved(tmp_path / "black.png", np.zeros((2, 2), np.uint16)), GRAY).max() == 0
    with pytest.raises(DataError, match="32-bit grey values from 0 to 70000"):
        read_image(saved(tmp_path / "i.tif", np.array([[0, 70000]], np.int32)), GRAY)


def test_of_several_pictures_in_a_file_the_first_counts_which_is_said(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    notes = Notes()
    assert read_image(tmp_path / "pages.tif", GRAY, notes=notes).max() == 10
    assert notes.lines() == ["took the first image of 1 files that hold several: pages.tif"]


@pytest.mark.parametrize("kind", ["L", "LA", "P"])
def test_grey_with_transparency_is_grey(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(np.array([[0, 90], [180, 255]], np.uint8))
    if kind == "LA":
        image.putalpha(Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8)))
    else:
        image = image.convert(kind)
    image.save(tmp_path / "t.png", **({} if kind == "LA" else {"transparency": 0}))
    strict = ImageForm(colour="gray", strict=True)
    assert read_image(tmp_path / "t.png", strict).tolist() == [[255, 90], [180, 255]]
    assert resolve_colour([tmp_path / "t.png"], ImageForm()).colour == "gray"


def test_white_on_transparent_does_not_become_an_empty_sheet(tmp_path: Path) -> None:
    ink = np.full((4, 4, 4), 255, np.uint8)
    ink[1:3, 1:3, 3] = 0
    with pytest.raises(DataError, match="white on transparent: nothing is left"):
        read_image(saved(tmp_path / "white.png", ink), RGB)
    ink[..., 3] = 255
    assert read_image(saved(tmp_path / "sheet.png", ink), RGB).min() == 255


def test_a_palette_of_colours_is_no_grey(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.png", np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    with Image.open(path) as opened:
        opened.convert("P").save(tmp_path / "p.png")
    assert resolve_colour([tmp_path / "p.png"], ImageForm()).colour == "rgb"
    assert read_image(tmp_path / "p.png", RGB).tolist() == [[[255, 0, 0], [0, 0, 255]]]


GREEN = [0, 255, 0]


def turned(path: Path, orientation: int, size: tuple[int, int] = (6, 10)) -> Path:
    """A grey picture whose stored rows 1, 2 and columns 2 to 4 are green, with an EXIF orientation."""
    pixels = np.full((*size, 3), 90, np.uint8)
    pixels[1:3, 2:5] = GREEN
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


STORED_BOX = (2, 1, 5, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_drawn_in_the_stored_picture_are_cut_from_it(tmp_path: Path, orientation: int) -> None:
    path = turned(tmp_path / "t.png", orientation)
    found = read_image(path, ImageForm(colour="rgb", boxes="stored"), STORED_BOX)
    assert found.shape == ((3, 2, 3) if orientation >= 5 else (2, 3, 3))
    assert (found == GREEN).all()
    upright = read_image(path, RGB)
    rows, columns = np.nonzero((upright == GREEN).all(axis=2))
    box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
    assert np.array_equal(read_image(path, ImageForm(colour="rgb", boxes="upright"), box), found)


def test_the_size_that_annotations_state_tells_which_picture_boxes_were_drawn_in(tmp_path: Path) -> None:
    path = turned(tmp_path / "t.png", 6)
    assert (read_image(path, RGB, STORED_BOX, (10, 6)) == GREEN).all()
    assert (read_image(path, RGB, (3, 2, 5, 5), (6, 10)) == GREEN).all()
    for drawn in (None, (0, 0)):
        with pytest.raises(DataError, match=r"EXIF orientation \(6\) turns.*--boxes stored"):
            read_image(path, RGB, STORED_BOX, drawn)
    with pytest.raises(DataError, match=r"orientation \(3\)"):
        read_image(turned(tmp_path / "half.png", 3), RGB, STORED_BOX, (10, 6))
    with pytest.raises(DataError, match="10 x 6 pixels, annotated as 20 x 12"):
        read_image(turned(tmp_path / "small.png", 1), RGB, STORED_BOX, (20, 12))
