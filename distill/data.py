"""Training data of the sprites world: clips rendered and encoded once, prompts drawn anew at every step.

A latent clip keeps the complete scenes it shows and the chunk each begins at; a step then says them in other words,
leaves attributes open, or says nothing. Only the "train" side of `split` is ever drawn.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor
from tqdm import tqdm

from streamgen.errors import InputError
from streamgen.models.vae import StreamingVAE
from streamgen.worlds.sprites.dataset import SpritesDataset, chunk_start
from streamgen.worlds.sprites.language import (
    ANY_SHAPE,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    PARAPHRASES,
    SHAPES,
    Actor,
    Scene,
    describe,
    omit,
    split,
)

log = logging.getLogger(__name__)

SHARD = 100  # clips per unit of work


def vocabulary() -> list[str]:
    """Every word a prompt of the world can hold, as the tokenizer splits them."""
    phrases = [*COLOURS, *BACKGROUNDS, *SHAPES, *MOTIONS, ANY_SHAPE, "a an and on against over background backdrop"]
    phrases += [other for others in PARAPHRASES.values() for other in others] + ["- . , !"]
    return sorted({word for phrase in phrases for word in phrase.replace("-", " - ").split()})


def to_pixels(clips: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] -> [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@dataclass(frozen=True)
class ClipSpec:
    """What a set of latent clips is made from."""

    codec: str
    clips: int = 4800
    chunks: int = 9
    chunk_frames: int = 3
    seed: int = 0

    @property
    def file_name(self) -> str:
        """Another for every other content: the codec goes in by its weights."""
        weights = b"".join(path.read_bytes() for path in sorted(Path(self.codec).glob("*.safetensors")))
        codec = hashlib.sha256(weights).hexdigest()[:8]
        return f"{self.clips}x{self.chunks}x{self.chunk_frames}-seed{self.seed}-{codec}.safetensors"


def _encode_shard(spec: ClipSpec, shard: int) -> tuple[Tensor, list]:
    torch.set_num_threads(1)
    codec = StreamingVAE.from_pretrained(spec.codec)
    world = SpritesDataset(spec.clips, spec.chunks, spec.chunk_frames, "train", spec.seed)
    latents, scenes = [], []
    for index in range(shard * SHARD, min(spec.clips, (shard + 1) * SHARD)):
        clip = world[index]
        pixels = to_pixels(clip.frames[None])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents.append(codec.encode(pixels)[0][0].half())
        scenes.append([[c.frame, c.cut, asdict(c.scene)] for c in clip.scenes])
    return torch.stack(latents), scenes


def build_clips(spec: ClipSpec, path: Path, workers: int = 2) -> None:
    """Render and encode a set of clips; the file appears when it is whole."""
    shards = range(-(-spec.clips // SHARD))
    latents, scenes = [], []
    with ProcessPoolExecutor(workers) as pool:
        for part, told in tqdm(pool.map(partial(_encode_shard, spec), shards), total=len(shards), desc="clips"):
            latents.append(part)
            scenes += told
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({"latents": torch.cat(latents)}, temporary, metadata={"scenes": json.dumps(scenes)})
    os.replace(temporary, path)


def _scene(record: dict) -> Scene:
    return Scene(tuple(Actor(**a) for a in record["actors"]), record["background"])


class LatentClips:
    """Latent clips in memory with their scenes: latents float16 [N, C, F, h, w]."""

    def __init__(
        self, latents: Tensor, scenes: list[list[tuple[int, Scene]]], chunk_frames: int,
        favour: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """`scenes`: per clip, each scene with the pixel frame it begins at. `favour` as in `odds_of`."""
        self.latents, self.chunks = latents, latents.shape[2] // chunk_frames
        starts = {chunk_start(k, chunk_frames): k for k in range(self.chunks)}
        self.scenes = [[(starts[frame], scene) for frame, scene in clip] for clip in scenes]
        self.odds = odds_of(self.scenes, favour) if favour else None

    @classmethod
    def load(cls, path: Path, chunk_frames: int, favour: Mapping[str, float] | None = None) -> LatentClips:
        with safe_open(path, "pt") as file:
            latents, told = file.get_tensor("latents"), json.loads(file.metadata()["scenes"])
        scenes = [[(frame, _scene(scene)) for frame, _, scene in clip] for clip in told]
        return cls(latents, scenes, chunk_frames, favour)

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, rng: np.random.Generator) -> int:
        """A clip's index."""
        return int(rng.integers(len(self)) if self.odds is None else rng.choice(len(self), p=self.odds))


def check_favoured(favour: Mapping[str, float]) -> None:
    """Raises InputError for what is no motion or shape, or would never be drawn."""
    for word, times in favour.items():
        if word not in (*MOTIONS, *SHAPES):
            raise InputError(f"flow.favour: {word!r} is no motion or shape: use {', '.join((*MOTIONS, *SHAPES))}")
        if not times > 0:
            raise InputError(f"flow.favour: {word} cannot be drawn {times} times as often: give a number above 0")


def odds_of(scenes: list[list[tuple[int, Scene]]], favour: Mapping[str, float]) -> np.ndarray:
    """[N] how probable each clip is, if those that show a word of `favour` come up so many times as often."""
    words = [{word for _, scene in clip for a in scene.actors for word in (a.motion, a.shape)} for clip in scenes]
    weights = np.array([max(favour.get(word, 1.0) for word in shown) for shown in words])
    return weights / weights.sum()


def tell(scenes: list[Scene], rng: np.random.Generator, partial: float = 0.3, paraphrase: float = 0.25) -> list[str]:
    """Prompts for the scenes of one clip: about 30 % of clips leave something open, the same thing throughout."""
    if rng.random() < partial:
        seed = int(rng.integers(2**31))
        open_ = [omit(scene, np.random.default_rng(seed)) for scene in scenes]
        if all(split(scene) == "train" for scene in open_) and _changes_told(scenes, open_):
            scenes = open_
    return [describe(scene, rng, paraphrase) for scene in scenes]


def _changes_told(full: list[Scene], said: list[Scene]) -> bool:
    """Whether every two scenes that differ are also said differently: a change nobody names teaches nothing."""
    pairs = zip(zip(full, full[1:], strict=False), zip(said, said[1:], strict=False), strict=True)
    return all(a == b or c != d for (a, b), (c, d) in pairs)
