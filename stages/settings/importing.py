"""The settings of `import`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.errors import UsageError, require
from stages.settings.declared import check, setting

if TYPE_CHECKING:
    from stages.graphs.tokens import Drops
    from stages.importing import Importing

CLASSIFIERS = ("keep", "drop", "features")


@dataclass(frozen=True, kw_only=True, slots=True)
class NewModel:
    """Which model there is to be, where its code names it: for `import` and `pretrain-fsl`."""

    arg: tuple[str, ...] = setting((), "Argument of the architecture; repeatable.", metavar="KEY=VALUE")
    size: int | None = setting(None, "Side of the input image in pixels.", least=1)
    input: str | None = setting(
        None, "Input of your own model: 3x32x32, 9x128 (signals), 900 (features), 49x40@16000 (log-mel)."
    )
    result: int | None = setting(None, "Which of several outputs of your own model counts: 0, 1, ...", least=0)

    def __post_init__(self) -> None:
        check(self)

    def importing(self, arch: str, seed: int, **others: object) -> Importing:
        """What `stages.importing.import_model` takes. Raises `UsageError` for text that cannot be read."""
        from stages.importing import Importing, arguments, input_from_text

        spec = None if self.input is None else input_from_text(self.input)
        arch_args = arguments(self.arg, self.size)
        return Importing(arch=arch, arch_args=arch_args, input=spec, seed=seed, result=self.result, **others)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What to make of the weights."""

    classifier: str | None = setting(
        None,
        "The final linear layer: the record's head, nothing (default), or part of the features.",
        metavar="keep|drop|features",
        choices=CLASSIFIERS,
    )
    preset: str | None = setting(
        None,
        "How the weights want their pictures: resize, cut, mean and deviation.",
        metavar="torchvision|timm|mcunet|edgetrain",
        choices=("torchvision", "timm", "mcunet", "edgetrain"),
    )
    scale: str | None = setting(None, "Model input = raw * scale + offset; one number or one per channel.")
    offset: str | None = setting(None, "See --scale.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Where a vision transformer drops tokens (BSR)."""

    drop_tokens: str | None = setting(
        None,
        "WEIGHTS is a run: let its transformer drop tokens behind the attention of these blocks, counted from 0.",
        metavar="3,6,9",
    )
    keep_tokens: float | None = setting(
        None,
        "Share of the tokens that each drop lets pass, of those the class token attends to most; 0.5.",
        metavar="R",
    )
    fuse: bool = setting(False, "What is dropped goes on as one token: the sum, each times its score.")

    def __post_init__(self) -> None:
        for option, given in (("--keep-tokens", self.keep_tokens is not None), ("--fuse", self.fuse)):
            require(self.drop_tokens is not None or not given, option, "no blocks", "--drop-tokens 3,6,9 with it")

    def drops(self) -> Drops | None:
        """What `stages.dropping.with_drops` takes; None where nothing is dropped.

        Raises `UsageError` for text that cannot be read, and as `Drops`.
        """
        if self.drop_tokens is None:
            return None
        from stages.graphs.tokens import Drops

        try:
            blocks = tuple(int(number) for number in self.drop_tokens.split(","))
        except ValueError:
            raise UsageError("--drop-tokens", repr(self.drop_tokens), "numbers of blocks joined by commas") from None
        return Drops(blocks=blocks, keep=0.5 if self.keep_tokens is None else self.keep_tokens, fuse=self.fuse)
