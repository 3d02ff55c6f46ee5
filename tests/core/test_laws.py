"""The laws of specs 02 D.7 and 03 E.3 over every shipped preset; a preset that breaks one says so in `violates`.

Laws that need tensors (I6 to I12, V3, V15, V16) are held over random configurations beside this, in `test_policies` and
`test_presets`.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property

import pytest

from streamgen.building import build_policy
from streamgen.cache.plan import FLIGHT
from streamgen.config import available, load_preset
from streamgen.engine import Engine
from streamgen.schedules import Lane, OpKind, SlotOp
from streamgen.walk import PlannedCall, walk

CHUNKS = 60
NAMES = available("presets")
BLENDED = ("bank",)  # regions whose pages hold what content chose


class Case:
    """A preset walked for 60 chunks, without weights."""

    def __init__(self, name: str) -> None:
        self.config = load_preset(name)
        self.engine = Engine(None, self.config)
        self.ticks = list(self.engine.schedule.ticks(self.engine.steps, CHUNKS))

    @cached_property
    def calls(self) -> list[PlannedCall]:
        return list(walk(self.engine, CHUNKS))

    @cached_property
    def pages(self) -> int:
        chunk = self.config.chunk
        flight = self.engine.schedule.in_flight(self.engine.steps, CHUNKS) * chunk.largest
        return build_policy(self.config, flight, chunk.frames(CHUNKS - 1).stop).pages

    def slots(self, tick, *ops):
        return [slot for call in tick.calls for row in call.rows for slot in row.slots if slot.op in ops]

    @cached_property
    def entered(self) -> dict[int, int]:
        """The tick of each chunk's first step; what waits as noise has begun before."""
        return {s.chunk: tick.index for tick in self.ticks for s in self.slots(tick, SlotOp.STEP) if s.p_in == 0}

    @cached_property
    def emitted(self) -> dict[int, int]:
        return {chunk: tick.index for tick in self.ticks for chunk in tick.emits}


@cache
def case_of(name: str) -> Case:
    return Case(name)


# --- of ladders and ticks


def v1_levels_fall(case: Case) -> bool:
    levels = [ladder.sigmas for ladder in case.engine.ladders]
    return all(s[0] <= 1 and s[-1] == 0 and all(a > b for a, b in zip(s, s[1:])) for s in levels)


def v2_every_step_once(case: Case) -> bool:
    taken: dict[int, list] = {}
    for tick in case.ticks:
        for slot in case.slots(tick, SlotOp.STEP):
            taken.setdefault(slot.chunk, []).append((slot.p_in, slot.p_out))
    return taken == {k: [(p, p + 1) for p in range(case.engine.steps(k))] for k in range(CHUNKS)}


def v4_a_contiguous_range_moves_forward(case: Case) -> bool:
    before = (0, 0)
    for tick in case.ticks:
        active = sorted({slot.chunk for slot in case.slots(tick, SlotOp.STEP)})
        if active != list(range(active[0], active[-1] + 1)) or active[0] < before[0] or active[-1] < before[1]:
            return False
        before = (active[0], active[-1])
    return True


def v5_newer_is_noisier(case: Case) -> bool:
    for tick in case.ticks:
        for call in tick.calls:
            for row in call.rows:
                steps = [slot for slot in row.slots if slot.op is SlotOp.STEP]
                levels = [case.engine.ladder_of(slot.chunk).sigmas[slot.p_in] for slot in steps]
                if levels != sorted(levels) or [s.chunk for s in steps] != sorted(s.chunk for s in steps):
                    return False
    return True


def v8_each_chunk_leaves_once_in_order(case: Case) -> bool:
    gone: list[int] = []
    for tick in case.ticks:
        if {slot.chunk for slot in case.slots(tick, SlotOp.STEP)} & set(gone):
            return False
        gone += tick.emits
    return gone == list(range(CHUNKS))


def v9_latency_is_the_ladders_length(case: Case) -> bool:
    return all(case.emitted[k] - case.entered[k] == case.engine.steps(k) - 1 for k in range(CHUNKS))


def v12_work_is_the_sum_of_all_ladders(case: Case) -> bool:
    work = sum(len(case.slots(tick, SlotOp.STEP)) for tick in case.ticks)
    return work == sum(map(case.engine.steps, range(CHUNKS)))


def v14_a_longer_stream_begins_like_a_shorter_one(case: Case) -> bool:
    longer = list(case.engine.schedule.ticks(case.engine.steps, CHUNKS + 3))
    missing = next(tick.index for tick in longer for op in tick.ops if op.kind is OpKind.BEGIN and op.chunk == CHUNKS)
    before = lambda ticks: [tick for tick in ticks if tick.index < missing]
    return before(case.ticks) == before(longer)


# --- of reads and writes


class Pages:
    """What lies in the pages of every lane as a walk goes on: (stream frame, level it was written at)."""

    def __init__(self, case: Case) -> None:
        self.case, self.held = case, {}
        self.clones = [(t.index, op.lanes) for t in case.ticks for op in t.ops if op.kind is OpKind.CLONE]

    def lane(self, lane: Lane) -> dict[int, tuple[int, float]]:
        return self.held.setdefault(lane, {})

    def before(self, call: PlannedCall) -> None:
        while self.clones and self.clones[0][0] <= call.tick and call.call.source == "flight":
            _, (source, *others) = self.clones.pop(0)
            self.held.update({lane: dict(self.lane(source)) for lane in others})

    def after(self, call: PlannedCall) -> None:
        levels = dict(levels_of(self.case, call))
        for write in (*call.plan.stages, *call.plan.writes):
            self.lane(call.row.lane)[write.page] = (write.frame, levels[write.frame])


def levels_of(case: Case, call: PlannedCall) -> Iterator[tuple[int, float]]:
    """(frame, level it is fed with) of a call."""
    if call.call.source != "flight":
        yield from ((frame, case.config.schedule.commit_level / 1000) for part in call.frames for frame in part)
        return
    for slot, part in zip(call.row.slots, call.frames, strict=True):
        if slot.op is SlotOp.CLEAN:
            level = case.config.schedule.commit_level / 1000
        else:
            level = case.engine.ladder_of(slot.chunk).sigmas[min(slot.p_in, case.engine.steps(slot.chunk) - 1)]
        yield from ((frame, level) for frame in part)


def reads(call: PlannedCall) -> Iterator:
    """Segments of the cache that a call reads."""
    return (s for group in call.plan.groups for s in group.segments if s.region not in (FLIGHT, *BLENDED))


def placed(group) -> list:
    """Segments whose positions a plan knows: content chooses the frames of the others."""
    return [s for s in group.segments if not s.fixed and set(s.positions) != {-1}]


def v6_what_is_read_was_written(case: Case) -> bool:
    pages = Pages(case)
    for call in case.calls:
        pages.before(call)
        lane = pages.lane(call.row.lane)
        for segment in reads(call):
            for page, frame in zip(segment.pages, segment.frames, strict=True):
                if frame >= 0 and lane.get(page, (None,))[0] != frame:
                    return False
        pages.after(call)
    return True


def v7_at_the_level_that_was_declared(case: Case) -> bool:
    pages, commit = Pages(case), case.config.schedule.commit
    for call in case.calls:
        pages.before(call)
        lane = pages.lane(call.row.lane)
        for segment in reads(call):
            for page in segment.pages:
                frame, level = lane.get(page, (-1, None))
                ladder = case.engine.ladder_of(case.config.chunk.holding(max(0, frame)))
                declared = case.config.schedule.commit_level / 1000
                if call.row.lane.level is not None:
                    declared = ladder.sigmas[call.row.lane.level]
                elif commit == "inplace":
                    declared = ladder.sigmas[-2]
                if level is not None and level != declared:
                    return False
        pages.after(call)
    return True


def v10_memory_is_bounded(case: Case) -> bool:
    used = {w.page for call in case.calls for w in (*call.plan.writes, *call.plan.stages)}
    return all(0 <= page < case.pages for page in used)


def v11_what_is_committed_is_read(case: Case) -> bool:
    """Frames of clean calls, the stream's last chunks apart."""
    end = CHUNKS - 1 - case.engine.chunks_in_flight
    owed: dict[int, int] = {}
    for call in case.calls:
        for segment in (*reads(call), *(call.plan.choose.segments if call.plan.choose else ())):
            for frame in segment.frames:
                owed.pop(frame, None)
        for slot, part in zip(call.row.slots, call.frames):
            if call.call.source == "flight" and slot.op is SlotOp.CLEAN and slot.chunk < end:
                owed.update(dict.fromkeys((f for f in part if f in {w.frame for w in call.plan.writes}), slot.chunk))
    return not owed


def v13_positions_in_order_within_the_span(case: Case) -> bool:
    for call in case.calls:
        for group in call.plan.groups:
            known = [p for s in placed(group) for p in s.positions]
            if known != sorted(set(known)):
                return False
            if max(group.query_positions) - min(known) > case.config.positions.span - 1:
                return False
    return True


def i2_positions_stay_in_range(case: Case) -> bool:
    """Of streams whose memory is bounded."""
    if case.config.cache.window == -1:
        return True
    late = [call for call in case.calls if call.frames[0].start > 2 * case.config.positions.span]
    positions = [p for call in late for g in call.plan.groups for s in placed(g) for p in s.positions]
    return not positions or (min(positions) >= 0 and max(positions) < 2 * case.config.positions.span)


def i3_nothing_from_the_future(case: Case) -> bool:
    for call in case.calls:
        last = max(frame for part in call.frames for frame in part)
        for group in call.plan.groups:
            cached = [f for s in group.segments if s.region != FLIGHT for f in s.frames]
            if any(frame > last for frame in cached):
                return False
    return True


def i4_no_frame_twice(case: Case) -> bool:
    for call in case.calls:
        for group in call.plan.groups:
            seen = Counter(f for s in group.segments for f in s.frames if f >= 0)
            if max(seen.values(), default=1) > 1:
                return False
    return True


def i5_regions_in_order(case: Case) -> bool:
    for call in case.calls:
        for group in call.plan.groups:
            spans = sorted((min(s.positions), max(s.positions)) for s in placed(group))
            if any(list(s.positions) != sorted(set(s.positions)) for s in placed(group)):
                return False
            if any(a[1] >= b[0] for a, b in zip(spans, spans[1:])):
                return False
    return True


LAWS = {
    function.__name__.split("_")[0].upper(): function
    for function in (
        v1_levels_fall, v2_every_step_once, v4_a_contiguous_range_moves_forward, v5_newer_is_noisier,
        v6_what_is_read_was_written, v7_at_the_level_that_was_declared, v8_each_chunk_leaves_once_in_order,
        v9_latency_is_the_ladders_length, v10_memory_is_bounded, v11_what_is_committed_is_read,
        v12_work_is_the_sum_of_all_ladders, v13_positions_in_order_within_the_span,
        v14_a_longer_stream_begins_like_a_shorter_one, i2_positions_stay_in_range, i3_nothing_from_the_future,
        i4_no_frame_twice, i5_regions_in_order,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_laws_that_a_preset_names_are_broken(name):
    broken = {law for law, holds in LAWS.items() if not holds(case_of(name))}
    assert broken == set(case_of(name).config.violates)
    assert all(len(reason) > 10 for reason in case_of(name).config.violates.values())
