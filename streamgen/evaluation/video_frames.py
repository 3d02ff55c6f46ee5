"""What every video metric starts from: checked frames, their luminance, and a picture as a few blocks or cells."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from streamgen.errors import InputError

BLOCK = 8  # pixels per side of the blocks in which change and motion are looked for
STILL = 2.0  # grey levels of 255: a block that changes by no more on average is at rest; codecs shimmer below it
PART_PIXELS = 1 << 20  # pixels looked at together: bounds what a metric holds in floats, whatever a video's length


def check_frames(frames: np.ndarray) -> np.ndarray:
    """The frames themselves if they are uint8 [F, H, W, 3] and a block fits in. Raises: InputError."""
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        what = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise InputError(f"a video must be a uint8 array [F, H, W, 3], not {what}; convert it to 0-255 RGB")
    height, width = frames.shape[1:3]
    if min(height, width) < BLOCK:
        raise InputError(f"pictures of {height}×{width} are smaller than {BLOCK}×{BLOCK}; give larger ones")
    return frames


def parts(frames: np.ndarray) -> Iterator[np.ndarray]:
    """A video in runs of frames, each of about `PART_PIXELS` pixels; views, nothing is copied."""
    count = max(1, PART_PIXELS // (frames.shape[1] * frames.shape[2]))
    for first in range(0, len(frames), count):
        yield frames[first : first + count]


def luminance(frames: np.ndarray) -> np.ndarray:
    """BT.601 luma of uint8 [F, H, W, 3]: float32 [F, H, W] in [0, 1]."""
    total = np.multiply(frames[..., 0], 0.299 / 255, dtype=np.float32)
    total += np.multiply(frames[..., 1], 0.587 / 255, dtype=np.float32)
    total += np.multiply(frames[..., 2], 0.114 / 255, dtype=np.float32)
    return total


def block_means(pictures: np.ndarray, size: int) -> np.ndarray:
    """Means over size×size blocks of [F, H, W]: float32 [F, H // size, W // size]; a rest at the edges is left out."""
    count, height, width = pictures.shape[0], pictures.shape[1] // size, pictures.shape[2] // size
    cut = pictures[:, : height * size, : width * size]
    rows = cut.reshape(count, height, size, width * size).sum(2, dtype=np.float32)  # long runs first: that is fast
    return rows.reshape(count, height, width, size).sum(3) / np.float32(size * size)


def area_weights(length: int, cells: int) -> np.ndarray:
    """[cells, length] float32: each row averages the pixels that its share of the line covers, in part or whole."""
    edges = np.arange(cells + 1) * (length / cells)
    pixels = np.arange(length)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.clip(covered, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
