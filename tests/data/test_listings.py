"""Which files make a data set, in every way in which publishers say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stages.data.images import SUFFIXES
from stages.data.listings import Columns, Listing, by_coco, by_folder, by_table, walk
from stages.errors import DataError, InputMissing, UsageError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def classes(listing: Listing) -> dict[str, str]:
    return {file: listing.names[label] for file, label in zip(listing.files, listing.y, strict=True)}


# ------------------------------------------------------------------------------------------------------------- folders


def test_walk_is_sorted_and_leaves_out_what_is_hidden_or_of_another_kind(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.PNG", "b/1.jpg", "a/x/3.ppm", "a/GT.csv", ".git/4.png", "a/.5.png", "6.gif")
    assert walk(tmp_path, SUFFIXES) == ["6.gif", "a/x/3.ppm", "b/1.jpg", "b/2.PNG"]


def test_classes_are_folders_however_deep(tmp_path: Path) -> None:
    touch(tmp_path, "Latin/character02/1.png", "Latin/character01/1.png", "Greek/character01/1.png")
    listing = by_folder(tmp_path, SUFFIXES)
    assert listing.names == ("Greek/character01", "Latin/character01", "Latin/character02")
    assert classes(listing)["Latin/character02/1.png"] == "Latin/character02"
    assert listing.path(0) == tmp_path / "Greek/character01/1.png"


def test_a_pattern_gives_class_and_columns_and_leaves_out_what_does_not_match(tmp_path: Path) -> None:
    touch(tmp_path, "7_theo_0.wav", "3_lucas_12.wav", "7_lucas_1.wav", "noise.wav")
    listing = by_folder(tmp_path, frozenset({".wav"}), r"^(?P<label>\d)_(?P<speaker>\w+)_(?P<take>\d+)\.wav")
    assert classes(listing) == {"3_lucas_12.wav": "3", "7_lucas_1.wav": "7", "7_theo_0.wav": "7"}
    assert listing.columns["speaker"].tolist() == [b"lucas", b"lucas", b"theo"]
    assert listing.columns["take"].tolist() == [12, 1, 0]


def test_a_pattern_without_label_keeps_the_folder_as_class(tmp_path: Path) -> None:
    touch(tmp_path, "00001/00003_00007.ppm", "00002/00000_00001.ppm")
    listing = by_folder(tmp_path, SUFFIXES, r"(?P<track>\d+)_\d+\.ppm$")
    assert listing.names == ("00001", "00002")
    assert listing.columns["track"].tolist() == [3, 0]


def test_folders_that_say_too_little(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of a known kind"):
        by_folder(tmp_path, SUFFIXES)
    touch(tmp_path, "a/1.png", "loose.png")
    with pytest.raises(DataError, match=r"loose\.png: a file outside every class folder.*--pattern"):
        by_folder(tmp_path, SUFFIXES)
    with pytest.raises(DataError, match="none of 2 paths"):
        by_folder(tmp_path, SUFFIXES, "z+")
    with pytest.raises(UsageError, match="regular expression"):
        by_folder(tmp_path, SUFFIXES, "(")


# -------------------------------------------------------------------------------------------------------------- tables


def table(tmp_path: Path, text: str, name: str = "list.csv") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_plain_csv_of_files_and_classes(tmp_path: Path) -> None:
    listing = by_table(table(tmp_path, "a.png,cat\nb.png,dog\n"), tmp_path, SUFFIXES, Columns())
    assert classes(listing) == {"a.png": "cat", "b.png": "dog"}


def test_columns_by_name_semicolons_and_boxes_as_in_gtsrb(tmp_path: Path) -> None:
    text = "Filename;Width;X1;Y1;X2;Y2;ClassId\n00000.ppm;53;6;5;48;49;16\n00001.ppm;42;5;6;36;37;1\n"
    columns = Columns(file="Filename", label="ClassId", box=("X1", "Y1", "X2", "Y2"), kept=("Width",))
    listing = by_table(table(tmp_path, text), tmp_path, SUFFIXES, columns)
    assert classes(listing) == {"00000.ppm": "16", "00001.ppm": "1"}
    assert listing.boxes is not None
    assert listing.boxes.tolist() == [[6, 5, 48, 49], [5, 6, 36, 37]]
    assert listing.columns["Width"].tolist() == [53, 42]


def test_names_without_suffix_and_classes_with_spaces_as_in_fgvc_aircraft(tmp_path: Path) -> None:
    touch(tmp_path, "0034309.jpg", "0034958.jpg")
    path = table(tmp_path, "0034309 Boeing 707\n0034958 A340-200\n", "images_variant_train.txt")
    listing = by_table(path, tmp_path, SUFFIXES, Columns())
    assert classes(listing) == {"0034309.jpg": "Boeing 707", "0034958.jpg": "A340-200"}


def test_a_list_of_files_alone_takes_their_folders_as_in_speech_commands(tmp_path: Path) -> None:
    path = table(tmp_path, "yes/0a.wav\nno/0b.wav\n", "testing_list.txt")
    listing = by_table(path, tmp_path, frozenset({".wav"}), Columns())
    assert classes(listing) == {"yes/0a.wav": "yes", "no/0b.wav": "no"}


def test_tables_that_cannot_be_honoured(tmp_path: Path) -> None:
    path = table(tmp_path, "file,label\na.png,cat\n")
    with pytest.raises(UsageError, match=r"no column 'klass', expected file, label"):
        by_table(path, tmp_path, SUFFIXES, Columns(label="klass"))
    with pytest.raises(DataError, match="column label"):
        by_table(path, tmp_path, SUFFIXES, Columns(box=("label",) * 4))
    with pytest.raises(UsageError, match="four"):
        Columns(box=("a", "b"))


# ---------------------------------------------------------------------------------------------------------------- COCO


STRANGER = {"image_id": 1, "category_id": 1}


def coco(**changes: object) -> dict[str, object]:
    return {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 9, "file_name": "9.jpg"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 18, "bbox": [1, 2, 10, 20]},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 5, 5]},
            {"image_id": 9, "category_id": 1, "bbox": [3, 3, 4, 4], "iscrowd": 1},
        ],
        **changes,
    }


def test_coco_objects_are_samples_with_boxes_and_crowds_are_not(tmp_path: Path) -> None:
    listing = by_coco(table(tmp_path, json.dumps(coco()), "i.json"), tmp_path / "train2017")
    assert listing.files == ["7.jpg", "7.jpg"]
    assert [listing.names[label] for label in listing.y] == ["dog", "person"]
    assert listing.boxes is not None
    assert np.array_equal(listing.boxes, [[1, 2, 11, 22], [0, 0, 5, 5]])


def test_annotations_without_boxes_as_in_fungi(tmp_path: Path) -> None:
    notes = [{"image_id": 7, "category_id": 18}]
    assert by_coco(table(tmp_path, json.dumps(coco(annotations=notes)), "i.json"), tmp_path).boxes is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps(coco(annotations=[{"image_id": 1, "category_id": 1}])),
        json.dumps(coco(annotations=[])),
    ],
    ids=["empty", "list", "no keys", "unknown image", "no objects"],
)
def test_json_that_is_no_annotations(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"i\.json"):
        by_coco(table(tmp_path, text, "i.json"), tmp_path)


def test_missing_annotations(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        by_coco(tmp_path / "none.json", tmp_path)
