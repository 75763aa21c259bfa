"""A stage's memory does not grow with the length of its stream. `examples/bench/pipeline.py` does it with a million."""

import importlib.util
import sys

import pytest

from stages.artifacts.hdf5 import encode
from stages.artifacts.stream import open_records
from tests.pipes.conftest import ROOT

GROWTH_MB = 2.0
"""The samples between the two looks are 5 MB: a stage that keeps them, or what it makes of them, is found out."""


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_pipeline", ROOT / "examples" / "bench" / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="private memory is read from /proc")
@pytest.mark.parametrize(
    "pipeline",
    ["filter -q --window 200", "filter -q --window 200 | select -q | train-sparse -q"],
    ids=["filter", "all"],
)
def test_memory_does_not_grow_with_the_stream(bench, tmp_path, monkeypatch, pipeline):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench.make_inputs(bench.TINY, tmp_path, 1)
    (tmp_path / "run.h5").write_bytes(encode(next(open_records(tmp_path / "stream.h5"))))
    found = bench.long_stream(tmp_path, pipeline, (40_000, 120_000))
    assert found.keys() == {words.split()[0] for words in pipeline.split("|")}
    for stage, (early_mb, late_mb) in found.items():
        assert late_mb - early_mb < GROWTH_MB, stage
