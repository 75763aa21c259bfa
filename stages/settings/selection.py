"""The settings of `select`."""

from __future__ import annotations

from dataclasses import dataclass

from stages.errors import require
from stages.settings.declared import check, device_setting, engine_setting, same_bits_setting, setting

AUTO = "auto"
FORGETTING = "forgetting"
STRATEGIES = (
    "titan", "c-is", "is", "stratified", "random", "all", FORGETTING,
    "high-loss", "low-loss", "entropy", "ocs", "camel", AUTO,
)  # fmt: skip
"""The names of `stages.valuation.fine.SELECTIONS`; `auto` chooses among them round by round."""
IMPORTANCES = ("last-layer", "live", "full")
"""The names of `stages.valuation.scoring.IMPORTANCES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """How a batch is chosen from the candidates of a round."""

    batch: int = setting(10, "Draws per round; duplicates are merged.", least=1)
    strategy: str = setting(
        "titan",
        "Unbiased: titan, c-is, is (scored), stratified, random, all (not scored); auto chooses among them by variance "
        "and cost; forgetting: of data that comes several times. Rivals: high-loss, low-loss, entropy, ocs (scored), "
        "camel. Your own: package.module:function.",
        metavar="NAME",
        choices=STRATEGIES,
        own=True,
    )
    importance: str = setting(
        "last-layer",
        "Whose gradient counts: last-layer (closed form), live (what the plan trains; slow), full (slowest).",
        metavar="NAME",
        choices=IMPORTANCES,
    )
    epsilon: float = setting(
        0.2, "Uniform share in the probabilities; bounds the weights by 1 / epsilon of uniform ones.", least=0, most=1
    )
    weighted: bool = setting(
        True, "Unweighted: all draws weigh alike, the paper's other reading, biased.", flag="--weighted/--unweighted"
    )
    max_batch: int | None = setting(None, "auto: largest batch it may choose; none: --batch.", least=1)
    update_cost: float | None = setting(
        None, "auto: forward passes that training on a sample costs; none: as measured, before that by MACs.", least=1
    )
    overlap: bool = setting(False, "auto: training runs at the same time, on another processor.")
    remove: float = setting(0.2, "forgetting: share of the data that is left out.", least=0, most=1)
    exchange: float = setting(
        0.25, "forgetting: share of what is left out that returns at a time; as many of the easiest leave.",
        least=0, most=1,
    )  # fmt: skip
    period: int = setting(5, "forgetting: passes through the data between exchanges.", least=1, most=10_000)
    buffer: int | None = setting(
        None, "forgetting, for a stream: samples held to be looked at again; none: the data comes several times.",
        least=1,
    )  # fmt: skip
    streak: int = setting(3, "forgetting, with --buffer: what was right so often in a row is dropped.", least=1)
    send: str = setting(
        "samples",
        "features: chosen samples bring the frozen layers' output along.",
        metavar="samples|features",
        choices=("samples", "features"),
    )
    engine: str = engine_setting()
    device: str = device_setting()
    same_bits: bool = same_bits_setting()

    def __post_init__(self) -> None:
        check(self)
        most = self.batch if self.max_batch is None else self.max_batch
        require(most >= self.batch, "--max-batch", f"{most}", f"at least --batch {self.batch}")
        features_of_auto = self.send_features and self.strategy == AUTO
        require(not features_of_auto, "--send", "features with --strategy auto", "a strategy")
        if self.strategy == FORGETTING:
            self._check_forgetting()

    def _check_forgetting(self) -> None:
        """No sample may stand for more than 1 / epsilon."""
        bound = f"which bounds weights by 1 / --epsilon {self.epsilon}"
        most = 1.0 - self.epsilon
        require(self.remove <= most and self.remove < 1.0, "--remove", f"{self.remove}", f"at most {most:g}, {bound}")
        enough = self.exchange >= self.epsilon and self.exchange > 0.0
        require(enough, "--exchange", f"{self.exchange}", f"at least {self.epsilon:g}, {bound}")

    @property
    def needs_model(self) -> bool:
        """Whether candidates are scored at all."""
        from stages.valuation.fine import selection_named

        return self.strategy == AUTO or selection_named(self.strategy).needs in ("answers", "gradients")

    @property
    def remembers(self) -> bool:
        """Whether a choice depends on earlier blocks."""
        from stages.valuation.fine import selection_named

        return self.strategy != AUTO and selection_named(self.strategy).memory is not None

    @property
    def send_features(self) -> bool:
        """Whether chosen samples take the frozen layers' outputs with them."""
        return self.send == "features"
