"""Which files make a data set, in every way in which publishers say so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from stages.data.images import SUFFIXES
from stages.data.listings import Columns, Listing, by_coco, by_folder, by_table, walk
from stages.data.samples import Notes
from stages.errors import DataError, InputMissing, UsageError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def classes(listing: Listing) -> dict[str, str]:
    assert listing.labels is not None
    assert listing.names is not None
    name_of = dict(zip(listing.labels.tolist(), listing.names, strict=True))
    return {file: name_of.get(label, "") for file, label in zip(listing.files, listing.y.tolist(), strict=True)}


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
    assert listing.columns["track"].tolist() == [b"00003", b"00000"]
    assert (listing.y.tolist(), listing.labels) == ([1, 2], pytest.approx(np.array([1, 2])))


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


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.png", "b/notes.txt", "mean.npy", "a/._1.png", ".git/2.png", "__MACOSX/a/1.png")
    (tmp_path / "a/gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "b/pipe.png")
    notes = Notes()
    assert len(by_folder(tmp_path, SUFFIXES, notes=notes).files) == 2
    assert notes.lines() == [
        "left out 3 hidden: .git, __MACOSX, a/._1.png",
        "left out 2 of another kind: mean.npy, b/notes.txt",
        "left out 2 that are no files: a/gone.png, b/pipe.png",
    ]


def test_a_class_folder_without_samples_is_an_error_unless_it_may_be_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.heic", "c/d/2.png")
    (tmp_path / "c/e").mkdir()
    with pytest.raises(DataError, match=r"/b: no file of the kind in this folder \(2 such folders\).*--on-bad skip"):
        by_folder(tmp_path, SUFFIXES)
    notes = Notes()
    assert by_folder(tmp_path, SUFFIXES, skip_empty=True, notes=notes).names == ("a", "c/d")
    assert "left out 2 folders without samples: b, c/e" in notes.lines()
    assert by_folder(tmp_path, SUFFIXES, r"(?P<label>\w+)/\d").names == ("a", "d")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/cat/1.png", "set/dog/1.png")
    root = tmp_path / "set"
    (root / "cat").symlink_to(tmp_path / "elsewhere/cat")
    (root / "dog/up").symlink_to(root)
    (root / "dog/beside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root / "dog")
    (root / "above").symlink_to(tmp_path)
    assert walk(root, SUFFIXES) == ["cat/1.png", "dog/1.png", "dog/beside/cat/1.png"]


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.png", "val/cat/1.png")
    with pytest.raises(DataError, match=r"folders train, val, expected classes.*--pattern"):
        by_folder(tmp_path, SUFFIXES)
    listing = by_folder(tmp_path, SUFFIXES, "^(?P<split>[^/]+)/(?P<label>[^/]+)/")
    assert (listing.names, listing.columns["split"].tolist()) == (("cat",), [b"train", b"val"])


def test_a_folder_that_all_classes_share_is_no_part_of_their_names(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{name}/images/{name}_1.JPEG" for name in ("n01443537", "n01629819")))
    notes = Notes()
    assert by_folder(tmp_path, SUFFIXES, notes=notes).names == ("n01443537", "n01629819")
    assert notes.lines() == [
        "classes are named without the folder 'train' that all of them share",
        "classes are named without the folder 'images' that all of them share",
    ]
    assert by_folder(tmp_path / "train", SUFFIXES).names == ("n01443537", "n01629819")
    touch(tmp_path, "train/n3/1.JPEG")
    assert by_folder(tmp_path / "train", SUFFIXES).names == ("n01443537/images", "n01629819/images", "n3")


def test_names_that_are_not_utf8_stay_apart_and_can_be_written(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"caf\xe8"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"\xff.png"), "wb"):
            pass
    listing = by_folder(tmp_path, SUFFIXES)
    assert listing.names == ("caf\\xe8", "caf\\xe9")
    assert all(listing.path(row).exists() for row in range(2))


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


def test_label_and_file_are_found_by_their_names(tmp_path: Path) -> None:
    listing = by_table(table(tmp_path, ",width,filename,label\n0,8,0.png,dog\n"), tmp_path, SUFFIXES, Columns())
    assert classes(listing) == {"0.png": "dog"}
    listing = by_table(table(tmp_path, "width,what\n8,0.png\n"), tmp_path, SUFFIXES, Columns(kept=("width",)))
    assert listing.files == ["0.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,width,height\n0.png,8,8\n", "columns width, height, expected one called label"),
        ("0.png,8,cat\n1.png,8,dog\n", "columns 2, 3, expected one called label"),
        ("file,class,label\n0.png,a,b\n", "columns 'class' and 'label', expected one of them"),
    ],
)
def test_more_than_one_column_that_may_be_the_class_is_asked(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"{message}.*--label-column"):
        by_table(table(tmp_path, text), tmp_path, SUFFIXES, Columns())


def test_an_empty_class_is_none(tmp_path: Path) -> None:
    listing = by_table(table(tmp_path, "file,label\na.png,cat\nb.png,\n"), tmp_path, SUFFIXES, Columns())
    assert (listing.y.tolist(), listing.lines) == ([0, -1], [2, 3])


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
    assert list(classes(listing).values()) == ["person"]
    assert (listing.y.tolist(), listing.names) == ([0, 1], ("dog", "person"))
    assert listing.boxes is not None
    assert np.array_equal(listing.boxes, [[1, 2, 11, 22], [0, 0, 5, 5]])


def test_coco_says_what_it_leaves_out_and_what_pictures_it_speaks_of(tmp_path: Path) -> None:
    content = coco()
    content["images"][0] |= {"width": 40, "height": 24}  # type: ignore[index]
    content["categories"].append({"id": 5, "name": "cat"})  # type: ignore[attr-defined]
    notes = Notes()
    listing = by_coco(table(tmp_path, json.dumps(content), "i.json"), tmp_path, notes)
    assert listing.sizes is not None
    assert listing.sizes.tolist() == [[40, 24], [40, 24]]
    assert notes.lines() == [
        "left out 1 crowds: annotation ",
        "left out 1 images without an object: 9.jpg",
        "left out 1 categories without an object: cat",
    ]


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
