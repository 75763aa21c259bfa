"""The order of a net's layers from their names alone, for files that keep none (.safetensors).

torchvision's and timm's names tell it: numbers count, a stem comes before blocks and a classifier at the end, `bn2` is
the norm behind the second convolution beside it, and timm's `conv_pw` comes first in a block that ends in a `conv_pwl`.
Names that do not tell it give no order, and all shapes are compared afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

RANKS = {
    **dict.fromkeys(("cls_token", "class_token"), -3), "pos_embed": -2, "patch_embed": -1,
    **dict.fromkeys(("conv_stem", "stem", "conv", "conv1", "conv_reduce", "fc1", "features"), 0),
    **dict.fromkeys(("conv_dw", "conv_expand", "fc2"), 1),
    **dict.fromkeys(("se", "conv2"), 2), **dict.fromkeys(("conv_pw", "conv_pwl", "conv3"), 3),
    **dict.fromkeys(("downsample", "shortcut"), 5), **dict.fromkeys(("blocks", "layers"), 10),
    **{f"layer{i}": 10 + i for i in range(1, 5)},
    "conv_head": 90, "norm": 95, **dict.fromkeys(("head", "fc", "classifier"), 99),
}  # fmt: skip
"""Where a word stands among those beside it."""
LAST = 50
"""Where a norm stands whose convolution is not there."""


def in_order(names: Iterable[str]) -> list[str] | None:
    """The names of a state dict, layers in the order in which a net has them; None where they do not tell it.

    >>> in_order(["fc.bias", "layer1.0.bn1.weight", "layer1.0.conv1.weight", "conv1.weight", "bn1.weight"])
    ['conv1.weight', 'bn1.weight', 'layer1.0.conv1.weight', 'layer1.0.bn1.weight', 'fc.bias']
    >>> in_order(["first.weight", "second.weight"])
    """
    names = list(names)
    beside: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            beside.setdefault(".".join(parts[:i]), set()).add(part)
    if not all(len(words) == 1 or all(map(_is_known, words)) for words in beside.values()):
        return None
    return sorted(names, key=lambda name: [_place(*at) for at in _steps(name, beside)])


def _steps(name: str, beside: dict[str, set[str]]) -> list[tuple[str, set[str]]]:
    parts = name.split(".")
    return [(part, beside[".".join(parts[:i])]) for i, part in enumerate(parts[:-1])]


def _place(word: str, beside: set[str]) -> tuple[float, str]:
    if word.isdigit():
        return int(word), ""
    norm = re.fullmatch(r"bn(\d+)", word)
    if norm:  # behind the convolution of its number
        convolutions = sorted(_rank(other, beside) for other in beside if other.startswith("conv"))
        number = int(norm[1]) - 1
        return (convolutions[number] + 0.1 if number < len(convolutions) else LAST), word
    return _rank(word, beside), word


def _rank(word: str, beside: set[str]) -> float:
    if word == "conv_pw" and "conv_pwl" in beside:
        return 0
    return RANKS.get(word, LAST)


def _is_known(word: str) -> bool:
    return word.isdigit() or word in RANKS or re.fullmatch(r"bn\d+", word) is not None
