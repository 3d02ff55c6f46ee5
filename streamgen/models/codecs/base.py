"""The protocol of a codec, and what its implementations share: frame counts, and cutting a chunk along time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from streamgen.errors import InputError

# Latents that go through a network at once: a chunk of any preset is one call, a whole clip does not fill the memory.
LATENTS_PER_CALL = 4


@runtime_checkable
class Codec(Protocol):
    """Pixels <-> latents as a stream: whatever the chunks, the result is that of the whole clip.

    A state belongs to one stream in one direction; None = its start. It is opaque, made of dicts, lists, tensors and
    plain Python (`torch.load(weights_only=True)` reads it back), and no call changes one in place: streams may fork.
    The first latent of a stream stands for one frame, each later one for `temporal_ratio` frames.
    """

    spatial_ratio: int  # pixels per latent, per side
    temporal_ratio: int  # frames per latent
    latent_channels: int

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Normalised latents [B, C, f, h, w] -> pixels [B, 3, F, H, W] in [-1, 1], float32, and the new state."""
        ...

    def encode(self, frames: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Pixels [B, 3, F, H, W] in [-1, 1] -> normalised latents [B, C, f, h, w], float32, and the new state.

        F = 1 + 4k at the start of a stream and 4k after it, 4 being `temporal_ratio`.
        """
        ...


def form_of(codec: Codec) -> list[str | int]:
    """What the form of a codec's state follows from, its tiles too; plain Python."""
    own = [type(codec).__name__, codec.spatial_ratio, codec.temporal_ratio, codec.latent_channels]
    tiles = [getattr(codec, name) for name in ("tile", "overlap") if hasattr(codec, name)]
    inside = getattr(codec, "codec", None)
    return [*own, *tiles, *(form_of(inside) if inside is not None else [])]


def check_frames(codec: Codec, frames: Tensor, start: bool) -> None:
    """Raises InputError for a number or a size of frames [B, 3, F, H, W] that has no latents of its own."""
    count, height, width = frames.shape[2:]
    ratio, grid = codec.temporal_ratio, codec.spatial_ratio
    if count < 1 or (count - start) % ratio:
        rule = f"a stream starts with 1 + {ratio}k frames" if start else f"a stream goes on with {ratio}k frames"
        raise InputError(f"cannot encode {count} frames: {rule}; cut the video there")
    if height % grid or width % grid:
        raise InputError(f"cannot encode frames of {height}×{width}: resize both sides to multiples of {grid}")


def split_time(x: Tensor, first: int, size: int) -> list[Tensor]:
    """[B, C, F, H, W] -> a part of `first` frames (0 = none), then parts of at most `size`."""
    head = [x[:, :, :first]] if first else []
    return head + [x[:, :, i : i + size] for i in range(first, x.shape[2], size)]


def run_parts(step: Callable[[Tensor, Any], tuple[Tensor, Any]], parts: list[Tensor], state: Any) -> tuple[Tensor, Any]:
    """Feed parts one after the other, each with the state the one before left; outputs are joined along time."""
    out = []
    for part in parts:
        y, state = step(part, state)
        out.append(y)
    return torch.cat(out, 2), state
