"""What self-attention sees: the one door between the transformer and whatever holds keys and values.

The transformer hands each layer's query, key and value to a context and takes an attention output back. `DenseContext`
keeps nothing: it is the training and bidirectional path. The cache implements the same protocol for streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from streamgen.kernels.attention import attend
from streamgen.kernels.rope import rotate
from streamgen.models.masks import FrameGroups

__all__ = ["AttentionContext", "DenseContext", "RowsContext", "in_order", "take_frames", "token_mask"]


@runtime_checkable
class AttentionContext(Protocol):
    """Self-attention of one forward. Queries and keys arrive normalised, before rotation: positions are the context's.

    Under gradient checkpointing `attend` runs a second time for the same layer during the backward pass and must give
    the same answer then: a context used for training keeps what it reads unchanged until backward is done.
    """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, F·T, H, D] each, frames slowest. Returns the same shape."""
        ...

    def stage(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take keys and values that nobody attends with in this forward: the last layer of a commit."""
        ...


class DenseContext:
    """Every token sees every token, or what a mask allows, or group by group; nothing is kept."""

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        backend: str = "native",
        groups: FrameGroups | None = None,
        frames: int = 1,
    ) -> None:
        """
        Args:
            cos, sin: as `rotate` takes them.
            mask: over tokens, broadcastable to [B, H, L, L], or None.
            groups: instead of a mask, over `frames` frames; see `frame_groups`.
        """
        self.cos, self.sin, self.mask, self.backend = cos, sin, mask, backend
        self.groups, self.frames = groups, frames

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = rotate(query, self.cos, self.sin), rotate(key, self.cos, self.sin)
        if self.groups is None:
            return attend(query, key, value, mask=self.mask, backend=self.backend)
        tokens = query.shape[1] // self.frames
        take = lambda x, frames: take_frames(x, frames, tokens)
        parts = [
            attend(take(query, mine), take(key, seen), take(value, seen), backend=self.backend)
            for mine, seen in self.groups
        ]
        return in_order(parts, [mine for mine, _ in self.groups])

    def stage(self, layer: int, key: Tensor, value: Tensor) -> None:
        raise NotImplementedError("a DenseContext keeps nothing: commit_only needs a context with a cache")


class RowsContext:
    """Rows of one batch that remember different things: each part of it goes to a context of its own."""

    def __init__(self, contexts: Sequence[AttentionContext], batch: int) -> None:
        """`batch`: of each part."""
        self.contexts, self.batch = contexts, batch

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(self.contexts, *(x.split(self.batch) for x in (query, key, value)), strict=True)
        return torch.cat([context.attend(layer, q, k, v) for context, q, k, v in parts])

    def stage(self, layer: int, key: Tensor, value: Tensor) -> None:
        for context, k, v in zip(self.contexts, key.split(self.batch), value.split(self.batch), strict=True):
            context.stage(layer, k, v)


def take_frames(x: Tensor, frames: Sequence[int], tokens: int) -> Tensor:
    """[B, F·T, H, D] -> the T tokens each of some frames, [B, n·T, H, D]; a run of neighbours is a view."""
    starts = [i for i, frame in enumerate(frames) if i == 0 or frame != frames[i - 1] + 1]
    runs = [frames[a:b] for a, b in zip(starts, [*starts[1:], len(frames)], strict=True)]
    parts = [x[:, run[0] * tokens : (run[-1] + 1) * tokens] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat([x[:, :0], *parts], 1)  # of no frames too


def in_order(outputs: list[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """What groups of frames computed, [B, n·T, H, D] each, as the frames of one call."""
    if len(outputs) == 1:
        return outputs[0]
    order = [frame for frames in groups for frame in frames]
    together = torch.cat(outputs, 1)
    if order == sorted(order):
        return together
    return take_frames(together, [order.index(i) for i in range(len(order))], together.shape[1] // len(order))


def token_mask(frame_mask: Tensor, tokens_per_frame: int) -> Tensor:
    """[F, F] or [B, F, F] over frames -> [L, L] or [B, 1, L, L] over tokens, L = F·T.

    >>> import torch
    >>> token_mask(torch.tensor([[True, False], [True, True]]), 2).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 1],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    frames = frame_mask.shape[-1]
    grid = (*frame_mask.shape[:-2], frames, tokens_per_frame, frames, tokens_per_frame)
    mask = frame_mask[..., :, None, :, None].expand(grid).flatten(-4, -3).flatten(-2)
    return mask if frame_mask.dim() == 2 else mask.unsqueeze(1)
