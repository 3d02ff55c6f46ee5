"""Attention back-ends by name, one layout: [B, L, H, D] in and out.

`native` (torch SDPA) is the reference and needs nothing; the others are extras, probed before they are used and refused
with one line that says why. `streamgen doctor` prints what `available()` returns.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

__all__ = ["BACKENDS", "Backend", "attend", "available", "require"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One way to compute attention. `probe` returns None if it is usable on this machine, else one line why not."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
    probe: Callable[[], str | None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "native",
) -> Tensor:
    """Softmax attention over all heads.

    Args:
        query: [B, Lq, H, D].
        key, value: [B, Lk, H, D], same dtype as `query`.
        mask: bool, broadcastable to [B, H, Lq, Lk], True = may attend; every query needs at least one True. None = all.
        scale: factor on the logits; None = 1/√D.
        backend: a name in `BACKENDS`.
    Returns: [B, Lq, H, D].
    Raises: ValueError for an unknown name (it lists the choices), RuntimeError if the back-end cannot run here.
    """
    if backend == "native":  # the hot path: no look-up, no probe
        return _native(query, key, value, mask, scale)
    return require(backend).run(query, key, value, mask, scale)


def require(name: str) -> Backend:
    """The back-end of that name, or an error that says what to use instead."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attention back-end {name!r}; choose from {', '.join(BACKENDS)}")
    reason = BACKENDS[name].probe()
    if reason is not None:
        raise RuntimeError(f"attention back-end {name!r} cannot be used here: {reason}; use 'native'")
    return BACKENDS[name]


def available() -> dict[str, str | None]:
    """Every back-end with None (usable) or the reason why it is not."""
    return {name: backend.probe() for name, backend in BACKENDS.items()}


def _native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2)  # SDPA writes [B, L, H, D] memory for such inputs, so a following flatten is free


def _math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Scores in memory, L² per head: for training short sequences on a CPU, where SDPA's backward is the slow part."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    scores = (query @ key.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def _xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:  # a tensor bias must be aligned to 8 keys in memory, so it is cut out of a padded one
        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        padded = query.new_zeros(*shape[:3], -(-shape[3] // 8) * 8)
        bias = padded[..., : shape[3]]
        bias.masked_fill_(~mask.expand(shape), float("-inf"))
    return memory_efficient_attention(query, key, value, attn_bias=bias, scale=scale)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    blocks = None
    if mask is not None:
        from torch.nn.attention.flex_attention import create_block_mask

        shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        full = mask.expand(shape)
        blocks = create_block_mask(lambda b, h, q, k: full[b, h, q, k], *shape, device=str(query.device))
    out = _compiled_flex()(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), block_mask=blocks, scale=scale
    )
    return out.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # uncompiled it materialises the whole score matrix


@functools.cache
def _probe_xformers() -> str | None:
    if not torch.cuda.is_available():
        return "xformers has kernels for CUDA devices only and none is visible"
    with contextlib.redirect_stderr(io.StringIO()):  # a wheel built for another torch prints a banner at import
        return _probe_on_cuda("xformers", _xformers)


@functools.cache
def _probe_flex() -> str | None:
    if not torch.cuda.is_available():
        return "FlexAttention has no backward without a CUDA device"
    return _probe_on_cuda("flex", _flex)


def _probe_on_cuda(name: str, run: Callable[..., Tensor]) -> str | None:
    """One real forward and backward against the reference; an import that works proves little."""
    try:
        with torch.enable_grad(), torch.inference_mode(False):
            # float16: every GPU generation the kernels support has it
            query = torch.randn(1, 128, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)
            out = run(query, query, query, None, None)
            out.float().sum().backward()
            error = (out - _native(query, query, query, None, None)).abs().max().item()
    except ImportError:
        return f"{name} is not installed"
    except Exception as failure:  # whatever a third-party kernel raises, the answer is the same: not usable
        logger.debug("attention back-end %s failed its probe", name, exc_info=True)
        line = str(failure).strip().partition("\n")[0]
        return f"its trial call failed with {type(failure).__name__}: {line[:160]}"
    return None if error < 1e-2 else f"its trial call differs from the reference by {error:.2g}"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(name="native", run=_native, probe=lambda: None),
        Backend(name="math", run=_math, probe=lambda: None),
        Backend(name="xformers", run=_xformers, probe=_probe_xformers),
        Backend(name="flex", run=_flex, probe=_probe_flex),
    )
}
