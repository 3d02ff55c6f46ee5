"""Who may read what: policies write plans from frame numbers alone.

A policy owns reads, capacity, positions and visibility. Memory is laid out [sink | ring | tentative]; a frame's page is
a function of its number and of the frame the sink begins at, so nothing is ever shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from streamgen.cache.plan import FLIGHT, Group, Plan, Segment, Write
from streamgen.errors import InputError
from streamgen.registry import Registry
from streamgen.schedules import Call, CallKind, Row

POLICIES: Registry = Registry("cache policy", "streamgen.policies")
register_policy = POLICIES.register


class CachePolicy(Protocol):
    """What `register_policy` takes: `cls(options, flight_frames, total_frames)`."""

    pages: int  # persistent pages of one lane's cache

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        """Reads and writes of a row; `frames` are each slot's latent frames. Changes nothing."""
        ...

    def commit(self, frames: Sequence[int]) -> None:
        """These frames are now in their pages."""
        ...

    def switch(self, mode: str) -> range | None:
        """A new prompt takes effect: which committed frames are to be re-encoded under it (None = none)."""
        ...

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class WindowOptions:
    """Sizes in latent frames; `window` = sink + recent + flight, -1 = everything (finite streams only)."""

    window: int = 21
    sink: int = 0
    positions: str = "absolute"

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise InputError(f"cache.sink cannot be negative, got {self.sink}")
        if self.window != -1 and self.window < 1:
            raise InputError(f"cache.window is a number of latent frames, or -1 for all of them, got {self.window}")
        if self.positions not in ("absolute", "packed"):
            raise InputError(f"positions.rule {self.positions!r} is unknown: use absolute or packed")


@register_policy("window", WindowOptions)
class WindowPolicy:
    """A static sink and the most recent frames (StreamingLLM's sinks in LongLive's form, arXiv:2509.22622).

    Positions: "absolute" = the frame's own number; "packed" = rank among what is visible, so they never grow.
    """

    def __init__(self, options: WindowOptions, flight_frames: int, total_frames: int | None) -> None:
        self.options = options
        floor = options.sink + flight_frames
        if options.window == -1:
            if total_frames is None:
                raise InputError("cache.window=-1 keeps every frame, which an endless stream cannot: give a window")
            self.sink, self.recent = 0, total_frames
        elif options.window < floor:
            raise InputError(
                f"cache.window={options.window} is below its floor {floor} = cache.sink {options.sink} + "
                f"{flight_frames} frames in flight: raise cache.window or lower cache.sink"
            )
        else:
            self.sink, self.recent = options.sink, options.window - floor
        self.base = 0  # the stream frame the sink begins at
        self.frames = 0  # frames committed so far: the next one's number
        self.oldest = 0  # nothing before this frame is read, the sink apart

    @property
    def pages(self) -> int:
        return self.sink + self.recent

    def page(self, frame: int) -> int | None:
        """Where a frame lies; None if it has no place (a window without recent frames)."""
        offset = frame - self.base
        if offset < self.sink:
            return offset
        return self.sink + (offset - self.sink) % self.recent if self.recent else None

    def visible(self, before: int, without: range = range(0)) -> tuple[list[int], list[int]]:
        """(sink frames, recent frames) that a chunk beginning at frame `before` reads."""
        end = min(before, self.frames)
        sink = [f for f in range(self.base, min(end, self.base + self.sink)) if f not in without]
        first = max(self.base + self.sink, self.oldest, end - self.recent)
        return sink, [f for f in range(first, end) if f not in without]

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        own = [frame for part in frames for frame in part]
        redo = range(own[0], own[-1] + 1) if call.source == "past" else range(0)
        sink, recent = self.visible(own[0] if not redo else self.frames, redo)
        recent = [] if redo else recent
        order = [*sink, *recent, *own]
        packed = self.options.positions == "packed"
        position = dict(zip(order, range(len(order)), strict=True)) if packed else {f: f for f in order}
        segments = [self._segment("sink", sink, position), self._segment("recent", recent, position)]
        flight = Segment(FLIGHT, tuple(range(len(own))), tuple(own), tuple(position[f] for f in own))
        group = Group(flight.pages, flight.positions, tuple(s for s in (*segments, flight) if s.pages))
        return Plan((group,), self._writes(own) if call.kind is CallKind.CLEAN else ())

    def _segment(self, region: str, frames: list[int], position: dict[int, int]) -> Segment:
        return Segment(
            region, tuple(self.page(f) for f in frames), tuple(frames), tuple(position[f] for f in frames)
        )

    def _writes(self, frames: list[int]) -> tuple[Write, ...]:
        """Of several frames that share a page the last one stays; a page nobody reads again is not written."""
        pages = {self.page(frame): Write(index, frame, self.page(frame)) for index, frame in enumerate(frames)}
        pages.pop(None, None)
        return tuple(pages.values())

    def commit(self, frames: Sequence[int]) -> None:
        self.frames = max(self.frames, frames[-1] + 1)

    def switch(self, mode: str) -> range | None:
        if mode == "cut":
            self.oldest = self.frames
        if mode != "recache" or not self.frames:
            return None
        # the sink is re-encoded only while the whole stream fits the window; later it keeps its first prompt
        window = self.options.window
        whole = self.oldest <= self.base and (window == -1 or self.frames - self.base <= window)
        first = self.base if whole else max(self.base + self.sink, self.oldest, self.frames - (window - self.sink))
        return range(first, self.frames) if first < self.frames else None

    def state_dict(self) -> dict:
        return {"base": self.base, "frames": self.frames, "oldest": self.oldest}

    def load_state_dict(self, state: dict) -> None:
        self.base, self.frames, self.oldest = state["base"], state["frames"], state["oldest"]
