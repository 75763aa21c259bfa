"""Files appear whole or not at all; versions of a live directory too."""

import os
import subprocess
import sys

import numpy as np
import pytest

from stages.artifacts import history
from stages.artifacts.files import AtomicFile, check_writable, write_all
from stages.artifacts.live import LiveDirectory, version_for
from stages.errors import DataError, OutputError, TransferError, UsageError


def test_a_file_appears_only_when_all_is_written(tmp_path):
    path = tmp_path / "out.h5"
    path.write_bytes(b"old")
    with AtomicFile(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out.h5"]


def half_then_fail():
    raise BufferError


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.h5"
    path.write_bytes(b"old")
    with pytest.raises(BufferError), AtomicFile(path) as file:
        file.write(half_then_fail())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.h5"]


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    target, link = tmp_path / "real.h5", tmp_path / "link.h5"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    with AtomicFile(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_is_an_error():
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(TransferError):
        write_all(full.fileno(), b"data")


def test_every_byte_goes_through_a_slow_pipe():
    data = np.random.default_rng(0).bytes(3_000_000)
    script = "import sys,hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    reader = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    write_all(reader.stdin.fileno(), data)
    out, _ = reader.communicate()
    import hashlib

    assert out.decode().strip() == hashlib.sha256(data).hexdigest()


def test_outputs_that_cannot_be_made_are_known_beforehand(tmp_path):
    check_writable(tmp_path / "fine.h5")
    for path in (tmp_path, tmp_path / "no" / "such" / "folder.h5"):
        with pytest.raises(OutputError):
            check_writable(path)
    with pytest.raises(OutputError):
        AtomicFile(tmp_path / "no" / "such.h5")


# -------------------------------------------------------------------------------------------------------- versions


def test_batch_r_is_chosen_with_version_r_minus_lag():
    assert [version_for(r, 0) for r in range(3)] == [0, 1, 2]
    assert [version_for(r, 2) for r in range(5)] == [0, 0, 0, 1, 2]


def test_versions_come_back_and_old_ones_go(tmp_path, run):
    live = LiveDirectory(tmp_path / "live", history.model_hash(run))
    live.prepare()
    for number in range(5):
        live.publish(number, {"a.weight": np.full(3, number, np.float32)}, run.model.head, keep=3)
    assert live.numbers() == [2, 3, 4]
    assert live.read(1) is None
    assert live.newest().number == 4
    assert live.read(3).tensors["a.weight"].tolist() == [3, 3, 3]
    assert live.read(3).head.names == ("yes", "no")
    live.clear()
    assert live.numbers() == []


def test_versions_say_what_updates_took_where_that_is_known(tmp_path):
    live = LiveDirectory(tmp_path, "one")
    live.publish(0, {}, None, keep=9)
    live.publish(1, {}, None, keep=9, update_times=[(10, 0.25), (30, 0.5)])
    assert [live.read(number).update_times for number in (0, 1)] == [(), ((10, 0.25), (30, 0.5))]


def test_another_runs_versions_are_refused(tmp_path, run):
    LiveDirectory(tmp_path, "one").publish(0, {}, None, keep=2)
    other = LiveDirectory(tmp_path, "two")
    with pytest.raises(DataError, match="another run"):
        other.read(0)
    with pytest.raises(UsageError, match="earlier run"):
        other.prepare()


def test_resuming_drops_versions_beyond_the_checkpoint(tmp_path):
    live = LiveDirectory(tmp_path, "one")
    for number in range(4):
        live.publish(number, {}, None, keep=9)
    live.prepare(keep_up_to=1)
    assert live.numbers() == [0, 1]


@pytest.mark.parametrize("damage", [lambda d: d[:-10], lambda d: b"", lambda d: b"\x89HDF" + d[4:50]])
def test_a_damaged_version_is_an_error(tmp_path, damage):
    live = LiveDirectory(tmp_path, "one")
    live.publish(0, {"a": np.ones(2, np.float32)}, None, keep=2)
    file = tmp_path / "0.h5"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError):
        live.read(0)


def test_waiting_ends_when_it_is_pointless(tmp_path):
    live = LiveDirectory(tmp_path, "one")
    polls = []

    def alive():
        polls.append(1)
        if len(polls) == 3:
            live.publish(7, {}, None, keep=2)
        if len(polls) > 5:
            raise BrokenPipeError

    assert live.wait(7, alive).number == 7
    with pytest.raises(BrokenPipeError):
        live.wait(8, alive)


def test_the_models_hash_ignores_what_stages_add(run):
    from dataclasses import replace

    assert history.model_hash(replace(run, plan=None, history=())) == history.model_hash(run)
    changed = replace(run, model=replace(run.model, version=8))
    assert history.model_hash(changed) != history.model_hash(run)
