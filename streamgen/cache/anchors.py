"""Anchors: the first chunk under each prompt, kept for good and read between sink and window (Anchor Forcing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamgen.cache.options import WindowOptions, needs_own_commits
from streamgen.cache.plan import Plan, Write
from streamgen.cache.policies import Pages, Sizes, WindowPolicy, needs_solo, register_policy
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.schedules import Call, CallKind, Row


@dataclass(frozen=True)
class AnchorOptions(WindowOptions):
    """A window and its anchors.

    Args:
        anchors: chunks kept, the newest of those captured; 0 = none.
        anchor_every: capture every so many chunks instead of at switches, as the release's single-prompt loop does: the
            chunk being captured then reads its own earlier steps.
        anchor_switch: with `anchor_every`, the frame that must have left the window before anchors are read.
    """

    anchors: int = 1
    anchor_every: int | None = None
    anchor_switch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchors < 0:
            raise InputError(f"cache.anchors cannot be negative, got {self.anchors}")
        if self.anchor_every is not None and self.anchor_every < 1:
            raise InputError(f"cache.anchor_every is a number of chunks, got {self.anchor_every}")
        if self.anchor_every is not None and self.anchors > 1:
            raise InputError(
                f"cache.anchor_every={self.anchor_every} reads the earlier steps of the one anchor being captured, and "
                f"cache.anchors is {self.anchors}: use cache.anchors=1"
            )
        if self.window == -1 or not self.sink:
            raise InputError(f"anchors need a window and a sink: cache.window={self.window}, cache.sink={self.sink}")

    @classmethod
    def from_config(cls, config: StreamConfig) -> AnchorOptions:
        needs_own_commits(config)
        base, cache = vars(WindowOptions.from_config(config)), config.cache
        return cls(**base, anchors=cache.anchors, anchor_every=cache.anchor_every, anchor_switch=cache.anchor_switch)


@dataclass(frozen=True)
class Anchor:
    """A captured chunk: its first frame, its place among the anchors, and the frame its prompt was asked for."""

    start: int
    place: int
    switch: int


@register_policy("anchor", AnchorOptions)
class AnchorPolicy(WindowPolicy):
    """Sink, anchors, recent frames. An anchor is read once its switch has left the window.

    Pages: [sink | anchors | the anchor being captured | ring].
    """

    extra_region = "anchor"

    def __init__(self, options: AnchorOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        room = options.span - options.window - options.sink
        if options.positions == "tri-region" and 0 < self._extra_frames() > room:
            raise InputError(
                f"cache.anchors={options.anchors} of {sizes.chunk} frames do not fit between sink and window: "
                f"positions.span={options.span} leaves {max(0, room)} positions beside cache.window={options.window} "
                f"and cache.sink={options.sink}"
            )
        if options.anchor_every:
            needs_solo(sizes, "cache.anchor_every lets a chunk read its own earlier steps")
        self.anchors: tuple[Anchor, ...] = ()
        self.since = options.anchor_switch  # the newest switch, as asked for
        self.captures: tuple[int, ...] = ()  # switches whose first chunks are not yet committed

    @property
    def reserved(self) -> int:
        return (self.options.anchors + 1) * self.sizes.chunk

    def _extra_frames(self) -> int:
        return self.options.anchors * self.sizes.chunk

    def _anchor_pages(self, place: int) -> range:
        start = self.sink + place * self.sizes.chunk
        return range(start, start + self.sizes.chunk)

    # ------------------------------------------------------------------------------------------- reads
    def _extra(self, first: int, *seen: Sequence[int]) -> Pages:
        """Anchor frames and their pages."""
        if not self.since + self.options.window - self.sink < first:
            return ()
        frames = [anchor.start + i for anchor in self.anchors for i in range(self.sizes.chunk)]
        pages = [page for anchor in self.anchors for page in self._anchor_pages(anchor.place)]
        twice = () if self.options.anchor_every else seen  # that loop lets them stand twice
        return [(f, page) for f, page in zip(frames, pages, strict=True) if not any(f in part for part in twice)]

    # ------------------------------------------------------------------------------------------- writes
    def _captures(self, first: int) -> bool:
        every = self.options.anchor_every
        if not self.options.anchors:
            return False
        return bool(self._due(first)) if every is None else first // self.sizes.chunk % every == 0

    def _due(self, first: int) -> tuple[int, ...]:
        """Switches that have taken effect by frame `first`."""
        return tuple(switch for switch in self.captures if switch <= first)

    def variant(self, row: Row) -> object:
        first = row.slots[0].chunk * self.sizes.chunk
        early = self._captures(first) and row.slots[0].p_in == 0
        return super().variant(row), early

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        plan = super().plan(call, row, frames)
        if call.source != "flight" or not self._captures(frames[0].start):
            return plan
        own = frames[0]
        target = self._anchor_pages(self._place() if call.kind is CallKind.CLEAN else self.options.anchors)
        writes = tuple(Write(i, f, page) for i, (f, page) in enumerate(zip(own, target, strict=True)))
        if call.kind is CallKind.CLEAN:
            plan = replace(plan, writes=plan.writes + writes)
        elif self.options.anchor_every:
            plan = replace(plan, stages=writes)
        return self._own_steps(plan, row, own)

    def _own_steps(self, plan: Plan, row: Row, own: range) -> Plan:
        """After its first step a chunk captured every so often reads what it staged instead of the last anchor."""
        if not self.options.anchor_every or row.slots[0].p_in == 0:
            return plan
        (group,) = plan.groups
        staged = self._anchor_pages(self.options.anchors)
        segments = tuple(
            replace(s, pages=tuple(staged), frames=tuple(own)) if s.region == self.extra_region else s
            for s in group.segments
        )
        return replace(plan, groups=(replace(group, segments=segments),))

    def _place(self) -> int:
        """Where the next anchor goes: a free place, or the oldest one's."""
        taken = {anchor.place for anchor in self.anchors}
        free = [place for place in range(self.options.anchors) if place not in taken]
        return free[0] if free else self.anchors[0].place

    def commit(self, frames: Sequence[int]) -> None:
        fresh = frames[-1] >= self.frames  # not a re-encoding
        if fresh and self._captures(frames[0]):
            due = self._due(frames[0])
            anchor = Anchor(frames[0], self._place(), due[-1] if due else self.since)
            self.anchors = (*(a for a in self.anchors if a.place != anchor.place), anchor)
            self.captures = self.captures[len(due) :]
        super().commit(frames)

    def switched(self, mode: str, requested: int) -> None:
        if self.options.anchor_every is None:
            self.since = requested
            self.captures += (requested,)

    def state_dict(self) -> dict:
        anchors = [(a.start, a.place, a.switch) for a in self.anchors]
        return {**super().state_dict(), "anchors": anchors, "since": self.since, "captures": self.captures}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.anchors = tuple(Anchor(*saved) for saved in state["anchors"])
        self.since, self.captures = state["since"], tuple(state["captures"])
