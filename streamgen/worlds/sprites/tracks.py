"""From bodies in frames to actors in time, with what can be measured of each.

Bodies are linked to the nearest prediction of constant velocity, colour first: two actors never share one. An actor
may be away, or hidden behind the other, and is known again by its colour; a stranger that enters where an actor was
due is taken for that actor, changed, which is how forgetting is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamgen.worlds.sprites import shapes
from streamgen.worlds.sprites.language import SHAPES
from streamgen.worlds.sprites.segment import UNKNOWN, Bodies

REACHABLE = 0.15  # how far from its prediction a body may be found
OTHER_COLOUR = 0.25  # what another colour costs, in picture widths
RETURN = 45  # frames within which a stranger at a side stands for an actor that left
PARTIAL = 48  # partial views that are fitted at most
CLEAR = 24  # clear views that make fits of partial ones unnecessary
FITS = 0.8  # overlap of a fit that is believed


@dataclass(slots=True)
class Track:
    """One actor: its bodies in time order, and what was measured. Arrays are [M], NaN or -1 where unknown."""

    rows: np.ndarray  # into Bodies
    t: np.ndarray  # frames
    colour: np.ndarray
    clear: np.ndarray  # fully in view, touching nobody
    x: np.ndarray  # centre of the whole body
    y: np.ndarray
    kind: np.ndarray  # index into SHAPES, from clear views alone
    overlap: np.ndarray  # with that shape
    size: np.ndarray
    angle: np.ndarray  # of clear views, within the symmetry of the track's shape
    shape: int = -1  # the shape of most views

    @property
    def known(self) -> np.ndarray:
        """Frames whose centre is known."""
        return np.isfinite(self.x)


def link(bodies: Bodies, num_frames: int, actors: int | None = None) -> list[np.ndarray]:
    """Rows of `bodies` per actor, those that live long enough, longest first, at most `actors`."""
    tracks: list[list[int]] = []
    bounds = np.searchsorted(bodies.frame, np.arange(num_frames + 1))
    for frame in range(num_frames):
        free = list(range(bounds[frame], bounds[frame + 1]))
        for track, row in _pairs(bodies, tracks, free, frame):
            tracks[track].append(row)
            free.remove(row)
        tracks += [[row] for row in free]
    enough = max(5, min(int(0.08 * num_frames), 48))
    lasting = [np.array(rows) for rows in tracks if len(rows) >= min(enough, max(num_frames // 2, 1))]
    lasting.sort(key=lambda rows: (-len(rows), rows[0]))
    kept = lasting[:actors] if actors else lasting
    return sorted(kept, key=lambda rows: rows[0])


def _pairs(bodies: Bodies, tracks: list[list[int]], free: list[int], frame: int) -> list[tuple[int, int]]:
    """(track, row) for one frame: the closest pairs first."""
    offers = []
    for number, track in enumerate(tracks):
        last = track[-1]
        for row in free:
            cost = _cost(bodies, track, last, row, frame)
            if cost is not None:
                offers.append((cost, number, row))
    found, used = [], set()
    for _, number, row in sorted(offers):
        if ("t", number) not in used and ("r", row) not in used:
            used |= {("t", number), ("r", row)}
            found.append((number, row))
    return found


def _cost(bodies: Bodies, track: list[int], last: int, row: int, frame: int) -> float | None:
    """How unlikely it is that `row` continues a track; None if it cannot."""
    gap = frame - bodies.frame[last]
    x, y = bodies.x[last], bodies.y[last]
    if len(track) > 1 and bodies.frame[track[-2]] == bodies.frame[last] - 1 and gap <= 3:
        x += (x - bodies.x[track[-2]]) * gap
        y += (y - bodies.y[track[-2]]) * gap
    away = float(np.hypot(bodies.x[row] - x, bodies.y[row] - y))
    same = bodies.colour[last] == bodies.colour[row] and bodies.colour[row] != UNKNOWN
    if same and away < REACHABLE:
        return away
    if same:  # back from beyond a side, or from behind the other, it comes before any stranger
        due = (bodies.cut[last].any() and bodies.cut[row].any()) or bodies.touching[last] or bodies.touching[row]
        return (0.15 if due else 1.0) + 0.01 * away
    if gap <= 3 and away < REACHABLE:
        return OTHER_COLOUR + away
    if gap <= RETURN and bodies.cut[last].any() and bodies.cut[row].any():
        return 3 + away
    return 4 + away if gap == 1 else None


def measure(bodies: Bodies, rows: np.ndarray) -> Track:
    """Follow one actor."""
    clear, n = bodies.clear[rows], len(rows)
    overlap, angles = shapes.match(bodies.grid[rows])
    kind = np.where(clear, shapes.decide(overlap), -1)
    blank = [np.full(n, np.nan) for _ in range(4)]
    x, y, size, angle = blank
    track = Track(rows, bodies.frame[rows], bodies.colour[rows], clear, x, y, kind, overlap.max(1), size, angle)
    track.shape = majority(kind[kind >= 0], 0.5)
    known = np.where(kind >= 0, kind, track.shape)
    x[clear], y[clear] = bodies.x[rows[clear]], bodies.y[rows[clear]]
    size[clear] = np.sqrt(bodies.area[rows] / shapes.areas()[known])[clear] / bodies.size
    if track.shape >= 0:
        angle[clear] = angles[clear, track.shape]
    if clear.sum() < min(CLEAR, n):
        _complete(bodies, track)
    return track


def majority(values: np.ndarray, share: float) -> int:
    """The commonest value if it has at least that share, else -1."""
    if not len(values):
        return -1
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()]) if counts.max() >= share * len(values) else -1


def _complete(bodies: Bodies, track: Track) -> None:
    """Too little is seen whole: fit the partial views, with every shape if the shape is not known either."""
    rest = np.flatnonzero(~track.clear)
    rest = rest[bodies.area[track.rows[rest]] > 0.3 * np.median(bodies.area[track.rows])]
    if not len(rest):
        return
    if track.shape < 0:
        few = rest[np.linspace(0, len(rest) - 1, min(len(rest), 10)).astype(int)]
        scores = [np.median(_fit(bodies, track, few, kind)[1]) for kind in range(len(SHAPES))]
        if max(scores) < shapes.LIKE:
            return
        track.shape = int(np.argmax(scores))
    rest = rest[:PARTIAL]
    pose, overlap, share = _fit(bodies, track, rest, track.shape)
    good = (overlap > FITS) & (share > 0.35)
    track.x[rest[good]], track.y[rest[good]] = pose[good, 0], pose[good, 1]
    if _in_place(bodies, track) or not track.clear.any():
        track.size[rest[good]] = np.exp(pose[good, 2])
        if shapes.SYMMETRY[SHAPES[track.shape]]:
            track.angle[rest[good]] = pose[good, 3]


def _in_place(bodies: Bodies, track: Track) -> bool:
    """Whether what is seen of a body stays where it is."""
    low, high = np.percentile([bodies.x[track.rows], bodies.y[track.rows]], [5, 95], axis=1)
    return bool((high - low).max() < 0.12)


def _fit(bodies: Bodies, track: Track, which: np.ndarray, kind: int):
    """Fit a shape to partial views of a track: pose, overlap, share in sight. Size and angle are free if unknown."""
    rows, clear, turns = track.rows[which], track.clear, shapes.SYMMETRY[SHAPES[kind]]
    still, view = _in_place(bodies, track), bodies.view(rows)
    vague = still or not clear.any()
    turned = bool(turns) and vague
    size = np.median(np.log(track.size[clear])) if clear.any() else np.log(0.15)
    start = np.stack([bodies.x[rows], bodies.y[rows], np.full(len(rows), size), np.zeros(len(rows))], 1)
    if clear.any():
        _start(bodies, track, which, start)
        if turns:
            start[:, 3] = np.angle(np.exp(1j * turns * track.angle[clear & np.isfinite(track.angle)]).sum()) / turns
    best = None
    for extra in (0.0, np.pi / turns) if turned else (0.0,):
        found = shapes.fit(view, kind, start + [0, 0, 0, extra], (True, True, vague, turned), bodies.size)
        if best is None:
            best = found
        else:
            better = found[1] > best[1]
            best = tuple(np.where(better[:, None] if a.ndim == 2 else better, a, b) for a, b in zip(found, best))
    return best


def _start(bodies: Bodies, track: Track, which: np.ndarray, start: np.ndarray) -> None:
    """Where to begin a fit: the known place of what stays, else what the sides still in view say."""
    rows, clear = track.rows[which], track.clear
    if _in_place(bodies, track):
        start[:, 0], start[:, 1] = np.median(track.x[clear]), np.median(track.y[clear])
        return
    box, whole = bodies.box[rows], bodies.box[track.rows[clear]]
    for p, (centre, low, high) in enumerate(((track.x, 0, 1), (track.y, 2, 3))):
        before = box[:, low] + np.median(centre[clear] - whole[:, low])
        after = box[:, high] - np.median(whole[:, high] - centre[clear])
        cut = bodies.cut[rows]
        value = np.where(cut[:, low], after, np.where(cut[:, high], before, (before + after) / 2))
        start[:, p] = np.where(cut[:, low] & cut[:, high], start[:, p], value)
