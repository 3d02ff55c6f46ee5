"""What all suites ask of a few seconds of frames: does it do what was said, is it the same as before, does it live."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import numpy as np

from streamgen.evaluation.suites.base import Values
from streamgen.evaluation.suites.scenes import ATTRIBUTES
from streamgen.worlds.sprites.language import Scene
from streamgen.worlds.sprites.motion import Hidden
from streamgen.worlds.sprites.oracle import ActorReading, Reading, score
from streamgen.worlds.sprites.segment import segment

SIZE_ALIKE = 0.15  # of log size; the world's sizes span 0.46, the oracle errs by 0.02
SPEED_ALIKE = 0.25  # of log speed; the world's span 0.79
CHANGED, SHOWN = 40, 60  # sums of absolute RGB differences: to the frame before; to the background
FEW_CHANGED, FEW_SHOWN = 4, 20  # of every second pixel each way; the slowest motion changes 15 in a frame
STILL = 4  # frames: a pulse stands still at its ends for less
JUMP = 0.1  # picture widths in a frame; the fastest circle takes 0.058


# ------------------------------------------------------------------------------------------- as it was said
def attributes(reading: Reading, scene: Scene) -> Values:
    """The oracle's score as numbers; None where the scene does not name it."""
    found = score(reading, scene)
    return {name: None if found[name] is None else float(found[name]) for name in ATTRIBUTES}


def binding(reading: Reading, scene: Scene) -> float | None:
    """Of two actors: the share that has all its named attributes itself, none of them the other's. None for one."""
    if len(scene.actors) < 2:
        return None
    most = 0
    for order in permutations(range(max(len(scene.actors), len(reading.actors)))):
        pairs = [(a, reading.actors[i]) for a, i in zip(scene.actors, order) if i < len(reading.actors)]
        named = ("colour", "shape", "motion")
        right = [all(getattr(a, n) in (None, getattr(r, n)) for n in named) for a, r in pairs]
        most = max(most, sum(right))
    return most / len(scene.actors)


# ------------------------------------------------------------------------------------------- as it was before
def close_to(before: float | None, after: float | None, tolerance: float) -> bool | None:
    """Whether two lengths or speeds are one; None where either is not known."""
    if not before or not after:
        return None
    return abs(float(np.log(after / before))) < tolerance


def same_actor(before: ActorReading, after: ActorReading) -> bool:
    """Whether colour, shape and size agree, as far as they are known; the colour has to be."""
    if after.colour is None or before.colour != after.colour:
        return False
    if None not in (before.shape, after.shape) and before.shape != after.shape:
        return False
    return close_to(before.size, after.size, SIZE_ALIKE) is not False


def strangers(before: Reading, after: Reading) -> int:
    """How many actors were there with another identity in the reading before."""
    few, many = sorted((before.actors, after.actors), key=len)
    if not few:
        return 0
    return min(sum(not same_actor(a, b) for a, b in zip(few, order)) for order in permutations(many, len(few)))


# ------------------------------------------------------------------------------------------- how alive it is
def _sparse(frames: np.ndarray) -> np.ndarray:
    return frames[:, ::2, ::2].astype(np.int16)


def visible(frames: np.ndarray) -> np.ndarray:
    """[F] whether anything stands out from the background, whose rows are of one colour."""
    few = _sparse(frames)
    apart = np.abs(few - np.median(few, axis=2)[:, :, None]).sum(-1) > SHOWN
    return apart.sum((1, 2)) >= FEW_SHOWN


def stagnation(frames: np.ndarray) -> float | None:
    """Share of the frames that show something in which nothing moves (for `STILL` frames or longer)."""
    if len(frames) < 2:
        return None
    few, shown = _sparse(frames), visible(frames)[1:]
    calm = (np.abs(np.diff(few, axis=0)).sum(-1) > CHANGED).sum((1, 2)) < FEW_CHANGED
    edges = np.flatnonzero(np.diff(np.concatenate([[0], calm & shown, [0]]).astype(int)))
    still = sum(stop - start for start, stop in zip(edges[::2], edges[1::2]) if stop - start >= STILL)
    return float(still / shown.sum()) if shown.any() else None


@cache
def usual_speed(motion: str) -> float | None:
    """Picture widths per second of a motion in the world, on average; None in place."""
    drawn = [Hidden.draw(np.random.default_rng([5, i])) for i in range(500)]
    if motion == "circling":
        return float(np.mean([hidden.radius * abs(hidden.turn) for hidden in drawn]))
    if motion == "bouncing" or motion.startswith("moving"):
        return float(np.mean([hidden.speed for hidden in drawn]))
    return None


def dynamic_degree(reading: Reading, scene: Scene) -> float | None:
    """Speed of the actors that are to travel, against what is usual for the motion that is named.

    1 = as lively as the world itself, 0 = in place. None where nothing is to travel, and for actors whose motion cannot
    be read; two are told apart by their colours.
    """
    parts = []
    for actor in scene.actors:
        usual = usual_speed(actor.motion) if actor.motion else None
        alone = len(scene.actors) == 1
        seen = [found for found in reading.actors if found.motion and (alone or actor.colour in (None, found.colour))]
        if usual and seen:
            parts.append((seen[0].speed or 0.0) / usual)
    return float(np.mean(parts)) if parts else None


def centres(frames: np.ndarray) -> np.ndarray:
    """[F, 2] where what is seen has its middle, in picture widths; NaN where nothing is."""
    bodies, _ = segment(frames)
    weight = np.bincount(bodies.frame, bodies.area, len(frames))
    sums = np.stack([np.bincount(bodies.frame, bodies.area * v, len(frames)) for v in (bodies.x, bodies.y)], 1)
    with np.errstate(invalid="ignore"):
        return sums / weight[:, None]


def jumps(frames: np.ndarray) -> int:
    """How often a body that is wholly in view is suddenly somewhere else; away from the sides, where one may leave."""
    bodies, _ = segment(frames)
    count = 0
    for colour in np.unique(bodies.colour):
        rows = np.flatnonzero((bodies.colour == colour) & bodies.clear)
        steps = np.hypot(np.diff(bodies.x[rows]), np.diff(bodies.y[rows]))
        count += int(((np.diff(bodies.frame[rows]) == 1) & (steps > JUMP)).sum())
    return count


def greatest_step(frames: np.ndarray) -> float:
    """The longest way from one frame to the next, in picture widths; across frames without anything, their mean."""
    middle = centres(frames)
    known = np.flatnonzero(np.isfinite(middle[:, 0]))
    if len(known) < 2:
        return 0.0
    steps = np.hypot(*np.diff(middle[known], axis=0).T) / np.diff(known)
    return float(steps.max())
