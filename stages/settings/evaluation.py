"""The settings of `evaluate` over few-shot tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.errors import UsageError, require
from stages.settings.declared import (
    MICRO_BATCH,
    check,
    device_setting,
    engine_setting,
    micro_batch,
    same_bits_setting,
    setting,
)

if TYPE_CHECKING:
    from stages.fsl.episodes import Shape
    from stages.training.adaptation import Adapting


def shard(text: str) -> tuple[int, int]:
    """From `0/8`.

    >>> shard("1/8")
    (1, 8)
    """
    first, _, step = text.partition("/")
    if not (first.isdigit() and step.isdigit()):
        raise UsageError("--shard", repr(text), "i/n, such as 0/8")
    return int(first), int(step)


def names(text: str) -> tuple[str, ...]:
    """From names joined by commas."""
    return tuple(text.split(","))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """Which tasks, which methods, and how they adapt."""

    tasks: int | None = setting(None, "Compare methods on N few-shot tasks of SAMPLES.", metavar="N", least=1)
    methods: tuple[str, ...] = setting(
        ("none", "last-layer", "full", "tinytrain"),
        "Joined by commas; settings as tinytrain:rule=random+ratios=0.5.",
        metavar="NAMES",
        parse=names,
        text="none,last-layer,full,tinytrain",
    )
    ways: int | None = setting(None, "Fixed number of classes; default Meta-Dataset's.", least=2)
    shots: int = setting(5, "With --ways: support samples per class.", least=1)
    queries: int = setting(10, "Queries per class, at most.", least=1)
    max_ways: int | None = setting(None, "Most classes of a task that Meta-Dataset draws; 50.", least=2)
    max_support: int | None = setting(None, "Most support samples of a task that Meta-Dataset draws; 500.", least=2)
    group: str | None = setting(None, "No value on both sides of a task; class+COL: within classes.", metavar="COL")
    hierarchical: bool = setting(False, "Each task within one family of classes named family/class.")
    iterations: int = setting(40, "Of adaptation.", least=1)
    lr: float | None = setting(None, "Fixed; default: chosen inside each support set.", least=0)
    folds: int = setting(3, "Parts of the support to choose the rate with.", least=2)
    detach_prototypes: bool = setting(False, "No gradient through prototypes.")
    engine: str = engine_setting()
    device: str = device_setting()
    same_bits: bool = same_bits_setting()
    shard: tuple[int, int] = setting(
        (0, 1), "Only tasks I, I+N, I+2N, ...; join them with --merge.", metavar="I/N", parse=shard, text="0/1"
    )
    measure: bool = setting(
        True, "Seconds per task; without, two runs write equal rows.", flag="--measure/--no-measure"
    )
    on_bad: str = setting(
        "fail",
        "Tasks: stop at a class with too few samples, or leave it out.",
        metavar="fail|skip",
        choices=("fail", "skip"),
    )
    micro_batch: int | None = setting(None, MICRO_BATCH, least=1, metavar="N|auto", parse=micro_batch, text="auto")

    def __post_init__(self) -> None:
        check(self)
        require(len(self.methods) > 0, "--methods", "none", "at least one")
        require(len(set(self.methods)) == len(self.methods), "--methods", "a method twice", "each once")
        if self.tasks is not None:
            from stages.methods.registry import find_method

            for name in self.methods:
                find_method(name)
        capped = self.max_ways is not None or self.max_support is not None
        require(not capped or self.ways is None, "--max-ways, --max-support", "together with --ways", "one of them")
        first, step = self.shard
        require(0 <= first < step, "--shard", f"{first}/{step}", "i/n with 0 <= i < n")

    @property
    def numbers(self) -> range:
        """The tasks of this shard."""
        return range(self.tasks or 0)[self.shard[0] :: self.shard[1]]

    @property
    def shape(self) -> Shape:
        """How tasks are drawn: as Meta-Dataset does, or with fixed numbers."""
        from stages.fsl.episodes import FixedShape, VariousShape

        if self.ways is None:
            usual = VariousShape()
            support = self.max_support or usual.most_support
            ways = min(self.max_ways or usual.most_ways, support)
            least = min(usual.least_ways, ways)
            return VariousShape(least_ways=least, most_ways=ways, most_support=support, most_queries=self.queries)
        return FixedShape(ways=self.ways, shots=self.shots, queries=self.queries)

    def adapting(self, scale: float, micro_batch: int) -> Adapting:
        """How a backbone adapts to each task."""
        from stages.training.adaptation import LEARNING_RATES, Adapting

        return Adapting(
            iterations=self.iterations,
            learning_rates=LEARNING_RATES if self.lr is None else (self.lr,),
            folds=self.folds,
            detach_prototypes=self.detach_prototypes,
            scale=scale,
            micro_batch=micro_batch,
        )
