"""Reading budgets."""

import pytest

from stages.errors import UsageError
from stages.planning.budget import Budget, parse_latency, parse_macs, parse_memory

MB = 2**20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1MB", MB),
        ("1MiB", MB),
        ("512KiB", MB // 2),
        ("900kB", 900 * 1024),
        ("1.5 mb", 3 * MB // 2),
        ("77", 77),
        ("12B", 12),
        ("2GB", 2**31),
        ("0.5KB", 512),
        (".5MB", MB // 2),
    ],
)
def test_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("15%", 150), ("6.5M", 6_500_000), ("12k", 12_000), ("99", 99), ("0.1%", 1), ("2G", 2 * 10**9)],
)
def test_macs(text, expected):
    assert parse_macs(text, 1000) == expected


def test_a_share_is_cut_off_not_rounded():
    assert parse_macs("15%", 44_907_008) == 44_907_008 * 15 // 100
    assert parse_macs("0.29%", 10_000) == 29  # binary fractions would give 28


@pytest.mark.parametrize(("text", "expected"), [("200ms", 0.2), ("1.5s", 1.5), ("800us", 0.0008)])
def test_latency(text, expected):
    assert parse_latency(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1TBB", "1 000", "nan", "1e3", "0", "0.0001", "15%"])
def test_memory_that_cannot_be_read(text):
    with pytest.raises(UsageError):
        parse_memory(text)


@pytest.mark.parametrize("text", ["", "%", "0%", "15 percent", "6.5MB", "-5%"])
def test_macs_that_cannot_be_read(text):
    with pytest.raises(UsageError):
        parse_macs(text, 1000)


@pytest.mark.parametrize("text", ["200", "0ms", "1h", ""])
def test_latency_that_cannot_be_read(text):
    with pytest.raises(UsageError):
        parse_latency(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes": 0},
        {"backward_macs": -1},
        {"latency_s": 0.0},
        {"batch": 0},
        {"memory_model": "big"},
        {"optimizer": "lion"},
    ],
)
def test_a_budget_checks_itself(wrong):
    with pytest.raises(UsageError):
        Budget(**wrong)


def test_a_budget_reads_as_a_sentence():
    assert str(Budget(memory_bytes=MB, backward_macs=6_736_051, latency_s=0.2)) == (
        "1,048,576 bytes (1.00 MB) of memory (model paper) and 6,736,051 backward MACs and 200 ms"
    )
    assert str(Budget()) == "no budget"
