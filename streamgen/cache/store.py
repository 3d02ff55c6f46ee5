"""The bytes of a cache, and self-attention that follows a plan.

Pages hold raw keys (before rotation), values, and a rotated copy of the keys that is refreshed only where a plan wants
another position: once per chunk for packed positions, once per frame for absolute ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamgen.cache import content
from streamgen.cache.plan import FLIGHT, Fold, Group, Merge, Plan, Record, Segment, Write
from streamgen.kernels.attention import attend
from streamgen.kernels.rope import rotate
from streamgen.models.blocks import TextKeys, widen
from streamgen.models.context import in_order, take_frames
from streamgen.models.rope import RotaryEmbedding

FIXED = ("fixed",)  # the rotated copy of a page is the page
TIMED = ("timed",)  # its tokens are rotated to a time each of their own
ROTATED_AT_ONCE = 2**26  # bytes of keys: rotating takes six times as much for a moment


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of one stream's keys: patch grid height × width per frame, heads × head_dim per token."""

    layers: int
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width


class KVStore:
    """Preallocated pages for inference: [pages + flight] frames per layer, the last ones tentative.

    A call's own keys and values go to the tentative pages, so attention reads one contiguous block once the window is
    full. `publish` copies what a plan writes; until then nothing that others read has changed.
    """

    def __init__(
        self, geometry: Geometry, pages: int, flight: int, dtype: torch.dtype, device: torch.device,
        aside: Mapping[str, int | None] | None = None,
    ) -> None:
        """`aside`: as a policy names it."""
        g = geometry
        self.geometry, self.pages, self.flight = g, pages, flight
        shape = (g.layers, g.batch, pages + flight, g.tokens_per_frame, g.heads, g.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.rotated = torch.zeros_like(self.keys)
        self.angles: list[tuple | None] = [None] * pages  # (position, phase) each page is rotated to, or FIXED
        self.sums: dict[tuple[str, int], Tensor] = {}  # of folded pages, in float32 at least
        wide = torch.promote_types(dtype, torch.float32)
        per_token = (pages, g.tokens_per_frame)
        self.aside: dict[str, Tensor] = {
            name: torch.zeros(
                g.layers, g.batch, *(per_token if n is None else (n, g.heads, g.head_dim)), dtype=wide, device=device
            )
            for name, n in (aside or {}).items()
        }
        self._make_views()

    def _make_views(self) -> None:
        """Per-layer views, made once: slicing costs microseconds, and there are layers × calls of it."""
        self.layer_rotated, self.layer_values = self.rotated.unbind(0), self.values.unbind(0)
        self.layer_keys = self.keys.unbind(0)

    def reserve(self, frames: int) -> None:
        """Make room for calls of so many frames; an exception (out of memory) leaves what the store holds as it was."""
        if frames <= self.flight:
            return
        for name in ("keys", "values", "rotated"):  # one after the other: each is held twice for a moment
            old = getattr(self, name)
            if old.shape[2] < self.pages + frames:  # otherwise an earlier attempt got this far
                new = old.new_zeros(*old.shape[:2], self.pages + frames, *old.shape[3:])
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)
                self._make_views()
        self.flight = frames

    @property
    def nbytes(self) -> int:
        held = (self.keys, self.values, self.rotated, *self.sums.values(), *self.aside.values())
        return sum(t.numel() * t.element_size() for t in held)

    def rotate_pages(self, rope: RotaryEmbedding, wanted: dict[int, tuple]) -> None:
        """Bring the rotated copy of these pages to (position, phase), or as FIXED and TIMED have it."""
        stale = [page for page, angle in wanted.items() if self.angles[page] != angle]
        if not stale:
            return
        timed = [page for page in stale if wanted[page] == TIMED]
        if timed:
            content.rotate_to_times(self, rope, timed)
        for page in [page for page in stale if wanted[page] == FIXED]:
            self.rotated[:, :, page] = self.keys[:, :, page]
        self._rotate(rope, {page: wanted[page] for page in stale if wanted[page] not in (FIXED, TIMED)})
        for page in stale:
            self.angles[page] = wanted[page]

    def _rotate(self, rope: RotaryEmbedding, wanted: dict[int, tuple[float, float]]) -> None:
        if not wanted:
            return
        g = self.geometry
        cos, sin = rope.angles(
            [at for at, _ in wanted.values()], g.height, g.width, [phase for _, phase in wanted.values()],
            self.keys.device,
        )  # fmt: skip
        index = torch.tensor(list(wanted), device=self.keys.device)
        layers = max(1, ROTATED_AT_ONCE // (len(wanted) * self.keys[0, :, 0].nbytes))
        for keys, rotated in zip(self.keys.split(layers), self.rotated.split(layers), strict=True):
            raw = keys.index_select(2, index)  # [layers, B, n, T, H, D]
            turned = rotate(raw.flatten(0, 1).flatten(1, 2), cos, sin).view(raw.shape)
            rotated.index_copy_(2, index, turned)

    def publish(self, plan: Plan, context: CacheContext | None = None, text: TextKeys | None = None) -> None:
        """Make a finished call's frames visible: tentative pages -> their own. `text`: the prompt, for merges."""
        self._fold(plan.folds)
        if plan.absorb is not None:
            content.absorb(self, plan.absorb)
        if plan.renew is not None:
            content.renew(self, plan.renew)
        self._write(plan.writes)
        if plan.remember:
            context.remember()
        if plan.record is not None:
            self._record(plan.record, context.rope)
        if plan.merge is not None:
            self._merge(plan.merge, text)

    def stage(self, plan: Plan, context: CacheContext | None = None) -> None:
        """Keep what later calls of the same chunk read."""
        self._write(plan.stages)

    def _write(self, writes: Sequence[Write]) -> None:
        if not writes:
            return
        source = torch.tensor([self.pages + w.index for w in writes], device=self.keys.device)
        target = torch.tensor([w.page for w in writes], device=self.keys.device)
        for tensor in (self.keys, self.values):
            tensor.index_copy_(2, target, tensor.index_select(2, source))
        for write in writes:
            self.angles[write.page] = None
            for name in ("keys", "values"):
                self.sums.pop((name, write.page), None)

    def _fold(self, folds: Sequence[Fold]) -> None:
        """Blend pages into pages; sums in float32 are kept beside the page they are rounded to."""
        for fold in folds:
            for name, tensor in (("keys", self.keys), ("values", self.values)):
                target = self.sums.get((name, fold.target), widen(tensor[:, :, fold.target]))
                target = torch.lerp(widen(tensor[:, :, fold.source]), target, fold.decay)
                if fold.precision == "fp32":
                    self.sums[name, fold.target] = target
                tensor[:, :, fold.target] = target
            self.angles[fold.target] = None

    def _record(self, record: Record, rope: RotaryEmbedding) -> None:
        """A tentative page -> a page whose keys stay as they are rotated now."""
        g, source = self.geometry, self.pages + record.index
        keys = self.keys[:, :, source]  # [layers, B, T, H, D]
        if record.position is not None:
            cos, sin = rope.angles([record.position], g.height, g.width, device=self.keys.device)
            keys = rotate(keys.flatten(0, 1), cos, sin).view(keys.shape)
        self.keys[:, :, record.page] = keys
        self.values[:, :, record.page] = self.values[:, :, source]
        self.angles[record.page] = None

    def _merge(self, merge: Merge, text: TextKeys) -> None:
        pages = torch.tensor(merge.pages, device=self.keys.device)
        if merge.place is not None:
            for tensor in (self.keys, self.values):
                tensor[:, :, merge.pages[merge.place]] = tensor[:, :, merge.source]
        else:
            for layer, prompt in enumerate(text.keys):  # [B, P, L, H, D]
                bank = self.layer_keys[layer][:, pages]  # [B, n, T, H, D]
                scores = (bank.float().mean(2) * prompt[:, :1].float().mean(2)).sum((2, 3))  # [B, n]
                kept = scores.argsort(dim=1, descending=True, stable=True)[:, : len(pages) - 1]
                for tensor in (self.layer_keys[layer], self.layer_values[layer]):
                    best = tensor[:, pages].gather(1, kept[..., None, None, None].expand(-1, -1, *bank.shape[2:]))
                    tensor[:, pages] = torch.cat([best, tensor[:, merge.source : merge.source + 1]], 1)
        for page in merge.pages:
            self.angles[page] = None

    def bind(self, plan: Plan, rope: RotaryEmbedding) -> CacheContext:
        return CacheContext(self, plan, rope)

    def fork(self) -> KVStore:
        """An independent copy."""
        other = object.__new__(KVStore)
        other.geometry, other.pages, other.flight = self.geometry, self.pages, self.flight
        other.keys, other.values, other.rotated = self.keys.clone(), self.values.clone(), self.rotated.clone()
        other.angles, other.sums = list(self.angles), dict(self.sums)
        other.aside = {name: tensor.clone() for name, tensor in self.aside.items()}
        other._make_views()
        return other

    def state_dict(self) -> dict:
        """Keys and values of the persistent pages, what is kept beside them; the rotated copy follows from these."""
        return {
            "keys": self.keys[:, :, : self.pages].clone(),
            "values": self.values[:, :, : self.pages].clone(),
            "sums": dict(self.sums),
            **{name: tensor.clone() for name, tensor in self.aside.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        self.keys[:, :, : self.pages] = state["keys"]
        self.values[:, :, : self.pages] = state["values"]
        self.sums = {key: tensor.to(self.keys.device) for key, tensor in state["sums"].items()}
        for name, tensor in self.aside.items():
            tensor.copy_(state[name])
        self.angles = [None] * self.pages


class CacheContext:
    """Self-attention of every call that shares one plan over a `KVStore` (an `AttentionContext`)."""

    def __init__(self, store: KVStore, plan: Plan, rope: RotaryEmbedding) -> None:
        self.store, self.plan, self.rope = store, plan, rope
        self.keep = plan.publishes or bool(plan.stages)  # raw keys are needed only if they may be published
        wanted: dict[int, tuple] = {}
        for segment in _cached_segments(plan):
            for page, position in zip(segment.pages, segment.positions, strict=True):
                angle = FIXED if segment.fixed else TIMED if segment.counted else (position, segment.phase)
                if wanted.setdefault(page, angle) != angle:
                    raise ValueError(f"page {page} is read at two positions in one call: plan two calls instead")
        store.rotate_pages(rope, wanted)
        self.choice = None if plan.choose is None else content.Choice(store, plan.choose)
        self.asked: dict[int, Tensor] = {}  # queries per layer, summed over each frame, [B, F, H, D]
        watch = self._watch if plan.choose or plan.remember else None
        self.groups = [_BoundGroup(store, group, rope, watch) for group in plan.groups]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.stage(layer, key, value)
        outputs = [group.attend(layer, query, key) for group in self.groups]
        return in_order(outputs, [group.query_frames for group in self.plan.groups])

    def _watch(self, layer: int, query: Tensor) -> None:
        """What is done with the rotated queries of a call of one group, before it reads."""
        frames = widen(query).unflatten(1, (-1, self.store.geometry.tokens_per_frame)).sum(2)
        if self.choice is not None:
            self.choice.make(layer, frames.sum(1))
        self.asked[layer] = frames

    def remember(self) -> None:
        """Publish the queries of this call."""
        for layer, frames in self.asked.items():
            for index, place in self.plan.remember:
                self.store.aside["queries"][layer, :, place] = frames[:, index]

    def stage(self, layer: int, key: Tensor, value: Tensor) -> None:
        store = self.store
        count = key.shape[1] // store.geometry.tokens_per_frame
        pages = slice(store.pages, store.pages + count)
        store.layer_values[layer][:, pages] = value.unflatten(1, (count, -1))
        if self.keep:
            store.layer_keys[layer][:, pages] = key.unflatten(1, (count, -1))


def _cached_segments(plan: Plan) -> list[Segment]:
    read = [segment for group in plan.groups for segment in group.segments if segment.region != FLIGHT]
    return [*read, *plan.choose.segments] if plan.choose else read


class _BoundGroup:
    """One group of a plan: its angles, and which pages of the block it reads."""

    def __init__(
        self, store: KVStore, group: Group, rope: RotaryEmbedding, watch: Callable[[int, Tensor], None] | None = None
    ) -> None:
        g, device = store.geometry, store.keys.device
        self.store, self.group, self.watch = store, group, watch
        self.cos, self.sin = rope.angles(
            list(group.query_positions), g.height, g.width, shared_phase(group.query_phases), device
        )
        flight = [s for s in group.segments if s.region == FLIGHT]
        self.own = [i for s in flight for i in s.pages]
        own_positions = [p for s in flight for p in s.positions]
        phases = [s.phase for s in flight for _ in s.pages]
        self.same = self.own == list(group.query_frames) and own_positions == list(group.query_positions)
        self.same = self.same and shared_phase(phases) == shared_phase(group.query_phases)
        if not self.same:
            self.key_cos, self.key_sin = rope.angles(own_positions, g.height, g.width, phases, device)
        routed = group.route.regions if group.route else ()
        self.routed = [p for s in group.segments if s.region in routed for p in s.pages]
        self.candidates = torch.tensor(self.routed, device=device)
        pages = [p for s in group.segments if s.region not in (*routed, FLIGHT) for p in s.pages]
        pages += [store.pages + i for i in self.own]
        ordered = sorted(pages)
        self.block = None  # the pages as one slice where they lie side by side: attention does not mind the order
        if ordered == list(range(ordered[0], ordered[-1] + 1)):
            self.block = slice(ordered[0], ordered[-1] + 1)
        else:
            self.index = torch.tensor(ordered, device=device)
        self.bias = _token_bias(group, store, ordered, device)
        if self.bias is not None and self.routed:  # what a head picks stands in front, and counts in full
            picked = min(group.route.count, len(self.routed)) * g.tokens_per_frame
            self.bias = torch.nn.functional.pad(self.bias, (picked, 0))
        counted = [page for s in group.segments if s.counted for page in s.pages]
        self.biases = content.count_bias(store, ordered, counted) if counted else None
        if self.biases is not None and self.bias is not None:
            self.biases = self.biases + self.bias
        self.whole = list(group.query_frames) == list(range(len(group.query_frames)))
        # tentative pages of the group's own keys: a slice where they lie side by side
        self.own_run = None
        if _contiguous(self.own):
            self.own_run = slice(store.pages + self.own[0], store.pages + self.own[-1] + 1)
        self.own_first = self.own == list(range(len(self.own)))

    def attend(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """Queries and keys of the whole call, raw; values are staged already."""
        store, tokens = self.store, self.store.geometry.tokens_per_frame
        if not (self.whole and query.shape[1] == len(self.group.query_frames) * tokens):
            query = take_frames(query, self.group.query_frames, tokens)
        own = key if self.own_first and key.shape[1] == len(self.own) * tokens else take_frames(key, self.own, tokens)
        query = rotate(query, self.cos, self.sin)
        if self.watch is not None:
            self.watch(layer, query)
        own = rotate(own, *((self.cos, self.sin) if self.same else (self.key_cos, self.key_sin)))
        rotated = store.layer_rotated[layer]
        own = own.unflatten(1, (-1, tokens))
        if self.own_run:
            rotated[:, self.own_run] = own
        else:
            for i, frame in enumerate(self.own):
                rotated[:, store.pages + frame] = own[:, i]
        keys, values = self._read(rotated), self._read(store.layer_values[layer])
        if self.routed:
            picked = self._route(query, rotated, store.layer_values[layer])
            keys, values = (torch.cat(pair, 1) for pair in zip(picked, (keys, values), strict=True))
        return attend(query, keys, values, mask=self.bias if self.biases is None else self.biases[layer])

    def _route(self, query: Tensor, rotated: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the pages whose mean key agrees best with the mean query, per head."""
        keys, values = rotated[:, self.candidates], values[:, self.candidates]  # [B, n, T, H, D]
        scores = torch.einsum("bhd,bnhd->bnh", query.float().mean(1), keys.float().mean(2))
        chosen = scores.topk(min(self.group.route.count, len(self.routed)), 1).indices.sort(1).values
        index = chosen[:, :, None, :, None].expand(-1, -1, keys.shape[2], -1, keys.shape[4])
        return keys.gather(1, index).flatten(1, 2), values.gather(1, index).flatten(1, 2)

    def _read(self, layer: Tensor) -> Tensor:
        """[B, pages, T, H, D] -> [B, L, H, D]."""
        pages = layer[:, self.block] if self.block else layer.index_select(1, self.index)
        return pages.flatten(1, 2)


def shared_phase(phases: Sequence[float]) -> float | list[float]:
    """One number where frames share it: such tables are kept."""
    return list(phases) if len(set(phases)) > 1 else phases[0] if phases else 0.0


def _contiguous(items: Sequence[int]) -> bool:
    return bool(items) and list(items) == list(range(items[0], items[0] + len(items)))


def _token_bias(group: Group, store: KVStore, ordered: list[int], device) -> Tensor | None:
    """[1, L] additive logits, or None when no segment asks for one."""
    if not any(s.log_bias for s in group.segments):
        return None
    bias = {}
    for segment in group.segments:
        offset = store.pages if segment.region == FLIGHT else 0
        bias.update({offset + page: segment.log_bias for page in segment.pages})
    per_page = torch.tensor([bias[page] for page in ordered], dtype=store.keys.dtype, device=device)
    return per_page.repeat_interleave(store.geometry.tokens_per_frame)[None]
