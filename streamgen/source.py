"""What chunks begin from besides noise: an encoded video, for video-to-video streams.

    engine.run(text, noise, conditions={"video": latents, "strength": 0.8})
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from streamgen.errors import InputError
from streamgen.ladder import TRAIN_STEPS, Ladder

PerChunk = float | Sequence[float] | Tensor | Callable[[int], float]


class Latents(Protocol):
    """An encoded video that is there when its frames are asked for: in order, the last ones perhaps again."""

    def frames(self, frames: range) -> Tensor:
        """[B or 1, C, f, h, w] of these latent frames."""
        ...


class Source:
    """Chunks that begin as x = s·ε + (1 - s)·z, z the video's latents (SDEdit, arXiv:2108.01073).

    Args:
        video: [B or 1, C, F, h, w], or an object with `frames(range)` for streams without end.
        strength: s in 0..1, one number or one per chunk (a sequence, or a function of the chunk's number); None = the
            level the chunk's first step is at.
        first_timestep: what the network is told at a chunk's first step, in the same forms; None = the ladder's.
            StreamDiffusionV2 (arXiv:2511.07399) tells it 100 less than 1000·s.
    """

    def __init__(
        self, video: Tensor | Latents, strength: PerChunk | None = None, first_timestep: PerChunk | None = None
    ) -> None:
        self.video, self.strength, self.first_timestep = video, strength, first_timestep

    @classmethod
    def take(cls, conditions: dict) -> Source | None:
        """The source that conditions describe, if they do; its keys are taken out."""
        found = {name: conditions.pop(name, None) for name in ("video", "strength", "first_timestep")}
        if found["video"] is not None:
            return cls(**found)
        given = [name for name, value in found.items() if value is not None]
        if given:
            raise InputError(f"conditions {', '.join(given)} belong to video-to-video streams: give a video as well")
        return None

    def ladder(self, chunk: int, ladder: Ladder, shift: float, sigma: str) -> Ladder:
        """The chunk's own steps."""
        if self.first_timestep is None:
            return ladder
        return ladder.starting(_of(self.first_timestep, chunk, "first_timestep"), shift, sigma)

    def begin(self, chunk: int, frames: range, noise: Tensor, ladder: Ladder) -> Tensor:
        """[B, C, f, h, w], a chunk as it enters; `noise` like it.

        Raises: InputError for a video that has ended or does not fit.
        """
        strength = ladder.sigmas[0] if self.strength is None else _of(self.strength, chunk, "strength")
        if not 0 <= strength <= 1:
            raise InputError(f"strength {strength} of chunk {chunk} is not in 0-1")
        latents = self._latents(frames).to(noise)
        if latents.shape[0] not in (1, noise.shape[0]) or latents.shape[1:] != noise.shape[1:]:
            raise InputError(
                f"the video's latents for frames {frames.start}-{frames.stop - 1} are {tuple(latents.shape)}, "
                f"[B or 1, C, f, h, w] = {tuple(noise.shape)} is needed here"
            )
        return strength * noise + (1 - strength) * latents

    def _latents(self, frames: range) -> Tensor:
        if isinstance(self.video, Tensor):
            return self.video[:, :, frames.start : frames.stop]
        return self.video.frames(frames)


def _of(value: PerChunk, chunk: int, name: str) -> float:
    """A chunk's own value."""
    if callable(value):
        return float(value(chunk))
    if isinstance(value, (int, float)):
        return float(value)
    if chunk >= len(value):
        raise InputError(f"{name} has {len(value)} values, and chunk {chunk} needs one of its own")
    return float(value[chunk])


class MotionStrength:
    """Less noise where more moves: strength and first timestep per chunk from the pixels it shows (StreamDiffusionV2).

    Args:
        strength: of a still picture.
        slack: how much the network is told too little, in timesteps.
    """

    FULL, EFFECT, INERTIA = 0.2, 0.1, 0.1  # root mean square that counts as full motion; what that takes off; memory

    def __init__(self, strength: float = 0.8, slack: int = 100) -> None:
        if not 0 < strength <= 1:
            raise InputError(f"strength {strength} is not in 0-1")
        self.still, self.slack = strength, slack
        self.strength = strength  # of the last chunk
        self._last: Tensor | None = None

    def next(self, pixels: Tensor) -> tuple[float, int]:
        """(strength, first timestep) of the next chunk; `pixels` [B, 3, F, H, W] in [-1, 1] are its frames."""
        last, self._last = self._last, pixels[:, :, -1:]
        if last is not None:  # the first chunk is taken as still
            seen = torch.cat([last, pixels], 2)
            moved = (seen[:, :, 1:] - seen[:, :, :-1]).square().mean((0, 1, 3, 4)).sqrt().max()
            motion = min(1.0, float(moved) / self.FULL)
            aim = self.still - self.EFFECT * motion
            self.strength = (1 - self.INERTIA) * aim + self.INERTIA * self.strength
        return self.strength, int(TRAIN_STEPS * self.strength) - self.slack
