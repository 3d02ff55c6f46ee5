"""What a cache chooses or merges by content, on the device: static shapes, nothing here waits for a number.

Keys and values of n pages are [B, n, T, H, D], one number for each of their tokens is [B, n, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from streamgen.cache.plan import Absorb, Choose, Renew
from streamgen.kernels.rope import rotate
from streamgen.models.blocks import widen
from streamgen.models.rope import RotaryEmbedding

if TYPE_CHECKING:
    from streamgen.cache.store import KVStore

__all__ = ["Choice", "absorb", "count_bias", "renew", "rotate_to_times"]


class Choice:
    """A plan's `Choose` over one store."""

    def __init__(self, store: KVStore, choose: Choose) -> None:
        self.store, self.limit = store, choose.limit
        pages = [page for segment in choose.segments for page in segment.pages]
        self.pages = torch.tensor(pages, device=store.keys.device)
        self.target = slice(choose.target[0], choose.target[-1] + 1)
        self.count = len(choose.target) * store.geometry.tokens_per_frame
        # tokens of single frames were never chosen before, whatever their pages held
        chosen = [float(segment.fixed) for segment in choose.segments for _ in segment.pages]
        self.chosen = torch.tensor(chosen, device=store.keys.device)[:, None]

    def make(self, layer: int, asked: Tensor) -> None:
        """Fill the target's pages of a layer; `asked` is the sum of the call's rotated queries, [B, H, D]."""
        store, uses = self.store, self.store.aside["uses"][layer]
        take = lambda pages: pages[layer].index_select(1, self.pages).flatten(1, 2)  # [B, n·T, H, D]
        keys, values = take(store.layer_rotated), take(store.layer_values)
        before = (uses.index_select(1, self.pages) * self.chosen).flatten(1)
        scores = torch.einsum("bhd,blhd->bl", asked + store.aside["queries"][layer].sum(1), widen(keys))
        best = scores.masked_fill(before >= self.limit, float("-inf")).topk(self.count, 1).indices.sort(1).values
        index = best[..., None, None].expand(-1, -1, *keys.shape[2:])
        pages = (self.target.stop - self.target.start, -1)
        kept = keys.gather(1, index).unflatten(1, pages)
        store.layer_keys[layer][:, self.target] = kept
        store.layer_rotated[layer][:, self.target] = kept
        store.layer_values[layer][:, self.target] = values.gather(1, index).unflatten(1, pages)
        uses[:, self.target] = (before.gather(1, best) + 1).unflatten(1, pages)


def absorb(store: KVStore, plan: Absorb) -> None:
    """Merge frames that leave into the entries of a store, one after the other."""
    for layer in range(store.geometry.layers):
        tensors = (store.layer_keys[layer], store.layer_values[layer], *(store.aside[n][layer] for n in ENTRY))
        for i, (source, time) in enumerate(zip(plan.sources, plan.times, strict=True)):
            size = min(plan.held + i + 1, len(plan.pages))
            entries = [tensor[:, plan.pages[0] : plan.pages[0] + size] for tensor in tensors]
            entries[2][:, plan.held + i :] = 0  # a page that is new here is empty
            _absorb_frame(*entries, tensors[0][:, source], tensors[1][:, source], time, plan)
    for page in plan.pages:
        store.angles[page] = None


def renew(store: KVStore, plan: Renew) -> None:
    """Let frames that leave replace the pages they are least like; all layers at once."""
    pages = torch.tensor(plan.pages, device=store.keys.device)
    summary = lambda tensor, index: widen(tensor[:, :, index]).mean(-3).flatten(-2)  # [layers, B, (n,) H·D]
    for source in plan.sources:
        closeness = sum(
            F.cosine_similarity(summary(tensor, pages), summary(tensor, source)[:, :, None], dim=-1) / 2
            for tensor in (store.keys, store.values)
        )  # [layers, B, n]
        least, place = closeness.min(-1, keepdim=True)
        taken = (torch.arange(len(pages), device=pages.device) == place) & (least < plan.threshold)
        for tensor in (store.keys, store.values):
            kept = tensor[:, :, pages]
            tensor[:, :, pages] = torch.where(taken[..., None, None, None], tensor[:, :, source, None], kept)
    for page in plan.pages:
        store.angles[page] = None


ENTRY = ("counts", "times")  # keys that an entry stands for (0 = it is empty), and the newest one's time


def _absorb_frame(
    keys: Tensor, values: Tensor, counts: Tensor, times: Tensor, key: Tensor, value: Tensor, time: float, plan: Absorb
) -> None:
    """One frame, [B, T, H, D]. Means are rounded to the cache's dtype: few enough keys share one to lose nothing."""
    closeness = F.cosine_similarity(widen(keys), widen(key)[:, None], dim=-1).mean(-1)  # [B, n, T]
    joinable = (counts > 0) & (counts < plan.most)
    best, entry = closeness.masked_fill(~joinable, float("-inf")).max(1)
    joins = best >= plan.threshold  # [B, T]
    empty = torch.arange(-counts.shape[1], 0, device=counts.device, dtype=counts.dtype)[:, None]  # the first one first
    worth = torch.where(counts > 0, counts * ((times - time) / plan.half_life).exp(), empty)
    place = torch.where(joins, entry, worth.argmin(1))[:, None]  # [B, 1, T]
    count = torch.where(joins[:, None], counts.gather(1, place), 0)
    index = place[..., None, None].expand(-1, -1, -1, *key.shape[2:])
    many = count[..., None, None]
    mean = (widen(values.gather(1, index)) * many + widen(value)[:, None]) / (many + 1)
    keys.scatter_(1, index, key[:, None])
    values.scatter_(1, index, mean.to(values.dtype))
    counts.scatter_(1, place, count + 1)
    times.scatter_(1, place, time)


def count_bias(store: KVStore, ordered: Sequence[int], counted: Sequence[int]) -> Tensor:
    """ln n added to the logits of keys that stand for n, [layers, B, 1, 1, L]; -inf for empty entries.

    `ordered`: the pages read, of which `counted` have numbers of their own.
    """
    counts = store.aside["counts"]
    bias = counts.new_zeros(*counts.shape[:2], len(ordered), counts.shape[3])
    pages = torch.tensor(counted, device=counts.device)
    at = torch.tensor([ordered.index(page) for page in counted], device=counts.device)
    bias.index_copy_(2, at, counts.index_select(2, pages).log())
    return bias.flatten(2).to(store.keys.dtype)[:, :, None, None]


def rotate_to_times(store: KVStore, rope: RotaryEmbedding, pages: Sequence[int]) -> None:
    """Rotated copies of pages whose tokens have a time each, the numbers `rope.angles` gives for a whole frame."""
    g, device = store.geometry, store.keys.device
    index = torch.tensor(pages, device=device)
    grid_cos, grid_sin = rope.angles([0.0] * len(pages), g.height, g.width, device=device)
    for layer in range(g.layers):
        times = store.aside["times"][layer].index_select(1, index).flatten(1)  # [B, n·T]
        cos, sin = rope.angles(times, 1, 1, device=device)  # a token as a frame of one: nothing turns but time
        cos, sin = cos * grid_cos - sin * grid_sin, sin * grid_cos + cos * grid_sin
        raw = store.layer_keys[layer].index_select(1, index)
        store.layer_rotated[layer].index_copy_(1, index, rotate(raw.flatten(1, 2), cos, sin).view(raw.shape))
