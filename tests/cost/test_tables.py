"""The reproduction of TinyTrain's cost tables, and its report in the documentation."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> str:
    return str(runpy.run_path(str(ROOT / "examples/reproduce/tinytrain_cost.py"))["report"]())


def test_every_deviation_has_a_reason(report):
    assert "UNEXPLAINED" not in report
    assert report.count("| MCUNet, ") > 30


def test_the_published_report_is_what_the_code_says(report):
    assert (ROOT / "docs/results/tinytrain_cost.md").read_text(encoding="utf-8") == report


def test_it_states_the_factor_at_batch_one(report):
    assert "| ProxylessNAS | 1,098x | 14.1 MB | 18x |" in report
