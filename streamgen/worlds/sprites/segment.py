"""From pixels to bodies: who is where in every frame, by colour alone.

A frame is a background (a table colour with a vertical shade and a small offset of its own), plus flat patches. Flat
foreground pixels vote for the colours a frame holds; every pixel then goes to the nearest of the background and these
colours, which puts an edge at half coverage whatever its blur. Two actors never share a colour, so all patches of one
colour in a frame are one body, whole or in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from streamgen.worlds.sprites.language import BACKGROUNDS, COLOURS
from streamgen.worlds.sprites.renderer import GRADIENT

UNKNOWN = len(COLOURS)  # the class of a patch whose colour is in no table
CLASSES = UNKNOWN + 1
FOREGROUND = 40.0  # RGB distance from the background at which a flat pixel may vote for a colour
PLAIN = 90.0  # and one of no known colour: ghosts are fainter
FAINT = 20.0  # and at which a pixel may belong to a body at all
FLAT = 66.0  # sum of absolute differences to a neighbour, above which a pixel lies on an edge
REJECT = 62.0  # distance (with brightness discounted) beyond which a colour has no name
SAME = 45.0  # two observed colours closer than this are one
VOTES, UNKNOWN_VOTES = 8, 40  # flat pixels a colour needs in a frame
SPECK = 10  # pixels
PIECE = 0.08  # share of a body's largest piece, below which another piece is a speck
VIEW = 44  # samples per side of the view a partly hidden body is fitted to
CHUNK = 96  # frames per pass: bounds the memory

_TABLE = np.array(list(COLOURS.values()), np.float32)
_BACK = np.array(list(BACKGROUNDS.values()), np.float32)
_GREY = np.full((3, 3), 1 / 3, np.float32)
_DISCOUNT = np.eye(3, dtype=np.float32) - 0.35 * _GREY  # brightness counts less than hue


@dataclass(frozen=True, slots=True)
class Bodies:
    """Everything seen in a clip, one entry per body and frame, in frame order. Lengths in picture widths."""

    frame: np.ndarray  # [N]
    colour: np.ndarray  # [N] index into COLOURS, or UNKNOWN
    area: np.ndarray  # [N] in pixels, of all its pieces
    pieces: np.ndarray  # [N] pieces worth the name
    x: np.ndarray  # [N] centroid of what is seen
    y: np.ndarray
    box: np.ndarray  # [N, 4] left, right, top, bottom
    cut: np.ndarray  # [N, 4] whether it reaches that side of the picture
    touching: np.ndarray  # [N] whether another body touches (or covers) it
    grid: np.ndarray  # [N, GRID, GRID] its picture around the centroid, scaled to unit area; see `shapes`
    maps: np.ndarray  # [F, S/2, S/2] colour + 1 of every second pixel, 0 = background

    @property
    def size(self) -> int:
        """Pixels per side of the picture."""
        return 2 * self.maps.shape[1]

    @property
    def clear(self) -> np.ndarray:
        """[N] fully in view and apart from every other body."""
        return ~self.touching & ~self.cut.any(1)

    def view(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every second pixel around bodies: where they are seen, where something may hide them (another body, the
        end of the picture), both [len(rows), VIEW, VIEW]; and the first pixel's column and row [len(rows), 2]."""
        size = self.size
        middle = np.stack([self.x[rows], self.y[rows]], 1) * size
        first = np.round((middle - VIEW) / 2).astype(int)
        at = first[:, :, None] + np.arange(VIEW)
        inside = (at >= 0) & (at < size // 2)
        at = np.clip(at, 0, size // 2 - 1)
        maps = self.maps[self.frame[rows][:, None, None], at[:, 1, :, None], at[:, 0, None, :]]
        inside = inside[:, 1, :, None] & inside[:, 0, None, :]
        seen = inside & (maps == (self.colour[rows] + 1)[:, None, None])
        return seen, ~inside | ((maps > 0) & ~seen), 2 * first


GRID, SPAN = 48, 1.8  # samples per side of a normalised picture, and its half-width in radii of a disc of equal area


def name(index: int) -> str | None:
    """The word for a colour class."""
    return None if index == UNKNOWN else list(COLOURS)[index]


def as_pixels(frames: np.ndarray) -> np.ndarray:
    """[F, H, W, 3] in 0…255, float32, from uint8 or floats in [0, 1]."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"frames must be [F, S, S, 3], got {list(frames.shape)}")
    scale = 255.0 if frames.dtype.kind == "f" else 1.0
    return frames.astype(np.float32) * np.float32(scale)


def segment(frames: np.ndarray) -> tuple[Bodies, list[str | None]]:
    """All bodies of a clip, and the name of each frame's background."""
    parts, names = [], []
    for first in range(0, len(frames), CHUNK):
        pixels = as_pixels(frames[first : first + CHUNK])
        back, labels = _background(pixels)
        names += labels
        bodies = _bodies(_classify(pixels, back))
        bodies.frame[:] += first
        parts.append(bodies)
    joined = Bodies(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Bodies)))
    return joined, names


def _background(pixels: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
    """The background of every row [F, H, 3], and its name per frame."""
    size = pixels.shape[1]
    step = max(size // 32, 1)
    shade = 1 + GRADIENT * (1 - 2 * (np.arange(size, dtype=np.float32) + 0.5) / size)
    model = shade[:, None, None] * _BACK  # [H, 5, 3]
    rows = slice(step // 2, None, step)
    few = pixels[:, rows, rows]  # [F, h, w, 3]
    d = few[:, :, :, None] - model[rows][None, :, None]  # [F, h, w, 5, 3]
    near = np.einsum("fhwbc,fhwbc->fhwb", d, d) < 40.0**2
    votes = near.mean((1, 2))  # [F, 5]
    best = votes.argmax(1)
    index = np.arange(len(pixels))
    mask = near[index, :, :, best][..., None]
    offset = (d[index, :, :, best] * mask).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)  # [F, 3]
    back = model[:, best].transpose(1, 0, 2) + offset[:, None]
    labels: list[str | None] = [list(BACKGROUNDS)[b] for b in best]
    for i in np.flatnonzero(votes.max(1) < 0.3):  # no table colour: the median of the rim
        rim = np.concatenate([few[i, 0], few[i, -1], few[i, :, 0], few[i, :, -1]])
        back[i], labels[i] = np.median(rim, 0), None
    return back, labels


def _classify(pixels: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour class + 1 of every pixel (0 = background) [F, H, W], and where the flat, certain ones are."""
    count, size = pixels.shape[:2]
    d = pixels - back[:, :, None]
    far = np.einsum("fhwc,fhwc->fhw", d, d)
    index = np.flatnonzero(far > FAINT**2)
    far = far.reshape(-1)[index]
    flat = pixels.reshape(-1, 3)
    values, frame = flat[index], index // (size * size)
    core = np.flatnonzero(far > FOREGROUND**2)
    core = core[_is_flat(flat, values[core], index[core], size)]
    colour = _nearest(values[core])
    colour[(colour == UNKNOWN) & (far[core] < PLAIN**2)] = CLASSES
    sure = core[colour < CLASSES]
    order, seen = _palette(values[sure], frame[sure] * CLASSES + colour[colour < CLASSES], back)
    closest, owner = far.copy(), np.zeros(len(index), np.uint8)
    for rank in range(order.shape[1]):
        there = order[:, rank] >= 0
        if not there.any():
            break
        rows = np.flatnonzero(there[frame])
        which = order[frame[rows], rank]
        gap = values[rows] - seen[frame[rows], which]
        gap = np.einsum("nc,nc->n", gap, gap)
        win = gap < closest[rows]
        closest[rows[win]], owner[rows[win]] = gap[win], which[win] + 1
    classes = np.zeros(pixels.shape[:3], np.uint8)
    classes.reshape(-1)[index] = owner
    certain = np.zeros(pixels.shape[:3], bool)
    certain.reshape(-1)[index[core]] = True
    return classes, certain


def _is_flat(flat: np.ndarray, values: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Whether a pixel resembles its four neighbours."""
    row, col = (index // size) % size, index % size
    calm = np.ones(len(index), bool)
    for inside, step in ((col > 0, -1), (col < size - 1, 1), (row > 0, -size), (row < size - 1, size)):
        other = flat[index + np.where(inside, step, 0)]
        calm &= np.abs(values - other).sum(1) < FLAT
    return calm


def _nearest(values: np.ndarray) -> np.ndarray:
    """Nearest table colour of every value, UNKNOWN beyond `REJECT`."""
    values, table = values @ _DISCOUNT, _TABLE @ _DISCOUNT
    d = (values**2).sum(1)[:, None] - 2 * values @ table.T + (table**2).sum(1)
    best = d.argmin(1)
    best[d[np.arange(len(d)), best] > REJECT**2] = UNKNOWN
    return best


def _palette(values: np.ndarray, key: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per frame the colours it holds, commonest first (-1 = no more) [F, 4], and their mean values [F, CLASSES, 3]."""
    count = len(back)
    cells = count * CLASSES
    votes = np.bincount(key, minlength=cells).reshape(count, CLASSES)
    seen = np.stack([np.bincount(key, values[:, c], cells) for c in range(3)], 1).reshape(count, CLASSES, 3)
    seen = (seen / np.maximum(votes, 1)[..., None]).astype(np.float32)
    votes[:, :UNKNOWN][votes[:, :UNKNOWN] < VOTES] = 0
    votes[:, UNKNOWN][votes[:, UNKNOWN] < UNKNOWN_VOTES] = 0
    for i in np.flatnonzero((votes > 0).sum(1) > 1):
        strong: list[int] = []
        for c in sorted(np.flatnonzero(votes[i]), key=lambda c, i=i: -votes[i, c]):
            if _is_shade(seen[i], c, strong, votes[i], back[i].mean(0)):
                votes[i, c] = 0
            else:
                strong.append(c)
    order = np.argsort(-votes, axis=1, kind="stable")[:, :4]
    order[np.take_along_axis(votes, order, 1) == 0] = -1
    return order, seen


def _is_shade(seen: np.ndarray, colour: int, strong: list[int], votes: np.ndarray, back: np.ndarray) -> bool:
    """Whether a colour is but a shade of a stronger one, or a blurred edge between two, or one and the background."""
    value, reach = seen[colour], 45.0 if colour == UNKNOWN else 35.0
    if any(np.linalg.norm(value - seen[s]) < SAME for s in strong):
        return True
    others = [c for c in np.flatnonzero(votes) if c != colour] if 2 * votes[colour] < votes.max() else strong
    ends = [(seen[a], seen[b]) for k, a in enumerate(others) for b in others[:k]]
    ends += [(seen[s], back) for s in strong if 2 * votes[colour] < votes[s]]
    for a, b in ends:
        along = np.clip(np.dot(value - b, a - b) / max(np.dot(a - b, a - b), 1.0), 0, 1)
        if np.linalg.norm(value - b - along * (a - b)) < reach:
            return True
    return False


def label(classes: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected patches of one class (8 neighbours): a number from 0 per patch, -1 outside [F, H, W], and their count.

    Works on horizontal runs of the whole clip at once: runs that meet in neighbouring rows are merged by pointer
    jumping, which takes a handful of passes.
    """
    count, height, width = classes.shape
    rows = classes.reshape(-1, width)
    differs = rows[:, 1:] != rows[:, :-1]
    edge = np.ones((len(rows), 1), bool)
    starts = np.flatnonzero(np.concatenate([edge, differs], 1) & (rows > 0))
    ends = np.flatnonzero(np.concatenate([differs, edge], 1) & (rows > 0))
    flat = classes.reshape(-1)
    row = starts // width
    lo = np.searchsorted(ends, np.maximum(starts + width - 1, (row + 1) * width))
    hi = np.searchsorted(starts, np.minimum(ends + width + 1, (row + 2) * width - 1), "right")
    meets = np.where(row % height == height - 1, 0, np.maximum(hi - lo, 0))
    u = np.repeat(np.arange(len(starts)), meets)
    v = np.arange(len(u)) - np.repeat(np.cumsum(meets) - meets, meets) + np.repeat(lo, meets)
    same = flat[starts[u]] == flat[starts[v]]
    root = _union(len(starts), u[same], v[same])
    kinds, number = np.unique(root, return_inverse=True)
    out = np.full(flat.shape, -1, np.int32)
    out[np.flatnonzero(flat)] = np.repeat(number, ends - starts + 1)
    return out.reshape(classes.shape), len(kinds)


def _union(count: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The smallest index reachable from each of `count` items along the edges u-v."""
    root = np.arange(count)
    while len(u):
        a, b = root[u], root[v]
        differ = a != b
        if not differ.any():
            break
        u, v, a, b = u[differ], v[differ], a[differ], b[differ]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while True:
            jumped = root[root]
            if (jumped == root).all():
                break
            root = jumped
    return root


def _bodies(maps: tuple[np.ndarray, np.ndarray]) -> Bodies:
    """Measure the bodies of one chunk."""
    classes, certain = maps
    count, size = classes.shape[:2]
    labels, patches = label(classes)
    index = np.flatnonzero(labels >= 0)
    patch = labels.reshape(-1)[index]
    area = np.bincount(patch, minlength=patches)
    solid = np.bincount(labels[certain & (labels >= 0)], minlength=patches)
    kind = np.zeros(patches, int)  # frame and colour of a patch: the body it is a piece of
    kind[patch] = index // (size * size) * CLASSES + classes.reshape(-1)[index] - 1
    keep = (area >= SPECK) & (solid >= 3)
    touched = _touches(labels, classes, keep, patches)
    largest = np.zeros(count * CLASSES, int)
    np.maximum.at(largest, kind[keep], area[keep])
    keep &= area >= PIECE * largest[kind]
    bodies, piece_of = np.unique(kind[keep], return_inverse=True)
    owner = np.full(patches, -1)
    owner[keep] = piece_of
    pieces = np.bincount(piece_of, minlength=len(bodies))
    touching = np.bincount(piece_of, touched[keep], minlength=len(bodies)) > 0
    main = keep & (area == largest[kind])
    owner[keep & ~main & ~touching[owner]] = -1  # apart from others, a body is measured by its largest piece
    mine = owner[patch] >= 0
    classes[labels >= 0] *= keep[labels[labels >= 0]]
    found = _measure(labels, index[mine], owner, owner[patch[mine]], bodies, pieces, touching)
    return Bodies(*found, classes[:, ::2, ::2].copy())


def _touches(labels: np.ndarray, classes: np.ndarray, keep: np.ndarray, patches: int) -> np.ndarray:
    """Whether each patch has a patch of another colour within three pixels."""
    touched = np.zeros(patches, bool)
    several = np.flatnonzero([len(np.unique(c)) > 2 for c in classes])
    labels, classes = labels[several], classes[several]
    for step in (1, 2, 3):
        for a, b in (
            (np.s_[:, :, :-step], np.s_[:, :, step:]),
            (np.s_[:, :-step], np.s_[:, step:]),
            (np.s_[:, :-step, :-step], np.s_[:, step:, step:]),
            (np.s_[:, step:, :-step], np.s_[:, :-step, step:]),
        ):
            other = (classes[a] != classes[b]) & (classes[a] > 0) & (classes[b] > 0)
            one, two = labels[a][other], labels[b][other]
            both = keep[one] & keep[two]
            touched[one[both]] = True
            touched[two[both]] = True
    return touched


def _measure(labels, index, owner, body, bodies, pieces, touching) -> tuple:
    """Area, centroid, box and normalised picture of every body from its pixels."""
    size, n = labels.shape[1], len(bodies)
    row, col = (index // size) % size, index % size
    area = np.bincount(body, minlength=n)
    x = (np.bincount(body, col, n) / area + 0.5) / size
    y = (np.bincount(body, row, n) / area + 0.5) / size
    box = np.empty((n, 4), int)
    box[:, (0, 2)], box[:, (1, 3)] = size, -1
    for values, low, high in ((col, 0, 1), (row, 2, 3)):
        np.minimum.at(box[:, low], body, values)
        np.maximum.at(box[:, high], body, values)
    cut = np.stack([box[:, 0] < 1, box[:, 1] > size - 2, box[:, 2] < 1, box[:, 3] > size - 2], 1)
    frame = bodies // CLASSES
    edges = (box + np.array([0, 1, 0, 1])) / size
    grid = _normalised(labels, owner, frame, x * size, y * size, np.sqrt(area / np.pi))
    return frame, bodies % CLASSES, area, pieces, x, y, edges, cut, touching, grid


def _normalised(labels, owner, frame, x, y, radius) -> np.ndarray:
    """[N, GRID, GRID] masks around the centroids, in units of the radius of a disc of the same area."""
    size, n = labels.shape[1], len(frame)
    axis = (np.arange(GRID) + 0.5) / GRID * 2 * SPAN - SPAN
    col = np.floor(x[:, None] + radius[:, None] * axis).astype(int)
    row = np.floor(y[:, None] + radius[:, None] * axis).astype(int)
    inside = ((row >= 0) & (row < size))[:, :, None] & ((col >= 0) & (col < size))[:, None, :]
    patch = labels[frame[:, None, None], np.clip(row, 0, size - 1)[:, :, None], np.clip(col, 0, size - 1)[:, None]]
    mine = np.append(owner, -1)[patch] == np.arange(n)[:, None, None]
    return mine & inside
