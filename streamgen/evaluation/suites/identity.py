"""`identity`: what the prompt does not say the model chooses; does it keep its choice, also while nobody can see it.

Every third case leaves the picture at one side and comes back at the other. A stream that starts over, or whose cache
is emptied, redraws from the text alone and fails.
"""

from __future__ import annotations

import numpy as np

from streamgen.evaluation.suites.base import BIN, Case, Judge, Options, Pieces, Suite, Values, mean, seeds
from streamgen.evaluation.suites.readings import SIZE_ALIKE, SPEED_ALIKE, close_to, same_actor, visible
from streamgen.evaluation.suites.scenes import underspecified
from streamgen.worlds.sprites.language import Actor, Change, Scene, Timeline, omit, sample_scene, split
from streamgen.worlds.sprites.oracle import Reading, read
from streamgen.worlds.sprites.renderer import FPS

AWAY = ((0.75, "0.5"), (1.5, "1"), (3.0, "2"), (float("inf"), "4"))  # seconds out of sight at most, and their name
SHORTEST = 4  # frames that count as away
SEEN = 64  # frames of an appearance that are read
ENOUGH = 24  # and how many there have to be, at the end of the video
KEPT = ("colour", "shape", "motion", "background", "size", "speed")


def leaving(count: int, side: str, rng: np.random.Generator) -> list[Scene]:
    """Scenes of one actor that moves through the picture, and leave its colour, its shape or the background open."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = omit(sample_scene(rng, "train", 0.0), rng)
        motion = scene.actors[0].motion
        if motion and motion.startswith("moving") and split(scene) == side:
            scenes.append(scene)
    return scenes


def identity_cases(options: Options, num_frames: int) -> list[Case]:
    rng, seed = seeds(options, 3)
    away = leaving(options.prompts // 3, options.split, rng)
    stay = underspecified(options.prompts - len(away), options.split, options.seed + 1)
    cases = []
    for i in range(options.prompts):
        goes = i % 3 == 2
        scene = (away if goes else stay).pop(0)
        cases.append(Case(Timeline((Change(0, scene),)), num_frames, seed(i), "leaving" if goes else "open"))
    return cases


class Absences:
    """Compares what comes back into the picture with what left it."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []  # of this appearance
        self.before: Reading | None = None  # the appearance before
        self.hidden = 0  # frames since anything was seen
        self.away = 0  # frames between the two
        self.returns: dict[str, list[float]] = {name: [] for _, name in AWAY}

    def take(self, frames: np.ndarray) -> None:
        for frame, there in zip(frames, visible(frames)):
            if not there:
                self.hidden += 1
                continue
            if self.hidden >= SHORTEST and self.seen:
                self._finish()
                self.away = self.hidden
            self.hidden = 0
            if len(self.seen) < SEEN:
                self.seen.append(frame.copy())

    def _finish(self) -> None:
        now = read(np.stack(self.seen), actors=1)
        if self.before is not None and self.before.actors:
            name = next(name for most, name in AWAY if self.away / FPS < most)
            same = bool(now.actors) and same_actor(self.before.actors[0], now.actors[0])
            self.returns[name].append(float(same))
        self.before, self.seen = now, []

    def close(self) -> Values:
        if len(self.seen) >= ENOUGH:
            self._finish()
        found = {f"returns@{name}": mean(values) for name, values in self.returns.items()}
        return {"returns": mean([v for values in self.returns.values() for v in values]), **found}


class IdentityJudge(Judge):
    """Compares every bin with the first."""

    def __init__(self, case: Case) -> None:
        self.pieces, self.absences = Pieces(BIN), Absences()
        self.chosen: Reading | None = None
        self.bins: list[dict[str, bool | None]] = []

    def take(self, frames: np.ndarray) -> None:
        self.absences.take(frames)
        for piece in self.pieces.take(frames):
            self._read(piece)

    def _read(self, piece: np.ndarray) -> None:
        now = read(piece, actors=1)
        if self.chosen is None:
            self.chosen = now
        else:
            self.bins.append({**_agrees(self.chosen, now), "identity": now.identity_changes == 0})

    def close(self) -> Values:
        for piece in self.pieces.rest():
            self._read(piece)
        out: Values = {}
        for name in (*KEPT, "identity"):  # within a bin, where a vote over its frames hides it
            out[f"kept_{name}"] = mean([values[name] for values in self.bins])
        whole = [float(_same(values)) for values in self.bins]
        out["kept"] = mean(whole)
        out["kept_to_the_end"] = whole[-1] if whole else None
        out |= {f"kept@{(i + 1) * BIN // FPS}": value for i, value in enumerate(whole)}
        return {**out, **self.absences.close()}


def _agrees(chosen: Reading, now: Reading) -> dict[str, bool | None]:
    """Per attribute whether a bin shows what was chosen; None where the choice could not be read."""
    out: dict[str, bool | None] = {}
    for name in ("colour", "shape", "motion", "background"):
        was = getattr(chosen, name)
        out[name] = None if was is None else was == getattr(now, name)
    out["size"] = close_to(chosen.size, now.size, SIZE_ALIKE)
    out["speed"] = close_to(chosen.speed, now.speed, SPEED_ALIKE)
    return out


def _same(found: dict[str, bool | None]) -> bool:
    """Whether nothing is known to differ; the colour has to be known."""
    return found["colour"] is True and False not in found.values()


def identity(seconds: int = 60) -> Suite:
    return Suite(
        "identity" if seconds == 60 else f"identity-{seconds}",
        f"{seconds} s of a prompt that leaves something open: kept = the share of 5 s bins whose colour, shape, "
        "motion, background, size and speed are those of the first bin, throughout; returns@S = the share of returns "
        "after about S seconds out of sight with the same colour, shape and size",
        ("kept", "kept_to_the_end", "kept_colour", "kept_shape", "kept_size", "kept_speed", "returns"),
        lambda options: identity_cases(options, seconds * FPS),
        IdentityJudge,
    )


# ------------------------------------------------------------------------------------------- a scene and back again
def memory_cases(options: Options) -> list[Case]:
    """A scene that leaves something open, another one for five seconds, the first prompt again."""
    rng, seed = seeds(options, 4)
    cases = []
    for i, first in enumerate(underspecified(options.prompts, options.split, options.seed + 2)):
        second = sample_scene(rng, options.split, 0.0)
        while not _apart(first, second):
            second = sample_scene(rng, options.split, 0.0)
        changes = (Change(0, first), Change(BIN, second, cut=True), Change(2 * BIN, first, cut=True))
        cases.append(Case(Timeline(changes), 3 * BIN + 12, seed(i)))
    return cases


def _apart(first: Scene, second: Scene) -> bool:
    """Whether nothing that one names is named by the other."""
    words = lambda scene: {*(getattr(scene.actors[0], n) for n in Actor.__dataclass_fields__), scene.background}
    return not (words(first) & words(second)) - {None}


class MemoryJudge(Judge):
    """Reads the last five seconds of each scene."""

    def __init__(self, case: Case) -> None:
        self.scenes = [change.scene for change in case.timeline.changes]
        self.parts: list[np.ndarray] = []
        self.readings: list[Reading] = []

    def take(self, frames: np.ndarray) -> None:
        self.parts.append(frames)
        while sum(map(len, self.parts[1:])) >= BIN:
            self.parts.pop(0)

    def change(self, index: int) -> None:
        self.readings.append(read(np.concatenate(self.parts)[-BIN:], actors=1))
        self.parts = []

    def close(self) -> Values:
        self.change(len(self.scenes))
        first, between, again = self.readings
        found = _agrees(first, again)
        other = self.scenes[1]
        gone = between.background == other.background and between.colour == other.actors[0].colour
        back = _same(found)
        out: Values = {f"back_{name}": None if v is None else float(v) for name, v in found.items()}
        return {"success": float(gone and back), "back": float(back), "between": float(gone), **out}


def memory() -> Suite:
    return Suite(
        "memory",
        "5 s of a prompt that leaves something open, 5 s of another scene, the first prompt again: back = colour, "
        "shape, motion, background, size and speed are those of the first time; between = the other scene did come; "
        "success = both",
        ("success", "back", "between", "back_colour", "back_shape", "back_background", "back_size"),
        memory_cases,
        MemoryJudge,
    )
