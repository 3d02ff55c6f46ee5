"""What a clip of the sprites world shows, read from its frames alone.

`segment` finds bodies by colour, `tracks` follows them, `shapes` compares them with the renderer's own shapes, `laws`
names their motion. Here the votes over frames are counted, and what a vote would hide is kept: whether every actor
was there (`present`), was one body of one shape (`whole`), and stayed the same (`identity_changes`).

    reading = read(render("a red circle bouncing on a navy background"))
    reading.colour, reading.motion, reading.present, reading.whole      # "red", "bouncing", 1.0, True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from streamgen.worlds.sprites import laws, shapes
from streamgen.worlds.sprites.language import SHAPES, Scene
from streamgen.worlds.sprites.renderer import FPS
from streamgen.worlds.sprites.segment import UNKNOWN, Bodies, name, segment
from streamgen.worlds.sprites.tracks import Track, link, majority, measure

PRESENT = 0.95  # share of frames `all_right` asks for
WHOLE = 0.85  # share of clear views in one piece and of one shape
LASTING = 6  # frames a state must last to count
AWAY = 2.0 + 0.6  # seconds an actor may be out of sight beyond a side; the rest is the slivers nobody can see
NEAR = 0.12  # picture widths from a side within which a body half hidden by the other may be leaving or entering
EXTRA = 60  # pixels from which a body too many is one
JUMP, DIFFERENT = 0.2, 0.16  # of log size: within two frames, and lasting


@dataclass(frozen=True, slots=True)
class ActorReading:
    """One actor, in words of the language's tables; None where nothing can be said."""

    colour: str | None
    shape: str | None
    motion: str | None
    speed: float | None  # picture widths per second; None in place
    size: float | None  # half-width in picture widths
    whole: bool | None
    present: float  # share of frames in which it was seen, or rightly was not
    identity_changes: int
    first: int  # frame it was first seen in
    frames: int  # in which it was seen


@dataclass(frozen=True, slots=True)
class Reading:
    """A clip as the oracle sees it; the first actor's attributes are its own."""

    actors: tuple[ActorReading, ...]
    background: str | None
    identity_changes: int
    present: float  # share of frames with as many actors as there should be
    whole: bool | None

    @property
    def colour(self) -> str | None:
        return self.actors[0].colour if self.actors else None

    @property
    def shape(self) -> str | None:
        return self.actors[0].shape if self.actors else None

    @property
    def motion(self) -> str | None:
        return self.actors[0].motion if self.actors else None

    @property
    def speed(self) -> float | None:
        return self.actors[0].speed if self.actors else None

    @property
    def size(self) -> float | None:
        return self.actors[0].size if self.actors else None


@dataclass(frozen=True, slots=True)
class FrameReading:
    """One frame: the colours and shapes of its bodies, largest first (a shape is None unless clearly seen)."""

    colours: tuple[str | None, ...]
    shapes: tuple[str | None, ...]
    background: str | None


def read(frames: np.ndarray, actors: int | Sequence[int] | None = None) -> Reading:
    """Read a clip.

    Args:
        frames: [F, S, S, 3], uint8 or floats in [0, 1].
        actors: how many there should be, in all or in every frame; by default as many as live long enough.
    >>> from streamgen.worlds.sprites.renderer import render
    >>> read(render("a red circle bouncing on a navy background")).motion
    'bouncing'
    """
    bodies, backgrounds = segment(frames)
    most = None if actors is None else int(np.max(actors))
    followed = [measure(bodies, rows) for rows in link(bodies, len(frames), most)]
    there = [_there(bodies, track, followed, len(frames)) for track in followed]
    expected = np.broadcast_to(np.asarray(len(followed) if actors is None else actors), len(frames))
    known = [b for b in backgrounds if b]
    background = max(sorted(set(known)), key=known.count) if 2 * len(known) > len(backgrounds) else None
    found = tuple(_actor(bodies, track, seen) for track, seen in zip(followed, there))
    wholes = [a.whole for a in found]
    return Reading(
        actors=found,
        background=background,
        identity_changes=sum(a.identity_changes for a in found),
        present=_present(bodies, followed, there, expected, len(frames)),
        whole=None if not wholes else False if False in wholes else None if None in wholes else True,
    )


def _actor(bodies: Bodies, track: Track, there: np.ndarray) -> ActorReading:
    motion, speed = laws.classify(track)
    colour = majority(track.colour, 0.5)
    return ActorReading(
        colour=name(colour) if colour >= 0 else None,
        shape=SHAPES[track.shape] if track.shape >= 0 else None,
        motion=motion,
        speed=speed,
        size=laws.rest_size(track, motion),
        whole=_whole(bodies, track),
        present=float(there.mean()),
        identity_changes=_changes(track, motion),
        first=int(track.t[0]),
        frames=len(track.t),
    )


# ------------------------------------------------------------------------------------------------ presence
def _there(bodies: Bodies, track: Track, others: list[Track], count: int) -> np.ndarray:
    """[F] whether an actor is seen, or is rightly out of sight: beyond a side for a while, or behind the other."""
    there = np.zeros(count, bool)
    there[track.t] = True
    edges = np.concatenate([[-1], track.t, [count]])
    for before, after in zip(edges[:-1], edges[1:]):
        if after - before < 2:
            continue
        ends = np.array([np.searchsorted(track.t, f) for f in (before, after) if 0 <= f < count])
        rows, away = track.rows[ends], np.arange(before + 1, after)
        behind = _behind(bodies, track, ends, others, away)
        side = (bodies.box[rows] * [1, -1, 1, -1] + [0, 1, 0, 1]).min(1) < NEAR
        near_side = bodies.cut[rows].any(1) | (bodies.touching[rows] & (side | behind.any()))
        if behind.all() or (near_side.all() and (~behind).sum() <= AWAY * FPS):
            there[away] = True
    return there


def _behind(bodies: Bodies, track: Track, ends: np.ndarray, others: list[Track], away: np.ndarray) -> np.ndarray:
    """Whether another body covers the place where an actor out of sight should be, in each frame of `away`."""
    hidden = np.zeros(len(away), bool)
    if not bodies.touching[track.rows[ends]].any():
        return hidden
    seen = track.rows[ends]
    x, y = (np.interp(away, track.t[ends], values[seen]) for values in (bodies.x, bodies.y))
    for other in others:
        if other is track:
            continue
        at = np.clip(np.searchsorted(other.t, away), 0, len(other.t) - 1)
        box = bodies.box[other.rows[at]] + np.array([-1, 1, -1, 1]) * 0.05
        over = (x > box[:, 0]) & (x < box[:, 1]) & (y > box[:, 2]) & (y < box[:, 3])
        hidden |= over & (np.abs(other.t[at] - away) <= 1)
    return hidden


def _present(bodies: Bodies, tracks: list[Track], there: list[np.ndarray], expected: np.ndarray, count: int) -> float:
    """Share of frames with as many actors as expected."""
    total = np.sum(there, 0) if there else np.zeros(count, int)
    stray = np.ones(len(bodies.frame), bool)
    for track in tracks:
        stray[track.rows] = False
    extra = np.bincount(bodies.frame[stray & (bodies.area > EXTRA)], minlength=count)
    return float(np.mean(total + extra == expected))


# ------------------------------------------------------------------------------------------------ identity
def _whole(bodies: Bodies, track: Track) -> bool | None:
    """One piece and one shape in nearly every clear view; None without clear views."""
    rows = track.rows[track.clear]
    if len(rows) < 3:
        return True if track.shape >= 0 else None
    good = (bodies.pieces[rows] == 1) & (track.kind[track.clear] == track.shape)
    return bool(good.mean() >= WHOLE)


def _changes(track: Track, motion: str | None) -> int:
    """Moments at which colour, shape or size pass from one lasting state to another."""
    colour = _switches(track.t, track.colour, track.colour != UNKNOWN)
    shape = _switches(track.t, track.kind, track.kind >= 0)
    events = sorted([*colour, *shape, *_jumps(track, motion)])
    merged = [t for i, t in enumerate(events) if i == 0 or t - events[i - 1] > 2 * LASTING]
    return len(merged)


def _switches(t: np.ndarray, values: np.ndarray, known: np.ndarray) -> list[int]:
    """Frames at which a value gives way to another, both lasting."""
    t, values = t[known], values[known]
    if not len(values):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1])
    lengths = np.diff(np.concatenate([starts, [len(values)]]))
    lasting = [(int(t[s]), int(values[s])) for s, n in zip(starts, lengths) if n >= LASTING]
    return [b[0] for a, b in zip(lasting, lasting[1:]) if a[1] != b[1]]


def _jumps(track: Track, motion: str | None) -> list[int]:
    """Frames at which the size jumps and stays different; a pulsing body's only where it is seen throughout."""
    clear = track.clear & np.isfinite(track.size)
    t, size = track.t[clear], np.log(track.size[clear])
    found: list[int] = []
    for i in range(LASTING, len(t) - LASTING + 1):
        lasting = abs(np.median(size[i : i + LASTING]) - np.median(size[i - LASTING : i]))
        whole = t[i + 1] - t[i - 2] == 3
        step = abs(size[i + 1] - size[i - 2]) if whole else abs(size[i] - size[i - 1])
        if motion == "pulsing":
            jumps = whole and step > 2 * JUMP
        else:
            jumps = step > (JUMP if whole else DIFFERENT)
        if jumps and lasting > DIFFERENT and (not found or t[i] - found[-1] > LASTING):
            found.append(int(t[i]))
    return found


# ------------------------------------------------------------------------------------------------ judging
def score(reading: Reading, scene: Scene) -> dict[str, bool | float | None]:
    """Per attribute whether the reading agrees with what a scene names (None: not named), the best way round.

    With two actors an attribute's value is the share of actors that have it. `all_right` is every named attribute,
    as many actors as named, whole, and present in at least `PRESENT` of the frames.
    """
    best: dict[str, bool | float | None] | None = None
    for order in permutations(range(max(len(scene.actors), len(reading.actors)))):
        now = _compare(reading, scene, order)
        if best is None or _sum(now) > _sum(best):
            best = now
    assert best is not None
    best["background"] = None if scene.background is None else reading.background == scene.background
    best["whole"] = reading.whole is True
    best["present"] = reading.present >= PRESENT
    best["all_right"] = len(reading.actors) == len(scene.actors) and all(v is None or v == 1 for v in best.values())
    return best


def _sum(found: dict) -> float:
    return sum(float(v) for v in found.values() if v is not None)


def _compare(reading: Reading, scene: Scene, order: tuple[int, ...]) -> dict[str, bool | float | None]:
    out: dict[str, bool | float | None] = {}
    for part in ("colour", "shape", "motion"):
        named = [(getattr(a, part), order[i]) for i, a in enumerate(scene.actors) if getattr(a, part) is not None]
        right = [i < len(reading.actors) and getattr(reading.actors[i], part) == word for word, i in named]
        out[part] = None if not right else bool(right[0]) if len(right) == 1 else float(np.mean(right))
    return out


def all_right(reading: Reading, scene: Scene) -> bool:
    """Whether a clip shows everything a scene names, whole and present (see `score`)."""
    return bool(score(reading, scene)["all_right"])


# ------------------------------------------------------------------------------------------------ frame by frame
def timeline(frames: np.ndarray) -> tuple[FrameReading, ...]:
    """What every single frame shows."""
    bodies, backgrounds = segment(frames)
    kind = np.where(bodies.clear, shapes.decide(shapes.match(bodies.grid)[0]), -1)
    bounds = np.searchsorted(bodies.frame, np.arange(len(frames) + 1))
    out = []
    for i, background in enumerate(backgrounds):
        rows = sorted(range(bounds[i], bounds[i + 1]), key=lambda r: -bodies.area[r])
        colours = tuple(name(int(bodies.colour[r])) for r in rows)
        out.append(FrameReading(colours, tuple(SHAPES[kind[r]] if kind[r] >= 0 else None for r in rows), background))
    return tuple(out)


def first_frame_with(
    frames: np.ndarray,
    colour: str | None = None,
    shape: str | None = None,
    background: str | None = None,
    lasting: int = 3,
) -> int | None:
    """The first frame from which all that is named is shown for `lasting` frames; None if never."""
    hits = [
        (colour is None or colour in f.colours)
        and (shape is None or shape in f.shapes)
        and (background is None or background == f.background)
        for f in timeline(frames)
    ]
    run = 0
    for i, hit in enumerate(hits):
        run = run + 1 if hit else 0
        if run >= min(lasting, len(hits)):
            return i - run + 1
    return None
