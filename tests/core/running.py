"""Running roll-outs, as several tests of the engine do."""

from __future__ import annotations

import io
import math

import torch

from streamgen.noise import SeededNoise

SIZE = (4, 4)


def start(engine, embeds, frames=None, **more):
    return engine.start(embeds, SeededNoise(0), latent_size=SIZE, num_latent_frames=frames, **more)


def latents(chunks) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in chunks], 2)


def advance(rollout, chunks: int) -> torch.Tensor:
    return latents([rollout.advance() for _ in range(chunks)])


def drain(rollout, chunks: float = math.inf) -> torch.Tensor:
    """What is left of a stream, or its next `chunks`."""
    out = []
    while not rollout.finished and len(out) < chunks:
        out.append(rollout.advance())
    return latents(out)


def saved(rollout) -> dict:
    """The state after a trip through a file."""
    file = io.BytesIO()
    torch.save(rollout.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
