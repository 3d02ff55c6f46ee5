"""Noise is addressed, not drawn: one latent frame's noise is a function of where it is used, and of nothing else.

So it does not depend on device, batch split, world size or call order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

PURPOSES = {"initial": 0, "renoise": 1, "context": 2, "reference": 3}


class Noise(Protocol):
    """Where a roll-out's randomness comes from."""

    def frames(self, purpose: str, frames: range, step: int, shape: tuple[int, ...]) -> Tensor:
        """[B, C, F, h, w] float32 on the CPU for latent frames `frames`, used after `step`; shape = (B, C, h, w)."""
        ...


class SeededNoise:
    """Counter-based noise (NumPy Philox: key = seed, sample; counter = frame, step, purpose and candidate).

    Args:
        seed: an integer for the whole batch, sample i being its i-th stream, or one integer per sample.
        candidate: which of several tries for the same frames (best-of-N search).
    """

    def __init__(self, seed: int | Sequence[int] = 0, candidate: int = 0) -> None:
        self.seed, self.candidate = seed, candidate

    def _keys(self, batch: int) -> list[tuple[int, int]]:
        if isinstance(self.seed, int):
            return [(self.seed, sample) for sample in range(batch)]
        if len(self.seed) != batch:
            raise ValueError(f"{len(self.seed)} seeds for a batch of {batch}")
        return [(int(seed), 0) for seed in self.seed]

    def frames(self, purpose: str, frames: range, step: int, shape: tuple[int, ...]) -> Tensor:
        batch, *frame_shape = shape
        last = PURPOSES[purpose] << 32 | self.candidate
        rows = []
        for key in self._keys(batch):
            words = np.array([word % 2**64 for word in key], np.uint64)  # a list with a large seed would become floats
            for frame in frames:
                # the lowest word counts the numbers drawn; the address fills the words above it
                bits = np.random.Philox(key=words, counter=[0, frame, step, last])
                rows.append(np.random.Generator(bits).standard_normal(frame_shape, np.float32))
        out = torch.from_numpy(np.stack(rows)).unflatten(0, (batch, len(frames)))
        return out.transpose(1, 2)  # [B, C, F, h, w]

    def state_dict(self) -> dict:
        seed = self.seed if isinstance(self.seed, int) else list(map(int, self.seed))
        return {"kind": "seeded", "seed": seed, "candidate": self.candidate}


class TensorNoise:
    """Explicit noise, for parity with a reference.

    Args:
        initial: [B, C, F, h, w].
        renoise: [steps - 1, B, C, F, h, w]; entry k is used after step k of a chunk.
        purposes: any other purpose as [S, B, C, F, h, w].
    """

    def __init__(self, initial: Tensor, renoise: Tensor | None = None, **purposes: Tensor) -> None:
        self.initial = initial
        self.tables = {"initial": initial[None], **purposes}
        if renoise is not None:
            self.tables["renoise"] = renoise

    @property
    def num_latent_frames(self) -> int:
        return self.initial.shape[2]

    @property
    def latent_size(self) -> tuple[int, int]:
        return tuple(self.initial.shape[-2:])

    @property
    def batch(self) -> int:
        return self.initial.shape[0]

    def frames(self, purpose: str, frames: range, step: int, shape: tuple[int, ...]) -> Tensor:
        if purpose not in self.tables:
            raise ValueError(f"this schedule needs noise for {purpose!r}: give TensorNoise({purpose}=…)")
        table = self.tables[purpose]
        if step >= len(table) or frames.stop > table.shape[3]:
            raise ValueError(
                f"noise {purpose!r} has {len(table)} steps of {table.shape[3]} frames; step {step}, "
                f"frames {frames.start}-{frames.stop - 1} asked for"
            )
        out = table[step][:, :, frames.start : frames.stop]
        wanted = (*shape[:2], len(frames), *shape[2:])
        if out.shape != wanted:
            raise ValueError(f"noise {purpose!r} is {tuple(out.shape)}, [B, C, F, h, w] = {wanted} is needed here")
        return out
