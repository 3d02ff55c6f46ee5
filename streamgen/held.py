"""Schedules whose chunks ride along unchanged: every call runs a whole window, most of which may be held.

What is finished is read from its latents in every call instead of from a cache; what has not entered stands there as
noise. A window slides (AR-Diffusion, arXiv:2503.07418), or a clip is made of segments (SkyReels-V2, arXiv:2504.13074).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from streamgen.config import HeldConfig, StreamConfig
from streamgen.errors import InputError
from streamgen.schedules import (
    HORIZON,
    Call,
    CallKind,
    Op,
    OpKind,
    Row,
    ScheduleOptions,
    Slot,
    SlotOp,
    Staggered,
    Steps,
    Tick,
    register_schedule,
)


@dataclass(frozen=True)
class HeldOptions(ScheduleOptions):
    """A window of chunks that all ride in every call.

    Args:
        chunks: in the window.
        overlap: None = the window slides by a chunk whenever the first one behind it enters; a number = segments of
            `chunks` chunks, each begun when the one before is finished, whose last `overlap` chunks it holds.
        waiting: whether chunks of the window that have not entered are held too, as noise; all of a window then begin
            at once, for noise and prompt are fixed where a call first sees them.
    """

    commit: str = "none"
    chunks: int = 5
    overlap: int | None = None
    waiting: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks < 1:
            raise InputError(f"schedule.held.chunks must be at least 1, got {self.chunks}")
        if self.overlap is not None and not 0 < self.overlap < self.chunks:
            raise InputError(
                f"schedule.held.overlap={self.overlap} of a segment of schedule.held.chunks={self.chunks} must be at "
                "least 1, and fewer than all: or give null, for a window that slides"
            )
        if self.commit != "none":
            raise InputError(
                f"schedule.commit={self.commit} publishes finished chunks, which a held window reads from their "
                "latents: use schedule.commit=none, or schedule.coupling=joint"
            )

    @classmethod
    def from_config(cls, config: StreamConfig) -> HeldOptions:
        schedule, held = config.schedule, config.schedule.held
        return cls(schedule.stagger, schedule.commit, held.chunks, held.overlap, held.waiting)


def held_level(config: HeldConfig, slot: Slot, timesteps: Sequence[float]) -> float:
    """The timestep a held chunk is fed with.

    Args:
        config: `waiting_level` None = that of the first step; `done_level` None = that of the last; `overlap_level` is
            that of chunks from the segment before, whose latents are noised up to it.
        timesteps: of the chunk's ladder.
    """
    if slot.p_in == len(timesteps):
        done = timesteps[-1] if config.done_level is None else config.done_level
        return config.overlap_level if slot.overlap else done
    if slot.p_in == 0 and config.waiting_level is not None:
        return config.waiting_level
    return timesteps[slot.p_in]


@register_schedule("held", HeldOptions)
class HeldSchedule(Staggered):
    """All chunks of a window see each other, finished and waiting ones too (SkyReels-V2)."""

    causal = False

    @property
    def period(self) -> int:
        """Chunks after which a long stream repeats itself."""
        options = self.options
        return 1 if options.overlap is None else options.chunks - options.overlap

    def rows(self, slots: tuple[Slot, ...]) -> tuple[Row, ...]:
        return (Row(slots, causal=self.causal),)

    def segments(self, chunks: int | None) -> Iterator[tuple[range, int, int | None]]:
        """(chunks held from before, the first that enters, how many do); a sliding window is one segment."""
        size, overlap = self.options.chunks, self.options.overlap
        if overlap is None:
            yield range(0), 0, chunks
            return
        first = 0
        while chunks is None or first < chunks:
            held = range(max(0, first - overlap), first)
            enter = size - len(held) if chunks is None else min(size - len(held), chunks - first)
            yield held, first, enter
            first += enter

    def ticks(self, steps: Steps, chunks: int | None, first_tick: int = 0) -> Iterator[Tick]:
        self._check(steps, chunks)
        begin = 0  # the tick a segment begins at
        begun = 0  # chunks that have begun
        for held, first, count in self.segments(chunks):
            at, entered, done = begin - 1, first, first
            for tick in super().ticks(lambda chunk, first=first: steps(first + chunk), count):
                at, entered = begin + tick.index, entered + len(tick.ops)
                window = self._window(held, first, count, entered)
                slots = tuple(self._slots(window, tick, first, done, held, steps))
                emits = tuple(first + chunk for chunk in tick.emits)
                done += len(emits)
                ops = tuple(Op(OpKind.BEGIN, chunk) for chunk in range(begun, window.stop))
                begun = max(begun, window.stop)
                if at >= first_tick:
                    calls = (Call(CallKind.DENOISE, self.rows(slots)),)
                    yield Tick(at, ops, calls, emits, holds=tuple(range(window.start, done)))
            begin = at + 1

    def _window(self, held: range, first: int, count: int | None, entered: int) -> range:
        """Chunks of a call once those before `entered` have entered."""
        size = self.options.chunks
        if self.options.overlap is not None:
            return range(held.start if held else first, first + count if self.options.waiting else entered)
        top = max(entered, size if count is None else min(size, count))
        return range(max(0, top - size), top if self.options.waiting else entered)

    def _slots(self, window: range, tick: Tick, first: int, done: int, held: range, steps: Steps) -> Iterator[Slot]:
        """One slot per chunk; `tick` counts chunks from `first` on, those before `done` are finished."""
        moving = {first + slot.chunk: slot for slot in tick.calls[0].rows[0].slots}
        for chunk in window:
            if chunk in moving:
                yield replace(moving[chunk], chunk=chunk)
            else:
                p = steps(chunk) if chunk < done else 0
                yield Slot(chunk, SlotOp.HOLD, p, p, overlap=chunk in held)

    def _check(self, steps: Steps, chunks: int | None) -> None:
        """Raises InputError where a window would slide past a chunk that is not finished."""
        size = self.options.chunks
        if self.options.overlap is not None:
            return  # a segment waits
        seen = len(self.options.gaps) + size + HORIZON
        starts = dict(islice(self.entries(steps), seen if chunks is None else min(seen, chunks)))
        for chunk in range(size, len(starts)):
            taken = starts[chunk] - starts[chunk - size]
            if taken < steps(chunk - size):
                raise InputError(
                    f"chunk {chunk} would push chunk {chunk - size} out of a window of schedule.held.chunks={size} "
                    f"after {taken} of its {steps(chunk - size)} steps: raise schedule.stagger or schedule.held.chunks"
                )

    def in_flight(self, steps: Steps, chunks: int | None = None) -> int:
        return self.options.chunks if chunks is None else min(self.options.chunks, chunks)


@register_schedule("held-causal", HeldOptions)
class HeldCausalSchedule(HeldSchedule):
    """Each chunk of the window sees the older ones alone; what waits is then seen by nobody (AR-Diffusion)."""

    causal = True
