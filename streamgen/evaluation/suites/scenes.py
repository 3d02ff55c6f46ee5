"""What is asked of a model: scenes of one side of the split, drawn from a seed."""

from __future__ import annotations

import numpy as np

from streamgen.worlds.sprites.language import Scene, omit, sample_scene, split

ATTRIBUTES = ("colour", "background", "shape", "motion", "whole", "present", "all_right")


TWO_OF = (2, 5, 9)  # of every ten scenes these have two actors, so that few scenes are as mixed as many


def specified(count: int, side: str = "val", seed: int = 1) -> list[Scene]:
    """Scenes that leave nothing open, 30 % of them with two actors."""
    rng = np.random.default_rng([seed, 1])
    return [sample_scene(rng, side, float(i % 10 in TWO_OF)) for i in range(count)]


def underspecified(count: int, side: str = "val", seed: int = 1) -> list[Scene]:
    """Scenes that leave something open: the model chooses, and must keep its choice."""
    rng = np.random.default_rng([seed, 2])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = omit(sample_scene(rng, "train", 0.0), rng)
        if split(scene) == side:
            scenes.append(scene)
    return scenes
