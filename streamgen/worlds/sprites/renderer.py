"""Vectorised, anti-aliased pictures of sprites scenes: signed distances on a small patch around each body.

    >>> render("a red circle bouncing on a navy background", num_frames=5).shape
    (5, 128, 128, 3)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from streamgen.errors import InputError
from streamgen.worlds.sprites.language import BACKGROUNDS, COLOURS, Actor, Change, Scene, Timeline, complete, parse
from streamgen.worlds.sprites.motion import REACH, Hidden, Pose, track

SIZE = 128  # pixels per side
FPS = 16
GRADIENT = 0.12
RING_HOLE, CROSS_ARM, STAR_WAIST, SQUARE_SIDE = 0.55, 0.36, 0.42, 0.9  # proportions, in half-widths


@dataclass(frozen=True, slots=True)
class Body:
    """One actor over a run of frames: what it looks like and where it is. Arrays are [F]."""

    first: int  # frame the run begins at
    colour: str
    shape: str
    size: float
    pose: Pose


@dataclass(frozen=True, slots=True)
class Script:
    """A scene played out: who is where in every frame (the truth an oracle is measured against)."""

    bodies: tuple[tuple[Body, ...], ...]  # per actor, its runs in time
    backgrounds: tuple[tuple[int, str], ...]  # (first frame, name)
    scenes: tuple[Change, ...]  # complete scenes, nothing left open


def _turn(x, y, angle):
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def distance(shape: str, x: np.ndarray, y: np.ndarray, size) -> np.ndarray:
    """Signed distance to a shape of half-width `size` at the origin, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - size
    if shape == "ring":
        middle, half = (1 + RING_HOLE) / 2, (1 - RING_HOLE) / 2
        return np.abs(np.hypot(x, y) - middle * size) - half * size
    x, y = np.abs(x), y
    if shape == "square":
        return np.maximum(x, np.abs(y)) - SQUARE_SIDE * size
    if shape == "cross":
        y, arm = np.abs(y), CROSS_ARM * size
        return np.minimum(np.maximum(x - size, y - arm), np.maximum(x - arm, y - size))
    if shape == "triangle":
        corner = REACH["triangle"] * size
        return np.maximum(y, np.sqrt(0.75) * x - 0.5 * y) - corner / 2
    # star: fold the plane into one tenth, where the outline is one straight edge from a tip to a waist
    sector = 2 * np.pi / 5
    theta = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    r = np.hypot(x, y)
    tip = REACH["star"] * size
    waist = STAR_WAIST * tip
    ex, ey = waist * np.cos(sector / 2) - tip, waist * np.sin(sector / 2)
    px, py = r * np.cos(theta) - tip, r * np.sin(theta)
    return (ex * py - ey * px) / np.hypot(ex, ey) * -1


def _paint(frames: np.ndarray, body: Body, first: int, size: int) -> None:
    """Blend one run of a body into float frames [F, size, size, 3], which begin at frame `first`, in place."""
    start, stop = max(body.first, first), min(body.first + len(body.pose.x), first + len(frames))
    if start >= stop:
        return
    count, offset = stop - start, start - first
    part = slice(start - body.first, stop - body.first)
    x, y, scale, angle = (np.asarray(v[part], np.float32) for v in _arrays(body.pose))
    half = int(np.ceil(body.size * REACH[body.shape] * np.sqrt(2) * float(scale.max()) * size)) + 2
    left, top = np.floor(x * size).astype(int) - half, np.floor(y * size).astype(int) - half
    grid = (np.arange(2 * half, dtype=np.float32) + 0.5) / size
    gx = (left / size - x)[:, None, None].astype(np.float32) + grid[None, None, :]
    gy = (top / size - y)[:, None, None].astype(np.float32) + grid[None, :, None]
    gx, gy = np.broadcast_arrays(gx, gy)
    if body.shape not in ("circle", "ring") and np.any(angle):
        gx, gy = _turn(gx, gy, angle[:, None, None])
    d = distance(body.shape, gx, gy, body.size * scale[:, None, None])
    cover = np.clip(0.5 - d * size, 0, 1)[..., None]
    rgb = np.asarray(COLOURS[body.colour], np.float32)
    for i in range(count):
        x0, y0 = max(left[i], 0), max(top[i], 0)
        x1, y1 = min(left[i] + 2 * half, size), min(top[i] + 2 * half, size)
        if x0 >= x1 or y0 >= y1:
            continue
        c = cover[i, y0 - top[i] : y1 - top[i], x0 - left[i] : x1 - left[i]]
        patch = frames[offset + i, y0:y1, x0:x1]
        patch += c * (rgb - patch)


def _arrays(pose: Pose):
    return pose.x, pose.y, pose.scale, pose.angle


@dataclass(frozen=True, slots=True, eq=False)
class Drive:
    """Steers one actor from outside: `path` [F, 2] centres (x, y) in picture widths, `envelope` [F] scales."""

    path: np.ndarray | None = None
    envelope: np.ndarray | None = None


@dataclass(slots=True)
class _Life:
    """One actor while a scene plays: its hidden state, and when and where its present motion began."""

    hidden: Hidden
    began: int
    start: Pose | None = None
    last: Pose | None = None

    def move(self, actor: Actor, begin: int, stop: int) -> Pose | None:
        """Its pose over frames [begin, stop); None if that is empty."""
        t = np.arange(begin - self.began, stop - self.began) / FPS
        if not len(t):
            return None
        pose = track(self.hidden, actor.motion, actor.shape, t, self.start)
        self.last = pose.at(-1)
        return pose


def play(
    scene: str | Scene | Timeline, num_frames: int, seed: int = 0, drives: Mapping[int, Drive] | None = None
) -> Script:
    """Play a prompt, scene or timeline out: draw the hidden state from `seed` and follow every body.

    Args:
        drives: actor index -> an explicit path or envelope in place of its motion's own.
    Raises: InputError when the prompt is outside the language or num_frames is not positive.
    """
    if num_frames < 1:
        raise InputError(f"num_frames must be positive, got {num_frames}")
    timeline = _timeline(scene)
    runs: dict[tuple[int, int], list[Body]] = {}
    lives: list[_Life] = []
    full: Scene | None = None
    cuts, backgrounds, scenes = 0, [], []
    stops = [*(c.frame for c in timeline.changes[1:]), num_frames]
    for change, stop in zip(timeline.changes, stops, strict=True):
        if change.cut or full is None:
            cuts, lives, full = cuts + 1, [], None
        new = complete(_keep(change.scene, full), np.random.default_rng([seed, 7, cuts]))
        for index, actor in enumerate(new.actors):
            if index >= len(lives):
                lives.append(_Life(Hidden.draw(np.random.default_rng([seed, cuts, index])), change.frame))
            elif full is None or index >= len(full.actors) or actor.motion != full.actors[index].motion:
                lives[index] = _Life(lives[index].hidden, change.frame, lives[index].last)
            pose = lives[index].move(actor, change.frame, min(stop, num_frames))
            if pose is not None:
                pose = _driven(pose, (drives or {}).get(index), change.frame)
                body = Body(change.frame, actor.colour, actor.shape, lives[index].hidden.size, pose)
                runs.setdefault((cuts, index), []).append(body)
        full = new
        scenes.append(Change(change.frame, new, change.cut))
        backgrounds.append((change.frame, new.background))
    return Script(tuple(map(tuple, runs.values())), tuple(backgrounds), tuple(scenes))


def _driven(pose: Pose, drive: Drive | None, first: int) -> Pose:
    """A pose that begins at frame `first`, with what a drive dictates."""
    if drive is None:
        return pose
    part = slice(first, first + len(pose.x))
    x, y = (pose.x, pose.y) if drive.path is None else np.asarray(drive.path, float)[part].T
    scale = pose.scale if drive.envelope is None else np.asarray(drive.envelope, float)[part]
    if len(x) != len(pose.x) or len(scale) != len(pose.x):
        raise InputError(f"a drive must cover every frame: {first + len(pose.x)} are drawn")
    return Pose(x, y, scale, pose.angle)


def _timeline(scene: str | Scene | Timeline) -> Timeline:
    if isinstance(scene, Timeline):
        return scene
    return Timeline((Change(0, parse(scene) if isinstance(scene, str) else scene),))


def _keep(scene: Scene, before: Scene | None) -> Scene:
    """What a later prompt leaves open stays what it was."""
    if before is None:
        return scene
    actors = []
    for index, actor in enumerate(scene.actors):
        old = before.actors[index] if index < len(before.actors) else None
        if old:
            shape = actor.shape or old.shape
            motion = actor.motion or old.motion
            actor = replace(actor, colour=actor.colour or old.colour, shape=shape, motion=motion)
        actors.append(actor)
    return Scene(tuple(actors), scene.background or before.background)


def draw(script: Script, num_frames: int, first: int = 0, size: int = SIZE) -> np.ndarray:
    """Pictures of a played-out scene from frame `first` on, uint8 [F, size, size, 3]."""
    frames = np.empty((num_frames, size, size, 3), np.float32)
    shade = 1 + GRADIENT * (1 - 2 * (np.arange(size, dtype=np.float32) + 0.5) / size)
    for begin, name in script.backgrounds:
        rgb = np.asarray(BACKGROUNDS[name], np.float32)
        frames[max(begin - first, 0) :] = (shade[:, None] * rgb)[None, :, None, :]
    for runs in script.bodies:
        for body in runs:
            _paint(frames, body, first, size)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def render(
    scene: str | Scene | Timeline, num_frames: int = 81, seed: int = 0, drives: Mapping[int, Drive] | None = None
) -> np.ndarray:
    """The world's own video of a prompt, scene or timeline: uint8 [F, 128, 128, 3] at 16 fps; see `play`."""
    return draw(play(scene, num_frames, seed, drives), num_frames)
