"""The settings of `profile`."""

from __future__ import annotations

from dataclasses import dataclass

from stages.errors import require
from stages.settings.declared import check, device_setting, engine_setting, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Profiling:
    """What to measure."""

    measure: bool = setting(
        True, "Time the layers here; without, the output never varies.", flag="--measure/--no-measure"
    )
    repeats: int = setting(20, "Runs that each median is taken over.", least=1)
    power_watts: float | None = setting(
        None, "Power read from a meter at the plug while this ran, for energy figures.", metavar="W"
    )
    engine: str = engine_setting()
    device: str = device_setting()

    def __post_init__(self) -> None:
        check(self)
        require(self.power_watts is None or self.power_watts > 0, "--power-watts", str(self.power_watts), "more than 0")
        require(self.measure or self.power_watts is None, "--power-watts", "no measuring", "--measure")
