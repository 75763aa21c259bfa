"""Energy as the machine's own sensors count it. Without a sensor there is no figure, never an assumed wattage.

Two kinds are read, both below a root path that tests replace by a tree of their own:

* powercap (Intel and AMD RAPL): `/sys/class/powercap/intel-rapl:N/energy_uj`, a counter that wraps at
  `max_energy_range_uj`. Packages are summed; their sub-zones (`intel-rapl:0:0`) are not counted again.
* INA3221 (Jetson boards): rails whose power is sampled and integrated. Older kernels name the files
  `in_power0_input` (mW) or `in_voltage0_input` and `in_current0_input` below an `iio:device`, newer ones `in1_input`
  (mV) and `curr1_input` (mA) below a `hwmon`. A rail that feeds the whole board is taken alone, otherwise all are
  summed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

UNAVAILABLE = "unavailable"

WHOLE_BOARD = frozenset({"VDD_IN", "POM_5V_IN", "VIN", "VIN_SYS_5V0_IN"})
"""Rails that feed the board itself: the others are behind them."""

ENERGY_PASSES = 50
"""Passes that an energy figure is the mean of: sensors are slower than one pass."""


class Meter(Protocol):
    """Counts joules between calls of `poll`, which must come often enough: several times a second."""

    source: str
    """Where the figures come from."""
    joules: float
    """Drawn between the first and the latest poll."""

    def poll(self) -> None:
        """Read the sensor once more."""


@dataclass
class CounterMeter:
    """Powercap: joules from energy counters that wrap."""

    zones: tuple[Path, ...]
    source: str
    joules: float = 0.0
    _last_uj: dict[Path, int] = field(default_factory=dict)

    def poll(self) -> None:
        """Add what each counter moved, over its wrap if it went backwards."""
        for zone in self.zones:
            now_uj = int(_read(zone / "energy_uj"))
            moved_uj = now_uj - self._last_uj.get(zone, now_uj)
            if moved_uj < 0:
                moved_uj += int(_read(zone / "max_energy_range_uj")) + 1
            self.joules += moved_uj / 1e6
            self._last_uj[zone] = now_uj


@dataclass(frozen=True)
class Rail:
    """One supply rail: its label and the files of its power (mW), or of its voltage (mV) and current (mA)."""

    label: str
    power: Path | None = None
    voltage: Path | None = None
    current: Path | None = None

    def watts(self) -> float:
        """Power drawn now."""
        if self.power is not None:
            return int(_read(self.power)) / 1e3
        if self.voltage is None or self.current is None:
            raise OSError(f"rail {self.label}: neither power nor voltage and current")
        return int(_read(self.voltage)) * int(_read(self.current)) / 1e6


@dataclass
class RailMeter:
    """INA3221: joules from sampled power, the mean of two samples over the time between them."""

    rails: tuple[Rail, ...]
    source: str
    clock: Callable[[], float] = time.perf_counter
    joules: float = 0.0
    _last: tuple[float, float] | None = None

    def poll(self) -> None:
        """Sample the power once."""
        now_s, watts = self.clock(), sum(rail.watts() for rail in self.rails)
        if self._last is not None:
            before_s, before_watts = self._last
            self.joules += (now_s - before_s) * (watts + before_watts) / 2
        self._last = (now_s, watts)


@dataclass
class ExternalMeter:
    """A figure that the user read from a meter at the plug: constant power over time."""

    watts: float
    clock: Callable[[], float] = time.perf_counter
    source: str = "external meter"
    joules: float = 0.0
    _last_s: float | None = None

    def poll(self) -> None:
        """Add the time since the last poll at the stated power."""
        now_s = self.clock()
        if self._last_s is not None:
            self.joules += (now_s - self._last_s) * self.watts
        self._last_s = now_s


def find_meter(root: Path = Path("/"), power_watts: float | None = None) -> tuple[Meter | None, str]:
    """A meter and its source; or None and `unavailable` with the reason, where a sensor is there but cannot be read.

    Args:
        root: what stands for `/`.
        power_watts: power read from an external meter, which then is used instead of any sensor.
    """
    if power_watts is not None:
        return ExternalMeter(power_watts), f"external meter, {power_watts:g} W"
    rails = ina3221_rails(root)
    zones = powercap_zones(root)
    meter: Meter
    if rails:
        meter = RailMeter(rails, "INA3221 " + ", ".join(rail.label for rail in rails))
    elif zones:
        meter = CounterMeter(zones, "powercap " + ", ".join(_label(zone / "name", zone.name) for zone in zones))
    else:
        return None, UNAVAILABLE
    try:
        meter.poll()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return None, f"{UNAVAILABLE} ({meter.source}: {reason})"
    return meter, meter.source


def powercap_zones(root: Path) -> tuple[Path, ...]:
    """The RAPL packages, without their sub-zones and without the same packages' `intel-rapl-mmio` twins."""
    found = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    return tuple(zone for zone in found if zone.name.count(":") == 1 and (zone / "energy_uj").exists())


def ina3221_rails(root: Path) -> tuple[Rail, ...]:
    """The rails of every INA3221, under either naming scheme; the whole board's input alone where there is one."""
    rails = [*_iio_rails(root), *_hwmon_rails(root)]
    board = [rail for rail in rails if rail.label in WHOLE_BOARD]
    return tuple(board[:1] or rails)


def _iio_rails(root: Path) -> list[Rail]:
    rails = []
    for device in sorted((root / "sys/bus/i2c/drivers/ina3221x").glob("*/iio*device*")):
        for channel in range(3):
            power, voltage = device / f"in_power{channel}_input", device / f"in_voltage{channel}_input"
            label = _label(device / f"rail_name_{channel}", f"{device.parent.name} channel {channel}")
            if power.exists():
                rails.append(Rail(label, power=power))
            elif voltage.exists():
                rails.append(Rail(label, voltage=voltage, current=device / f"in_current{channel}_input"))
    return rails


def _hwmon_rails(root: Path) -> list[Rail]:
    rails = []
    for device in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _label(device / "name", "") != "ina3221":
            continue
        for channel in range(1, 4):
            voltage, current = device / f"in{channel}_input", device / f"curr{channel}_input"
            if voltage.exists() and current.exists():
                label = _label(device / f"in{channel}_label", f"{device.name} channel {channel}")
                rails.append(Rail(label, voltage=voltage, current=current))
    return rails


def _label(path: Path, otherwise: str) -> str:
    return _read(path) if path.exists() else otherwise


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace").strip()


def joules_per_run(meter: Meter, run: Callable[[], object], passes: int = ENERGY_PASSES) -> float:
    """Mean energy of one run over many."""
    meter.poll()
    before = meter.joules
    for _ in range(passes):
        run()
        meter.poll()
    return (meter.joules - before) / passes
