"""How many samples fit into the memory that is left, on machines made of files."""

import resource

import pytest

from stages.measurement.need import Need
from stages.measurement.room import SHARE, fit, room

MIB = 2**20


@pytest.fixture
def machine(tmp_path):
    """A machine with 1 GiB of free memory and no limits."""
    write(tmp_path, "proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n")
    write(tmp_path, "proc/self/status", "VmPeak: 1 kB\nVmSize: 204800 kB\n")
    return tmp_path


def write(machine, name, text):
    (machine / name).parent.mkdir(parents=True, exist_ok=True)
    (machine / name).write_text(text)


def test_without_limits_it_is_the_machines_free_memory(machine):
    assert room(machine) == 1024 * MIB


def test_nothing_is_known_where_the_kernel_says_nothing(tmp_path):
    assert room(tmp_path) is None


def test_a_control_group_of_version_2_and_those_above_it(machine):
    write(machine, "proc/self/cgroup", "0::/box/inner\n")
    write(machine, "sys/fs/cgroup/box/memory.max", f"{420 * MIB}\n")
    write(machine, "sys/fs/cgroup/box/memory.current", f"{300 * MIB}\n")
    write(machine, "sys/fs/cgroup/box/memory.stat", f"anon 1\ninactive_file {50 * MIB}\n")
    write(machine, "sys/fs/cgroup/box/inner/memory.max", "max\n")
    write(machine, "sys/fs/cgroup/box/inner/memory.current", "5\n")
    assert room(machine) == 170 * MIB


def test_a_control_group_of_version_1(machine):
    write(machine, "proc/self/cgroup", "5:cpu:/x\n4:memory:/box\n")
    write(machine, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{100 * MIB}\n")
    write(machine, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", f"{130 * MIB}\n")
    assert room(machine) == 0


def test_a_limit_of_the_address_space(machine, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (300 * MIB, 300 * MIB))
    assert room(machine) == 100 * MIB


def test_as_many_samples_as_fit_but_one_at_least_and_no_more_than_are_useful(machine):
    need = Need(sample=12 * MIB, fixed=100 * MIB)
    exact = int((SHARE * 1024 - 100) // 12)
    assert fit(need, 1000, machine=machine).samples == exact
    assert fit(need, 16, machine=machine).samples == 16
    crowded = fit(Need(1200 * MIB, 0), 16, machine=machine)
    assert (crowded.samples, crowded.tight) == (1, True)


def test_who_chooses_a_number_gets_it(machine):
    assert fit(Need(MIB, 0), 64, wanted=7, machine=machine).samples == 7
    assert fit(Need(MIB, 0), 64, wanted=0, machine=machine).samples == 64


def test_what_is_held_is_said_in_one_line(machine):
    held = fit(Need(10 * MIB, 100 * MIB), 2, machine=machine)
    assert str(held) == "holds up to 120 MiB (1 GiB free), 2 samples at once"


def test_what_is_held_beside_the_samples_leaves_them_less_room(machine):
    exact = int((SHARE * 1024 - 100 - 500) // 12)
    beside = fit(Need(12 * MIB, 100 * MIB), 1000, other_bytes=500 * MIB, machine=machine)
    assert beside.samples == exact
    assert beside.bytes == (exact * 12 + 500 + 100) * MIB
    assert fit(Need(MIB, 0), 64, other_bytes=1024 * MIB, machine=machine).tight
