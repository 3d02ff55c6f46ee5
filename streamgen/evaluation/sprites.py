"""How well a model does what its prompts say, by the sprites world's own oracle.

    suite = specified(64)                      # prompts of the "val" side of the split
    report = measure(generate(pipe, suite.prompts, 81), suite)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from streamgen.worlds.sprites.language import (
    COLOURS,
    Actor,
    Scene,
    describe,
    omit,
    sample_scene,
    split,
)
from streamgen.worlds.sprites.oracle import first_frame_with, read, score
from streamgen.worlds.sprites.renderer import FPS

ATTRIBUTES = ("colour", "background", "shape", "motion", "whole", "present", "all_right")


@dataclass(frozen=True)
class Suite:
    """Prompts and the scenes they name."""

    name: str
    scenes: tuple[Scene, ...]

    @property
    def prompts(self) -> list[str]:
        return [describe(scene) for scene in self.scenes]


def specified(count: int, side: str = "val", seed: int = 1, two_actors: float = 0.3) -> Suite:
    """Fully specified prompts of one side of the split."""
    rng = np.random.default_rng([seed, 1])
    return Suite("specified", tuple(sample_scene(rng, side, two_actors) for _ in range(count)))


def underspecified(count: int, side: str = "val", seed: int = 1) -> Suite:
    """Prompts that leave something open: the model chooses, and must keep its choice."""
    rng = np.random.default_rng([seed, 2])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = omit(sample_scene(rng, "train", 0.0), rng)
        if split(scene) == side:
            scenes.append(scene)
    return Suite("underspecified", tuple(scenes))


def colour_switches(count: int, side: str = "val", seed: int = 1) -> tuple[Suite, Suite]:
    """Two suites: scenes whose actor never leaves the picture, and the same scenes in another colour."""
    rng = np.random.default_rng([seed, 3])
    before: list[Scene] = []
    while len(before) < count:
        scene = sample_scene(rng, side, 0.0)
        if not scene.actors[0].motion.startswith("moving"):
            before.append(scene)
    after = []
    for scene in before:
        (actor,) = scene.actors
        others = [c for c in COLOURS if c != actor.colour]
        new = Actor(others[rng.integers(len(others))], actor.shape, actor.motion)
        after.append(Scene((new,), scene.background))
    return Suite("switch-before", tuple(before)), Suite("switch-after", tuple(after))


def generate(
    pipe, prompts: list[str], num_frames: int, seed: int = 0, batch: int = 8, **options
) -> Iterator[np.ndarray]:
    """Clips uint8 [F, H, W, 3], streamed causally in batches."""
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        with pipe.stream(part, num_frames=num_frames, seed=seed + first, **options) as stream:
            yield from np.concatenate([chunk.frames for chunk in stream], 1)


def measure(clips, suite: Suite, keep: Callable[[np.ndarray], None] | None = None) -> dict[str, float]:
    """Mean of every attribute over the clips of a suite (None where a prompt names it nowhere)."""
    found: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    changes, seconds = 0, 0.0
    for clip, scene in zip(clips, suite.scenes, strict=True):
        reading = read(clip, actors=len(scene.actors))
        for name, value in score(reading, scene).items():
            if value is not None and name in found:
                found[name].append(float(value))
        changes += reading.identity_changes
        seconds += len(clip) / FPS
        if keep:
            keep(clip)
    report = {name: round(float(np.mean(values)), 4) for name, values in found.items() if values}
    return {**report, "identity_changes_per_minute": round(60 * changes / seconds, 3), "n": len(suite.scenes)}


def measure_switch(pipe, count: int, seed: int = 0, at_chunk: int = 3, chunks: int = 8, **options) -> dict[str, float]:
    """A colour change in mid-stream: how often it arrives within two chunks, how late, and what else stays right."""
    before, after = colour_switches(count)
    arrived, delays, kept = 0, [], []
    for index, (old, new) in enumerate(zip(before.prompts, after.prompts, strict=True)):
        with pipe.stream(old, seed=seed + index, **options) as stream:
            first = [stream.next().frames for _ in range(at_chunk)]
            stream.set_prompt(new)
            rest = np.concatenate([stream.next().frames for _ in range(chunks - at_chunk)])
        wanted = after.scenes[index]
        frame = first_frame_with(rest, colour=wanted.actors[0].colour)
        if frame is not None and frame < 2 * len(first[-1]):
            arrived += 1
            delays.append(frame / FPS)
        result = score(read(rest, actors=1), wanted)
        kept.append(float(np.mean([float(result[k]) for k in ("shape", "motion", "background")])))
    return {
        "arrived": arrived / count,
        "delay_seconds": round(float(np.mean(delays)), 3) if delays else float("nan"),
        "rest_right": round(float(np.mean(kept)), 4),
        "n": count,
    }
