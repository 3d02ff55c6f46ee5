"""Where a video's power lies in space and in time: two spectra that are looked at apart, for videos of any length.

In the spirit of STREAM (arXiv:2403.09669), which takes apart the spectrum over time of frame features: its zero
frequency says how pictures look, the others how they change. Here both are spectra of luminance, so no network is
needed: the spatial one knows nothing of the order of frames, the temporal one little of what they show. As for any
power spectrum, a clip played backwards is the same clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from streamgen.errors import InputError
from streamgen.evaluation.video_drift import bin_means
from streamgen.evaluation.video_frames import area_weights, check_frames, luminance, parts

GRID = 64  # cells per side that every picture is averaged to, so that sizes compare: up to 32 cycles per picture
SPATIAL_BINS = 16  # rings of two cycles per picture
WINDOW, HOP = 16, 8  # frames
CELLS = 16  # cells per side whose series make the temporal spectrum
FLOOR = 1 / (12 * 255**2)  # power of rounding to 8 bits: what lies below it is not heard


def _decibels(power: np.ndarray) -> np.ndarray:
    return 10 * np.log10(power + FLOOR)


def _hann(length: int) -> np.ndarray:
    """Window without zeros at its ends, of mean square 1: white noise of variance v has power v in every bin."""
    window = np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2
    return window / np.sqrt(np.mean(window**2))


def _rings() -> np.ndarray:
    """[GRID · (GRID // 2 + 1), SPATIAL_BINS]: averages over rings of equal frequency of a real 2-D transform."""
    fy, fx = np.fft.fftfreq(GRID, 1 / GRID)[:, None], np.fft.rfftfreq(GRID, 1 / GRID)
    frequency = np.hypot(fy, fx)
    ring = (frequency * SPATIAL_BINS / (GRID / 2)).astype(int).ravel()
    copies = np.broadcast_to(np.where((fx == 0) | (fx == GRID / 2), 1.0, 2.0), frequency.shape).ravel()
    use = (frequency.ravel() > 0) & (ring < SPATIAL_BINS)
    weights = np.zeros((frequency.size, SPATIAL_BINS))
    weights[use, ring[use]] = copies[use]
    return weights / weights.sum(0)


RINGS = _rings()
PICTURE_WINDOW = np.outer(_hann(GRID), _hann(GRID))


def spatial_power(cells: np.ndarray) -> np.ndarray:
    """Power per ring of frequencies of [F, 64, 64] pictures: [F, 16]."""
    centred = cells - cells.mean((1, 2), keepdims=True)
    spectrum = np.fft.rfft2(centred * PICTURE_WINDOW) / GRID
    return (spectrum.real**2 + spectrum.imag**2).reshape(len(cells), -1) @ RINGS


def temporal_power(series: np.ndarray) -> np.ndarray:
    """Power at 1 to 8 cycles per 16 frames of each window of [F, N] series, averaged over the series: [M, 8]."""
    if len(series) < WINDOW:
        return np.empty((0, WINDOW // 2))
    windows = np.lib.stride_tricks.sliding_window_view(series, WINDOW, axis=0)[::HOP]  # [M, N, WINDOW]
    centred = windows - windows.mean(-1, keepdims=True)
    spectrum = np.fft.rfft(centred * _hann(WINDOW)) / np.sqrt(WINDOW)
    return (spectrum.real**2 + spectrum.imag**2)[..., 1:].mean(1)


@dataclass(frozen=True)
class Spectra:
    """Spectra of one clip in decibels (0 dB: a variance of full scale squared)."""

    spatial: np.ndarray  # [16], rings of two cycles per picture
    temporal: np.ndarray | None  # [8], 1 to 8 cycles per 16 frames; None below 16 frames


class SpectrumMeter:
    """Spectra of frames that come in parts, and how far the last five seconds are from the first.

    spectral_drift_spatial, spectral_drift_temporal: root mean square difference of the spectra of the last and the
        first bin of five seconds, in decibels, >= 0; None below two bins. Blur, grain and over-sharpening show in the
        first, motion that slows down or starts to jitter in the second.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self._spatial: list[np.ndarray] = []  # [f, 16] each
        self._temporal: list[np.ndarray] = []  # [m, 8] each
        self._series = np.empty((0, CELLS * CELLS))  # frames that windows to come still need

    def add(self, frames: np.ndarray, luma: np.ndarray) -> None:
        """Take in the luminance of the next frames, [f, H, W]."""
        cells = area_weights(luma.shape[1], GRID) @ luma @ area_weights(luma.shape[2], GRID).T
        self._spatial.append(spatial_power(cells))
        step = GRID // CELLS
        coarse = cells.reshape(len(cells), CELLS, step, CELLS, step).mean((2, 4)).reshape(len(cells), -1)
        series = np.concatenate([self._series, coarse])
        power = temporal_power(series)
        self._temporal.append(power)
        self._series = series[len(power) * HOP :]

    def spectra(self) -> Spectra:
        """Over all frames so far."""
        temporal = np.concatenate(self._temporal)
        spatial = _decibels(np.concatenate(self._spatial).mean(0))
        return Spectra(spatial, _decibels(temporal.mean(0)) if len(temporal) else None)

    def metrics(self) -> dict[str, float | None]:
        return {
            "spectral_drift_spatial": _ends_apart(np.concatenate(self._spatial), self.fps),
            "spectral_drift_temporal": _ends_apart(np.concatenate(self._temporal), self.fps / HOP),
        }


def _ends_apart(power: np.ndarray, rate: float) -> float | None:
    means = bin_means(power, rate)[1]
    return None if len(means) < 2 else _apart(_decibels(means[0]), _decibels(means[-1]))


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def spectra(frames: np.ndarray) -> Spectra:
    """Spatial and temporal spectrum of a clip, uint8 [F, H, W, 3]. Raises: InputError."""
    meter = SpectrumMeter(1.0)
    for part in parts(check_frames(frames)):
        meter.add(part, luminance(part))
    return meter.spectra()


def spectral_distance(clips: Iterable[Spectra], references: Iterable[Spectra]) -> dict[str, float | None]:
    """How far the spectra of a set of clips are from those of a reference set at the same frame rate.

    Clips may be of any length and number, and of any size.
    Returns: spectral_distance_spatial (fidelity) and spectral_distance_temporal (consistency), each the root mean
        square difference of the sets' mean spectra in decibels, >= 0, 0 for the same set; the temporal one is None if
        every clip of a set is shorter than 16 frames.
    Raises: InputError for an empty set.
    """
    ours, theirs = list(clips), list(references)
    if not ours or not theirs:
        raise InputError(f"{len(ours)} clips and {len(theirs)} references: give at least one of each")
    means = [np.mean([s.spatial for s in side], 0) for side in (ours, theirs)]
    moving = [[s.temporal for s in side if s.temporal is not None] for side in (ours, theirs)]
    temporal = _apart(*(np.mean(side, 0) for side in moving)) if all(moving) else None
    return {"spectral_distance_spatial": _apart(*means), "spectral_distance_temporal": temporal}
