"""The lines of docs/data.md work on miniatures of what the publishers of the data sets give out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from edgetrain_cli.commands.run import run_words
from stages.artifacts.records import Block
from stages.artifacts.stream import open_records
from stages.data.blocks import join_blocks

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
LINES: dict[str, str] = dict(re.findall(r"^### (.+?)\n.*?```sh\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


def pictures(root: Path, *names: str, size: tuple[int, ...] = (30, 40, 3)) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(size, 40 * i % 250, np.uint8)).save(root / name)


def recordings(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(root / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(2 * 7000))


def traffic_sign(root: Path) -> None:
    names = [f"{c:05d}/{t:05d}_{f:05d}.ppm" for c in range(2) for t in range(2) for f in range(2)]
    pictures(root / "GTSRB/Final_Training/Images", *names)
    (root / "GTSRB/Final_Training/Images/00000/GT-00000.csv").write_text("Filename;Width\n00000_00000.ppm;40\n")


def omniglot(root: Path) -> None:
    for alphabet, character in (("Latin", 1), ("Latin", 2), ("Greek", 1)):
        for drawer in (1, 2):
            path = root / f"images_evaluation/{alphabet}/character{character:02d}/09{character:02d}_{drawer:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("1", (105, 105), 1).save(path)  # white paper


def aircraft(root: Path) -> None:
    pictures(root / "data/images", "0000001.jpg", "0000002.jpg", "0000003.jpg")
    boxes = "".join(f"000000{i} 1 1 {20 + i} 20\n" for i in (1, 2, 3))
    (root / "data/images_box.txt").write_text(boxes)
    (root / "data/images_variant_trainval.txt").write_text("0000002 Boeing 717\n0000001 707-320\n")
    (root / "data/images_variant_train.txt").write_text("0000001 707-320\n")
    (root / "data/images_variant_test.txt").write_text("0000003 707-320\n")


def flowers(root: Path) -> None:
    pictures(root / "jpg", *(f"image_{i:05d}.jpg" for i in (1, 2, 3)))
    scipy.io.savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 77]], np.uint8)})


def coco(root: Path) -> None:
    pictures(root / "train2017", "000000000009.jpg", "000000000025.jpg")
    notes = [
        {"image_id": 9, "category_id": 1, "bbox": [1.5, 2.0, 10.2, 20.7], "iscrowd": 0},
        {"image_id": 9, "category_id": 18, "bbox": [0, 0, 40, 30], "iscrowd": 0},
        {"image_id": 25, "category_id": 1, "bbox": [3, 3, 0, 0], "iscrowd": 0},
        {"image_id": 25, "category_id": 1, "bbox": [5, 5, 9, 9], "iscrowd": 1},
    ]
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": notes,
    }
    (root / "annotations").mkdir()
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))


def quickdraw(root: Path) -> None:
    (root / "quickdraw").mkdir()
    for name in ("cat", "The Eiffel Tower"):
        np.save(root / "quickdraw" / f"{name}.npy", np.zeros((1001, 784), np.uint8))


def cifar(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n\n")
    for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        (folder / name).write_bytes((bytes([0]) + bytes(3072)) + (bytes([1]) + bytes(3072)))


def harbox(root: Path) -> None:
    for user in (1, 2, 10):
        folder = root / "large_scale_HARBox" / str(user)
        folder.mkdir(parents=True)
        for name in ("Call", "Hop", "typing", "Walk", "Wave"):
            np.savetxt(folder / f"{name}_train.txt", np.zeros((100, 10)), fmt="%g")


def uci_har(root: Path) -> None:
    folder = root / "UCI HAR Dataset"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        np.savetxt(folder / split / f"X_{split}.txt", np.zeros((2, 561)))
        np.savetxt(folder / split / f"y_{split}.txt", [1, 2], fmt="%d")
        np.savetxt(folder / split / f"subject_{split}.txt", [1, 2], fmt="%d")
    (folder / "activity_labels.txt").write_text("1 WALKING\n2 WALKING_UPSTAIRS\n")


def speech(root: Path) -> None:
    words = [f"{word}/0a7c2a8d_nohash_{i}.wav" for word in ("yes", "no", "up", "down", "tree") for i in range(2)]
    recordings(root / "speech_commands", *words, "_background_noise_/white_noise.wav")


def mini_imagenet(root: Path) -> None:
    pictures(root / "images", "n0153282900000005.jpg", "n0153282900000006.jpg", "n0155899300000001.jpg")
    rows = ["filename,label", *(f"{path.name},{path.name[:9]}" for path in sorted((root / "images").iterdir()))]
    (root / "train.csv").write_text("\n".join(rows) + "\n")


PUBLISHED: dict[str, tuple[Callable[[Path], None], tuple[int, ...], set[str] | None, set[str]]] = {
    "Traffic Sign": (traffic_sign, (8, 84, 84, 3), {"00000", "00001"}, {"track"}),
    "Omniglot": (omniglot, (6, 84, 84), {"Latin/character01", "Latin/character02", "Greek/character01"}, {"drawer"}),
    "Aircraft": (aircraft, (3, 84, 84, 3), {"707-320", "Boeing 717"}, set()),
    "VGG Flower": (flowers, (3, 84, 84, 3), {"77", "1"}, set()),
    "CUB Birds": (
        lambda root: pictures(root / "CUB_200_2011/images", "001.Black_footed_Albatross/a.jpg", "002.Laysan/b.jpg"),
        (2, 84, 84, 3),
        {"001.Black_footed_Albatross", "002.Laysan"},
        set(),
    ),
    "Textures (DTD)": (
        lambda root: pictures(root / "dtd/images", "banded/banded_0002.jpg", "woven/woven_0001.jpg"),
        (2, 84, 84, 3),
        {"banded", "woven"},
        set(),
    ),
    "Quick Draw": (quickdraw, (2000, 28, 28), {"cat", "The Eiffel Tower"}, set()),
    "Fungi": (
        lambda root: pictures(root / "fungi/images", "10000_Abortiporus biennis/10001.JPG", "11_Albatrellus/2.JPG"),
        (2, 84, 84, 3),
        {"10000_Abortiporus biennis", "11_Albatrellus"},
        set(),
    ),
    "MSCOCO": (coco, (2, 84, 84, 3), {"person", "dog"}, set()),
    "MiniImageNet": (mini_imagenet, (3, 84, 84, 3), {"n01532829", "n01558993"}, set()),
    "CIFAR-10": (cifar, (4, 3, 32, 32), {"airplane", "automobile"}, {"split"}),
    "HARBOX": (harbox, (15, 900), {"Call", "Hop", "typing", "Walk", "Wave"}, {"user"}),
    "UCI HAR": (uci_har, (2, 561), {"WALKING", "WALKING_UPSTAIRS"}, {"subject", "split"}),
    "Speech Commands": (speech, (8, 8000), {"yes", "no", "up", "down"}, {"speaker"}),
    "Spoken Digits": (
        lambda root: recordings(root / "recordings", "7_jackson_32.wav", "0_theo_1.wav"),
        (2, 8000),
        {"0", "7"},
        {"speaker", "take"},
    ),
    "Handwritten Digits": (lambda root: None, (1797, 8, 8), None, set()),
}
"""Data set -> its miniature, the shape of x, the class names, the columns beside `index` and `source`."""
ONE_FILE = {"UCI HAR", "Handwritten Digits"}
"""Samples that lie all in one place."""


def test_the_page_and_the_miniatures_name_the_same_data_sets() -> None:
    assert LINES.keys() == PUBLISHED.keys()


def packed(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Block:
    """What the page's lines make of the miniature; `edgetrain pack` runs in this process, the rest in bash."""
    PUBLISHED[title][0](folder)
    monkeypatch.chdir(folder)
    before, _, line = LINES[title].rpartition("edgetrain pack ")
    shell = f'python() {{ "{sys.executable}" "$@"; }}\n{before}'
    subprocess.run(["bash", "-euo", "pipefail", "-c", shell], check=True)
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True, text=True).stdout
    assert run_words(["pack", *words.split("\0")[:-1]]) == 0
    (out,) = folder.glob("*.h5")
    return join_blocks([record for record in open_records(out) if isinstance(record, Block)])


@pytest.mark.parametrize("title", list(PUBLISHED))
def test_the_line_of_the_page_packs_it(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shape, names, columns = PUBLISHED[title]
    block = packed(title, tmp_path, monkeypatch)
    assert block.x.shape == shape
    assert (set(block.names) if block.names else None) == names
    assert set(block.columns) == {"index", *columns, *(set() if title in ONE_FILE else {"source"})}


def test_white_paper_becomes_dark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.asarray(packed("Omniglot", tmp_path, monkeypatch).x).max() == 0
