"""Presets, the cut and bicubic resizing against torch's own; calibration; the order that names tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Block, InputSpec, Run
from stages.errors import SchemaError
from stages.importing import Importing, import_file, import_noting
from stages.models.calibration import calibrated
from stages.models.inputs import adapt
from stages.models.naming import in_order
from stages.models.presets import PRESETS
from stages.models.registry import ARCHITECTURES, build


def prepared(x: np.ndarray, preset: str, size: tuple[int, int], arch: str = "") -> np.ndarray:
    spec = PRESETS[preset].of(arch).applied(InputSpec("image", (3, *size)))
    return adapt(x, "NHWC", spec)


def of_the_field(x: np.ndarray, size: tuple[int, int], crop: float, mode: str, mean: tuple, std: tuple) -> np.ndarray:
    """torchvision's Resize, CenterCrop, ToTensor and Normalize, with torch's antialiased interpolation."""
    images = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    short = int(max(size) / crop)
    height, width = images.shape[2:]
    whole = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    resized = F.interpolate(images, size=whole, mode=mode, align_corners=False, antialias=True)
    top, left = (round((a - b) / 2) for a, b in zip(whole, size, strict=True))
    cut = resized[:, :, top : top + size[0], left : left + size[1]] / 255
    shape = (1, 3, 1, 1)
    scaled = (cut - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)
    return scaled.numpy()


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (33, 33), (90, 91)])
@pytest.mark.parametrize(
    ("preset", "arch", "crop", "mode", "numbers"),
    [
        ("torchvision", "resnet18", 0.875, "bilinear", IMAGENET),
        ("timm", "resnet18", 0.875, "bicubic", IMAGENET),
        ("timm", "vit-tiny", 0.9, "bicubic", HALF),
        ("mcunet", "mcunet-5fps", 0.875, "bilinear", HALF),
    ],
)
def test_a_preset_prepares_as_the_library_does(
    preset: str, arch: str, crop: float, mode: str, numbers: tuple, shape: tuple[int, int]
) -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    expected = of_the_field(x, (28, 28), crop, mode, *numbers)
    np.testing.assert_allclose(prepared(x, preset, (28, 28), arch), expected, rtol=0, atol=2e-5)


def test_without_a_cut_proportions_go() -> None:
    x = np.random.default_rng(0).integers(0, 256, (1, 20, 40, 3), np.uint8)
    found = prepared(x, "edgetrain", (10, 10))
    images = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    whole = F.interpolate(images, size=(10, 10), mode="bilinear", align_corners=False, antialias=True)
    np.testing.assert_allclose(found, (whole / 127.5 - 1).numpy(), rtol=0, atol=2e-5)


def test_a_record_keeps_its_preparation() -> None:
    run = import_file(Importing(arch="resnet18", arch_args={"size": 32}, preset="timm"), None).run
    again = decode(encode(run))
    assert isinstance(again, Run)
    assert again.model.input == run.model.input
    assert (again.model.input.crop, again.model.input.interpolation) == (0.875, "bicubic")


@pytest.mark.parametrize("more", [{"crop": -0.1}, {"crop": 0.05}, {"crop": 1.5}, {"interpolation": "lanczos"}])
def test_an_impossible_preparation_is_refused(more: dict) -> None:
    with pytest.raises(SchemaError, match="/model/input"):
        InputSpec("image", (3, 8, 8), **more)


def test_scale_and_offset_replace_a_presets_numbers_and_the_scaling_in_use_is_said() -> None:
    settings = Importing(arch="resnet18", arch_args={"size": 32}, preset="timm", scale=(1.0,), offset=(0.5,))
    spec = import_file(settings, None).run.model.input
    assert (spec.scale, spec.offset, spec.crop) == ((1.0,), (0.5,), 0.875)


def test_every_architecture_of_a_preset_is_in_the_registry() -> None:
    for preset in PRESETS.values():
        assert set(preset.others) <= set(ARCHITECTURES)


# ---------------------------------------------------------------------------------------------------------- calibration


def test_statistics_are_those_of_the_samples() -> None:
    x = np.random.default_rng(0).normal(3, 2, (50, 2, 6, 6)).astype(np.float32)
    module = calibrated(nn.Sequential(nn.BatchNorm2d(2)), x)
    norm = module[0]
    np.testing.assert_allclose(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(norm.running_var, x.var((0, 2, 3), ddof=1), rtol=1e-5)
    assert (norm.momentum, module.training) == (0.1, False)


def test_a_network_from_scratch_is_normalised_by_import() -> None:
    rng = np.random.default_rng(0)
    block = Block(rng.integers(0, 256, (24, 28, 28), np.uint8), np.zeros(24, np.int64), "NHW")
    settings = Importing(arch="cnn4", arch_args={"width": 8})
    plain, normal = import_noting(settings).run.model, import_noting(settings, start=block).run.model
    means = [name for name in plain.tensors if name.endswith("running_mean")]
    assert means
    assert not any(plain.tensors[name].any() for name in means)
    assert all(normal.tensors[name].any() for name in means)
    weights = [name for name in plain.tensors if "running" not in name]
    assert all(np.array_equal(plain.tensors[name], normal.tensors[name]) for name in weights)
    assert build("cnn4", {"width": 8}).training is False


# --------------------------------------------------------------------------------------------------------------- naming


def test_names_tell_the_order_or_nothing_is_guessed() -> None:
    timm = [
        "conv_stem.weight", "bn1.weight", "bn1.bias", "blocks.0.0.conv_dw.weight", "blocks.0.0.bn1.weight",
        "blocks.0.0.se.conv_reduce.weight", "blocks.0.0.se.conv_expand.weight", "blocks.0.0.conv_pw.weight",
        "blocks.0.0.bn2.weight", "blocks.1.0.conv_pw.weight", "blocks.1.0.bn1.weight", "blocks.1.0.conv_dw.weight",
        "blocks.1.0.bn2.weight", "blocks.1.0.conv_pwl.weight", "blocks.1.0.bn3.weight", "blocks.10.0.conv.weight",
        "conv_head.weight", "bn2.weight", "classifier.weight", "classifier.bias",
    ]  # fmt: skip
    found = in_order(sorted(timm))
    assert found is not None
    assert [name.rpartition(".")[0] for name in found] == [name.rpartition(".")[0] for name in timm]
    assert in_order(["encoder.first.weight", "encoder.second.weight"]) is None
