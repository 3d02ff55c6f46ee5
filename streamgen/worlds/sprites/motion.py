"""How sprites move: closed forms of time, so that any frame of a ten-minute scene costs the same.

Lengths are in picture widths, times in seconds, angles in radians. What a prompt never names (size, speed, phase,
turning sense) is an actor's hidden state: drawn once from the scene's seed and kept through every change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The reach of a shape beyond its half-width: pointed shapes have the area of a circle, so they reach further.
REACH = {"circle": 1.0, "square": 0.9, "triangle": 1.2, "star": 1.2, "cross": 1.0, "ring": 1.0}
PULSE = 0.35


@dataclass(frozen=True, slots=True)
class Hidden:
    """One body's unnamed state."""

    size: float  # half-width
    speed: float  # widths per second, for moving and bouncing
    away: float  # seconds out of sight between leaving one side and entering the other
    heading: float  # direction of bouncing, never along an axis
    start: tuple[float, float]
    radius: float  # of circling
    turn: float  # radians per second of circling, pulsing, spinning; the sign is the turning sense
    phase: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Hidden:
        sense = rng.choice([-1.0, 1.0])
        return cls(
            size=rng.uniform(0.12, 0.19),
            speed=rng.uniform(0.25, 0.55),
            away=rng.uniform(0.0, 2.0),
            heading=np.radians(rng.uniform(20, 70)) + rng.integers(4) * np.pi / 2,
            start=(rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75)),
            radius=rng.uniform(0.25, 0.31),
            turn=sense * rng.uniform(2.0, 3.0),
            phase=rng.uniform(0, 2 * np.pi),
        )


@dataclass(frozen=True, slots=True)
class Pose:
    """Position of the centre, scale and angle: arrays [F], or the scalars a next segment starts from."""

    x: np.ndarray | float
    y: np.ndarray | float
    scale: np.ndarray | float
    angle: np.ndarray | float

    def at(self, index: int) -> Pose:
        return Pose(*(float(v[index]) for v in (self.x, self.y, self.scale, self.angle)))


def _reflect(u: np.ndarray, low: float, high: float) -> np.ndarray:
    """Fold a straight line into [low, high]: the position of a ball between two walls."""
    span = high - low
    return low + span - np.abs((u - low) % (2 * span) - span)


def _moving(hidden: Hidden, motion: str, reach: float, x: float, y: float, t: np.ndarray):
    """Straight on, out at one side, away for a while, in at the other."""
    sign = -1.0 if motion in ("moving left", "moving up") else 1.0
    along, across = (x, y) if motion in ("moving left", "moving right") else (y, x)
    travelled = (along + reach) if sign > 0 else (1 + reach - along)
    crossing = 1 + 2 * reach
    s = (travelled + hidden.speed * t) % (crossing + hidden.away * hidden.speed)
    u = s - reach if sign > 0 else 1 + reach - s  # beyond the far edge while away
    v = np.full_like(t, np.clip(across, 0.12, 0.88))
    return (u, v) if motion in ("moving left", "moving right") else (v, u)


def track(hidden: Hidden, motion: str, shape: str, t: np.ndarray, start: Pose | None = None) -> Pose:
    """Pose at times `t` [F] since the motion began, continuing from `start` where the motion allows it."""
    reach = hidden.size * REACH[shape]
    x, y = (start.x, start.y) if start else hidden.start
    angle = np.full_like(t, start.angle if start else 0.0)
    scale = np.ones_like(t)
    if motion.startswith("moving"):
        px, py = _moving(hidden, motion, reach, x, y, t)
    elif motion == "bouncing":
        px = _reflect(x + hidden.speed * np.cos(hidden.heading) * t, reach, 1 - reach)
        py = _reflect(y + hidden.speed * np.sin(hidden.heading) * t, reach, 1 - reach)
    elif motion == "circling":
        phase = np.arctan2(y - 0.5, x - 0.5) if start else hidden.phase
        first = np.hypot(y - 0.5, x - 0.5) if start else hidden.radius
        radius = hidden.radius + (first - hidden.radius) * np.exp(-4 * t)  # spirals onto its circle
        px = 0.5 + radius * np.cos(phase + hidden.turn * t)
        py = 0.5 + radius * np.sin(phase + hidden.turn * t)
    else:
        px, py = (np.full_like(t, np.clip(v, 0.2, 0.8)) for v in (x, y))
        if motion == "pulsing":
            phase = 0.0 if start else hidden.phase
            scale = 1 + PULSE * np.sin(phase + hidden.turn * t)
        else:
            angle = angle + hidden.turn * t
    return Pose(px, py, scale, angle)
