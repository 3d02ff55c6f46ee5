"""What is said to a running stream: a request that waits for a chunk boundary, a blend that takes several of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamgen.engine import pad_rows


@dataclass(frozen=True)
class Change:
    """A request that was accepted: it takes effect with chunk `chunk`, the first to carry epoch `epoch`.

    With several chunks in flight that is the next one to enter, or, if they follow (`switch.in_flight`), to come out.
    """

    chunk: int
    epoch: int


@dataclass(frozen=True)
class Request:
    """Fields of a pending change; None = as it is."""

    epoch: int
    prompt: str | list[str] | None = None
    mode: str = "recache"
    blend: int = 0
    guidance_scale: float | None = None

    def after(self, pending: Request | None) -> Request:
        """Both as one: of each thing the newer word counts."""
        if pending is None:
            return self
        told = pending if self.prompt is None else self
        scale = pending.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return replace(told, epoch=self.epoch, guidance_scale=scale)


@dataclass
class Blend:
    """A prompt change spread over chunks: text moves linearly from `old` to `new`."""

    old: Tensor
    new: Tensor
    chunks: int
    mode: str
    done: int = 0

    def next(self) -> Tensor:
        """The text of the step after those that are done."""
        old, new = pad_rows([self.old, self.new])
        return torch.lerp(old, new, (self.done + 1) / (self.chunks + 1))
