"""Motion by block matching: how much moves, and how much of the change from frame to frame is motion at all."""

from __future__ import annotations

import math

import numpy as np

from streamgen.evaluation.video_frames import BLOCK, STILL, block_means

RADIUS = 8  # pixels of the reduced picture that a block may have come from, each way
LONG_SIDE = 128  # pictures are averaged down by a whole number until their longer side is no more than this
GROUP = 1024  # blocks matched together: their windows stay in the processor's cache

# nearest first, so that of equally good places the nearest wins
OFFSETS = sorted(
    ((dy, dx) for dy in range(-RADIUS, RADIUS + 1) for dx in range(-RADIUS, RADIUS + 1)),
    key=lambda offset: (math.hypot(*offset), offset),
)


def match_blocks(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each block of a picture came from, by full search over ±8 pixels.

    Blocks that hardly change are not searched for: they stay where they are.
    Args:
        before, after: float32 [n, h, w] in [0, 1], pairs of pictures at least one block in size.
    Returns: per block, each [n, h // 8, w // 8]: distance moved (pixels), mean absolute difference at the same place,
        and the same at the place it came from.
    """
    change = block_means(np.abs(after - before), BLOCK)
    rest, moved = change.copy(), np.zeros_like(change)
    pair, row, column = np.nonzero(change > STILL / 255)
    padded = np.pad(before, ((0, 0), (RADIUS, RADIUS), (RADIUS, RADIUS)), mode="edge")
    inner, outer = np.arange(BLOCK), np.arange(BLOCK + 2 * RADIUS)
    for first in range(0, len(pair), GROUP):
        n, i, j = (index[first : first + GROUP] for index in (pair, row, column))
        y, x = i * BLOCK, j * BLOCK
        block = after[n, inner[:, None, None] + y, inner[:, None] + x]  # [8, 8, blocks]
        window = padded[n, outer[:, None, None] + y, outer[:, None] + x]  # [24, 24, blocks]
        best, distance = np.full(len(n), np.inf, np.float32), np.zeros(len(n), np.float32)
        scratch = np.empty_like(block)
        for dy, dx in OFFSETS:
            top, left = RADIUS + dy, RADIUS + dx
            np.subtract(window[top : top + BLOCK, left : left + BLOCK], block, out=scratch)
            error = np.abs(scratch, out=scratch).sum((0, 1))
            better = error < best
            best[better], distance[better] = error[better], math.hypot(dy, dx)
        rest[n, i, j], moved[n, i, j] = best / BLOCK**2, distance
    return moved, change, np.minimum(rest, change)


class MotionMeter:
    """Warping consistency and dynamic degree of frames that come in parts.

    warping_error: mean absolute difference of luminance that is left when every 8×8 block is taken from where it fits
        best in the frame before. [0, 1], full scale 1; 0 = motion explains everything. After the warping error of Lai
        et al. 2018 (arXiv:1808.00449), by block matching in place of optical flow.
    warping_consistency: share of the change in changing blocks that motion explains. [0, 1]; None if nothing changes.
    dynamic_degree: mean speed over all blocks and frames, in picture widths per second; blocks at rest count as 0.
        VBench's dynamic degree (arXiv:2311.17982) thresholds an optical flow instead.

    Pictures above 128 pixels are averaged down first, so one search of ±8 pixels is at least 1/16 of the longer side.
    """

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self._last: np.ndarray | None = None
        self._pairs = 0
        self._error = self._speed = self._changed = self._left = 0.0

    def add(self, frames: np.ndarray, luma: np.ndarray) -> None:
        """Take in the luminance of the next frames, [f, H, W]."""
        height, width = luma.shape[1:]
        factor = max(1, min(math.ceil(max(height, width) / LONG_SIDE), min(height, width) // BLOCK))
        small = luma if factor == 1 else block_means(luma, factor)
        small = small if self._last is None else np.concatenate([self._last, small])
        self._last = small[-1:].copy()
        if len(small) < 2:
            return
        moved, change, rest = match_blocks(small[:-1], small[1:])
        self._pairs += len(moved)
        self._error += float(rest.mean((1, 2), dtype=np.float64).sum())
        self._speed += float(moved.mean((1, 2), dtype=np.float64).sum()) * factor / width * self.fps
        searched = change > STILL / 255
        self._changed += float(change[searched].sum(dtype=np.float64))
        self._left += float(rest[searched].sum(dtype=np.float64))

    def metrics(self) -> dict[str, float | None]:
        return {
            "warping_error": self._error / self._pairs,
            "warping_consistency": 1 - self._left / self._changed if self._changed else None,
            "dynamic_degree": self._speed / self._pairs,
        }
