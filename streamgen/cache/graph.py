"""A cache that gradients pass: the pages of a training roll-out, and the self-attention that reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamgen.cache.plan import FLIGHT, Group, Plan, Write
from streamgen.cache.store import Geometry, shared_phase
from streamgen.errors import InputError
from streamgen.kernels.attention import attend
from streamgen.kernels.rope import rotate
from streamgen.models.blocks import TextKeys
from streamgen.models.context import in_order, take_frames
from streamgen.models.rope import RotaryEmbedding


class GraphStore:
    """Pages for training: published tensors are kept, never overwritten, so gradients flow through the cache.

    A context remembers the very tensors it was bound to, so a recompute under activation checkpointing reads what the
    first pass read; a tensor changed in place meanwhile is refused.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.layers: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(geometry.layers)]

    def reserve(self, frames: int) -> None:
        """Nothing to do: nothing is allocated in advance."""

    def publish(self, plan: Plan, context: GraphContext, text: TextKeys | None = None) -> None:
        for fold in plan.folds:
            for pages in self.layers:
                blend = (torch.lerp(new, old, fold.decay) for new, old in zip(pages[fold.source], pages[fold.target]))
                pages[fold.target] = tuple(blend)
        self._write(plan.writes, context)

    def stage(self, plan: Plan, context: GraphContext) -> None:
        self._write(plan.stages, context)

    def _write(self, writes: Sequence[Write], context: GraphContext) -> None:
        for layer, (key, value) in context.staged.items():
            tokens = self.geometry.tokens_per_frame
            keys, values = (t.unflatten(1, (-1, tokens)) for t in (key, value))
            for write in writes:
                self.layers[layer][write.page] = (keys[:, write.index], values[:, write.index])

    def bind(self, plan: Plan, rope: RotaryEmbedding) -> GraphContext:
        if plan.by_content:
            raise InputError(
                "what this cache keeps is chosen by content, which no gradient passes: stream without gradients, or "
                "use cache.policy=window"
            )
        return GraphContext(self, plan, rope)

    def fork(self) -> GraphStore:
        """An independent copy with the same past: gradients of both reach it."""
        other = GraphStore(self.geometry)
        other.layers = [dict(pages) for pages in self.layers]
        return other


class GraphContext:
    """Self-attention of one forward over a `GraphStore`, differentiable."""

    def __init__(self, store: GraphStore, plan: Plan, rope: RotaryEmbedding) -> None:
        self.plan = plan
        self.groups = [_GraphGroup(store, group, rope) for group in plan.groups]
        self.versions = [self._versions(layer) for layer in range(store.geometry.layers)]
        self.staged: dict[int, tuple[Tensor, Tensor]] = {}

    def _versions(self, layer: int) -> list[tuple[int, int]]:
        return [(k._version, v._version) for group in self.groups for k, v in group.past[layer]]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.versions[layer] != self._versions(layer):
            raise RuntimeError(
                "the cache changed in place between a forward and its recompute: gradients would be those of another "
                "history; run backward before changing cached tensors"
            )
        self.stage(layer, key, value)
        outputs = [group.attend(layer, query, key, value) for group in self.groups]
        return in_order(outputs, [group.query_frames for group in self.plan.groups])

    def stage(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self.plan.publishes or self.plan.stages:
            self.staged.setdefault(layer, (key, value))  # the first pass counts, not its recompute


class _GraphGroup:
    """One group of a plan over the tensors that were published when it was bound."""

    def __init__(self, store: GraphStore, group: Group, rope: RotaryEmbedding) -> None:
        g = store.geometry
        self.group, self.tokens = group, g.tokens_per_frame
        cached = [s for s in group.segments if s.region != FLIGHT]
        flight = [s for s in group.segments if s.region == FLIGHT]
        self.own = [i for s in flight for i in s.pages]
        self.past = [[layer[page] for s in cached for page in s.pages] for layer in store.layers]
        self.queries = rope.angles(list(group.query_positions), g.height, g.width, shared_phase(group.query_phases))
        positions = [p for s in (*cached, *flight) for p in s.positions]
        phases = [s.phase for s in (*cached, *flight) for _ in s.pages]
        self.keys = rope.angles(positions, g.height, g.width, shared_phase(phases))
        biases = [s.log_bias for s in (*cached, *flight) for _ in s.pages]
        self.bias = torch.tensor(biases).repeat_interleave(self.tokens)[None] if any(biases) else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = take_frames(query, self.group.query_frames, self.tokens)
        key, value = (take_frames(x, self.own, self.tokens) for x in (key, value))
        keys = torch.cat([*(k for k, _ in self.past[layer]), key], 1)
        values = torch.cat([*(v for _, v in self.past[layer]), value], 1)
        query = rotate(query, *(t.to(query.device) for t in self.queries))
        keys = rotate(keys, *(t.to(query.device) for t in self.keys))
        mask = None if self.bias is None else self.bias.to(query)
        return attend(query, keys, values, mask=mask)
