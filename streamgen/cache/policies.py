"""Who may read what: policies write plans from frame numbers alone.

A policy owns reads, capacity, positions and visibility. Memory is laid out [sink | ring | tentative]; a frame's page is
a function of its number and of the frame the sink begins at, so nothing is ever shifted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from streamgen.cache.options import WindowOptions
from streamgen.cache.plan import FLIGHT, Fold, Group, Plan, Segment, Write
from streamgen.cache.positions import Seen, position_rule
from streamgen.cache.rebuild import Rebuild, attenuated, block_causal
from streamgen.errors import InputError
from streamgen.registry import Registry
from streamgen.schedules import Call, CallKind, Row, SlotOp

Pages = Sequence[tuple[int, int]]  # frames and where they lie

POLICIES: Registry = Registry("cache policy", "streamgen.policies")
register_policy = POLICIES.register


@dataclass(frozen=True, slots=True)
class Sizes:
    """Latent frames of a chunk, of all chunks in flight at most, and of the stream (None = endless).

    `published`: whether the schedule publishes finished chunks; without it there is nothing to keep.
    """

    chunk: int
    flight: int
    total: int | None = None
    published: bool = True


def needs_solo(sizes: Sizes, cause: str) -> None:
    """Raises InputError where chunks are in flight together, which `cause` cannot do with."""
    if sizes.flight > sizes.chunk:
        raise InputError(f"{cause}, for which one must be alone in flight: use schedule.coupling=solo")


class CachePolicy(Protocol):
    """What `register_policy` takes: `cls(options, sizes)`. Inherit from it: what has a default here may be left out.

    `options` are made from `cache.options`, or by their own `from_config(StreamConfig)` if they have one.
    """

    pages: int  # persistent pages of one lane's cache
    own_texts: bool = False  # whether past frames are ever told their own prompts again
    pictures: bool = False  # whether latents are ever made anew from pixels
    rebuilt: int = 0  # frames that `rebuild` asks for, at most
    # what the store keeps beside keys and values, in float32 for every layer and sample: a number for every token
    # (None), or as many vectors as wide as a key
    aside: Mapping[str, int | None] = MappingProxyType({})

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        """Reads and writes of a row; `frames` are each slot's latent frames. Changes nothing."""
        ...

    def commit(self, frames: Sequence[int]) -> None:
        """These frames are now in their pages."""
        ...

    def switch(self, mode: str, requested: int) -> Sequence[int] | None:
        """A new prompt takes effect at the next chunk: which committed frames are to be re-encoded (None = none).

        Called before they are; `switched` afterwards. `requested`: the latent frame the user named.
        """
        return None

    def rebuild(self, first: int, changing: bool) -> Rebuild | None:
        """What is to be encoded again before the chunk that begins at frame `first`; None once it is, or for good.

        Asked as the chunk enters; with `changing` also before a new prompt takes effect with it.
        """
        return None

    def keeps(self) -> Collection[int]:
        """Frames whose latents may be asked for after the window has passed them."""
        return ()

    def switched(self, mode: str, requested: int) -> None:
        """The new prompt is in effect."""

    def variant(self, row: Row) -> object:
        """What a plan depends on besides a row's frames: steps of a chunk with equal variants share one plan."""
        return any(slot.publish for slot in row.slots)

    def reach(self) -> int | None:
        """Temporal positions that a query and its keys may span; None = they grow with an endless stream."""
        return None

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


@register_policy("window", WindowOptions)
class WindowPolicy(CachePolicy):
    """A sink and the most recent frames (StreamingLLM's sinks in LongLive's form, arXiv:2509.22622)."""

    extra_region, extra_fixed, extra_counted = "extra", False, False

    def __init__(self, options: WindowOptions, sizes: Sizes) -> None:
        self.options, self.sizes = options, sizes
        self.rule = position_rule(options.positions)
        floor = options.sink + sizes.flight
        if options.window == -1:
            if sizes.total is None:
                raise InputError("cache.window=-1 keeps every frame, which an endless stream cannot: give a window")
            self.sink, self.ring = 0, sizes.total
        elif options.window < floor:
            raise InputError(
                f"cache.window={options.window} is below its floor {floor} = cache.sink {options.sink} + "
                f"{sizes.flight} frames in flight: raise cache.window or lower cache.sink"
            )
        else:
            self.sink = options.sink
            self.ring = (options.capacity or options.window) - options.sink - sizes.chunk
        if options.ema_decay is not None:
            self._needs_ring("cache.ema_decay folds")
        if not sizes.published:
            self.sink = self.ring = 0
        self.base = 0  # the stream frame the sink begins at
        self.frames = 0  # frames committed so far: the next one's number
        self.oldest = 0  # nothing before this frame is read, the sink apart

    def _needs_ring(self, cause: str) -> None:
        """Raises InputError where no frame ever leaves the window, which `cause` does something with."""
        options, chunk = self.options, self.sizes.chunk
        if self.ring < chunk:
            raise InputError(
                f"{cause} frames that leave the window, and cache.window={options.window} keeps {self.ring} beside "
                f"cache.sink {options.sink} and a chunk: give {options.sink + 2 * chunk} or more"
            )

    @property
    def changes_sink(self) -> bool:
        """Whether what leaves the window becomes part of the sink."""
        return self.options.ema_decay is not None

    @property
    def reserved(self) -> int:
        """Pages between sink and ring that a policy with a region of its own fills."""
        return 0

    @property
    def pages(self) -> int:
        return self.sink + self.reserved + self.ring

    def page(self, frame: int) -> int | None:
        """Where a frame lies; None if it has no place (a window without recent frames)."""
        offset = frame - self.base
        if offset < self.sink:
            return offset
        return self.sink + self.reserved + (offset - self.sink) % self.ring if self.ring else None

    # ------------------------------------------------------------------------------------------- reads
    def visible(self, end: int, room: int) -> tuple[range, range]:
        """(sink frames, recent frames) before frame `end` for a call that has room for so many recent ones."""
        end = min(end, self.frames)
        sink = range(self.base, max(self.base, min(end, self.base + self.sink)))
        first = max(self.base + self.sink, self.oldest, end - min(room, self.ring))
        return sink, range(min(first, end), end)

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        own = [frame for part in frames for frame in part]
        if call.source != "flight":
            groups = self._recache_groups(own)
        elif call.commits and self.options.commit_reads == "tail":
            groups = (self._tail_group(own),)
        elif row.causal or len({slot.op is SlotOp.CLEAN for slot in row.slots}) > 1:
            groups = tuple(self._group(own, part) for part in self._causal_parts(row, frames))
        else:
            groups = (self._group(own, (0, len(own), len(own))),)
        published, folds = own, ()
        if call.kind is CallKind.DENOISE and self.options.attention_bias < 1:
            groups = tuple(attenuated(group, math.log(self.options.attention_bias)) for group in groups)
        if call.source == "flight":
            published = row.published(frames)
            folds = self._folds(published)
        return Plan(groups, self._writes(own, published), folds)

    def _causal_parts(self, row: Row, frames: Sequence[range]) -> list[tuple[int, int, int]]:
        """(first query, end of queries, end of keys) as indices into the call, one part per set of readers."""
        parts, start = [], 0
        for slot, part in zip(row.slots, frames, strict=True):
            alone = row.causal or slot.op is SlotOp.CLEAN
            stop = start + len(part)
            if parts and not alone and not parts[-1][3]:  # slots that see each other are one part
                first, *_ = parts.pop()
                parts.append((first, stop, stop, False))
            else:
                parts.append((start, stop, stop, alone))
            start = stop
        return [part[:3] for part in parts]

    def _group(self, own: list[int], part: tuple[int, int, int]) -> Group:
        """Queries own[first:stop] that read the cache and own[:end]."""
        first, stop, end = part
        window = self.options.window
        room = self.ring if window == -1 else window - self.sink - end
        sink, recent = self.visible(own[0], max(0, room))
        return self._read(sink, recent, own, part, self._extra(own[0], sink, recent))

    def _extra(self, first: int, *seen: Sequence[int]) -> Pages:
        """What a call beginning at frame `first` reads of a region of its own, besides what it sees anyway."""
        return ()

    def _tail_group(self, own: list[int]) -> Group:
        """The last frames in a row, at their own numbers."""
        first = own[-1] + 1 - self.options.window
        sink = [f for f in range(self.base, self.base + self.sink) if first <= f < own[0]]
        recent = range(max(self.base + self.sink, self.oldest, first), own[0])
        return self._read(sink, recent, own, (0, len(own), len(own)), rule=position_rule("absolute"))

    def _recache_groups(self, own: list[int]) -> tuple[Group, ...]:
        group = self._recache_group(own)
        return (group,) if self.options.mask == "bidirectional" else block_causal(group, self._blocks(own))

    def _blocks(self, own: list[int]) -> list[int]:
        """Where each chunk begins among re-encoded frames."""
        chunks = [frame // self.sizes.chunk for frame in own]
        return [i for i, chunk in enumerate(chunks) if i == 0 or chunk != chunks[i - 1]]

    def _recache_group(self, own: list[int]) -> Group:
        """Re-encoded frames see each other and the sink before them, which may be among them."""
        sink = [f for f in range(self.base, min(self.frames, self.base + self.sink)) if f < own[0]]
        extra = self._extra(max(0, self.frames - self.options.window), sink, own)
        apart = own[-1] - own[0] + 1 > len(own)  # the sink and, after a gap, the window
        lead = sum(frame < self.base + self.sink for frame in own) if apart else 0
        return self._read(sink, range(0), own, (0, len(own), len(own)), extra, lead=lead)

    def _read(
        self, sink, recent, own: list[int], part: tuple[int, int, int], extra: Pages = (), rule=None, lead: int = 0
    ) -> Group:
        """Queries own[first:stop] over the sink, `extra` (frame, page), recent frames and own[:end].

        `lead`: so many of the call's own frames are the sink, and stand where it is read; `sink` is empty then.
        """
        first, stop, end = part
        place = lambda frames: [(frame, self.page(frame)) for frame in frames]
        regions = (("sink", place(sink)), (self.extra_region, extra), ("recent", place(recent)))
        ahead, others, options = [*sink, *own[:lead]], [f for f, _ in extra], self.options
        sizes = (options.window, options.span, self.sizes.chunk, options.lead, options.restart)
        seen = Seen(ahead, others, recent, own[lead:end], *sizes)
        positions = tuple((rule or self.rule)(seen))
        if lead:  # they are the call's own: behind `extra` in reading order
            split = lead + len(others)
            positions = positions[lead:split] + positions[:lead] + positions[split:]
        segments, start = [], 0
        for name, places in regions:
            frames, pages = tuple(f for f, _ in places), tuple(page for _, page in places)
            at = positions[start : start + len(places)]
            own_region = name == self.extra_region
            fixed, counted = own_region and self.extra_fixed, own_region and self.extra_counted
            segments.append(Segment(name, pages, frames, at, fixed=fixed, counted=counted))
            start += len(places)
        segments.append(Segment(FLIGHT, tuple(range(end)), tuple(own[:end]), positions[start:]))
        queries = positions[start + first : start + stop]
        return Group(tuple(range(first, stop)), queries, tuple(s for s in segments if s.pages))

    # ------------------------------------------------------------------------------------------- writes
    def _writes(self, own: list[int], published: list[int]) -> tuple[Write, ...]:
        """Of several frames that share a page the last one stays; a page nobody reads again is not written."""
        index = {frame: i for i, frame in enumerate(own)}
        pages = {self.page(frame): Write(index[frame], frame, self.page(frame)) for frame in published}
        pages.pop(None, None)
        return tuple(pages.values())

    def _folds(self, published: list[int]) -> tuple[Fold, ...]:
        """Frames that these push out of the ring, into the sink in turn; done before anything is written."""
        if self.options.ema_decay is None or not published:
            return ()
        return tuple(
            Fold(self.page(f), (f - self.base) % self.sink, self.options.ema_decay, self.options.ema_precision)
            for f in self._leaving(published)
        )

    def _leaving(self, published: Sequence[int]) -> range:
        """Frames that these push out of the ring."""
        first = max(self.base + self.sink, self.oldest)  # what was cut is gone
        return range(max(first, self.frames - self.ring), min(self.frames, published[-1] + 1 - self.ring))

    def commit(self, frames: Sequence[int]) -> None:
        self.frames = max(self.frames, frames[-1] + 1)

    def reach(self) -> int | None:
        options, total = self.options, self.sizes.total
        if options.positions in ("tri-region", "restart"):
            return options.restart or options.span
        if options.window == -1 or (options.positions == "absolute" and self._lags()):
            return total
        gap = options.lead + (self.sizes.chunk if options.positions == "trail" else 0)
        return min(options.window + gap, total or options.window + gap) + self._extra_frames()

    def _lags(self) -> bool:
        """Whether something stays visible that the stream moves away from."""
        return bool(self.sink or self._extra_frames())

    def _extra_frames(self) -> int:
        """Most frames that are read besides the window."""
        return 0

    def rebuild(self, first: int, changing: bool) -> Rebuild | None:
        return None

    def keeps(self) -> Collection[int]:
        return range(self.base, self.base + self.sink) if self.options.switch_sink == "refresh" else ()

    def switch(self, mode: str, requested: int) -> Sequence[int] | None:
        if mode == "cut":
            self.oldest = self.frames
        if mode != "recache" or not self.frames:
            return None
        # unless it is refreshed, the sink is re-encoded only while the whole stream fits the window; later it keeps its
        # first prompt, and what has been folded into it
        window = self.options.window
        room = min(window, self.pages) if self.changes_sink else window
        whole = self.oldest <= self.base and (window == -1 or self.frames - self.base <= room)
        if whole:
            first = self.base
        elif self.options.switch_sink == "replace":
            first = self.base = self.oldest = max(self.oldest, self.frames - window)
        else:
            first = max(self.base + self.sink, self.oldest, self.frames - (window - self.sink))
            if self.options.switch_sink == "refresh":
                return (*range(self.base, min(self.frames, self.base + self.sink)), *range(first, self.frames)) or None
        return range(first, self.frames) if first < self.frames else None

    def state_dict(self) -> dict:
        return {"base": self.base, "frames": self.frames, "oldest": self.oldest}

    def load_state_dict(self, state: dict) -> None:
        self.base, self.frames, self.oldest = state["base"], state["frames"], state["oldest"]
