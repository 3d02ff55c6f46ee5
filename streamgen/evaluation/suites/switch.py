"""`switch`: the prompt changes in mid-stream, twice; is the new there, is the old still there, does nothing jump.

A model can follow a prompt by starting over: then the new colour is right, and size, speed or place are another's.
So success is three things at once, and a cut has to fail.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from streamgen.evaluation.suites.base import BIN, Case, Judge, Options, Suite, Values, mean, seeds
from streamgen.evaluation.suites.readings import JUMP, SIZE_ALIKE, SPEED_ALIKE, attributes, close_to, greatest_step
from streamgen.worlds.sprites.language import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    UNTURNABLE,
    Change,
    Scene,
    Timeline,
    sample_scene,
)
from streamgen.worlds.sprites.oracle import first_frame_with, read
from streamgen.worlds.sprites.renderer import FPS

CHANGES = 2
FIXED = 3 * FPS  # of the first change
RANDOM = (2 * FPS, 6 * FPS)
SPACE = BIN + 12  # frames between changes: what is judged, and a chunk until the request is taken up
GROUP = 4  # cases that change at one random time, so that they can share a batch
BEFORE, AROUND = 4 * FPS, (8, 3 * FPS)  # frames that tell what there was; and about the request, which may not jump
LEAST = 24  # frames that have to be left to say that the new holds
SOON = 24  # two chunks of three latent frames


def switch_cases(options: Options) -> list[Case]:
    """One actor that never leaves the picture; half of the cases change at a fixed time, half at a random one."""
    rng, seed = seeds(options, 2)
    cases: list[Case] = []
    first = FIXED
    for i in range(options.prompts):
        fixed = i // GROUP % 2 == 0
        if i % GROUP == 0:
            first = FIXED if fixed else int(rng.integers(*RANDOM))
        scene = sample_scene(rng, options.split, 0.0)
        while scene.actors[0].motion.startswith("moving"):
            scene = sample_scene(rng, options.split, 0.0)
        changes = [Change(0, scene)]
        for k in range(CHANGES):
            scene = changed(scene, ("colour", "background", "shape")[(i + k) % 3], rng)
            changes.append(Change(first + k * SPACE, scene))
        cases.append(Case(Timeline(tuple(changes)), first + CHANGES * SPACE, seed(i), "fixed" if fixed else "random"))
    return cases


def changed(scene: Scene, part: str, rng: np.random.Generator) -> Scene:
    """A scene of one actor with another colour, background or shape; a bouncing one keeps its shape, because the
    world's walls are nearer to a shape that reaches further, and it would jump."""
    (actor,) = scene.actors
    if part == "background":
        others = [word for word in BACKGROUNDS if word != scene.background]
        return replace(scene, background=others[rng.integers(len(others))])
    if part == "shape" and actor.motion != "bouncing":
        barred = (actor.shape, *(UNTURNABLE if actor.motion == "spinning" else ()))
        others = [word for word in SHAPES if word not in barred]
        return replace(scene, actors=(replace(actor, shape=others[rng.integers(len(others))]),))
    others = [word for word in COLOURS if word != actor.colour]
    return replace(scene, actors=(replace(actor, colour=others[rng.integers(len(others))]),))


def part_changed(old: Scene, new: Scene) -> str:
    """The attribute in which two scenes of one actor differ."""
    parts = [name for name in ("colour", "shape") if getattr(old.actors[0], name) != getattr(new.actors[0], name)]
    return parts[0] if parts else "background"


class SwitchJudge(Judge):
    """Keeps the seconds about the latest change."""

    def __init__(self, case: Case) -> None:
        self.scenes = [change.scene for change in case.timeline.changes]
        self.index = 0
        self.parts: list[np.ndarray] = []
        self.before: np.ndarray | None = None
        self.found: list[Values] = []

    def take(self, frames: np.ndarray) -> None:
        self.parts.append(frames)
        while sum(map(len, self.parts[1:])) >= 2 * SPACE:  # never reached between two changes
            self.parts.pop(0)

    def change(self, index: int) -> None:
        self._judge()
        self.before, self.parts, self.index = np.concatenate(self.parts)[-BEFORE:], [], index

    def _judge(self) -> None:
        after = np.concatenate(self.parts)
        if self.before is None:
            self.found.append({"all_right": attributes(read(after, actors=1), self.scenes[0])["all_right"]})
        else:
            pair = self.scenes[self.index - 1], self.scenes[self.index]
            self.found.append(judge_switch(self.before, after[:BIN], *pair))

    def close(self) -> Values:
        self._judge()
        first, *switches = self.found
        out: Values = {"all_right@0": first["all_right"]}
        for name in ("success", "new", "kept", "steady", "all_right", "frames_until", "new_colour", "new_background",
                     "new_shape", "new_colour_soon"):  # fmt: skip
            out[name] = mean([values[name] for values in switches])
        for k, values in enumerate(switches, 1):
            out |= {f"{name}@{k}": values[name] for name in ("success", "all_right")}
        return out


def judge_switch(before: np.ndarray, after: np.ndarray, old: Scene, new: Scene) -> Values:
    """One change, from the frames before and after the request: three numbers, and whether all hold.

    new: the new word is seen, and holds to the end. kept: all other words are right, and size and speed are what they
    were. steady: from one frame to the next the actor goes no further than `JUMP`.
    """
    part = part_changed(old, new)
    word = new.background if part == "background" else getattr(new.actors[0], part)
    until = first_frame_with(after, **{part: word})
    late = until is None or len(after) - until < LEAST
    was, now = read(before, actors=1), read(after if late else after[until:], actors=1)
    right = attributes(now, new)
    arrived = not late and right[part] == 1
    around = np.concatenate([before[-AROUND[0] :], after[: AROUND[1]]])
    values: Values = {
        "new": float(arrived),
        "kept": float(_kept(was, now, right, part)),
        "steady": float(greatest_step(around) < JUMP),
        "all_right": right["all_right"],
        "frames_until": float(until) if arrived else None,
    }
    values["success"] = float(values["new"] == values["kept"] == values["steady"] == 1)
    for name in ("colour", "background", "shape"):
        values[f"new_{name}"] = values["new"] if name == part else None
    values["new_colour_soon"] = None if part != "colour" else float(arrived and until < SOON)
    return values


def _kept(was, now, right: Values, part: str) -> bool:
    """Whether the words that were not changed are right, and size and speed the same as far as they are known."""
    words = all(right[name] == 1 for name in ("colour", "shape", "motion", "background") if name != part)
    same_size = close_to(was.size, now.size, SIZE_ALIKE) is not False
    return bool(now.actors) and words and same_size and close_to(was.speed, now.speed, SPEED_ALIKE) is not False


def switch() -> Suite:
    return Suite(
        "switch",
        "the prompt changes twice, at fixed and at random times: new = the new word holds within 5 s; kept = the "
        "others are right, size and speed are what they were; steady = the actor does not jump; success = all three; "
        "NAME@k = after k changes; frames_until = frames from the request until the new word holds",
        ("success", "new", "kept", "steady", "frames_until", "new_colour_soon", "all_right@2"),
        switch_cases,
        SwitchJudge,
    )
