"""What self-attention sees: the one door between the transformer and whatever holds keys and values.

The transformer hands each layer's query, key and value to a context and takes an attention output back. `DenseContext`
keeps nothing: it is the training and bidirectional path. The cache implements the same protocol for streaming.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from streamgen.kernels.attention import attend
from streamgen.kernels.rope import rotate

__all__ = ["AttentionContext", "DenseContext", "token_mask"]


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
    """Every token sees every token, or what a mask allows; nothing is kept."""

    def __init__(self, cos: Tensor, sin: Tensor, mask: Tensor | None = None, backend: str = "native") -> None:
        """`cos`, `sin`: as `rotate` takes them. `mask`: over tokens, broadcastable to [B, H, L, L], or None."""
        self.cos, self.sin, self.mask, self.backend = cos, sin, mask, backend

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = rotate(query, self.cos, self.sin), rotate(key, self.cos, self.sin)
        return attend(query, key, value, mask=self.mask, backend=self.backend)

    def stage(self, layer: int, key: Tensor, value: Tensor) -> None:
        raise NotImplementedError("a DenseContext keeps nothing: commit_only needs a context with a cache")


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
