"""A stream of shots: a few frames of earlier ones, encoded once per shot, before the shot's own window (ShotStream)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamgen.cache.context import check_packed
from streamgen.cache.options import WindowOptions, needs_own_commits
from streamgen.cache.plan import Group, Plan, Write
from streamgen.cache.policies import Pages, Sizes, WindowPolicy, needs_solo, register_policy
from streamgen.cache.positions import Seen, packed
from streamgen.cache.rebuild import Rebuild
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.schedules import Call, Row


@dataclass(frozen=True)
class ShotOptions(WindowOptions):
    """`window` is the shot's own; a context of earlier shots comes on top.

    Args:
        context: frames taken from all earlier shots together.
        phase: radians between the temporal angles of one shot and the next.
        blank: the first shot, which has nothing before it, reads as many blank frames (zero latents).
        pixels: make the latents of context frames anew, each alone, from the pictures they were shown as.
    """

    context: int = 6
    phase: float = 0.0
    blank: bool = False
    pixels: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink:
            raise InputError(f"cache.policy=shots has a context where a sink would be: cache.sink={self.sink}, use 0")
        if not 1 <= self.context <= self.window:
            raise InputError(f"cache.context.frames={self.context} must lie between 1 and cache.window={self.window}")

    @classmethod
    def from_config(cls, config: StreamConfig) -> ShotOptions:
        check_packed(config)
        needs_own_commits(config)
        own, base = config.cache.context, vars(WindowOptions.from_config(config))
        return cls(**base, context=own.frames, phase=own.phase, blank=own.blank, pixels=own.pixels)


@dataclass(frozen=True)
class Shot:
    """A finished shot: its number, and the frames of it that are still kept, first to last."""

    number: int
    first: int
    last: int


def share(shot: int, shots: int, frames: int) -> int:
    """Of so many context frames, how many one of so many shots gives: as many each, the rest to the latest.

    >>> [share(shot, 4, 6) for shot in range(4)], [share(shot, 7, 6) for shot in range(7)]
    ([1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1])
    """
    each, rest = divmod(frames, shots)
    return each + (shot >= shots - rest)


def spread(first: int, last: int, count: int) -> list[int]:
    """`count` frames evenly from first to last (one: the first); fewer where the shot has not as many.

    >>> spread(0, 20, 6), spread(21, 41, 1), spread(0, 2, 6)
    ([0, 4, 8, 12, 16, 20], [21], [0, 1, 2])
    """
    gaps = max(1, count - 1)
    return list(dict.fromkeys(first + (2 * (last - first) * i + gaps) // (2 * gaps) for i in range(count)))


@register_policy("shots", ShotOptions)
class ShotPolicy(WindowPolicy):
    """Context of earlier shots at positions 0 …, the shot's window behind it, an angle between shots.

    A cut begins a shot: nothing recent is left, and the context is chosen anew, each frame under its own prompt.
    Pages: [context | ring].
    """

    extra_region = "context"
    own_texts = True

    def __init__(self, options: ShotOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        needs_solo(sizes, "cache.policy=shots begins a shot between chunks")
        self.pictures = options.pixels
        self.rule = self._positions
        self.shot, self.start = 0, 0  # the present one's number and first frame
        self.shots: tuple[Shot, ...] = ()  # earlier ones that may still give frames
        self.context: tuple[int, ...] = ()  # frames by page
        self.ready = False  # whether they are this shot's

    @property
    def rebuilt(self) -> int:
        return self.options.context

    @property
    def reserved(self) -> int:
        return self.options.context

    def _extra_frames(self) -> int:
        return self.options.context

    def _positions(self, seen: Seen) -> list[int]:
        """The window always begins behind a full context."""
        behind = range(self.options.context, self.options.context + len(seen.recent) + len(seen.own))
        return [*range(len(seen.extra)), *behind]

    # ------------------------------------------------------------------------------------------- context
    def rebuild(self, first: int, changing: bool) -> Rebuild | None:
        if changing or self.ready:
            return None
        count = self.options.context
        if not self.shot:
            return Rebuild(tuple(range(-count, 0))) if self.options.blank else None
        frames = tuple(f for shot in self.shots for f in self._given(shot, self.shot))
        return Rebuild(frames, pixels=frames if self.options.pixels else (), own_text=True)

    def _given(self, shot: Shot, shots: int) -> list[int]:
        """Context frames of one shot, when there are so many earlier ones."""
        return spread(shot.first, shot.last, share(shot.number, shots, self.options.context))

    def keeps(self) -> set[int]:
        """What earlier shots give now, and will give when more have followed."""
        ahead = range(self.shot, self.shot + self.options.context + 1)
        return {frame for shot in self.shots for shots in ahead for frame in self._given(shot, shots)}

    def switch(self, mode: str, requested: int) -> Sequence[int] | None:
        if mode == "cut" and self.frames > self.start:
            done = Shot(self.shot, max(self.start, self.frames - self.options.window), self.frames - 1)
            self.shots = (*self.shots, done)[-self.options.context :]
            self.shot, self.start, self.context, self.ready = self.shot + 1, self.frames, (), False
        return super().switch(mode, requested)

    # ------------------------------------------------------------------------------------------- plans
    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        plan = super().plan(call, row, frames)
        return replace(plan, groups=tuple(self._phased(group) for group in plan.groups))

    def _anew(self, own: Sequence[int]) -> bool:
        """Whether these frames are a context, and none of the present shot."""
        return own[-1] < self.start

    def _recache_group(self, own: list[int]) -> Group:
        if self._anew(own):
            return self._read((), (), own, (0, len(own), len(own)), rule=packed)
        return super()._recache_group(own)

    def _extra(self, first: int, *seen: Sequence[int]) -> Pages:
        return [(frame, page) for page, frame in enumerate(self.context)]

    def _writes(self, own: list[int], published: list[int]) -> tuple[Write, ...]:
        if published and self._anew(own):
            return tuple(Write(i, frame, i) for i, frame in enumerate(own))
        return super()._writes(own, published)

    def _phased(self, group: Group) -> Group:
        """The group with the angle of every frame's shot; a segment lies in one shot."""
        if not self.options.phase:
            return group
        flight = group.segments[-1]
        by_index = dict(zip(flight.pages, flight.frames, strict=True))
        segments = []
        for segment in group.segments:
            flags = [self._flag(frame) for frame in segment.frames]
            for flag in dict.fromkeys(flags):
                mine = [i for i, other in enumerate(flags) if other == flag]
                take = lambda items, mine=mine: tuple(items[i] for i in mine)
                segments.append(replace(
                    segment, pages=take(segment.pages), frames=take(segment.frames),
                    positions=take(segment.positions), phase=self.options.phase * flag,
                ))  # fmt: skip
        phases = tuple(self.options.phase * self._flag(by_index[index]) for index in group.query_frames)
        return replace(group, segments=tuple(segments), query_phases=phases)

    def _flag(self, frame: int) -> int:
        """The shot of a frame, 0 for blank ones; a first shot that follows those counts as the second."""
        if frame >= self.start:
            return max(self.shot, int(self.options.blank))
        return next((shot.number for shot in self.shots if shot.first <= frame <= shot.last), 0)

    def commit(self, frames: Sequence[int]) -> None:
        if self._anew(frames):
            self.context, self.ready = tuple(frames), True
        else:
            super().commit(frames)

    def state_dict(self) -> dict:
        shots = [(shot.number, shot.first, shot.last) for shot in self.shots]
        own = {"shot": self.shot, "start": self.start, "shots": shots, "context": self.context, "ready": self.ready}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.shot, self.start, self.ready = state["shot"], state["start"], state["ready"]
        self.shots = tuple(Shot(*saved) for saved in state["shots"])
        self.context = tuple(state["context"])
