"""What a stream is made of between two calls: chunks, texts, conditions, and the record of what ran."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from streamgen.ladder import Ladder


@dataclass(frozen=True, slots=True)
class LatentChunk:
    """A finished chunk: latents [B, C, f, H, W], its number, its first latent frame, and the epoch of its prompt."""

    latents: Tensor
    index: int
    first_frame: int
    epoch: int


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One executed call: what ran, and the plan it ran by."""

    tick: int
    kind: str
    source: str
    chunks: tuple[int, ...]
    frames: tuple[int, ...]
    timesteps: tuple[float, ...]
    key_frames: tuple[tuple[int, ...], ...]  # per group of queries
    key_positions: tuple[tuple[float, ...], ...]
    query_positions: tuple[tuple[float, ...], ...]
    writes: tuple[int, ...]
    expert: int = 0
    level: int | None = None  # of the row's lane


@dataclass(slots=True)
class Flight:
    """A chunk being denoised: x [B, C, f, H, W] at level p of its ladder."""

    x: Tensor
    frames: range
    text: Text
    ladder: Ladder
    p: int = 0
    channels: Tensor | None = None  # [B or 1, C', f, H, W], read beside x


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """What a chunk is told, per guidance branch, how strongly, and the epoch it belongs to."""

    embeds: Tensor  # [branches·B, L, D]
    keys: tuple  # their TextKeys, per expert
    epoch: int
    image: Tensor | None = None  # [branches·B, tokens, D'], the embedded picture
    scale: float = 1.0  # of guidance


class Channels(Protocol):
    """What a model reads beside its latents: the picture and mask of image-to-video, a control video."""

    def frames(self, frames: range) -> Tensor:
        """[B or 1, C', f, H, W] of these latent frames; asked in order, the last ones perhaps again."""
        ...

    def fork(self) -> Channels: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Timings:
    """Seconds spent per kind of call since they were last taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, name: str, begin: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken
