"""The learning rate over meta-training: P>M>F's, warm-up and then a cosine."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, isfinite, pi

from stages.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmCosine:
    """Linear from `warmup_rate` to `rate` over `warmup_epochs`, then a cosine that would reach `least_rate` at the end.

    Defaults: P>M>F (arXiv:2204.07305, code), used by TinyTrain (appendix A.3). As there, the cosine counts the warm-up
    among its epochs. Changed: the rate moves with every step; at the start of an epoch it is P>M>F's.
    """

    epochs: int = 100
    rate: float = 5e-5
    warmup_epochs: int = 5
    warmup_rate: float = 1e-6
    least_rate: float = 1e-6

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "schedule", f"{self.epochs} epochs", "at least 1")
        require(0 <= self.warmup_epochs <= self.epochs, "schedule", f"{self.warmup_epochs} epochs of warm-up",
                f"0 to {self.epochs}")  # fmt: skip
        for name in ("rate", "warmup_rate", "least_rate"):
            value = getattr(self, name)
            require(isfinite(value) and value >= 0, "schedule", f"{name} {value}", "a finite number, at least 0")

    def at(self, epoch: float) -> float:
        """The rate at a time in epochs, 0 to `epochs`.

        >>> schedule = WarmCosine()
        >>> [schedule.at(epoch) for epoch in (0, 2.5, 50, 100)]
        [1e-06, 2.55e-05, 2.55e-05, 1e-06]
        """
        if epoch < self.warmup_epochs:
            return self.warmup_rate + (self.rate - self.warmup_rate) * epoch / self.warmup_epochs
        return self.least_rate + (self.rate - self.least_rate) * (1 + cos(pi * epoch / self.epochs)) / 2
