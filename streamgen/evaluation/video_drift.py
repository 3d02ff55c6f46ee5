"""Slow change of how pictures look: brighter, more colourful, flatter, blurrier as a stream goes on."""

from __future__ import annotations

import numpy as np

BIN_SECONDS = 5.0
LOOKS = ("luminance", "saturation", "contrast", "sharpness")


def bin_means(values: np.ndarray, fps: float, bin_seconds: float = BIN_SECONDS) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins of a few seconds; a last bin counts from half its length on.

    Args:
        values: [F, …], one row per frame.
    Returns: middles of the bins in seconds [N], and means [N, …].
    """
    size = max(1, round(bin_seconds * fps))
    starts = np.arange(0, len(values), size)
    lengths = np.minimum(starts + size, len(values)) - starts
    full = lengths * 2 >= size
    sums = np.add.reduceat(values, starts, axis=0)[full] if len(values) else np.empty((0, *values.shape[1:]))
    lengths, starts = lengths[full], starts[full]
    return (starts + lengths / 2) / fps, sums / lengths.reshape(-1, *[1] * (values.ndim - 1))


def drift(values: np.ndarray, fps: float, bin_seconds: float = BIN_SECONDS) -> tuple[float | None, float | None]:
    """Slope per minute (least squares over bins) and last bin minus first, of one number per frame.

    Args:
        values: [F].
    Returns: both in the unit of the values; (None, None) with fewer than two bins.
    """
    times, means = bin_means(values, fps, bin_seconds)
    if len(means) < 2:
        return None, None
    centred = times - times.mean()
    slope = float(centred @ means / (centred @ centred))
    return 60 * slope, float(means[-1] - means[0])


def looks(frames: np.ndarray, luma: np.ndarray) -> np.ndarray:
    """Luminance, saturation, contrast and sharpness per frame: [F, 4]; see `DriftMeter`."""
    r, g, b = frames[..., 0], frames[..., 1], frames[..., 2]
    chroma = np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)
    edges = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * luma[:, 1:-1, 1:-1]
    columns = (luma.mean((1, 2)), chroma.mean((1, 2)) / 255, luma.std((1, 2)), edges.std((1, 2)))
    return np.stack([column.astype(np.float64) for column in columns], 1)


class DriftMeter:
    """Drift of colour statistics over bins of five seconds, for frames that come in parts.

    Each as drift_NAME_per_minute (slope) and drift_NAME_change (last bin minus first), full scale 1, signed; None
    below two bins. luminance: mean luma. saturation: mean of max - min over R, G and B, which is HSV's saturation
    times its value: dark pixels, whose hue is noise, count little. contrast: deviation of luma within a frame.
    sharpness: deviation of luma's Laplacian within a frame.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self._looks: list[np.ndarray] = []

    def add(self, frames: np.ndarray, luma: np.ndarray) -> None:
        """Take in the next frames, uint8 [f, H, W, 3], and their luminance [f, H, W]."""
        self._looks.append(looks(frames, luma))

    def metrics(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, values in zip(LOOKS, np.concatenate(self._looks).T, strict=True):
            found[f"drift_{name}_per_minute"], found[f"drift_{name}_change"] = drift(values, self.fps)
        return found
