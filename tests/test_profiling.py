"""The stage `profile`."""

from pathlib import Path

import numpy as np
import pytest

from edgetrain_cli.plots.profile import plot_profile
from edgetrain_cli.tables.profile import profile_table, total_rows
from stages.artifacts.hdf5 import decode, encode
from stages.artifacts.records import Model, Profile, Run
from stages.cost.latency import COLUMNS, durations
from stages.cost.model import cost_table
from stages.engines.choice import Engine, threads_of
from stages.errors import PartMissing, UsageError
from stages.measurement.energy import joules_per_run
from stages.models.deploy import deploy
from stages.models.registry import build, input_spec
from stages.profiling import Profiling, profile_run
from tests.cost.nets import backbone
from tests.rounding import check_features


def run_of(arch: str, **arguments: object) -> Run:
    state = build(arch, arguments).state_dict()
    tensors = {name: value.numpy() for name, value in state.items() if "num_batches" not in name}
    return Run(Model(arch, arguments, input_spec(arch, arguments), "batchnorm", tensors))


@pytest.fixture(scope="module")
def small() -> Run:
    return run_of("mobilenetv2-w0.1", size=32)


@pytest.fixture(scope="module")
def tiny() -> Run:
    return run_of("mlp", dim=8, width=4)


def profile_of(run: Run, **config: object) -> Profile:
    profile = profile_run(run, Profiling(**config)).profile
    assert profile is not None
    return profile


@pytest.mark.parametrize(
    ("arch", "arguments", "macs"),
    [("mcunet-5fps", {}, 22_453_504), ("mobilenetv2-w0.35", {"mix": True}, 17_449_728),
     ("proxyless-w0.3", {}, 18_619_904)],
)  # fmt: skip
def test_computed_figures_of_the_papers_networks(arch, arguments, macs):
    profile = profile_of(run_of(arch, **arguments), measure=False)
    graph = backbone(arch, **arguments)
    assert profile.totals["macs"] == profile.columns["macs"].sum() == macs
    assert profile.totals["backward_macs"] == profile.columns["backward_macs"].sum() == 2 * macs
    assert profile.layer == tuple(op.name for op in graph.layers)
    for name in ("weights", "input_bytes", "mask_bytes", "saved_bytes", "buffer_bytes"):
        assert list(profile.columns[name]) == [getattr(row, name) for row in cost_table(graph)]


def test_without_measuring_the_same_model_gives_the_same_bytes(small):
    images = [encode(profile_run(small, Profiling(measure=False))) for _ in range(2)]
    assert images[0] == images[1]


def test_the_model_leaves_in_deploy_form_and_computes_the_same(small):
    after = profile_run(small, Profiling(measure=False))
    assert (small.model.form, after.model.form) == ("batchnorm", "deploy")
    x = np.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=np.float32).reshape(2, 3, 32, 32)
    check_features(deploy(after.model).features(x), deploy(small.model), x)
    again = profile_run(after, Profiling(measure=False))
    assert encode(again) == encode(after)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_measured_columns_and_conditions(small, engine, tmp_path):
    profile = profile_run(small, Profiling(repeats=2, engine=engine), machine=tmp_path).profile
    assert profile is not None
    for name in (*COLUMNS, "backward_s"):
        assert profile.columns[name].shape == (len(profile.layer),)
        assert np.all(profile.columns[name] > 0)
        assert np.all(profile.columns[name.replace("_s", "_spread_s")] >= 0)
    assert profile.totals["repeats"] == 2
    assert profile.totals["engine"] == engine
    assert profile.totals["threads"] == threads_of(Engine(engine)) > 0
    assert profile.totals["forward_s"] > 0
    assert profile.totals["full_step_s"] > 0
    assert durations(profile).forward_ns > 0
    # a machine without sensors and without /proc: nothing is invented
    assert profile.totals["energy_source"] == "unavailable"
    assert not {"forward_j", "process_rss_bytes"} & profile.totals.keys()


def test_not_measuring_measures_nothing(small):
    profile = profile_of(small, measure=False)
    assert not [
        name for name in (*profile.columns, *profile.totals) if name.endswith(("_s", "_j")) or "process" in name
    ]


def test_the_profile_survives_the_artifact(small):
    run = profile_run(small, Profiling(repeats=1))
    after = decode(encode(run))
    assert isinstance(after, Run)
    assert after.profile is not None
    assert run.profile is not None
    assert after.profile.totals == run.profile.totals
    for name, column in run.profile.columns.items():
        np.testing.assert_array_equal(after.profile.columns[name], column)


def test_energy_from_a_sensor_and_from_an_external_meter(tiny, tmp_path):
    rail = tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input"
    rail.parent.mkdir(parents=True)
    rail.write_text("2000\n")
    for config, source in (({}, "INA3221 6-0040 channel 0"), ({"power_watts": 3.0}, "external meter, 3 W")):
        profile = profile_run(tiny, Profiling(repeats=1, **config), machine=tmp_path).profile
        assert profile is not None
        assert profile.totals["energy_source"] == source
        assert profile.totals["full_step_j"] > 0
        assert profile.totals["forward_j"] > 0


def test_energy_is_a_mean_over_passes():
    class Meter:
        source, joules = "test", 5.0

        def poll(self) -> None:
            self.joules += 0.5

    runs: list[int] = []
    assert joules_per_run(Meter(), lambda: runs.append(1), passes=4) == 0.5
    assert len(runs) == 4


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_progress_counts_operators(small, engine):
    done: list[int] = []
    profile_run(small, Profiling(repeats=1, engine=engine), on_step=done.append)
    assert done == sorted(done)
    assert done[-1] == len(deploy(small.model).graph.ops) - 1


@pytest.mark.parametrize(
    "wrong", [{"repeats": 0}, {"power_watts": 0.0}, {"power_watts": -1.0}, {"power_watts": 2.0, "measure": False}]
)
def test_configuration_checks_itself(wrong):
    with pytest.raises(UsageError):
        Profiling(**wrong)


# ------------------------------------------------------------------------------------------------ table and picture


def test_the_table_has_a_row_per_layer(small):
    from rich.console import Console

    for config in ({"measure": False}, {"repeats": 1}):
        profile = profile_of(small, **config)
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(profile_table(profile))
        console.file.close()
        text = console.export_text()
        assert all(layer in text for layer in profile.layer)
        assert ("full training step" in text) == ("repeats" in config)


def test_a_total_that_is_not_there_is_not_shown(small):
    rows = dict(total_rows(profile_of(small, measure=False).totals))
    assert rows["measured"] == "nothing (--no-measure)"
    assert "energy" not in rows


def test_the_picture_is_drawn_the_same_way_twice(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    computed, measured = profile_of(tiny, measure=False), profile_of(tiny, repeats=1)
    for name, profile in (("1.svg", computed), ("2.svg", computed), ("3.svg", measured)):
        plot_profile(profile, tmp_path / name)
    pictures = [(tmp_path / name).read_bytes() for name in ("1.svg", "2.svg", "3.svg")]
    assert pictures[0] == pictures[1]
    assert len(pictures[2]) > len(pictures[0]) > 0  # a row of bars more


def test_the_picture_says_what_it_needs(small, monkeypatch):
    profile = profile_of(small, measure=False)
    with pytest.raises(UsageError, match=r"\.png"):
        plot_profile(profile, Path("cost.gif"))
    monkeypatch.setattr("edgetrain_cli.plots.picture.find_spec", lambda name: None)
    with pytest.raises(PartMissing, match="pip install"):
        plot_profile(profile, Path("cost.png"))
