"""Contract one: a schedule says which chunk takes which denoising step at which tick.

It sees step counts and chunk numbers only, holds no tensors, yields lazily and is a pure function of its parameters.
The engine executes what it yields; nothing else decides what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from streamgen.errors import InputError
from streamgen.registry import Registry


class OpKind(Enum):
    """What happens to a stream at the start of a tick."""

    BEGIN = "begin"  # a chunk enters: its spec, prompt and noise are fixed now
    SWITCH = "switch"  # a new prompt takes effect with this chunk
    RESET = "reset"  # frame 0, fresh cache
    CLONE = "clone"  # a lane's state is copied to other lanes
    DRAIN = "drain"  # no more chunks enter


@dataclass(frozen=True, slots=True)
class Op:
    kind: OpKind
    chunk: int
    lanes: tuple[int, ...] = ()  # CLONE: from the first to the others


class CallKind(Enum):
    DENOISE = "denoise"
    CLEAN = "clean"  # finished frames run once more for their keys and values: commit, re-cache, prefill, rebuild


class SlotOp(Enum):
    STEP = "step"  # p_out = p_in + 1
    HOLD = "hold"  # contributes context, is not changed
    CLEAN = "clean"  # a finished chunk at the commit level


@dataclass(frozen=True, slots=True)
class Slot:
    """One chunk's part in a row: it comes in at level p_in of its ladder and leaves at p_out."""

    chunk: int
    op: SlotOp
    p_in: int
    p_out: int


@dataclass(frozen=True, slots=True)
class Lane:
    """What kind of state a row belongs to; each lane keeps a cache of its own. Presets add the fields they use."""

    branch: str = "positive"  # of guidance


@dataclass(frozen=True, slots=True)
class Row:
    """Slots that see each other's keys in one forward; rows of one call may belong to several streams."""

    slots: tuple[Slot, ...]
    stream: int = 0
    lane: Lane = Lane()


@dataclass(frozen=True, slots=True)
class Call:
    """One transformer forward. `source` says where its frames come from: flight | past | pixels | external."""

    kind: CallKind
    rows: tuple[Row, ...]
    source: str = "flight"


@dataclass(frozen=True, slots=True)
class Tick:
    """Calls before `commits` make `emits`; the commits run after emission, before the next chunk is touched."""

    index: int
    ops: tuple[Op, ...]
    calls: tuple[Call, ...]
    emits: tuple[int, ...]
    commits: tuple[Call, ...] = ()


Steps = Callable[[int], int]  # chunk -> length of its ladder


class Schedule(Protocol):
    """What `register_schedule` takes."""

    def ticks(self, steps: Steps, chunks: int | None, first_chunk: int = 0) -> Iterator[Tick]:
        """Ticks for `chunks` chunks in all (None = endless), from where `first_chunk` would begin."""
        ...

    def in_flight(self, steps: Steps) -> int:
        """The most chunks that are being denoised at once."""
        ...


SCHEDULES: Registry = Registry("schedule", "streamgen.schedules")
register_schedule = SCHEDULES.register


@dataclass(frozen=True)
class ScheduleOptions:
    """`commit`: "separate" runs a finished chunk once more at its commit level; "none" never publishes it."""

    commit: str = "separate"

    def __post_init__(self) -> None:
        if self.commit not in ("separate", "none"):
            raise InputError(f"schedule.commit {self.commit!r} is unknown: use separate or none")


@register_schedule("solo", ScheduleOptions)
class SoloSchedule:
    """One chunk at a time, all its steps, then its commit (Self-Forcing, arXiv:2506.08009)."""

    def __init__(self, options: ScheduleOptions) -> None:
        self.options = options

    def in_flight(self, steps: Steps) -> int:
        return 1

    def ticks(self, steps: Steps, chunks: int | None, first_chunk: int = 0) -> Iterator[Tick]:
        index = sum(steps(k) for k in range(first_chunk))
        chunk = first_chunk
        while chunks is None or chunk < chunks:
            n = steps(chunk)
            for p in range(n):
                row = Row((Slot(chunk, SlotOp.STEP, p, p + 1),))
                last = p + 1 == n
                yield Tick(
                    index,
                    ops=(Op(OpKind.BEGIN, chunk),) if p == 0 else (),
                    calls=(Call(CallKind.DENOISE, (row,)),),
                    emits=(chunk,) if last else (),
                    commits=(clean_call((chunk,), steps),) if last and self.options.commit == "separate" else (),
                )
                index += 1
            chunk += 1


def clean_call(chunks: tuple[int, ...], steps: Steps, source: str = "flight") -> Call:
    """Finished chunks in one CLEAN row."""
    slots = tuple(Slot(k, SlotOp.CLEAN, steps(k), steps(k)) for k in chunks)
    return Call(CallKind.CLEAN, (Row(slots),), source)
