"""The settings of `filter`."""

from __future__ import annotations

from dataclasses import dataclass

from stages.errors import require
from stages.settings.declared import check, engine_setting, setting

STRATEGIES = ("quota", "priority", "rep", "div", "rep-div", "ocs", "random", "camel")
"""The names of `stages.valuation.coarse.FILTERS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Filtering:
    """How the candidates of a round are chosen. Window and number of candidates: Titan, section 4.1."""

    window: int = setting(100, "Samples per round; at --pace demand the fewest.", least=1)
    keep: int = setting(30, "Candidates per round, at most --window.", least=1)
    strategy: str = setting(
        "quota",
        "quota: a random sample of each class, no forward pass. priority, rep, div, rep-div, ocs: by shallow features. "
        "random. camel: by input distance. Your own: package.module:function.",
        metavar="NAME",
        choices=STRATEGIES,
        own=True,
    )
    blocks: int = setting(1, "Feature strategies: depth of the features, in model blocks.", least=1)
    engine: str = engine_setting()
    decay: float = setting(0.99, "Feature strategies: how fast a class's statistics forget; 1 never.")

    def __post_init__(self) -> None:
        check(self)
        require(self.keep <= self.window, "--keep", f"{self.keep}", f"1 to the window's {self.window}")
        require(0.0 < self.decay <= 1.0, "--decay", f"{self.decay}", "above 0, at most 1")

    @property
    def needs_model(self) -> bool:
        """Whether `filter_stream` must be given `features`."""
        from stages.valuation.coarse import filter_named

        return filter_named(self.strategy).needs in ("features", "directions")
