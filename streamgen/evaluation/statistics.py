"""Means with intervals: the percentile bootstrap (Efron 1979) over clips, 1000 resamples, seeded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
LOW, HIGH = 2.5, 97.5  # percentiles of a 95 % interval


Interval = tuple[float | None, float | None, float | None, int]  # (value, low, high, n)


def mean_interval(values: Sequence[float | None], seed: int = 0) -> Interval:
    """(mean, low, high, n) of what is defined; None for all three of nothing.

    >>> mean_interval([1.0, None, 1.0])
    (1.0, 1.0, 1.0, 2)
    """
    known = np.array([value for value in values if value is not None], float)
    if not len(known):
        return None, None, None, 0
    drawn = np.random.default_rng(seed).integers(0, len(known), (RESAMPLES, len(known)))
    low, high = np.percentile(known[drawn].mean(1), [LOW, HIGH])
    return float(known.mean()), float(low), float(high), len(known)


def paired_interval(a: Sequence[float | None], b: Sequence[float | None], seed: int = 0) -> Interval:
    """(mean of a - b, low, high, n) over the pairs where both are defined. Raises ValueError for unequal lengths."""
    pairs = zip(a, b, strict=True)
    return mean_interval([x - y for x, y in pairs if x is not None and y is not None], seed)
