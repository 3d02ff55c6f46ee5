"""Intervals cover what they promise, drop what is undefined, and are the same for the same seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamgen.errors import InputError
from streamgen.evaluation import statistics
from streamgen.evaluation.statistics import (
    Interval,
    mean_interval,
    paired_interval,
    summary,
)


def width(interval: Interval) -> float:
    return interval.high - interval.low


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_the_true_mean_as_often_as_they_say(level):
    rng = np.random.default_rng(7)
    samples = 5 + 2 * rng.normal(size=(400, 40))
    found = [mean_interval(s, level=level, seed=i, resamples=500) for i, s in enumerate(samples)]
    covered = np.mean([i.low <= 5 <= i.high for i in found])
    assert covered == pytest.approx(level, abs=0.05)  # three deviations of a share of 400, and percentiles of 40 values


def test_width_is_that_of_the_standard_error():
    found = mean_interval(normal(200), seed=1)
    assert width(found) == pytest.approx(2 * 1.96 * normal(200).std() / math.sqrt(200), rel=0.1)
    assert found.low < found.value < found.high and found.value == pytest.approx(normal(200).mean())


def test_a_seed_says_everything(monkeypatch):
    values = normal(50).tolist()
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4)
    assert mean_interval([1.0, 1.0], 3)._asdict() == {"value": 1, "low": 1, "high": 1, "n": 2}
    one_block = mean_interval(values)
    monkeypatch.setattr(statistics, "BLOCK_ENTRIES", 50 * 300)  # resampled in seven blocks
    assert mean_interval(values) == one_block


def test_undefined_values_are_dropped():
    assert mean_interval([None, 1.0, math.nan, 3.0, math.inf]) == mean_interval([1.0, 3.0])
    assert mean_interval([1.0, 3.0]).n == 2
    assert mean_interval([None, 2]) == Interval(2, None, None, 1)
    assert mean_interval([]) == mean_interval([None]) == Interval(None, None, None, 0)


def test_pairs_are_dropped_together():
    found = paired_interval([1.0, None, 5.0, 7.0], [0.0, 9.0, None, 4.0])
    assert (found.value, found.n) == (2, 2)  # (1 - 0 + 7 - 4) / 2
    assert paired_interval([None, 1.0], [1.0, None]) == Interval(None, None, None, 0)


def test_pairing_narrows_the_interval_of_correlated_clips():
    clips, change = 3 * normal(40), 0.3 + 0.1 * normal(40, seed=1)
    paired = paired_interval(clips + change, clips)
    assert paired.value == pytest.approx(np.mean(clips + change) - np.mean(clips))
    assert width(paired) < width(mean_interval(clips)) / 10 and 0 < paired.low < paired.high < 0.5


def test_summary_of_reports():
    found = summary([{"flicker": 0.1, "seam": None}, {"flicker": 0.3}, {"seam": 2.0, "flicker": 0.2}], seed=5)
    assert list(found) == ["flicker", "seam"]
    assert found["flicker"] == mean_interval([0.1, 0.3, 0.2], seed=5) and found["seam"].n == 1


def test_what_makes_no_pairs_or_no_level_is_refused():
    with pytest.raises(InputError, match="3 and 2 values"):
        paired_interval([1, 2, 3], [1, 2])
    for options in ({"level": 1.0}, {"level": 95}, {"resamples": 0}):
        with pytest.raises(InputError, match="level"):
            mean_interval([1, 2], **options)
