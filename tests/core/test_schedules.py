"""Laws of a schedule (V2, V4, V8, V9, V12, V14), for any ladder lengths, number of chunks and starting chunk."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.errors import InputError
from streamgen.schedules import SCHEDULES, CallKind, OpKind, ScheduleOptions, SlotOp, SoloSchedule, register_schedule

ladders = st.lists(st.integers(1, 6), min_size=1, max_size=8)  # steps of chunk 0, 1, …; the last repeats
commits = st.sampled_from(["separate", "none"])


def solo(steps: list[int], chunks: int | None, first: int = 0, commit: str = "separate"):
    schedule = SoloSchedule(ScheduleOptions(commit=commit))
    count = lambda k: steps[min(k, len(steps) - 1)]
    return schedule, count, schedule.ticks(count, chunks, sum(count(k) for k in range(first)))


def stepped(tick):
    return [slot for call in tick.calls for row in call.rows for slot in row.slots if slot.op is SlotOp.STEP]


@given(ladders, st.integers(0, 10), st.integers(0, 4), commits)
def test_v2_each_chunk_takes_each_step_once_in_order(steps, chunks, first, commit):
    _, count, ticks = solo(steps, chunks, first, commit)
    taken: dict[int, list] = {}
    for tick in ticks:
        chunks_now = [slot.chunk for slot in stepped(tick)]
        assert len(chunks_now) == len(set(chunks_now))  # one step per chunk and tick at most
        for slot in stepped(tick):
            taken.setdefault(slot.chunk, []).append((slot.p_in, slot.p_out))
    assert taken == {k: [(p, p + 1) for p in range(count(k))] for k in range(first, chunks)}


@given(ladders, st.integers(1, 10))
def test_v4_chunks_in_flight_are_contiguous_and_move_forward(steps, chunks):
    schedule, count, ticks = solo(steps, chunks)
    before = (0, 0)
    for tick in ticks:
        active = sorted(slot.chunk for slot in stepped(tick))
        assert active == list(range(active[0], active[-1] + 1))
        assert active[0] >= before[0] and active[-1] >= before[1]
        assert len(active) <= schedule.in_flight(count)
        before = (active[0], active[-1])


@given(ladders, st.integers(0, 10), st.integers(0, 4), commits)
def test_v8_each_chunk_is_emitted_once_in_order_and_not_touched_again(steps, chunks, first, commit):
    emitted: list[int] = []
    for tick in solo(steps, chunks, first, commit)[2]:
        assert not {slot.chunk for slot in stepped(tick)} & set(emitted)
        emitted += tick.emits
        committed = [slot for call in tick.commits for row in call.rows for slot in row.slots]
        assert [slot.chunk for slot in committed] == (list(tick.emits) if commit == "separate" else [])
        assert all(slot.op is SlotOp.CLEAN and slot.p_in == slot.p_out for slot in committed)
        assert all(call.kind is CallKind.CLEAN for call in tick.commits)
    assert emitted == list(range(first, chunks))


@given(ladders, st.integers(1, 10))
def test_v9_latency_is_the_length_of_the_ladder(steps, chunks):
    _, count, ticks = solo(steps, chunks)
    begun, emitted = {}, {}
    for tick in ticks:
        begun.update({op.chunk: tick.index for op in tick.ops if op.kind is OpKind.BEGIN})
        emitted.update(dict.fromkeys(tick.emits, tick.index))
    assert begun.keys() == emitted.keys() == set(range(chunks))
    assert emitted[0] == count(0) - 1
    for k in range(chunks):
        assert emitted[k] - begun[k] == count(k) - 1
        assert k == 0 or emitted[k] - emitted[k - 1] == count(k)


@given(ladders, st.integers(0, 10), commits)
def test_v12_work_is_the_sum_of_all_ladders(steps, chunks, commit):
    _, count, ticks = solo(steps, chunks, 0, commit)
    work = Counter()
    for tick in ticks:
        work["step"] += len(stepped(tick))
        work["clean"] += sum(len(row.slots) for call in tick.commits for row in call.rows)
        work["hold"] += sum(s.op is SlotOp.HOLD for c in tick.calls for row in c.rows for s in row.slots)
    total = sum(count(k) for k in range(chunks))
    assert work == Counter(step=total, clean=chunks if commit == "separate" else 0)


@given(ladders, st.integers(0, 8), st.integers(1, 8))
def test_v14_a_longer_stream_begins_like_a_shorter_one(steps, chunks, more):
    short = list(solo(steps, chunks)[2])
    assert list(solo(steps, chunks + more)[2])[: len(short)] == short
    assert list(islice(solo(steps, None)[2], len(short))) == short


@given(ladders, st.integers(0, 6), st.integers(0, 6))
def test_a_resumed_stream_runs_the_ticks_that_were_left(steps, first, more):
    _, count, ticks = solo(steps, first + more)
    assert list(solo(steps, first + more, first)[2]) == list(ticks)[sum(count(k) for k in range(first)) :]


def test_endless_schedules_are_lazy():
    ticks = solo([2], None)[2]
    assert [tick.emits for tick in islice(ticks, 4)] == [(), (0,), (), (1,)]


def test_unknown_commit_mode_is_refused():
    with pytest.raises(InputError, match="use separate, fused"):
        ScheduleOptions(commit="seperate")


def test_registry_names_the_choices_and_refuses_two_owners_of_a_name():
    assert SCHEDULES.get("solo") == (SoloSchedule, ScheduleOptions)
    with pytest.raises(InputError, match="choose one of .*solo"):
        SCHEDULES.get("sola")
    with pytest.raises(ValueError, match="registered twice"):
        register_schedule("solo", ScheduleOptions)(type("Other", (), {}))
    register_schedule("solo", ScheduleOptions)(SoloSchedule)  # a reload of the same class is no conflict
