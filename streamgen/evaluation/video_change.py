"""How much a video changes from frame to frame: flicker, stagnation, seams between chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamgen.errors import InputError
from streamgen.evaluation.video_frames import BLOCK, STILL, block_means

SEAM_FLOOR = 0.01 / 255  # added to both sides of the ratio: a frozen video has a seam of 1, and none is infinite


def check_chunks(chunk_frames: int | Sequence[int]) -> list[int]:
    """Chunk sizes as a list, of which the last repeats. Raises: InputError."""
    sizes = list(chunk_frames) if isinstance(chunk_frames, Sequence) else [chunk_frames]
    if not sizes or not all(isinstance(size, (int, np.integer)) and size >= 1 for size in sizes):
        raise InputError(f"chunks of {chunk_frames} frames: give one positive integer, or a list of them")
    return [int(size) for size in sizes]


def chunk_starts(num_frames: int, chunk_frames: int | Sequence[int]) -> np.ndarray:
    """First frames of all chunks but the first; sizes from the first chunk on, the last size repeats.

    >>> chunk_starts(40, (9, 12)).tolist()
    [9, 21, 33]
    """
    sizes = check_chunks(chunk_frames)
    starts, at = [], 0
    while (at := at + sizes[min(len(starts), len(sizes) - 1)]) < num_frames:
        starts.append(at)
    return np.array(starts, int)


def seam_score(differences: np.ndarray, chunk_frames: int | Sequence[int]) -> float | None:
    """How much larger the change from frame to frame is at chunk borders than inside chunks.

    The mean over borders divided by the mean over all other pairs: 1 = no seam, 3 = three times the usual change.
    Args:
        differences: [F - 1], mean absolute difference of neighbouring frames, full scale 1.
        chunk_frames: frames per chunk, or sizes from the first chunk on, the last repeating: (9, 12) for a causal
            VAE whose first latent frame stands for one frame.
    Returns: a number >= 0; None without a border or without a pair inside a chunk.
    """
    border = np.zeros(len(differences), bool)
    border[chunk_starts(len(differences) + 1, chunk_frames) - 1] = True
    if not border.any() or border.all():
        return None
    across, inside = differences[border].mean(), differences[~border].mean()
    return float((across + SEAM_FLOOR) / (inside + SEAM_FLOOR))


class ChangeMeter:
    """Flicker, frame difference, stagnation and seams of frames that come in parts.

    flicker: mean distance of a pixel to the median of itself and its neighbours in time. Only what goes there and
        back within a frame counts; fades and moving edges do not. [0, 1], full scale 1; None below three frames.
    frame_difference: mean absolute difference of neighbouring frames, [0, 1]; motion counts too. VBench's temporal
        flickering (arXiv:2311.17982) is 1 minus this, on videos it has found to be static.
    stagnation: share of pairs of neighbouring frames without motion: no 8×8 block changes by more than two grey
        levels on average. [0, 1].
    seam: see `seam_score`.
    """

    def __init__(self, chunk_frames: int | Sequence[int] | None = None) -> None:
        self.chunk_frames = None if chunk_frames is None else check_chunks(chunk_frames)
        self._last: np.ndarray | None = None  # up to two frames before the next part
        self._differences: list[np.ndarray] = []
        self._still: list[np.ndarray] = []
        self._flicker, self._flicker_frames = 0.0, 0

    def add(self, frames: np.ndarray, luma: np.ndarray) -> None:
        """Take in the next frames, uint8 [f, H, W, 3]."""
        known = 0 if self._last is None else len(self._last)
        frames = frames if self._last is None else np.concatenate([self._last, frames])
        self._last = frames[-2:].copy()
        flat = frames.reshape(len(frames), -1)
        high, low = np.maximum(flat[1:], flat[:-1]), np.minimum(flat[1:], flat[:-1])
        change = (high - low)[max(known - 1, 0) :]
        if len(change):
            self._differences.append(change.mean(1) / 255)
            pictures = change.reshape(-1, *frames.shape[1:]).mean(3, dtype=np.float32)
            self._still.append(block_means(pictures, BLOCK).max((1, 2)) <= STILL)
        before, middle, after = flat[:-2], flat[1:-1], flat[2:]  # three frames at least: otherwise empty
        if len(middle):
            above, below = np.maximum(before, after), np.minimum(before, after)
            excess = (np.maximum(middle, above) - above) + (below - np.minimum(middle, below))
            self._flicker += float(excess.mean(1).sum()) / 255
            self._flicker_frames += len(middle)

    def metrics(self) -> dict[str, float | None]:
        differences = np.concatenate(self._differences)
        return {
            "flicker": self._flicker / self._flicker_frames if self._flicker_frames else None,
            "frame_difference": float(differences.mean()),
            "stagnation": float(np.concatenate(self._still).mean()),
            "seam": None if self.chunk_frames is None else seam_score(differences, self.chunk_frames),
        }
