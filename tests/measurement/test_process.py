"""Process memory from the kernel's files."""

import os
import sys

import pytest

from stages.measurement.process import process_memory

ROLLUP = """55d0c8c00000-7ffd000000 ---p 00000000 00:00 0                          [rollup]
Rss:              120000 kB
Pss:               80000 kB
Pss_Dirty:         30000 kB
Shared_Clean:      50000 kB
Private_Clean:     10000 kB
Private_Dirty:     60000 kB
"""


def test_fields(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/smaps_rollup").write_text(ROLLUP)
    expected = {"process_uss_bytes": 70_000, "process_pss_bytes": 80_000, "process_rss_bytes": 120_000}
    assert process_memory(tmp_path) == {name: 1024 * size for name, size in expected.items()}
    (tmp_path / "self/status").write_text("Name:\tpython\nVmHWM:\t  200000 kB\nThreads:\t1\n")
    assert process_memory(tmp_path)["process_peak_rss_bytes"] == 1024 * 200_000


@pytest.mark.parametrize("content", [None, "Rss: 12 kB\n", "garbage"])
def test_nothing_is_invented(tmp_path, content):
    if content is not None:
        (tmp_path / "self").mkdir()
        (tmp_path / "self/smaps_rollup").write_text(content)
    assert process_memory(tmp_path) == {}


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the kernel has no smaps_rollup")
def test_this_process():
    found = process_memory()
    assert 0 < found["process_uss_bytes"] <= found["process_pss_bytes"] <= found["process_rss_bytes"]
    assert found["process_rss_bytes"] > sys.getsizeof(b"") * 2**10
