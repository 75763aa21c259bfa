"""Backbones by name, and user models by `package.module:factory`.

`build` gives a torch module from (N, *input shape) to a feature vector (N, D), or, for user models, whatever the
factory returns. Code is imported only when the caller allows exactly that name: an artifact can ask for it, only the
command line can permit it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from stages.artifacts.records import InputSpec
from stages.errors import PartMissing, UsageError
from stages.models.blocks import he_init
from stages.models.efficientnet_lite import efficientnet_lite0
from stages.models.mcunet import mcunet_5fps
from stages.models.mobilenet_v1 import MobileNetV1
from stages.models.mobilenet_v2 import mobilenet_v2
from stages.models.mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from stages.models.proxyless import proxyless_w03
from stages.models.resnet import ResNet18
from stages.models.small import Cnn1d, Cnn4, DsCnn, Mlp
from stages.models.squeezenet import SqueezeNet
from stages.models.vit import VitTiny

Factory = Callable[..., nn.Module]


@dataclass(frozen=True)
class Architecture:
    """A backbone's factory, the input it takes unless the arguments change it, and one line about it."""

    factory: Factory
    input: InputSpec
    doc: str
    naming: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """A name in a state dict that tells whose weights these are -> the arguments that they need."""


def image_input(channels: int, height: int, width: int) -> InputSpec:
    """Bytes scaled to 2 * (value / 255) - 1."""
    return InputSpec("image", (channels, height, width), (2.0 / 255.0,), (-1.0,))


def sound_input(frames: int, mel: int, sample_rate_hz: int) -> InputSpec:
    """Log-mel energies of 40 ms windows every 20 ms (as in Hello Edge), brought to about -1..1."""
    window, hop = sample_rate_hz * 40 // 1000, sample_rate_hz * 20 // 1000
    if min(window, hop) < 1:
        raise UsageError("sample_rate", f"{sample_rate_hz} Hz", "at least 50 Hz")
    return InputSpec("sound", (1, frames, mel), (0.1,), (0.5,), sample_rate_hz, window, hop)


def signal_input(channels: int, length: int) -> InputSpec:
    """Values over time as they are."""
    return InputSpec("signal", (channels, length))


V3_NAMING = {"features.0.0.weight": {"eps": 1e-3}, "conv_stem.weight": {"eps": 1e-5}}
"""torchvision's and timm's MobileNetV3 differ in BatchNorm's eps."""

ARCHITECTURES: dict[str, Architecture] = {
    "mcunet-5fps": Architecture(
        mcunet_5fps, image_input(3, 128, 128), "MCUNet's 5 FPS ImageNet backbone; mix, channels, size"
    ),
    "mobilenetv2": Architecture(
        mobilenet_v2, image_input(3, 128, 128), "MobileNetV2; -wX or width, mix, channels, size"
    ),
    "proxyless-w0.3": Architecture(
        proxyless_w03, image_input(3, 128, 128), "ProxylessNAS, width 0.3; mix, channels, size"
    ),
    "mobilenetv1": Architecture(MobileNetV1, image_input(3, 128, 128), "MobileNetV1; -wX or width, channels, size"),
    "mobilenetv3-small": Architecture(
        mobilenet_v3_small, image_input(3, 224, 224), "MobileNetV3 small; mix, eps, channels, size", V3_NAMING
    ),
    "mobilenetv3-large": Architecture(
        mobilenet_v3_large, image_input(3, 224, 224), "MobileNetV3 large; mix, eps, channels, size", V3_NAMING
    ),
    "efficientnet-lite0": Architecture(
        efficientnet_lite0, image_input(3, 224, 224), "EfficientNet-Lite0; mix, channels, size"
    ),
    "resnet18": Architecture(ResNet18, image_input(3, 224, 224), "ResNet-18; channels, size"),
    "vit-tiny": Architecture(
        VitTiny,
        image_input(3, 224, 224),
        "vision transformer; patch (16), width (192), heads (3), depth (12), channels, size",
    ),
    "squeezenet": Architecture(SqueezeNet, image_input(3, 128, 128), "SqueezeNet 1.1; channels, size"),
    "cnn4": Architecture(Cnn4, image_input(1, 28, 28), "ProtoNet's Conv-4; -wX or width (64), channels, size"),
    "ds-cnn": Architecture(
        DsCnn, sound_input(49, 40, 16000), "DS-CNN on log-mel; -wX or width (64), depth, frames, mel, sample_rate"
    ),
    "cnn1d": Architecture(
        Cnn1d, signal_input(9, 128), "Conv-4 over time; -wX or width (64), channels (9), length (128)"
    ),
    "mlp": Architecture(
        Mlp, InputSpec("features", (900,)), "fully connected; dim (900), -wX or width (100), depth (1)"
    ),
}

INPUT_ARGUMENTS = {
    "image": {"size"},
    "sound": {"frames", "mel", "sample_rate"},
    "signal": {"length"},
    "features": set[str](),
}
"""Arguments that shape the input and not the network, by kind of input."""


def build(arch: str, arch_args: Mapping[str, Any], *, allow: str | None = None, seed: int = 0) -> nn.Module:
    """The module in evaluation mode, initialised from `seed`; torch's own random state is left as it was.

    Raises `UsageError` for an unknown name, wrong arguments, or code that `allow` does not name.
    """
    if ":" in arch:
        return _user_model(arch, arch_args, allow, seed)
    name, args = _resolve(arch, arch_args)
    known = ARCHITECTURES[name]
    own = INPUT_ARGUMENTS[known.input.kind] - _parameters(name)
    args = {key: value for key, value in args.items() if key not in own}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _call(arch, known.factory, args)
    he_init(module, torch.Generator().manual_seed(seed))
    return module.eval()


def input_spec(arch: str, arch_args: Mapping[str, Any]) -> InputSpec:
    """The input of a registry architecture with these arguments. Raises `UsageError`, also for user models.

    >>> input_spec("mobilenetv2-w0.35", {"size": 96}).shape
    (3, 96, 96)
    """
    if ":" in arch:
        raise UsageError(arch, "a user model's input is unknown", "its shape", "state it with --input, e.g. 3x32x32")
    name, args = _resolve(arch, arch_args)
    spec = ARCHITECTURES[name].input
    if spec.kind == "image":
        height, width = _size(arch, args.get("size", spec.shape[1]))
        return replace(spec, shape=(_positive(arch, "channels", args.get("channels", spec.shape[0])), height, width))
    if spec.kind == "features":
        return replace(spec, shape=(_positive(arch, "dim", args.get("dim", spec.shape[0])),))
    if spec.kind == "signal":
        length = _positive(arch, "length", args.get("length", spec.shape[1]))
        return signal_input(_positive(arch, "channels", args.get("channels", spec.shape[0])), length)
    rate_hz = _positive(arch, "sample_rate", args.get("sample_rate", spec.sample_rate_hz))
    frames = _positive(arch, "frames", args.get("frames", spec.shape[1]))
    mel = _positive(arch, "mel", args.get("mel", spec.shape[2]))
    return sound_input(frames, mel, rate_hz)


def arguments_for(arch: str, arch_args: Mapping[str, Any], names: Collection[str]) -> list[dict[str, Any]]:
    """The arguments under which weights of these names may fit, the given ones first: with what their naming asks for,
    without and with `mix`. What the user states stays."""
    if ":" in arch:
        return [dict(arch_args)]
    name, _ = _resolve(arch, arch_args)
    asked = next((more for key, more in ARCHITECTURES[name].naming.items() if key in names), {})
    base = {**asked, **arch_args}
    mixes = "mix" in _parameters(name) and "mix" not in arch_args
    return [base, {**base, "mix": True}] if mixes else [base]


def _resolve(arch: str, arch_args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Registry key and arguments, a `-wX` suffix turned into `width`."""
    if arch in ARCHITECTURES:
        return arch, dict(arch_args)
    match = re.fullmatch(r"(.+)-w(\d+(?:\.\d+)?)", arch)
    if match is None or match[1] not in ARCHITECTURES or "width" not in _parameters(match[1]):
        names = ", ".join(ARCHITECTURES)
        raise UsageError("--arch", f"unknown architecture {arch!r}", f"one of {names}, or package.module:factory")
    if "width" in arch_args:
        raise UsageError("--arch", f"{arch} and width={arch_args['width']}", "the width once")
    return match[1], {**arch_args, "width": float(match[2]) if "." in match[2] else int(match[2])}


def _parameters(name: str) -> frozenset[str]:
    return frozenset(inspect.signature(ARCHITECTURES[name].factory).parameters)


def _call(arch: str, factory: Factory, args: Mapping[str, Any]) -> nn.Module:
    """`factory(**args)`, its complaints as one `UsageError`."""
    try:
        inspect.signature(factory).bind(**args)
        module = factory(**args)
    except Exception as error:
        raise UsageError(arch, f"cannot be built with {dict(args)}: {_line(error)}", "", "see --arg") from error
    if not isinstance(module, nn.Module):
        raise UsageError(arch, f"the factory returned {type(module).__name__}", "a torch.nn.Module")
    return module


def _user_model(arch: str, arch_args: Mapping[str, Any], allow: str | None, seed: int) -> nn.Module:
    if allow != arch:
        raise UsageError(
            arch, "the model is code of yours that this command line does not permit", "", f"repeat --arch {arch}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _call(arch, _import_factory(arch), arch_args).eval()
    half = {torch.float16, torch.bfloat16}
    return module.float() if any(value.dtype in half for value in module.state_dict().values()) else module


def _import_factory(arch: str) -> Factory:
    module_name, _, attribute = arch.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise PartMissing(arch, _line(error), "", "install it, or put its folder on PYTHONPATH") from error
    except Exception as error:
        raise UsageError(arch, f"cannot be imported: {_line(error)}", "package.module:factory") from error
    if not callable(found):
        raise UsageError(arch, f"{attribute} is a {type(found).__name__}", "a function or class that makes the model")
    return found  # type: ignore[no-any-return]


def _line(error: Exception) -> str:
    """An exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _positive(arch: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(arch, f"{name}={value!r}", "a positive whole number")
    return value


def _size(arch: str, value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    return _positive(arch, "size", height), _positive(arch, "size", width)
