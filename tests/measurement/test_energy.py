"""Energy readers on made-up sysfs trees."""

from pathlib import Path

import pytest

from stages.measurement.energy import CounterMeter, ExternalMeter, RailMeter, find_meter, ina3221_rails, powercap_zones


def put(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def zone(name: str, microjoules: int, label: str = "package-0", limit: int = 1_000_000) -> dict[str, object]:
    folder = f"sys/class/powercap/{name}"
    return {f"{folder}/energy_uj": microjoules, f"{folder}/max_energy_range_uj": limit, f"{folder}/name": label}


OLD = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
NEW = "sys/class/hwmon/hwmon3"


def test_without_a_sensor_there_is_no_figure(tmp_path):
    assert find_meter(tmp_path) == (None, "unavailable")


def test_packages_are_summed_and_their_parts_are_not(tmp_path):
    put(tmp_path, zone("intel-rapl:0", 100) | zone("intel-rapl:1", 5, "package-1") | zone("intel-rapl:0:0", 9, "core"))
    put(tmp_path, zone("intel-rapl-mmio:0", 7))
    assert [zone.name for zone in powercap_zones(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]
    meter, source = find_meter(tmp_path)
    assert isinstance(meter, CounterMeter)
    assert source == "powercap package-0, package-1"
    put(tmp_path, zone("intel-rapl:0", 600_100) | zone("intel-rapl:1", 400_005, "package-1"))
    meter.poll()
    assert meter.joules == pytest.approx(1.0)


def test_a_counter_that_wraps(tmp_path):
    put(tmp_path, zone("intel-rapl:0", 900_000, limit=999_999))
    meter, _ = find_meter(tmp_path)
    assert meter is not None
    for microjoules in (100_000, 100_000, 99_999):  # +200,000 over the wrap, nothing, all the way round less one
        put(tmp_path, zone("intel-rapl:0", microjoules, limit=999_999))
        meter.poll()
    assert meter.joules == pytest.approx((200_000 + 999_999) / 1e6)


def test_a_sensor_that_cannot_be_read_is_unavailable_with_the_reason(tmp_path):
    put(tmp_path, zone("intel-rapl:0", 0))
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").mkdir()
    meter, source = find_meter(tmp_path)
    assert meter is None
    assert source == "unavailable (powercap package-0: Is a directory)"


def test_older_jetsons_name_power_directly(tmp_path):
    put(tmp_path, {f"{OLD}/in_power0_input": 2000, f"{OLD}/rail_name_0": "VDD_CPU",
                   f"{OLD}/in_power1_input": 3000, f"{OLD}/rail_name_1": "VDD_GPU"})  # fmt: skip
    rails = ina3221_rails(tmp_path)
    assert [(rail.label, rail.watts()) for rail in rails] == [("VDD_CPU", 2.0), ("VDD_GPU", 3.0)]


def test_older_jetsons_name_voltage_and_current(tmp_path):
    put(tmp_path, {f"{OLD}/in_voltage2_input": 5000, f"{OLD}/in_current2_input": 400})
    (rail,) = ina3221_rails(tmp_path)
    assert (rail.label, rail.watts()) == ("6-0040 channel 2", 2.0)


def test_newer_jetsons_are_hardware_monitors(tmp_path):
    put(tmp_path, {f"{NEW}/name": "ina3221", f"{NEW}/in1_label": "VDD_GPU_SOC", f"{NEW}/in1_input": 19_000,
                   f"{NEW}/curr1_input": 1000, f"{NEW}/in2_input": 5000, f"{NEW}/curr2_input": 100,
                   f"{NEW}/in7_input": 3, "sys/class/hwmon/hwmon0/name": "nvme",
                   "sys/class/hwmon/hwmon0/in1_input": 1, "sys/class/hwmon/hwmon0/curr1_input": 1})  # fmt: skip
    assert [(r.label, r.watts()) for r in ina3221_rails(tmp_path)] == [("VDD_GPU_SOC", 19.0), ("hwmon3 channel 2", 0.5)]


@pytest.mark.parametrize("label", ["VDD_IN", "POM_5V_IN"])
def test_the_boards_own_input_is_taken_alone(tmp_path, label):
    put(tmp_path, {f"{OLD}/in_power0_input": 9000, f"{OLD}/rail_name_0": label,
                   f"{OLD}/in_power1_input": 3000, f"{OLD}/rail_name_1": "POM_5V_GPU"})  # fmt: skip
    assert [rail.label for rail in ina3221_rails(tmp_path)] == [label]
    assert find_meter(tmp_path)[1] == f"INA3221 {label}"


def test_sampled_power_is_integrated_over_time(tmp_path):
    put(tmp_path, {f"{OLD}/in_power0_input": 2000})
    now = iter([10.0, 11.0, 11.5])
    meter = RailMeter(ina3221_rails(tmp_path), "test", clock=lambda: next(now))
    meter.poll()
    meter.poll()
    put(tmp_path, {f"{OLD}/in_power0_input": 6000})
    meter.poll()
    assert meter.joules == pytest.approx(1.0 * 2 + 0.5 * (2 + 6) / 2)


def test_an_external_meters_reading_stands_before_any_sensor(tmp_path):
    put(tmp_path, zone("intel-rapl:0", 5))
    meter, source = find_meter(tmp_path, power_watts=2.5)
    assert isinstance(meter, ExternalMeter)
    assert source == "external meter, 2.5 W"
    now = iter([1.0, 5.0])
    meter = ExternalMeter(2.5, clock=lambda: next(now))
    meter.poll()
    meter.poll()
    assert meter.joules == 10.0
