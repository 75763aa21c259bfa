"""The settings of `pretrain-fsl`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.errors import require
from stages.settings.declared import check, setting

if TYPE_CHECKING:
    from stages.fsl.episodes import FixedShape
    from stages.fsl.schedule import WarmCosine

AUGMENTATIONS = ("none", "colour", "photo", "handwriting")
"""The names of `stages.pretraining.AUGMENTATIONS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining:
    """How a backbone is meta-trained. Defaults: P>M>F's, with the validation added."""

    epochs: int = setting(100, "Of episodes.", least=1)
    steps: int = setting(2000, "Optimiser steps per epoch.", least=1)
    per_step: int = setting(1, "Episodes (or batches) per step.", least=1)
    ways: int = setting(5, "Classes of an episode.", least=2)
    shots: int = setting(5, "Support samples per class.", least=1)
    queries: int = setting(15, "Query samples per class.", least=1)
    repeat: bool = setting(
        True, "Repeat (augmented) samples of classes that have too few.", flag="--repeat/--no-repeat"
    )
    lr: float | None = setting(None, "Highest learning rate; default 5e-5 with --init, else 0.1, adamw 0.001.", least=0)
    warmup_epochs: int | None = setting(None, "Default 5 with --init, else none.", least=0)
    warmup_lr: float = setting(1e-6, "Rate at the start of the warm-up.", least=0)
    least_lr: float = setting(1e-6, "Rate at the end.", least=0)
    optimizer: str = setting(
        "sgd", "adamw: what transformers are trained with.", metavar="sgd|adamw", choices=("sgd", "adamw")
    )
    momentum: float = setting(0.9, "Of SGD.", least=0)
    weight_decay: float = setting(0.0, "Of weights; AdamW's spares biases and norms.", least=0)
    layer_decay: float = setting(
        1.0, "AdamW: a block's rate as a share of that of the block behind it; 0.75 for pretrained transformers.",
        least=0.01, most=1,
    )  # fmt: skip
    scale: float = setting(10.0, "First value of the learnable cosine scale, where the run has none.")
    batchnorm: str | None = setting(
        None,
        "Statistics of episodes: as they are, or each episode's own; default frozen with --init, else train.",
        metavar="frozen|train",
        choices=("frozen", "train"),
    )
    augment: str = setting("handwriting", "none, colour, photo or handwriting.", metavar="NAME", choices=AUGMENTATIONS)
    slice: float = setting(
        1.0, "SliceOut: share of hidden channels that each step trains; 1: all. Not from pretrained mobile nets, whose "
        "features it destroys.", least=0.01, most=1,
    )  # fmt: skip
    slice_draw: str = setting(
        "wrap", "Which: a run that may wrap, the paper's run, or any.", metavar="wrap|contiguous|random",
        choices=("wrap", "contiguous", "random"),
    )  # fmt: skip
    simulate_bits: str | None = setting(
        None, "For studies, slower than float32: layers compute as if in so many bits forward/backward, 3/6; the next "
        "ones when the loss stalls, 3/6,8/8:turn=0.05,decay=0.3; or a gate chooses, "
        "dfq:3/6,4/8,6/12:target=0.03,weights=4. What is validated and written is float32.", metavar="F/G,...",
    )  # fmt: skip
    policy: str = setting(
        "static",
        "velocity: layers whose outputs have settled train no more, from the first on (NEq); a look after each epoch.",
        metavar="static|velocity[:threshold=1e-3,share=1,mu=0.5]",
    )
    supervised_epochs: int = setting(0, "First train a classifier over all classes.", least=0)
    supervised_batch: int = setting(128, "Its batch size.", least=2)
    supervised_lr: float | None = setting(None, "Its highest learning rate; default 0.05, adamw 0.001.")
    validation_share: float = setting(0.1, "Share of the classes held out where there is no --validation.")
    validation_tasks: int = setting(100, "0: no validation, the last weights are written.", least=0)
    validation_ways: int = setting(5, "Classes of a validation task.", least=2)
    validation_shots: int = setting(5, "Its support samples per class.", least=1)
    validation_queries: int = setting(5, "Its queries per class.", least=1)
    patience: int = setting(0, "End after so many epochs without a better validation; 0: never.", least=0)
    on_bad: str = setting(
        "fail",
        "Stop at a class with too few samples, or leave it out.",
        metavar="fail|skip",
        choices=("fail", "skip"),
    )
    scratch: bool = True
    """Whether weights are random at the start: what the defaults of `lr`, `warmup_epochs` and `batchnorm` depend on."""

    def __post_init__(self) -> None:
        check(self)
        require(0 <= self.momentum < 1, "--momentum", f"{self.momentum}", "0 to below 1")
        require(self.scale > 0, "--scale", f"{self.scale}", "more than 0")
        require(self.supervised_rate > 0, "--supervised-lr", f"{self.supervised_lr}", "more than 0")
        adamw = self.optimizer == "adamw"
        require(self.slice == 1 or not adamw, "--slice", "with --optimizer adamw", "sgd")
        require(self.layer_decay == 1 or adamw, "--layer-decay", "with --optimizer sgd", "adamw")
        require(0 < self.validation_share < 1, "--validation-share", f"{self.validation_share}", "between 0 and 1")
        require((self.warmup_epochs or 0) <= self.epochs, "--warmup-epochs", f"{self.warmup_epochs}",
                f"0 to {self.epochs}")  # fmt: skip
        if self.policy != "static":
            from stages.fsl.settling import settling_of

            settling_of(self.policy)
        if self.simulate_bits is not None:
            from stages.fsl.bit_widths import parse_simulation

            require(self.slice == 1, "--simulate-bits", "together with --slice", "one of the two")
            parse_simulation(self.simulate_bits)

    @property
    def schedule(self) -> WarmCosine:
        """The learning rate over the epochs of episodes."""
        from stages.fsl.schedule import WarmCosine

        warmup = (0 if self.scratch else min(5, self.epochs)) if self.warmup_epochs is None else self.warmup_epochs
        return WarmCosine(
            epochs=self.epochs,
            rate=(self._scratch_rate if self.scratch else 5e-5) if self.lr is None else self.lr,
            warmup_epochs=warmup,
            warmup_rate=self.warmup_lr,
            least_rate=self.least_lr,
        )

    @property
    def _scratch_rate(self) -> float:
        return 0.001 if self.optimizer == "adamw" else 0.1

    @property
    def supervised_rate(self) -> float:
        """The highest learning rate of the supervised phase."""
        if self.supervised_lr is not None:
            return self.supervised_lr
        return 0.001 if self.optimizer == "adamw" else 0.05

    @property
    def batchnorm_trains(self) -> bool:
        """Whether episodes are normalised by their own statistics."""
        return self.scratch if self.batchnorm is None else self.batchnorm == "train"

    @property
    def shape(self) -> FixedShape:
        """Of training episodes."""
        from stages.fsl.episodes import FixedShape

        return FixedShape(ways=self.ways, shots=self.shots, queries=self.queries, repeat=self.repeat)

    @property
    def validation_shape(self) -> FixedShape:
        """Of validation tasks."""
        from stages.fsl.episodes import FixedShape

        return FixedShape(ways=self.validation_ways, shots=self.validation_shots, queries=self.validation_queries)

    @property
    def total_steps(self) -> int:
        """Of all epochs, unless patience ends them."""
        return (self.supervised_epochs + self.epochs) * self.steps
