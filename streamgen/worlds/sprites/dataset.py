"""The sprites world as a torch dataset: any number of clips, each a pure function of (seed, index)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from streamgen.config import check_choice
from streamgen.worlds.sprites.language import Change, Scene, Timeline, change_scene, describe, sample_scene, split
from streamgen.worlds.sprites.renderer import draw, play


@dataclass(frozen=True, eq=False)
class Clip:
    """`frames` uint8 [F, 128, 128, 3]; `scenes` are complete, nothing left open; `prompts[i]` says `scenes[i]`."""

    frames: np.ndarray
    scenes: tuple[Change, ...]

    @property
    def prompts(self) -> list[str]:
        return [describe(change.scene) for change in self.scenes]


def chunk_start(chunk: int, chunk_frames: int, ratio: int = 4) -> int:
    """First pixel frame of a chunk of `chunk_frames` latents: 0, then ratio·c·k - (ratio - 1)."""
    return max(0, ratio * chunk_frames * chunk - (ratio - 1))


def change_within(scene: Scene, rng: np.random.Generator, side: str) -> tuple[Scene, bool]:
    """`change_scene` that stays on one side of the split: (the new scene, whether it is a cut)."""
    new, cut = change_scene(scene, rng)
    while split(new) != side:
        new, cut = change_scene(scene, rng)
    return new, cut


def sample_timeline(
    rng: np.random.Generator, chunks: int, chunk_frames: int, side: str = "train", changes: float = 0.3
) -> Timeline:
    """A scene; with probability `changes` one attribute, actor or everything changes at a chunk boundary."""
    scene = sample_scene(rng, side)
    parts = [Change(0, scene)]
    if chunks > 1 and rng.random() < changes:
        new, cut = change_within(scene, rng, side)
        parts.append(Change(chunk_start(int(rng.integers(1, chunks)), chunk_frames), new, cut))
    return Timeline(tuple(parts))


class SpritesDataset(Dataset):
    """Clips of `chunks` chunks from one side of the split; about 30 % hold a change.

    Args:
        length: clips; index i gives the same clip whatever the length.
        chunks, chunk_frames: of latents; a clip has 4·chunks·chunk_frames - 3 pixel frames.
        side: train | val | test.
    """

    def __init__(
        self, length: int, chunks: int = 7, chunk_frames: int = 3, side: str = "train", seed: int = 0
    ) -> None:
        check_choice("side", side, ("train", "val", "test"))
        self.length, self.chunks, self.chunk_frames, self.side, self.seed = length, chunks, chunk_frames, side, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, 11, index])
        timeline = sample_timeline(rng, self.chunks, self.chunk_frames, self.side)
        frames = chunk_start(self.chunks, self.chunk_frames)
        script = play(timeline, frames, seed=int(rng.integers(2**31)))
        return Clip(draw(script, frames), script.scenes)
