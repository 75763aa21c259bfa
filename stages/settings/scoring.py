"""The settings of `score-layers`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from stages.errors import require
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
    from stages.methods.layer_scores import Search
    from stages.planning.budget import Budget
    from stages.planning.problem import Channels

SEARCHES = ("tinytrain", "shortcut")
CRITERIA = ("score", "fisher", "fisher-memory", "fisher-compute", "l2", "random")
SELECTORS = ("greedy", "strict-prefix", "knapsack", "exhaustive")
LAYERS = ("filters", "all", "entries")
GRADIENTS = ("exact", "shortcut")
HEADS = ("prototypes", "linear")
UNITS = ("channels", "heads", "blocks")
"""The names of the tables that the search looks into; a test holds them equal."""

OF_THE_SEARCH = ("search", "criterion", "select", "channels", "ratios", "train_bias", "blocks", "layers", "unit")
"""Settings of the search, which have no meaning beside a plan that is given."""

MEMORY, MACS = "1MB", "15%"
"""TinyTrain's budgets, which a search keeps unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How layers and channels are scored and selected, or which plan is taken instead.

    Raises `UsageError` for a value that cannot be read, and for settings of the search beside a given plan.
    """

    plan: str | None = setting(
        None,
        "No search: full, last-layer, last-3, bias, bsr, blocks:3,7,11, mcunet-99kb and other schemes.",
        metavar="NAME",
    )
    plan_text: str | None = None
    """The text of a hand-made plan instead of a search."""
    plan_file: str = "plan.toml"
    """Its file's name: says whether it is TOML or JSON."""
    memory: str | None = setting(
        None, "Budget: 1MB, 512KiB, ... Default 1MB; none with a plan that is given.", metavar="SIZE"
    )
    macs: str | None = setting(
        None,
        "Budget of backward MACs per sample: 6.5M, or a share of full training's. Default 15%; none with a plan that "
        "is given.",
        metavar="N|SHARE",
    )
    latency: str | None = setting(None, "Budget of a step per sample, by the profile: 200ms.", metavar="TIME")
    memory_model: str = setting("paper", "What --memory counts: paper, saved, peak, arena.", metavar="NAME")
    batch: int = setting(1, "Samples that training keeps in memory at once.", least=1)
    optimizer: str = setting("adam", "Whose state --memory counts: adam, adamw, momentum, sgd.", metavar="NAME")
    engine: str = engine_setting()
    device: str = device_setting()
    same_bits: bool = same_bits_setting()
    workers: int = setting(
        1, "Threads of the native engine, each with an arena that --memory-model arena counts.", least=1
    )
    keep_bits: int = setting(
        32, "Bits in which training keeps inputs of live layers, which --memory counts.", metavar="32|16|8"
    )
    search: str = setting(
        "tinytrain",
        "How to search. tinytrain: as published. shortcut: block entries by Fisher information, gradients past "
        "residual branches; more accurate at the same cost. Each option below changes one part of it.",
        metavar="tinytrain|shortcut",
        choices=SEARCHES,
    )
    criterion: str | None = setting(
        None,
        "A layer's worth: score (tinytrain), fisher (shortcut), fisher-memory, fisher-compute, l2, random. Your own: "
        "package.module:function.",
        metavar="NAME",
        choices=CRITERIA,
        own=True,
    )
    select: str | None = setting(
        None,
        "greedy (tinytrain), strict-prefix, knapsack (the optimum; shortcut), exhaustive.",
        metavar="NAME",
        choices=SELECTORS,
    )
    layers: str | None = setting(
        None,
        "Candidates: all layers (tinytrain), or the first of each block that mixes channels (shortcut).",
        metavar="all|entries",
        choices=LAYERS,
    )
    gradient: str | None = setting(
        None,
        "Through all layers (tinytrain), or past those of residual branches (shortcut). Also with --plan.",
        metavar="exact|shortcut",
        choices=GRADIENTS,
    )
    ratios: tuple[float, ...] | None = setting(
        None,
        "Share of a layer's channels; repeat for a choice. tinytrain: 1, 1/2, 1/4, 1/8; shortcut: 1, 1/2.",
        flag="--ratio",
    )
    unit: str = setting(
        "channels",
        "What lives or freezes as one: single channels, whole heads of an attention, or whole blocks (no --ratio).",
        metavar="channels|heads|blocks",
        choices=UNITS,
    )
    channels: str = setting("output", "Which channels train: output or input ones.", metavar="NAME")
    channel_rule: str | None = setting(
        None, "The best channels: fisher, l2, random. Default fisher; l2 with --plan.", metavar="NAME"
    )
    train_bias: bool = setting(False, "Biases of live channels train too.")
    blocks: int = setting(6, "Inspect the last so many blocks.", least=1)
    head: str | None = setting(
        None, "Whose loss counts. Default: as the run's head.", metavar="prototypes|linear", choices=HEADS
    )
    micro_batch: int | None = setting(None, MICRO_BATCH, least=1, metavar="N|auto", parse=micro_batch, text="auto")

    def __post_init__(self) -> None:
        check(self)
        require(self.plan is None or self.plan_text is None, "--plan", "a name and a file", "one of them")
        self.budget(full_macs=10**6)
        self.channel_choice()
        require(self.unit != "blocks" or self.ratios is None, "--ratio", "with --unit blocks", "whole blocks")
        default = {field.name: field.default for field in fields(type(self))}
        ignored = [name for name in OF_THE_SEARCH if self.given and getattr(self, name) != default[name]]
        require(not ignored, "a plan that is given", f"settings of the search: {', '.join(ignored)}", "none beside it")

    @property
    def given(self) -> bool:
        """Whether the plan is given, not searched for."""
        return self.plan is not None or self.plan_text is not None

    def how(self) -> Search:
        """How to search, with what the user chose in place; for a given plan only the gradient counts."""
        from stages.methods.layer_scores import SEARCHES, Search

        named = SEARCHES[self.search]
        chosen = {field.name: getattr(self, field.name) for field in fields(Search)}
        return replace(named, **{name: value for name, value in chosen.items() if value is not None})

    def budget(self, full_macs: int) -> Budget:
        """The limits in numbers; shares are shares of `full_macs`."""
        from stages.planning.budget import Budget, parse_latency, parse_macs, parse_memory

        memory, macs = (self.memory, self.macs) if self.given else (self.memory or MEMORY, self.macs or MACS)
        return Budget(
            memory_bytes=None if memory is None else parse_memory(memory),
            backward_macs=None if macs is None else parse_macs(macs, full_macs),
            latency_s=None if self.latency is None else parse_latency(self.latency),
            memory_model=self.memory_model,
            batch=self.batch,
            optimizer=self.optimizer,
            workers=self.workers,
            keep_bits=self.keep_bits,
        )

    def channel_choice(self) -> Channels:
        """How a search chooses channels; for a given plan only the rule counts."""
        from stages.planning.problem import Channels

        rule = self.channel_rule or ("l2" if self.given else "fisher")
        return Channels(ratios=self.how().ratios, axis=self.channels, rule=rule, bias=self.train_bias, unit=self.unit)
