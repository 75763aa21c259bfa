"""Widths of training simulated in few bits, and what it would cost where products cost by width (FracTrain).

FracTrain (arXiv:2012.13113) computes with f bits forward (inputs and, but in DFQ, weights) and g bits backward. Its
cost counts a product of a and b bits as a b / 32^2 of a float32 product, on an accelerator that does not stand here: a
count, no time. Settings alone: the arithmetic is `simulated_bits`.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.errors import UsageError, require
from stages.planning.precision import check_turning, settings_of

FLOAT = 32
"""The width that stands for float32 itself: nothing is rounded."""
WIDTHS = (*range(2, 17), FLOAT)
WHERE = "--simulate-bits"
EXPECTED = "3/6, or 3/6,4/8,8/8:turn=0.05,decay=0.3, or dfq:3/6,4/8,6/12:target=0.03,weights=4"


@dataclass(frozen=True)
class Bits:
    """What one layer computes with."""

    forward: int
    """Of the layer's input."""
    weights: int
    backward: int
    """Of the gradient at its output, from which those of its weight and of its input are made."""


DEPTHWISE = Bits(8, 8, 16)
"""The least that depthwise layers get (`DWS_BITS`, `DWS_GRAD_BITS` of the paper's code for MobileNetV2)."""


def at_least(bits: Bits, least: Bits) -> Bits:
    """Of each width the larger."""
    return Bits(max(bits.forward, least.forward), max(bits.weights, least.weights), max(bits.backward, least.backward))


def cost(bits: Bits) -> float:
    """Bit-weighted MACs of a training step as a share of float32's: the mean of the three products of a layer.

    Output (f w), input gradient (g w) and weight gradient (f g), each over 32^2 (`train_dfq.py`: cost_fw, cost_eb,
    cost_gc).

    >>> [round(100 * cost(Bits(f, f, g)), 2) for f, g in ((3, 6), (4, 6), (6, 8), (8, 8), (32, 32))]
    [1.46, 2.08, 4.3, 6.25, 100.0]
    """
    f, w, g = bits.forward, bits.weights, bits.backward
    return (f * w + g * w + f * g) / (3 * FLOAT**2)


@dataclass(frozen=True)
class Progressive:
    """Widths one after the other (PFQ); a single one is a fixed width."""

    bits: tuple[Bits, ...]
    turn: float = 0.05
    decay: float = 0.3
    """eps at first, and alpha (`planning.precision`)."""

    def __post_init__(self) -> None:
        check_turning(WHERE, self.turn, self.decay)
        steps = zip(self.bits, self.bits[1:], strict=False)
        rising = all(a != b and at_least(a, b) == b for a, b in steps)
        require(rising, WHERE, ",".join(f"{b.forward}/{b.backward}" for b in self.bits), "widths that rise")


@dataclass(frozen=True)
class Dynamic:
    """Widths of which a gate chooses for every block and sample (DFQ)."""

    bits: tuple[Bits, ...]
    target: float
    """Bit-weighted MACs as a share of float32's that the regulariser aims at: the paper's cp / 100."""

    def __post_init__(self) -> None:
        several = len(self.bits) > 1 and len(set(self.bits)) == len(self.bits)
        require(several, WHERE, f"dfq with {len(self.bits)} candidates", "two or more that differ")
        require(0 < self.target < 1, WHERE, f"target={self.target}", "between 0 and 1")


def parse_simulation(text: str) -> Progressive | Dynamic:
    """What `--simulate-bits` says: forward/backward widths, for `dfq:` candidates, and behind a colon settings.

    >>> parse_simulation("3/6,8/8:turn=0.1")
    Progressive(bits=(Bits(forward=3, weights=3, backward=6), Bits(forward=8, weights=8, backward=8)), turn=0.1, decay=0.3)
    >>> parse_simulation("dfq:3/6,4/8:target=0.02").bits[1]
    Bits(forward=4, weights=4, backward=8)

    Raises `UsageError` for anything else.
    """  # noqa: E501
    if text.startswith("dfq:"):
        return _dynamic(text.removeprefix("dfq:"))
    widths, _, rest = text.partition(":")
    pairs = _pairs(widths)
    # a single width has nothing to move on to
    given = settings_of(rest, {"turn", "decay"} if len(pairs) > 1 else set(), WHERE, EXPECTED)
    return Progressive(tuple(Bits(f, f, g) for f, g in pairs), **given)


def _dynamic(text: str) -> Dynamic:
    """Weights have one width, whatever is chosen: the paper's 4 for CIFAR, without a setting of one's own."""
    widths, _, rest = text.partition(":")
    given = settings_of(rest, {"target", "weights"}, WHERE, EXPECTED)
    require("target" in given, WHERE, "dfq without a target", "a share of float32's cost, as :target=0.03")
    weights = given.get("weights", 4)
    require(weights in WIDTHS, WHERE, f"weights={weights:g}", "2 to 16 bits, or 32")
    return Dynamic(tuple(Bits(f, int(weights), g) for f, g in _pairs(widths)), given["target"])


def _pairs(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [(int(f), int(g)) for f, g in (part.split("/") for part in text.split(","))]
    except ValueError:
        raise UsageError(WHERE, repr(text), EXPECTED) from None
    for pair in pairs:
        require(set(pair) <= set(WIDTHS), WHERE, "{}/{}".format(*pair), "2 to 16 bits, or 32 for float32")
    return pairs
