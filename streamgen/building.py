"""What a configuration makes for one stream: its cache policy and its stores; what does not go together is refused."""

from __future__ import annotations

import functools
import logging

import torch

from streamgen.cache import CachePolicy, GraphStore, KVStore
from streamgen.cache.options import rule_for_parts
from streamgen.cache.policies import POLICIES, Sizes
from streamgen.cache.store import Geometry
from streamgen.config import StreamConfig
from streamgen.errors import InputError

log = logging.getLogger(__name__)


def build_policy(config: StreamConfig, flight_frames: int, total_frames: int | None) -> CachePolicy:
    """The cache policy of a configuration. Raises InputError below a window's floor and for what cannot be combined."""
    _check(config, flight_frames)
    cls, options = POLICIES.get(config.cache.policy)
    if hasattr(options, "from_config"):  # the package's own read the shared keys
        chosen = options.from_config(config)
    else:
        try:
            chosen = options(**config.cache.options)
        except TypeError as error:
            raise InputError(f"cache.options of policy {config.cache.policy!r}: {error}") from None
    published = config.schedule.commit != "none"
    policy = cls(chosen, Sizes(config.chunk.latent_frames, flight_frames, total_frames, published))
    missing = [name for name in vars(CachePolicy) if not name.startswith("_") and not hasattr(policy, name)]
    if missing:
        raise InputError(
            f"cache policy {config.cache.policy!r} lacks {', '.join(missing)}: inherit from streamgen.cache.CachePolicy"
        )
    return policy


def _check(config: StreamConfig, flight_frames: int) -> None:
    """Raises InputError where schedule, chunks and switches ask for what no policy can do."""
    if config.schedule.coupling == "joint-causal" and flight_frames > config.chunk.largest:
        if config.cache.window != -1:
            rule_for_parts(config, "schedule.coupling=joint-causal")
    branch = config.guidance.commit_branch
    if branch != "own" and config.schedule.commit == "inplace":
        raise InputError(
            f"guidance.commit_branch={branch} asks for a commit under that prompt, and schedule.commit=inplace has "
            "none: use separate or fused"
        )
    first, size = config.chunk.first, config.chunk.latent_frames
    if first != size and (config.cache.policy != "window" or config.switch.mask != "bidirectional"):
        raise InputError(
            f"chunk.first_latent_frames={first} beside chunk.latent_frames={size}: only cache.policy=window with "
            "switch.mask=bidirectional counts frames instead of chunks; use it, or chunks of one size"
        )


def recache_frames(config: StreamConfig, total_frames: int | None) -> int:
    """Most frames a re-encoding call may hold: finished latents that are kept for it."""
    if config.cache.window != -1:
        return config.cache.window
    return total_frames if config.switch.mode == "recache" else 0


def call_frames(config: StreamConfig, policy: CachePolicy, flight_frames: int, total_frames: int | None) -> int:
    """Frames of the largest call that a stream makes room for as it starts: in flight, made anew, or re-encoded.

    Where switches keep the cache, room for a re-encoding is made when the first one is asked for all the same.
    """
    recached = recache_frames(config, total_frames) if config.switch.mode == "recache" else 0
    return max(flight_frames, policy.rebuilt, recached)


def build_store(
    model, policy: CachePolicy, batch: int, latent_size: tuple[int, int], frames: int, dtype: torch.dtype,
    device: torch.device,
) -> KVStore | GraphStore:
    """The pages of one expert; with gradients, those that they pass.

    Args:
        batch: rows of a forward, all branches of guidance.
        frames: of the largest call there is room for.
    """
    height, width = latent_size
    config, (_, ph, pw) = model.config, model.config.patch_size
    if height % ph or width % pw:
        raise InputError(f"latent size {height}x{width} is not a multiple of the patch {ph}x{pw}")
    geometry = Geometry(
        layers=config.num_layers,
        batch=batch,
        height=height // ph,
        width=width // pw,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
    )
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return GraphStore(geometry)
    return KVStore(geometry, policy.pages, frames, dtype, device, policy.aside)


def check_span(config: StreamConfig, policy: CachePolicy) -> None:
    """Warns, or raises InputError, where positions run past what the model was trained on."""
    reach, positions = policy.reach(), config.positions
    if reach is not None and reach <= positions.span:
        return
    far = "without end" if reach is None else f"over {reach} frames"
    message = (
        f"positions.rule={positions.rule} spreads what a call sees {far}, past the positions.span="
        f"{positions.span} the model was trained on: give positions.rule=packed and a cache.window within the span"
    )
    if positions.strict:
        raise InputError(f"{message}, or positions.strict=false")
    _warn_once(message)


def check_experts(config: StreamConfig, experts: int) -> None:
    """Raises InputError where commits would fill the cache of one expert alone."""
    commit = config.schedule.commit
    if experts > 1 and commit in ("fused", "inplace"):
        raise InputError(
            f"two experts keep a cache each, and schedule.commit={commit} fills that of one alone: use separate"
        )


@functools.cache
def _warn_once(message: str) -> None:
    """The same warning a second time says nothing."""
    log.warning(message)
