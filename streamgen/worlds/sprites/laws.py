"""Which law of motion a track follows, how fast, and how large the body is at rest.

In place or not is told by the spread of centres; in place, size tells pulsing and angle tells spinning. Elsewhere
the track is cut into short windows: a circle turns at a steady rate, straight pieces do not turn; along an axis and
always the same way is moving, aslant is bouncing.
"""

from __future__ import annotations

import numpy as np

from streamgen.worlds.sprites import shapes
from streamgen.worlds.sprites.language import SHAPES
from streamgen.worlds.sprites.renderer import FPS
from streamgen.worlds.sprites.tracks import Track

STILL = 0.06  # picture widths within which a body stays in place
SLOW = 0.06  # widths per second
TURNING = 1.2  # radians per second, between no turn at all and the slowest circle
SPIN = 0.8
ALONG = np.radians(14)  # bouncing keeps 20 degrees from an axis
STEP = 0.15  # of log size from one frame to the next; pulsing takes 0.1 at most
SWELL = 0.075  # spread of log size; pulsing has 0.25


def classify(track: Track) -> tuple[str | None, float | None]:
    """(motion, picture widths per second), None where it cannot be said; in-place motions have no speed."""
    known = track.known
    if known.sum() < 5:
        return None, None
    x, y, t = track.x[known], track.y[known], track.t[known]
    low, high = np.percentile([x, y], [4, 96], axis=1)
    if (high - low).max() < STILL:
        return _in_place(track), None
    velocity, turn = _windows(t, x, y)
    if len(velocity) < 3:
        return _few(t, x, y)
    speed = np.hypot(*velocity.T)
    if np.median(speed) < SLOW:
        return _in_place(track), None
    if _circles(x, y, turn[speed > SLOW]):
        return "circling", float(np.median(speed))
    return _straight(velocity)


def _windows(t: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Velocity [W, 2] and turning rate [W] (radians per second) in windows of consecutive frames."""
    for reach, enough in ((3, 40), (2, 5), (1, 1)):  # the longer the calmer, the shorter the fewer meet a wall
        mid = np.arange(reach, len(t) - reach)
        mid = mid[t[mid + reach] - t[mid - reach] == 2 * reach]
        if len(mid) >= enough:
            break
    if not len(mid):
        return np.zeros((0, 2)), np.zeros(0)
    p = np.stack([x, y], 1)
    ahead, behind = p[mid + reach], p[mid - reach]
    velocity = (ahead - behind) / (2 * reach) * FPS
    bend = (ahead - 2 * p[mid] + behind) / reach**2 * FPS**2
    square = np.maximum((velocity**2).sum(1), SLOW**2)
    return velocity, (velocity[:, 0] * bend[:, 1] - velocity[:, 1] * bend[:, 0]) / square


def _circles(x: np.ndarray, y: np.ndarray, turn: np.ndarray) -> bool:
    """A steady turn in one sense around the middle, with hardly a straight piece."""
    if len(turn) < 3:
        return False
    way = turn * np.sign(np.median(turn))
    steady = np.mean((way > TURNING) & (way < 6)) > 0.6 and np.mean(way < TURNING / 2) < 0.25
    radius = np.hypot(x - 0.5, y - 0.5)
    return bool(steady and 0.12 < np.median(radius) < 0.45 and radius.std() < 0.3 * radius.mean())


def _straight(velocity: np.ndarray) -> tuple[str | None, float | None]:
    """Moving or bouncing, by the direction of straight pieces."""
    fold = np.median(np.abs(velocity), 0)
    tilt = np.arctan2(fold[1], fold[0])
    axis = 0 if tilt < ALONG else 1 if tilt > np.pi / 2 - ALONG else None
    if axis is None:
        return "bouncing", float(np.hypot(*fold))
    sign = np.sign(np.median(velocity[:, axis]))
    if np.mean(np.sign(velocity[:, axis]) == sign) < 0.8:
        return None, float(fold[axis])  # to and fro along an axis is no motion of this world
    word = (("left", "right"), ("up", "down"))[axis][int(sign > 0)]
    return f"moving {word}", float(fold[axis])


def _few(t: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[str | None, float | None]:
    """Too few neighbouring frames for windows: differences over short gaps."""
    gap = np.diff(t)
    near = gap <= 4
    if near.sum() < 3:
        return None, None
    steps = np.stack([np.diff(x), np.diff(y)], 1)[near] / gap[near, None] * FPS
    return _straight(steps)


def _in_place(track: Track) -> str | None:
    """Pulsing, spinning, or neither."""
    clear = np.isfinite(track.size)
    if clear.sum() < 5:
        return None
    if _swell(track.t[clear], np.log(track.size[clear])) > SWELL:
        return "pulsing"
    turns = shapes.SYMMETRY[SHAPES[track.shape]]
    spun = np.isfinite(track.angle)
    if not turns or spun.sum() < 5:
        return None
    period, angle, t = 2 * np.pi / turns, track.angle[spun], track.t[spun]
    rates = []
    for gap in (1, 2, 3):
        pair = t[gap:] - t[:-gap] == gap
        step = (angle[gap:] - angle[:-gap])[pair]
        rates.append(((step + period / 2) % period - period / 2) / gap * FPS)
    rate = np.concatenate(rates)
    if not len(rate):
        return None
    middle = np.median(rate)
    return "spinning" if abs(middle) > SPIN and np.mean(np.sign(rate) == np.sign(middle)) > 0.8 else None


def _swell(t: np.ndarray, size: np.ndarray) -> float:
    """Spread of log size that comes little by little: jumps do not count."""
    step, gap = np.diff(size), np.diff(t)
    step[np.abs(step) > STEP * np.minimum(gap, 3)] = 0.0
    return float(np.concatenate([[0.0], np.cumsum(step)]).std())


def rest_size(track: Track, motion: str | None) -> float | None:
    """Half-width in picture widths; of a pulsing body, that in the middle of its swing."""
    clear = np.isfinite(track.size)
    if not clear.any():
        return None
    size, t = track.size[clear], track.t[clear] / FPS
    if motion != "pulsing" or len(size) < 12:
        return float(np.median(size))
    best, found = np.inf, float(np.median(size))
    for turn in np.arange(1.6, 3.5, 0.1):
        terms = np.stack([np.ones_like(t), np.sin(turn * t), np.cos(turn * t)], 1)
        answer, *_ = np.linalg.lstsq(terms, size, rcond=None)
        error, swing = ((terms @ answer - size) ** 2).mean(), np.hypot(*answer[1:]) / max(answer[0], 1e-6)
        error *= 1 + 4 * (swing - 0.35) ** 2
        if error < best:
            best, found = error, float(answer[0])
    return float(np.clip(found, size.min(), size.max()))
