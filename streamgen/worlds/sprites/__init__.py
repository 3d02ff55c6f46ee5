"""sprites: a procedural world with a language, a memory and an exact oracle.

128×128 pixels, 16 fps, one or two actors on a background. What a prompt does not say (and never size, speed, phase or
turning sense) must be remembered, so that sinks, banks and anchors can be told apart.

    frames = render("a red circle bouncing on a navy background", num_frames=81, seed=0)
    reading = read(frames)          # reading.colour == "red", reading.motion == "bouncing", …
"""

from streamgen.worlds.sprites.dataset import Clip, SpritesDataset
from streamgen.worlds.sprites.language import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Actor,
    Change,
    Scene,
    Timeline,
    describe,
    parse,
    sample_scene,
    split,
)
from streamgen.worlds.sprites.oracle import Reading, read
from streamgen.worlds.sprites.renderer import FPS, SIZE, Drive, render

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FPS",
    "MOTIONS",
    "SHAPES",
    "SIZE",
    "Actor",
    "Change",
    "Clip",
    "Drive",
    "Reading",
    "Scene",
    "SpritesDataset",
    "Timeline",
    "describe",
    "parse",
    "read",
    "render",
    "sample_scene",
    "split",
]
