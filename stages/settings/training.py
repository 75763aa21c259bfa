"""The settings of `train-sparse`."""

from __future__ import annotations

from dataclasses import dataclass
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
    from stages.sparse_training import StreamTraining, SupportTraining
    from stages.training.optimizers import Optimizing

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "step")


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How live channels train, on a support set or on a stream; what differs between the two is None by default."""

    full: bool = setting(False, "Train all layers, not the run's plan.")
    last_layer: bool = setting(False, "Train the backbone's last layer, not the run's plan.")
    micro_batch: int | None = setting(
        None, MICRO_BATCH + " 0 is all of them.", least=0, metavar="N|auto", parse=micro_batch, text="auto"
    )
    engine: str = engine_setting()
    device: str = device_setting()
    same_bits: bool = same_bits_setting()
    optimizer: str | None = setting(
        None, "Default: sgd for streams, adam for supports.", metavar="sgd|adam|adamw", choices=OPTIMIZERS
    )
    lr: float | None = setting(None, "Default: 0.02 for streams; chosen inside the support set.", least=0)
    momentum: float = setting(0.0, "Of sgd.", least=0)
    weight_decay: float = setting(0.0, "Of live values only.", least=0)
    schedule: str = setting(
        "constant",
        "Learning rate over updates; step is x0.95 every 100 (Titan's).",
        metavar="constant|cosine|step",
        choices=SCHEDULES,
    )
    warmup: int = setting(0, "Updates of linear warm-up.", least=0)
    updates: int = setting(0, "Streams: length of the cosine schedule.", least=0)
    clip: float | None = setting(
        None, "Largest gradient norm; 0 is any. Default: 2 for streams, 0 for supports.", least=0
    )
    keep_bits: int | None = setting(
        None, "Bits in which inputs of live layers are kept; default the plan's, or 32.", metavar="32|16|8"
    )
    keep_rounding: str = setting(
        "stochastic", "To these bits: by chance, unbiased, or to the nearest.", metavar="stochastic|nearest",
        choices=("stochastic", "nearest"),
    )  # fmt: skip
    precision_schedule: str | None = setting(
        None,
        "Widths of what is kept, the next one when the loss stalls (FracTrain): 8,16,32 or 8,32:turn=0.05,decay=0.3.",
        metavar="BITS,...",
    )
    ram: str | None = setting(
        None,
        "What a sample's values may take, such as 1.5MB: what is too much is made again. Gradients stay the same; "
        "samples are taken one by one.",
        metavar="SIZE",
    )
    page_dir: str | None = setting(None, "With --ram: a folder where values may be paged to.", metavar="DIR")
    ram_least: str = setting(
        "time",
        "What --ram takes the least of; energy where the machine has a sensor (RAPL, INA3221).",
        metavar="time|energy",
        choices=("time", "energy"),
    )
    policy: str = setting(
        "static",
        "How the plan is revised while training: static, velocity, rotate, rescore; settings behind a colon: "
        "velocity:every=10,threshold=0.001.",
        metavar="NAME[:settings]",
    )
    iterations: int = setting(40, "Support: passes over it.", least=1)
    folds: int = setting(3, "Support: parts left out in turn to choose the learning rate.", least=2)
    views: int = setting(0, "Support: augmented copies, drawn once; 0 is a fresh one each pass.", least=0)
    cache: str = setting(
        "off",
        "Support, with --views: keep what frozen layers make of each view (boundary), or where that pays here (auto).",
        metavar="off|boundary|auto",
        choices=("off", "boundary", "auto"),
    )
    detach_prototypes: bool = setting(False, "Support: no gradient through prototypes; cheaper.")
    scale: float | None = setting(None, "Support: of the cosine logits; default the head's, or 10.")

    def __post_init__(self) -> None:
        check(self)
        require(self.keep_bits in (None, 32, 16, 8), "--keep-bits", f"{self.keep_bits}", "32, 16 or 8")
        if self.ram is not None:
            from stages.planning.budget import parse_memory

            parse_memory(self.ram, "--ram")
        if self.precision_schedule is not None:
            from stages.planning.precision import parse_schedule

            require(self.keep_bits is None, "--precision-schedule", "together with --keep-bits", "one of the two")
            parse_schedule(self.precision_schedule)
        if self.policy != "static":
            from stages.planning.policies import parse_policy

            parse_policy(self.policy)
        require(not (self.full and self.last_layer), "--full", "together with --last-layer", "one of the two")

    @property
    def plan(self) -> str | None:
        """The named plan to train; None: the run's own."""
        return "full" if self.full else "last-layer" if self.last_layer else None

    @property
    def ram_bytes(self) -> int | None:
        """What a sample's values may take."""
        from stages.planning.budget import parse_memory

        return None if self.ram is None else parse_memory(self.ram, "--ram")

    def on_stream(self, schedule: str | None = None) -> StreamTraining:
        """The configuration of training on a stream; `schedule` is one of memory to replay."""
        from stages.sparse_training import STREAM_OPTIMIZING, StreamTraining

        standard, scheduled = STREAM_OPTIMIZING, self.ram is not None or schedule is not None
        rate = standard.learning_rate if self.lr is None else self.lr
        clip = standard.clip_norm if self.clip is None else self.clip
        optimizing = self._optimizing(self.optimizer or standard.optimizer, rate, clip, self.updates)
        return StreamTraining(
            plan=self.plan,
            optimizing=optimizing,
            micro_batch=1 if scheduled and self.micro_batch is None else self.micro_batch,
            engine=self.engine,
            device=self.device,
            same_bits=self.same_bits,
            policy=self.policy,
            keep_bits=self.keep_bits,
            keep_rounding=self.keep_rounding,
            precision=self.precision_schedule,
            ram_bytes=self.ram_bytes,
            schedule=schedule,
            page_dir=self.page_dir,
            ram_least=self.ram_least,
        )

    def on_support(self, scale: float, schedule: str | None = None) -> SupportTraining:
        """The configuration of adapting to a support set, for a head of this cosine scale."""
        from stages.sparse_training import STREAM_OPTIMIZING, SupportTraining
        from stages.training.adaptation import LEARNING_RATES, Adapting

        rate = STREAM_OPTIMIZING.learning_rate if self.lr is None else self.lr
        scheduled = self.ram is not None or schedule is not None
        adapting = Adapting(
            iterations=self.iterations,
            learning_rates=LEARNING_RATES if self.lr is None else (self.lr,),
            folds=self.folds,
            optimizing=self._optimizing(self.optimizer or "adam", rate, self.clip or 0.0, self.iterations),
            views=self.views,
            cache_prefix=self.cache == "boundary",
            detach_prototypes=self.detach_prototypes,
            scale=scale if self.scale is None else self.scale,
            micro_batch=self.micro_batch or (1 if scheduled else 0),
        )
        fitting = self.micro_batch is None and not scheduled
        return SupportTraining(
            plan=self.plan,
            adapting=adapting,
            fitting=fitting,
            auto_cache=self.cache == "auto",
            engine=self.engine,
            device=self.device,
            same_bits=self.same_bits,
            policy=self.policy,
            keep_bits=self.keep_bits,
            keep_rounding=self.keep_rounding,
            precision=self.precision_schedule,
            ram_bytes=self.ram_bytes,
            schedule=schedule,
            page_dir=self.page_dir,
            ram_least=self.ram_least,
        )

    def _optimizing(self, optimizer: str, rate: float, clip: float, updates: int) -> Optimizing:
        from stages.training.optimizers import Optimizing

        return Optimizing(
            optimizer=optimizer,
            learning_rate=rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_updates=self.warmup,
            total_updates=updates,
            clip_norm=clip,
        )
