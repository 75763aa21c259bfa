from importlib import util

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the fonts of matplotlib are not installed")

from stages.data import synthetic
from stages.data.synthetic import FONTS, Glyphs, candidates, class_name, fit, glyphs
from stages.errors import PartMissing, UsageError

SMALL = Glyphs(size=12, fonts=("DejaVuSans", "DejaVuSans-Bold", "STIXGeneral"), classes=30)


@pytest.fixture(scope="module")
def block():
    return glyphs(SMALL)


def test_every_class_has_one_sample_per_font_and_at_least_two(block):
    assert block.x.shape == (len(block.y), 12, 12)
    assert block.x.dtype == np.uint8
    assert (block.x.reshape(len(block), -1).max(1) > 100).all()
    pairs = set(zip(block.y.tolist(), block.columns["font"].tolist(), strict=True))
    assert len(pairs) == len(block)
    assert np.bincount(block.y).min() >= 2
    assert len(block.names) == len(set(block.names)) == len(np.unique(block.y)) == 30


def test_two_renderings_are_equal(block):
    assert np.array_equal(glyphs(SMALL).x, block.x)


def test_fonts_differ_within_a_class(block):
    first = block.x[block.y == 0].astype(int)
    assert np.abs(first[0] - first[1]).sum() > 0


def test_there_are_many_letters_and_no_digits():
    letters = set(candidates())
    assert len(letters) > 2000
    assert {"A", "z", "Ж", "ა"} <= letters
    assert letters.isdisjoint("0123456789²½é")


def test_letters_that_look_alike_are_one_class(block):
    shapes = block.x[block.columns["font"] == 0].reshape(30, -1).astype(float)
    shapes /= np.linalg.norm(shapes, axis=1, keepdims=True)
    cosine = shapes @ shapes.T - np.eye(30)
    assert cosine.max() < synthetic._ALIKE


def test_fit_centres_and_keeps_the_shape():
    page = fit(np.full((20, 10), 255, np.uint8), Glyphs(size=10, fill=0.8))
    rows, columns = np.flatnonzero(page.any(1)), np.flatnonzero(page.any(0))
    assert (rows[0], rows[-1]) == (1, 8)
    assert (columns[0], columns[-1]) == (3, 6)


def test_names_are_script_and_code_point():
    assert class_name("A") == "latin/U+0041"


@pytest.mark.parametrize("settings", [{"size": 4}, {"fill": 0.0}, {"fonts": FONTS[:1]}, {"classes": 1}], ids=str)
def test_settings_are_checked(settings):
    with pytest.raises(UsageError):
        Glyphs(**settings)


def test_without_matplotlib_the_part_is_missing(monkeypatch):
    monkeypatch.setattr(synthetic, "find_spec", lambda name: None)
    with pytest.raises(PartMissing, match="pip install matplotlib"):
        glyphs(SMALL)


def test_a_font_that_is_not_there_is_named():
    assert util.find_spec("matplotlib") is not None
    with pytest.raises(PartMissing, match="no font Nobody"):
        glyphs(Glyphs(fonts=("Nobody", "DejaVuSans")))
