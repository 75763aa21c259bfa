import math

import numpy as np
import pytest
from scipy.stats import binomtest

from stages.errors import UsageError
from stages.fsl.intervals import half_width, wilson
from stages.fsl.schedule import WarmCosine


def test_the_defaults_are_pmfs():
    schedule = WarmCosine()
    assert schedule.at(0) == 1e-6
    assert schedule.at(4) == pytest.approx(1e-6 + (5e-5 - 1e-6) * 4 / 5)
    # the cosine counts from epoch 0, so at the end of the warm-up it has left the top already
    assert schedule.at(5) == pytest.approx(1e-6 + 4.9e-5 * (1 + math.cos(math.pi * 0.05)) / 2)
    assert schedule.at(100) == pytest.approx(1e-6)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"warmup_epochs": 101}, {"rate": float("nan")}], ids=str)
def test_schedules_are_checked(settings):
    with pytest.raises(UsageError):
        WarmCosine(**settings)


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (37, 50), (1, 1000)])
def test_wilson_agrees_with_scipy(hits, count):
    value, low, high = wilson(hits, count)
    other = binomtest(hits, count).proportion_ci(method="wilson")
    assert value == hits / count
    assert (low, high) == pytest.approx((other.low, other.high))


def test_half_width_by_hand():
    # t(0.975, 3) = 3.18245; s = 2, n = 4
    assert half_width(np.array([1.0, 3.0, 1.0, 3.0]) * math.sqrt(3)) == pytest.approx(3.18245, rel=1e-5)
    assert math.isnan(half_width(np.array([1.0])))
