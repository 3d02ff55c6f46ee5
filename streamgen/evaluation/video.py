"""Metrics of any video of any model, with nothing known of what it should show.

    video_metrics(frames, fps=16, chunk_frames=(9, 12))   # uint8 [F, H, W, 3] -> {"flicker": 0.0003, "seam": 1.1, …}
    file_metrics("story.mp4")                             # the same of a file, read frame by frame
    compare_videos(clips, references)                     # sets: Fréchet and spectral distances

The metrics and their units are described where they are taken: `ChangeMeter` (flicker, frame_difference, stagnation,
seam), `MotionMeter` (warping_error, warping_consistency, dynamic_degree), `DriftMeter` (drift_*) and `SpectrumMeter`
(spectral_drift_*). None = undefined for this video, for example too short. Frames are taken in parts, so a stream can
be measured while it runs, and an hour needs no more memory than a minute (a few hundred bytes a frame apart).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from streamgen.errors import InputError
from streamgen.evaluation.video_change import ChangeMeter, check_chunks
from streamgen.evaluation.video_drift import DriftMeter
from streamgen.evaluation.video_frames import check_frames, luminance, parts
from streamgen.evaluation.video_motion import MotionMeter
from streamgen.evaluation.video_spectrum import SpectrumMeter, spectra, spectral_distance

Metrics = dict[str, float | None]


class Meter(Protocol):
    """One family of metrics, taken part by part."""

    def add(self, frames: np.ndarray, luma: np.ndarray) -> None:
        """Take in the next frames, uint8 [f, H, W, 3], and their luminance [f, H, W]."""

    def metrics(self) -> Metrics:
        """Of all frames so far, at least two."""


class VideoMeter:
    """All metrics of one video whose frames come in parts of any size.

    >>> meter = VideoMeter(fps=16, chunk_frames=(9, 12))
    >>> for chunk in stream:                            # doctest: +SKIP
    ...     meter.add(chunk.frames)
    >>> meter.metrics()                                 # doctest: +SKIP
    """

    def __init__(self, fps: float, chunk_frames: int | Sequence[int] | None = None) -> None:
        """
        Args:
            fps: frames per second.
            chunk_frames: frames per chunk, for the seam score; a sequence gives sizes from the first chunk on, of
                which the last repeats.
        Raises: InputError.
        """
        if not 0 < fps < float("inf"):
            raise InputError(f"{fps} frames per second: metrics over time need a positive rate")
        self.frames = 0  # taken so far
        self._size: tuple[int, ...] | None = None
        self._change = ChangeMeter(chunk_frames)
        self._meters: list[Meter] = [self._change, MotionMeter(fps), DriftMeter(fps), SpectrumMeter(fps)]

    def add(self, frames: np.ndarray) -> None:
        """Take in the next frames, uint8 [f, H, W, 3]. Raises: InputError."""
        size = check_frames(frames).shape[1:3]
        if self._size not in (None, size):
            raise InputError(f"frames of {size} in a video of {self._size} (height, width): give frames of one size")
        self._size = size
        for part in parts(frames):
            luma = luminance(part)
            for meter in self._meters:
                meter.add(part, luma)
        self.frames += len(frames)

    def metrics(self, chunk_frames: Sequence[int] | None = None) -> Metrics:
        """Every metric by name; None where this video defines none. Raises: InputError below two frames.

        Args:
            chunk_frames: frames of every chunk as they came, where nobody knew beforehand.
        """
        if chunk_frames is not None:
            self._change.chunk_frames = check_chunks(chunk_frames)
        if self.frames < 2:
            raise InputError(f"a video of {self.frames} frames has no metrics; give at least 2 frames")
        found: Metrics = {}
        for meter in self._meters:
            found.update(meter.metrics())
        return found


def video_metrics(frames: np.ndarray, fps: float, chunk_frames: int | Sequence[int] | None = None) -> Metrics:
    """All metrics of a clip, uint8 [F, H, W, 3]; arguments as in `VideoMeter`. Raises: InputError."""
    meter = VideoMeter(fps, chunk_frames)
    meter.add(frames)
    return meter.metrics()


def _runs(path: str | os.PathLike[str], count: int = 16) -> Iterator[np.ndarray]:
    """Frames of a file, a few at a time. Raises: InputError."""
    from streamgen.media import iter_video

    waiting: list[np.ndarray] = []
    for frame in iter_video(path):
        if waiting and (len(waiting) == count or frame.shape != waiting[0].shape):
            yield np.stack(waiting)
            waiting = []
        waiting.append(frame)
    if waiting:
        yield np.stack(waiting)


def file_metrics(
    path: str | os.PathLike[str], chunk_frames: int | Sequence[int] | None = None, fps: float | None = None
) -> Metrics:
    """All metrics of a video file, or of a folder of `frame_*.png`, read a few frames at a time.

    Args:
        chunk_frames: as in `VideoMeter`.
        fps: frames per second in place of what the file says; a folder says nothing.
    Raises: InputError.
    """
    from streamgen.media import video_info

    if fps is None:
        fps = 0.0 if Path(path).is_dir() else video_info(path).fps
        if not fps > 0:
            raise InputError(f"{path} does not say how many frames a second it has; give fps")
    meter = VideoMeter(fps, chunk_frames)
    for run in _runs(path):
        meter.add(run)
    if meter.frames < 2:
        raise InputError(f"{path} holds {meter.frames} frames; give a video of at least 2")
    return meter.metrics()


def compare_videos(
    clips: Iterable[np.ndarray],
    references: Iterable[np.ndarray],
    features: str | Callable[[np.ndarray], np.ndarray] = "vae",
) -> Metrics:
    """Distances of a set of clips from a reference set at the same frame rate, each uint8 [F, H, W, 3].

    Clips may be of any length; each is looked at once, so generators serve.
    Args:
        features: the space of the Fréchet distance: a name, see `streamgen.evaluation.video_features.load_features`,
            or what that returns.
    Returns: frechet_distance (squared feature units), spectral_distance_spatial and spectral_distance_temporal
        (decibels; None below 16 frames). All >= 0, 0 for the same set, lower is better.
    Raises: InputError, for example for an empty set.
    """
    from streamgen.evaluation.video_features import frechet_distance, load_features

    space = load_features(features) if isinstance(features, str) else features
    seen = [[(spectra(clip), space(clip)) for clip in side] for side in (clips, references)]
    distances = spectral_distance(*([spectrum for spectrum, _ in side] for side in seen))
    ours, theirs = (np.concatenate([found for _, found in side]) for side in seen)
    return {"frechet_distance": frechet_distance(ours, theirs), **distances}
