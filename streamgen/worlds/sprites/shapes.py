"""Which shape a body has, how large it is and how it is turned: comparison with the renderer's own shapes.

A body seen whole is scaled to unit area and compared with every shape at every angle, one matrix product for a clip.
A body seen in part (beyond the picture's edge, or behind another) is fitted: position, size and angle are moved until
a soft picture of the shape agrees with what is seen where anything can be seen.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from streamgen.worlds.sprites.language import SHAPES
from streamgen.worlds.sprites.renderer import distance
from streamgen.worlds.sprites.segment import GRID, SPAN

SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4, "ring": 0}  # turns that change nothing
STEP = np.radians(4)
LIKE, MARGIN = 0.72, 0.03  # overlap a shape needs, and by how much it must beat the next
SOFT = (6.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0)  # pixels of blur of an outline at each step of a fit: how far it sees


@lru_cache(maxsize=1)
def _bank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures of unit area [T, GRID²], the index of their shape [T], their angle [T]."""
    pictures, kinds, angles = [], [], []
    axis = (np.arange(GRID) + 0.5) / GRID * 2 * SPAN - SPAN
    x, y = np.meshgrid(axis, axis)
    for kind, shape in enumerate(SHAPES):
        turns = SYMMETRY[shape]
        for angle in np.arange(0, 2 * np.pi / turns - 1e-6, STEP) if turns else [0.0]:
            c, s = np.cos(angle), np.sin(angle)
            size = np.sqrt(np.pi / areas()[kind])
            pictures.append(distance(shape, c * x + s * y, c * y - s * x, size) < 0)
            kinds.append(kind)
            angles.append(angle)
    return np.array(pictures, np.float32).reshape(len(pictures), -1), np.array(kinds), np.array(angles)


@lru_cache(maxsize=1)
def areas() -> np.ndarray:
    """Area of every shape of half-width one."""
    axis = (np.arange(1000) + 0.5) / 1000 * 3 - 1.5
    x, y = np.meshgrid(axis, axis)
    return np.array([(distance(shape, x, y, 1.0) < 0).mean() * 9 for shape in SHAPES])


def match(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Overlap (intersection over union) of bodies with every shape at its best angle, and that angle: both [N, S]."""
    pictures, kinds, turned = _bank()
    masks = grid.reshape(len(grid), GRID * GRID).astype(np.float32)
    both = masks @ pictures.T
    overlap = both / (masks.sum(1)[:, None] + pictures.sum(1) - both)
    found, angle = np.zeros((len(grid), len(SHAPES))), np.zeros((len(grid), len(SHAPES)))
    for kind in range(len(SHAPES)):
        mine = np.flatnonzero(kinds == kind)
        best = overlap[:, mine].argmax(1) if len(grid) else np.zeros(0, int)
        found[:, kind] = overlap[np.arange(len(grid)), mine[best]]
        angle[:, kind] = turned[mine[best]]
    return found, angle


def decide(overlap: np.ndarray) -> np.ndarray:
    """Index of the shape each row of overlaps shows, -1 where it is like none or too like two."""
    if not len(overlap):
        return np.zeros(0, int)
    ranked = np.sort(overlap, 1)
    sure = (ranked[:, -1] >= LIKE) & (ranked[:, -1] - ranked[:, -2] >= MARGIN)
    return np.where(sure, overlap.argmax(1), -1)


View = tuple[np.ndarray, np.ndarray, np.ndarray]


def fit(view: View, kind: int, start: np.ndarray, free: tuple[bool, ...], size: int) -> View:
    """Fit one shape to bodies seen in part.

    Args:
        view: of `Bodies.view`: where it is seen, where it may be hidden [N, h, h], the first pixel [N, 2].
        kind: index into SHAPES. start: [N, 4] x, y (picture widths), log half-width, angle.
        free: which of the four may move. size: pixels per picture width.
    Returns: the fitted [N, 4]; the overlap of what is drawn and seen [N]; the share of the shape in sight [N].
    """
    seen, hidden, first = view
    axes = ((first[:, :, None] + 2 * np.arange(seen.shape[1]) + 0.5) / size).astype(np.float32)  # [N, 2, h]
    open_, target = (~hidden).astype(np.float32), seen.astype(np.float32)
    pose, moving = start.astype(float).copy(), np.flatnonzero(free)
    steps, bound = (2e-3, 2e-3, 0.02, 0.03), np.array([0.04, 0.04, 0.2, 0.2])
    for soft in SOFT:
        now = _cover(kind, pose, axes, soft / size)
        error = ((target - now) * open_).reshape(len(pose), -1)
        slopes = []
        for p in moving:
            other = pose.copy()
            other[:, p] += steps[p]
            slopes.append((((_cover(kind, other, axes, soft / size) - now) / steps[p]) * open_).reshape(len(pose), -1))
        jac = np.stack(slopes, 1)  # [N, P, h²]
        normal = jac @ jac.transpose(0, 2, 1)
        normal += np.eye(len(moving)) * (1e-3 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-6)
        move = np.linalg.solve(normal, jac @ error[..., None])[..., 0]
        pose[:, moving] += np.clip(move, -bound[moving], bound[moving])
        pose[:, 2] = np.clip(pose[:, 2], np.log(0.05), np.log(0.32))
    drawn = _cover(kind, pose, axes, 1 / size) > 0.5
    shown = drawn & ~hidden
    both, union = (shown & seen).sum((1, 2)), (shown | seen).sum((1, 2))
    whole = areas()[kind] * np.exp(2 * pose[:, 2]) * (size / 2) ** 2
    return pose, both / np.maximum(union, 1), both / whole


def _cover(kind: int, pose: np.ndarray, axes: np.ndarray, soft: float) -> np.ndarray:
    """A soft picture [N, h, h] of a shape at each pose."""
    x, y, size, angle = (pose[:, i, None, None].astype(np.float32) for i in range(4))
    gx, gy = np.broadcast_arrays(axes[:, 0, None, :] - x, axes[:, 1, :, None] - y)
    if angle.any():
        c, s = np.cos(angle), np.sin(angle)
        gx, gy = c * gx + s * gy, c * gy - s * gx
    d = distance(SHAPES[kind], gx, gy, np.exp(size))
    return np.clip(0.5 - d / np.float32(2 * soft), 0, 1)
