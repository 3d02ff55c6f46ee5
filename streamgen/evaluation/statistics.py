"""Confidence intervals by the bootstrap (Efron 1979): what a mean over a few clips, or a difference, is worth.

    mean_interval([0.9, None, 0.7, 0.8])               # Interval(value=0.8, low=…, high=…, n=3)
    paired_interval(ours, baseline)                    # the same prompts and seeds, clip by clip

Undefined values (None, not finite) are dropped, in pairs where there are pairs; `n` says what was left. Intervals are
those of percentiles and deterministic for a seed; from few clips (n < 10) they are too
narrow: of three they are the lowest and the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from streamgen.errors import InputError

Values = Sequence[float | None]

RESAMPLES = 2000
BLOCK_ENTRIES = 1 << 20  # resampled entries held at a time


class Interval(NamedTuple):
    """An estimate and its confidence interval; both None without values, the interval also with one alone."""

    value: float | None
    low: float | None
    high: float | None
    n: int  # clips, or pairs of clips, that count


def _columns(*series: Values) -> np.ndarray:
    """[N, K] of the rows that are finite in all series. Raises: InputError for unequal lengths."""
    lengths = [len(values) for values in series]
    if len(set(lengths)) > 1:
        raise InputError(f"{lengths[0]} and {lengths[1]} values are no pairs; give one of each per clip")
    table = np.array([[np.nan if v is None else float(v) for v in values] for values in series], float).T
    table = table.reshape(lengths[0], len(series))
    return table[np.isfinite(table).all(1)]


def _bootstrap(sample: np.ndarray, level: float, seed: int, resamples: int) -> tuple[float, float]:
    """Percentiles of the mean over resampled samples [N]."""
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level {level} with {resamples} resamples: give a level between 0 and 1 and at least one")
    rng, count = np.random.default_rng([seed, 0]), len(sample)
    rows = max(1, BLOCK_ENTRIES // count)
    found = np.concatenate([
        sample[rng.integers(0, count, (min(rows, resamples - first), count))].mean(1)
        for first in range(0, resamples, rows)
    ])  # fmt: skip
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Values, seed: int = 0, *, level: float = 0.95, resamples: int = RESAMPLES) -> Interval:
    """The mean over clips with its confidence interval.

    Args:
        values: one per clip, None where undefined.
        level: 0.95 for an interval that covers the true mean 95 times of 100.
    """
    sample = _columns(values)[:, 0]
    if not len(sample):
        return Interval(None, None, None, 0)
    ends = _bootstrap(sample, level, seed, resamples) if len(sample) > 1 else (None, None)
    return Interval(float(sample.mean()), *ends, len(sample))


def paired_interval(
    values: Values, baseline: Values, seed: int = 0, *, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Mean of values - baseline over the same prompts and seeds, clip by clip; n counts pairs.

    Raises: InputError for unequal lengths.
    """
    table = _columns(values, baseline)
    return mean_interval(table[:, 0] - table[:, 1], seed, level=level, resamples=resamples)


def summary(clips: Sequence[Mapping[str, float | None]], **options) -> dict[str, Interval]:
    """Mean and interval of every metric over clips; a metric that a clip lacks is undefined for it.

    Args:
        clips: one report per clip, name -> value, as `streamgen.evaluation.video.video_metrics` returns.
        options: of `mean_interval`.
    """
    names = dict.fromkeys(name for clip in clips for name in clip)
    return {name: mean_interval([clip.get(name) for clip in clips], **options) for name in names}
