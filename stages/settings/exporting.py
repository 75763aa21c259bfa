"""The settings of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.settings.declared import check, setting
from stages.settings.training import OPTIMIZERS

if TYPE_CHECKING:
    from stages.bare_metal.program import Programming


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramSettings:
    """How an exported C program trains, and the board that it must fit."""

    optimizer: str = setting("sgd", "C: the rule of updates.", metavar="sgd|adam|adamw", choices=OPTIMIZERS)
    lr: float = setting(0.02, "C: the learning rate.", least=0)
    momentum: float = setting(0.0, "C: of sgd.", least=0)
    weight_decay: float = setting(0.0, "C: of live values only.", least=0)
    clip: float = setting(0.0, "C: largest gradient norm; 0 is any, and takes least memory.", least=0)
    batch: int = setting(1, "C: most samples of an update; 1 needs no gradient of all live values.", least=1)
    ram: str | None = setting(None, "C: the board's RAM; refuse what does not fit: 512KB, ...", metavar="SIZE")
    flash: str | None = setting(None, "C: the board's flash, for constant data.", metavar="SIZE")

    def __post_init__(self) -> None:
        check(self)

    def programming(self) -> Programming:
        """The configuration of an exported program. Raises `UsageError` for a size that is none."""
        from stages.bare_metal.program import Programming
        from stages.planning.budget import parse_memory
        from stages.training.optimizers import Optimizing

        optimizing = Optimizing(
            optimizer=self.optimizer,
            learning_rate=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip_norm=self.clip,
        )
        return Programming(
            optimizing=optimizing,
            batch=self.batch,
            ram_bytes=None if self.ram is None else parse_memory(self.ram, "--ram"),
            flash_bytes=None if self.flash is None else parse_memory(self.flash, "--flash"),
        )
