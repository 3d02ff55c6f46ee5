"""Noise levels of a chunk: the timesteps it is called at, the sigmas between them, and how a step is taken.

Flow matching: x = (1-σ)·x0 + σ·ε, the network returns ε - x0, model time is 1000·σ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from streamgen.errors import InputError

TRAIN_STEPS = 1000


def warp_timesteps(timesteps: Tensor, shift: float) -> Tensor:
    """Move a step list towards high noise: u' = s·u / (1 + (s - 1)·u) with u = t / 1000.

    The resolution-dependent shift of Esser et al. 2024 (arXiv:2403.03206).
    Args:
        timesteps: [S], descending, in model time (1000 = pure noise).
        shift: s > 0; 1 leaves the list as it is.
    Returns: [S], same unit.
    Raises: ValueError if `shift` is not positive.
    >>> warp_timesteps(torch.tensor([1000.0, 750.0, 500.0, 250.0]), shift=5.0)
    tensor([1000.0000,  937.5000,  833.3333,  625.0000])
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    u = timesteps / TRAIN_STEPS
    return TRAIN_STEPS * (shift * u / (1 + (shift - 1) * u))


@cache
def sigma_table(shift: float) -> Tensor:
    """[1000] float32: the shifted training sigmas that released few-step students look levels up in."""
    raw = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
    return shift * raw / (1 + (shift - 1) * raw)


@dataclass(frozen=True, slots=True)
class Ladder:
    """One chunk's steps: `timesteps` [n] are fed to the network, `sigmas` [n + 1] are the levels, the last one 0."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    solver: str = "renoise"

    def __post_init__(self) -> None:
        levels = self.sigmas
        if not self.timesteps or len(levels) != len(self.timesteps) + 1:
            raise InputError("ladder.timesteps is empty: give at least one, e.g. [1000]")
        if any(a <= b for a, b in zip(levels, levels[1:], strict=False)) or levels[0] > 1 or levels[-1] != 0:
            raise InputError(f"ladder.timesteps {list(self.timesteps)} must fall strictly from 1000 or less to above 0")

    def __len__(self) -> int:
        return len(self.timesteps)

    def starting(self, timestep: float, shift: float, sigma: str) -> Ladder:
        """The ladder with another first timestep, looked up as `build_ladder` does; the other steps stay.

        Raises: InputError if the list would not fall any more.
        """
        first = build_ladder([timestep], shift=shift, sigma=sigma, solver=self.solver)
        return replace(
            self, timesteps=(*first.timesteps, *self.timesteps[1:]), sigmas=(first.sigmas[0], *self.sigmas[1:])
        )

    def denoised(self, x: Tensor, velocity: Tensor, p: int) -> Tensor:
        """The clean estimate x0 = x - σ·v at step p; in float64 as the released code has it."""
        precise = torch.float32 if x.device.type == "mps" else torch.float64
        return (x.to(precise) - self.sigmas[p] * velocity.to(precise)).to(x.dtype)

    def step(self, x: Tensor, velocity: Tensor, p: int, noise) -> Tensor:
        """The sample at level p + 1. `noise()` supplies fresh noise like `x`; it is called only where one is used."""
        if p + 1 == len(self):
            return self.denoised(x, velocity, p)
        target = self.sigmas[p + 1]
        if self.solver == "euler":
            return x + (target - self.sigmas[p]) * velocity.to(x.dtype)
        return (1 - target) * self.denoised(x, velocity, p) + target * noise()


def build_ladder(
    timesteps: Sequence[float], *, shift: float = 1.0, warp: bool = False, sigma: str = "exact", solver: str = "renoise"
) -> Ladder:
    """A ladder from a step list.

    Args:
        timesteps: descending, model time; a trailing 0 is dropped.
        warp: apply `shift` to the list; otherwise it is fed as it is.
        sigma: "exact" = t / 1000; "table" = the nearest of the 1000 shifted training sigmas, as released students do.
        solver: "renoise" (x0, then fresh noise at the next level) or "euler".
    """
    if sigma not in ("exact", "table"):
        raise InputError(f"ladder.sigma {sigma!r} is unknown: use exact or table")
    if solver not in ("renoise", "euler"):
        raise InputError(f"ladder.solver {solver!r} is unknown: use renoise or euler")
    if shift <= 0:
        raise InputError(f"ladder.shift must be positive, got {shift}")
    fed = torch.tensor([float(t) for t in timesteps if t != 0], dtype=torch.float32)
    if warp:
        fed = warp_timesteps(fed, shift)
    sigmas = fed / TRAIN_STEPS
    if sigma == "table":
        table = sigma_table(shift)
        sigmas = torch.stack([table[(table * TRAIN_STEPS - t).abs().argmin()] for t in fed]) if len(fed) else fed
    return Ladder(tuple(fed.tolist()), (*sigmas.tolist(), 0.0), solver)


def uniform_timesteps(steps: int) -> list[float]:
    """`steps` levels evenly spaced from 1000 down, 0 left out.

    >>> uniform_timesteps(4)
    [1000.0, 750.0, 500.0, 250.0]
    """
    return [TRAIN_STEPS * (1 - i / steps) for i in range(steps)]
