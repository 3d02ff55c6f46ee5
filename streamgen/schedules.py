"""Contract one: a schedule says which chunk takes which denoising step at which tick.

It sees step counts and chunk numbers only, holds no tensors, yields lazily and is a pure function of its parameters.
The engine executes what it yields; nothing else decides what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count, islice
from typing import Any, Protocol

from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.registry import Registry


class OpKind(Enum):
    """What happens to a stream at the start of a tick."""

    BEGIN = "begin"  # a chunk enters: its spec, prompt and noise are fixed now
    CLONE = "clone"  # a lane's state is copied to other lanes


@dataclass(frozen=True, slots=True)
class Op:
    kind: OpKind
    chunk: int
    lanes: tuple[Lane, ...] = ()  # CLONE: from the first to the others


class CallKind(Enum):
    DENOISE = "denoise"
    CLEAN = "clean"  # finished frames run once more for their keys and values: commit, re-cache, prefill, rebuild


class SlotOp(Enum):
    STEP = "step"  # p_out = p_in + 1
    HOLD = "hold"  # contributes context, is not changed
    CLEAN = "clean"  # a finished chunk at the commit level


@dataclass(frozen=True, slots=True)
class Slot:
    """One chunk's part in a row: it comes in at level p_in of its ladder and leaves at p_out.

    `publish`: the keys and values of this very call become visible to later ones.
    `overlap`: a held chunk that was finished before this segment began.
    """

    chunk: int
    op: SlotOp
    p_in: int
    p_out: int
    publish: bool = False
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class Lane:
    """What kind of state a row belongs to; each lane keeps a cache of its own. Presets add the fields they use."""

    level: int | None = None  # step of the ladder, where every step keeps a cache of its own


@dataclass(frozen=True, slots=True)
class Row:
    """Slots of one forward that see each other's keys; rows of one call may belong to several streams.

    `causal`: a slot sees the slots before it and itself, not those after it.
    """

    slots: tuple[Slot, ...]
    stream: int = 0
    lane: Lane = Lane()
    causal: bool = False

    def published(self, frames: Sequence[range]) -> list[int]:
        """Frames whose keys and values this row makes visible; `frames` are each slot's."""
        return [frame for slot, part in zip(self.slots, frames, strict=True) if slot.publish for frame in part]

    def carrying(self, owed: Container[int]) -> Row:
        """The row without finished chunks that were published meanwhile and are no longer owed."""
        return replace(self, slots=tuple(s for s in self.slots if s.op is not SlotOp.CLEAN or s.chunk in owed))


@dataclass(frozen=True, slots=True)
class Call:
    """One transformer forward. `source` says where its frames come from: flight | past | pixels | external."""

    kind: CallKind
    rows: tuple[Row, ...]
    source: str = "flight"

    @property
    def commits(self) -> bool:
        """Whether this is a call of its own that publishes a chunk as it is finished."""
        return self.kind is CallKind.CLEAN and self.source == "flight"


@dataclass(frozen=True, slots=True)
class Tick:
    """`calls` finish `emits`; the commits run after these are emitted, before anything of the next tick.

    `holds`: finished chunks whose latents are kept, for later calls hold them.
    """

    index: int
    ops: tuple[Op, ...]
    calls: tuple[Call, ...]
    emits: tuple[int, ...]
    commits: tuple[Call, ...] = ()
    holds: tuple[int, ...] = ()


Steps = Callable[[int], int]  # chunk -> length of its ladder

HORIZON = 32  # chunks beyond the last listed ladder and gap that a check looks at: everything repeats from there


class Schedule(Protocol):
    """What `register_schedule` takes: `cls(options)`.

    `options` are made from `schedule.stagger`, `schedule.commit` and `schedule.options`, or by their own
    `from_config(StreamConfig)` if they have one. `period`, if there is one: chunks after which a stream repeats itself.
    """

    def ticks(self, steps: Steps, chunks: int | None, first_tick: int = 0) -> Iterator[Tick]:
        """Ticks for `chunks` chunks in all (None = endless), from tick `first_tick` on."""
        ...

    def in_flight(self, steps: Steps, chunks: int | None = None) -> int:
        """The most chunks that share a row, in a stream of `chunks`; those that ride along to be published count."""
        ...


SCHEDULES: Registry = Registry("schedule", "streamgen.schedules")
register_schedule = SCHEDULES.register

COMMITS = ("separate", "fused", "inplace", "none")


@dataclass(frozen=True)
class ScheduleOptions:
    """When chunks enter and how finished ones are published.

    Args:
        stagger: "solo" = a chunk enters when the one before it has finished; a number of ticks between two entries; or
            a list of these, the last repeats.
        commit: "separate" runs a finished chunk once more at its commit level; "fused" lets it ride along with the next
            call; "inplace" keeps the keys and values of its last step; "none" never publishes it.
    """

    stagger: Any = "solo"
    commit: str = "separate"

    def __post_init__(self) -> None:
        if self.commit not in COMMITS:
            raise InputError(f"schedule.commit {self.commit!r} is unknown: use {', '.join(COMMITS)}")
        gaps = self.gaps
        if not gaps or not all(gap == "solo" or type(gap) is int and gap >= 0 for gap in gaps):
            raise InputError(
                f"schedule.stagger {self.stagger!r} is unknown: use solo, a number of ticks, or a list of these"
            )

    @property
    def gaps(self) -> tuple:
        """As listed; the last repeats."""
        return tuple(self.stagger) if isinstance(self.stagger, (list, tuple)) else (self.stagger,)


class Staggered:
    """Chunk k enters at tick S_k and takes step p at tick S_k + p; a coupling says which chunks share a forward."""

    def __init__(self, options: ScheduleOptions) -> None:
        self.options = options

    def rows(self, slots: tuple[Slot, ...]) -> tuple[Row, ...]:
        """Rows of a tick, from the slots that are due, oldest chunk first."""
        raise NotImplementedError

    def keeps(self, p: int, steps: int) -> bool:
        """Whether a commit in place keeps the keys and values of step p of so many."""
        return p + 1 == steps

    def ops(self, chunk: int, steps: Steps) -> tuple[Op, ...]:
        """What happens as a chunk enters."""
        return (Op(OpKind.BEGIN, chunk),)

    @property
    def bursts(self) -> bool:
        """Whether all later chunks enter at once, which only a finite stream can do."""
        return self.options.gaps[-1] == 0

    def gap(self, chunk: int, steps: Steps) -> int:
        """Ticks between the entries of this chunk and the next."""
        gaps = self.options.gaps
        gap = gaps[min(chunk, len(gaps) - 1)]
        return steps(chunk) if gap == "solo" else gap

    def entries(self, steps: Steps) -> Iterator[tuple[int, int]]:
        """(chunk, tick it enters at), without end. Raises InputError where a chunk would overtake the one before."""
        tick = last = 0
        for chunk in count():
            if tick + steps(chunk) < last:
                raise InputError(
                    f"chunk {chunk} with {steps(chunk)} steps would be finished before chunk {chunk - 1} with "
                    f"{steps(chunk - 1)}: raise schedule.stagger or give later chunks no shorter ladders"
                )
            yield chunk, tick
            last = tick + steps(chunk)
            tick += self.gap(chunk, steps)

    def ticks(self, steps: Steps, chunks: int | None, first_tick: int = 0) -> Iterator[Tick]:
        if chunks is None and self.bursts:
            raise InputError(
                f"schedule.stagger={self.options.stagger} starts all chunks at once: give the stream a number of frames"
            )
        entries = islice(self.entries(steps), chunks)
        entering = next(entries, None)
        levels: dict[int, int] = {}  # of the chunks in flight
        owed: tuple[int, ...] = ()  # finished, to be published by the next call
        index = 0
        while entering or levels:
            begins = []
            while entering and entering[1] == index:
                levels[entering[0]] = 0
                begins.append(entering[0])
                entering = next(entries, None)
            if levels:
                tick = self._tick(index, begins, levels, steps, owed)
                owed = tick.emits if self.options.commit == "fused" else ()
                if index >= first_tick:
                    yield tick
            levels = {chunk: p + 1 for chunk, p in levels.items() if p + 1 < steps(chunk)}
            index += 1

    def _tick(self, index: int, begins: list[int], levels: dict[int, int], steps: Steps, owed: tuple[int, ...]) -> Tick:
        commit = self.options.commit
        clean = tuple(clean_slot(k, steps) for k in owed)
        slots = tuple(
            Slot(k, SlotOp.STEP, p, p + 1, publish=commit == "inplace" and self.keeps(p, steps(k)))
            for k, p in levels.items()
        )
        done = tuple(slot.chunk for slot in slots if slot.p_out == steps(slot.chunk))
        return Tick(
            index,
            ops=tuple(op for chunk in begins for op in self.ops(chunk, steps)),
            calls=(Call(CallKind.DENOISE, self.rows(clean + slots)),),
            emits=done,
            commits=tuple(clean_call((k,), steps) for k in done) if commit == "separate" else (),
        )

    def in_flight(self, steps: Steps, chunks: int | None = None) -> int:
        listed = len(self.options.gaps)
        if chunks is None or not self.bursts:  # a burst of unknown size: its first chunk stands for it
            seen = listed if self.bursts else listed + HORIZON
            chunks = seen if chunks is None else min(seen, chunks)
        calls = (call for tick in self.ticks(steps, chunks) for call in tick.calls)
        return max(len(row.slots) for call in calls for row in call.rows)


@register_schedule("solo", ScheduleOptions)
class SoloSchedule(Staggered):
    """One chunk at a time, all its steps, then its commit (Self-Forcing, arXiv:2506.08009)."""

    def __init__(self, options: ScheduleOptions) -> None:
        if options.stagger != "solo":
            raise InputError(
                f"schedule.stagger={options.stagger} puts several chunks in flight, which schedule.coupling=solo "
                "cannot: use joint or joint-causal"
            )
        super().__init__(options)

    def rows(self, slots: tuple[Slot, ...]) -> tuple[Row, ...]:
        return (Row(slots, causal=len(slots) > 1),)


@register_schedule("joint", ScheduleOptions)
class JointSchedule(Staggered):
    """Chunks in flight see each other, older ones cleaner (Rolling Forcing, arXiv:2509.25161; StreamDiT)."""

    def rows(self, slots: tuple[Slot, ...]) -> tuple[Row, ...]:
        return (Row(slots),)


@register_schedule("joint-causal", ScheduleOptions)
class JointCausalSchedule(Staggered):
    """Chunks in flight share a forward and each sees the older ones alone (MAGI-1, arXiv:2505.13211)."""

    def rows(self, slots: tuple[Slot, ...]) -> tuple[Row, ...]:
        return (Row(slots, causal=True),)


@dataclass(frozen=True)
class RowsOptions(ScheduleOptions):
    """`clone`: the first chunk, alone, fills the caches of all levels with the keys and values of its last step."""

    clone: bool = False

    @classmethod
    def from_config(cls, config: StreamConfig) -> RowsOptions:
        if config.switch.mode == "recache":
            raise InputError(
                "schedule.coupling=rows keeps what noisy steps left, which switch.mode=recache cannot renew by a clean "
                "pass: use switch.mode=keep, cut or reset"
            )
        return cls(config.schedule.stagger, config.schedule.commit, config.schedule.clone)


@register_schedule("rows", RowsOptions)
class RowsSchedule(Staggered):
    """Chunks in flight are rows of one batch that do not see each other: step p of a chunk reads what step p of earlier
    ones left, from a cache per step (StreamDiffusionV2, arXiv:2511.07399; Live Avatar's timestep pipeline).

    The rows of a tick may run in any order, or each on a device of its own: only latents pass from one to the next.
    """

    def __init__(self, options: RowsOptions) -> None:
        if options.commit != "inplace":
            raise InputError(
                f"schedule.commit={options.commit} publishes finished chunks, and schedule.coupling=rows keeps the "
                "keys and values of every step: use inplace"
            )
        if 0 in options.gaps:
            raise InputError(
                f"schedule.stagger={options.stagger} would put two chunks at the same step of schedule.coupling=rows, "
                "which has one cache per step: use 1 or more"
            )
        if options.clone and options.gaps[0] != "solo":
            raise InputError(
                f"schedule.clone copies what the first chunk left alone, and schedule.stagger={options.stagger} lets "
                "others enter before it is finished: use [solo, 1]"
            )
        super().__init__(options)

    def rows(self, slots: tuple[Slot, ...]) -> tuple[Row, ...]:
        """The newest chunk first: row p of a full pipeline is at step p."""
        return tuple(Row((slot,), lane=Lane(slot.p_in)) for slot in reversed(slots))

    def keeps(self, p: int, steps: int) -> bool:
        return True

    def ops(self, chunk: int, steps: Steps) -> tuple[Op, ...]:
        ops = super().ops(chunk, steps)
        if not (self.options.clone and chunk == 1):
            return ops
        last = steps(0) - 1
        lanes = (Lane(last), *(Lane(p) for p in range(_longest(steps)) if p != last))
        return (Op(OpKind.CLONE, 0, lanes), *ops)


def lanes(schedule: Schedule, steps: Steps, chunks: int | None = None) -> tuple[Lane, ...]:
    """The kinds of state a stream keeps, in the order they are used."""
    ticks = islice(schedule.ticks(steps, chunks), HORIZON + _longest(steps))
    return tuple(dict.fromkeys(row.lane for tick in ticks for call in tick.calls for row in call.rows))


def _longest(steps: Steps) -> int:
    return max(steps(chunk) for chunk in range(HORIZON))


def until_emission(ticks: Iterator[Tick]) -> list[Tick]:
    """The next ticks, up to the first that finishes a chunk."""
    out = []
    for tick in ticks:
        out.append(tick)
        if tick.emits:
            break
    return out


def begins(ticks: Iterable[Tick]) -> int:
    """How many chunks enter."""
    return sum(op.kind is OpKind.BEGIN for tick in ticks for op in tick.ops)


def clean_slot(chunk: int, steps: Steps) -> Slot:
    """A finished chunk, run for its keys and values."""
    return Slot(chunk, SlotOp.CLEAN, steps(chunk), steps(chunk), publish=True)


def clean_call(chunks: tuple[int, ...], steps: Steps, source: str = "flight") -> Call:
    """Finished chunks in one CLEAN row."""
    return Call(CallKind.CLEAN, (Row(tuple(clean_slot(k, steps) for k in chunks)),), source)
