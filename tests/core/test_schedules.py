"""Laws of a schedule (V2, V4, V8, V9, V11, V12, V14, V16), for any ladders, stagger, coupling and commit."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamgen.errors import InputError
from streamgen.schedules import (
    COMMITS,
    SCHEDULES,
    CallKind,
    OpKind,
    ScheduleOptions,
    SlotOp,
    SoloSchedule,
    begins,
    register_schedule,
    until_emission,
)

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=6)  # steps of chunk 0, 1, …; the last repeats


class Case:
    """A schedule, and what follows from its definition: when each chunk starts and ends."""

    def __init__(self, steps: list[int], stagger, coupling: str, commit: str) -> None:
        self.listed, self.stagger, self.coupling, self.commit = steps, stagger, coupling, commit
        schedule, options = SCHEDULES.get(coupling)
        self.schedule = schedule(options(stagger=stagger, commit=commit))

    def steps(self, chunk: int) -> int:
        return self.listed[min(chunk, len(self.listed) - 1)]

    def gap(self, chunk: int) -> int:
        if self.stagger == "solo":
            return self.steps(chunk)
        gaps = self.stagger if isinstance(self.stagger, list) else [self.stagger]
        return gaps[min(chunk, len(gaps) - 1)]

    def start(self, chunk: int) -> int:
        return sum(self.gap(k) for k in range(chunk))

    def end(self, chunk: int) -> int:
        """The tick of its last step."""
        return self.start(chunk) + self.steps(chunk) - 1

    def overtakes(self, chunks: int) -> int | None:
        """The first chunk that would be finished before the one before it."""
        return next((k for k in range(1, chunks) if self.end(k) < self.end(k - 1)), None)

    @property
    def bursts(self) -> bool:
        return self.gap(100) == 0

    def ticks(self, chunks: int | None, first: int = 0) -> list:
        return list(self.schedule.ticks(self.steps, chunks, first))


@st.composite
def streams(draw, **fixed):
    """A case in which no chunk overtakes another, and a number of chunks."""
    coupling = fixed.get("coupling") or draw(st.sampled_from(["solo", "joint", "joint-causal"]))
    steps, more = draw(lengths), st.integers(0, 6)
    drops = [max(0, a - b) for a, b in zip(steps, steps[1:])]
    solo, even = st.just("solo"), more.map(lambda gap: max([gap, *drops]))
    listed = st.tuples(*(more.map(lambda gap, drop=drop: gap + drop) for drop in drops), more).map(list)
    stagger = draw(solo if coupling == "solo" else st.one_of(solo, even, listed))
    return Case(steps, stagger, coupling, draw(st.sampled_from(COMMITS))), draw(st.integers(0, 10))


def slots(tick, *ops):
    return [slot for call in tick.calls for row in call.rows for slot in row.slots if slot.op in ops]


def stepped(tick):
    return slots(tick, SlotOp.STEP)


@given(streams())
def test_v2_each_chunk_takes_each_step_once_in_order_and_on_time(stream):
    case, chunks = stream
    taken: dict[int, list] = {}
    for tick in case.ticks(chunks):
        for slot in stepped(tick):
            taken.setdefault(slot.chunk, []).append((tick.index, slot.p_in, slot.p_out))
    assert taken == {k: [(case.start(k) + p, p, p + 1) for p in range(case.steps(k))] for k in range(chunks)}


@given(streams())
def test_v4_chunks_in_flight_are_contiguous_and_move_forward(stream):
    case, chunks = stream
    before, most = (0, 0), 0
    for tick in case.ticks(chunks):
        active = [slot.chunk for slot in stepped(tick)]
        assert active == list(range(active[0], active[-1] + 1))
        assert active[0] >= before[0] and active[-1] >= before[1]
        before, most = (active[0], active[-1]), max(most, len(slots(tick, *SlotOp)))
        assert len(tick.calls) == len(tick.calls[0].rows) == 1
        causal = case.coupling == "joint-causal" or (case.coupling == "solo" and len(slots(tick, *SlotOp)) > 1)
        assert tick.calls[0].rows[0].causal == causal
    if chunks:
        assert most == case.schedule.in_flight(case.steps, chunks)
        if not case.bursts:
            assert most <= case.schedule.in_flight(case.steps)


@given(streams())
def test_v8_each_chunk_is_emitted_once_in_order_and_not_touched_again(stream):
    case, chunks = stream
    emitted: list[int] = []
    for tick in case.ticks(chunks):
        assert not {slot.chunk for slot in stepped(tick)} & set(emitted)
        assert all(case.end(chunk) == tick.index for chunk in tick.emits)
        emitted += tick.emits
    assert emitted == list(range(chunks))


@given(streams())
def test_v9_latency_is_the_length_of_the_ladder(stream):
    case, chunks = stream
    begun, emitted = {}, {}
    for tick in case.ticks(chunks):
        assert all(op.kind is OpKind.BEGIN for op in tick.ops)
        begun.update({op.chunk: tick.index for op in tick.ops})
        emitted.update(dict.fromkeys(tick.emits, tick.index))
    assert list(begun) == list(range(chunks)) and begun.keys() == emitted.keys()
    for k in range(chunks):
        assert emitted[k] - begun[k] == case.steps(k) - 1
        assert k == 0 or emitted[k] - emitted[k - 1] == case.gap(k - 1) + case.steps(k) - case.steps(k - 1)


@given(streams())
def test_v11_what_is_finished_is_published_once_as_its_commit_says_before_anybody_reads_it(stream):
    case, chunks = stream
    ticks = case.ticks(chunks)
    for tick, following in zip(ticks, [*ticks[1:], None]):
        separate = [slot for call in tick.commits for row in call.rows for slot in row.slots]
        assert [slot.chunk for slot in separate] == (list(tick.emits) if case.commit == "separate" else [])
        assert all(call.kind is CallKind.CLEAN and call.commits for call in tick.commits)
        inplace = [slot.chunk for slot in stepped(tick) if slot.publish]
        assert inplace == (list(tick.emits) if case.commit == "inplace" else [])
        if following is not None:  # the last ones nobody reads
            riding = slots(following, SlotOp.CLEAN)
            assert [slot.chunk for slot in riding] == (list(tick.emits) if case.commit == "fused" else [])
            assert slots(following, *SlotOp)[: len(riding)] == riding  # before those that read them
            separate += riding
        for slot in separate:
            assert slot.op is SlotOp.CLEAN and slot.publish and slot.p_in == slot.p_out == case.steps(slot.chunk)
    assert not ticks or not slots(ticks[0], SlotOp.CLEAN)


@given(streams())
def test_v12_work_is_the_sum_of_all_ladders(stream):
    case, chunks = stream
    work, ticks = Counter(), case.ticks(chunks)
    for tick in ticks:
        work["step"] += len(stepped(tick))
        work["clean"] += len(slots(tick, SlotOp.CLEAN)) + sum(len(c.rows[0].slots) for c in tick.commits)
        work["hold"] += len(slots(tick, SlotOp.HOLD))
    published = {"separate": chunks, "fused": chunks - len(ticks[-1].emits) if ticks else 0}.get(case.commit, 0)
    assert work == Counter(step=sum(case.steps(k) for k in range(chunks)), clean=published)


@given(streams(), st.integers(1, 6))
def test_v14_a_longer_stream_begins_like_a_shorter_one(stream, more):
    """Until the tick at which the chunk that is missing would have entered; then the shorter one only drains."""
    case, chunks = stream
    before = lambda ticks: [tick for tick in ticks if tick.index < case.start(chunks)]
    short, long = case.ticks(chunks), case.ticks(chunks + more)
    assert before(short) == before(long)
    assert not any(tick.ops for tick in short if tick.index >= case.start(chunks))
    if not case.bursts:
        assert before(islice(case.schedule.ticks(case.steps, None), len(long))) == before(long)


@given(streams(), st.integers(0, 40))
def test_a_resumed_stream_runs_the_ticks_that_were_left(stream, first):
    case, chunks = stream
    assert case.ticks(chunks, first) == [tick for tick in case.ticks(chunks) if tick.index >= first]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 2), st.integers(2, 8))
def test_v5_overtaking_is_refused_with_both_numbers(steps, stagger, chunks):
    case = Case(steps, stagger, "joint", "none")
    late = case.overtakes(chunks)
    assume(late is not None)
    with pytest.raises(InputError, match=f"chunk {late} with {case.steps(late)} steps .* chunk {late - 1} with "
                                         f"{case.steps(late - 1)}: raise schedule.stagger") as caught:  # fmt: skip
        case.ticks(chunks)
    assert "\n" not in str(caught.value)


@given(streams(coupling="joint-causal"))
def test_v16_chunks_one_after_the_other_are_solo_whatever_the_coupling(stream):
    """A stagger of the ladder's length is solo; a longer one is solo with pauses."""
    case, chunks = stream
    solo = Case(case.listed, "solo", "solo", case.commit)
    work = lambda ticks: [([slots(t, *SlotOp)], t.emits, t.commits, t.ops) for t in ticks]
    for stagger in ("solo", [case.steps(k) for k in range(10)], 6):
        for coupling in ("joint", "joint-causal"):
            other = Case(case.listed, stagger, coupling, case.commit)
            assert work(other.ticks(chunks)) == work(solo.ticks(chunks))
    if case.commit != "fused":
        assert Case(case.listed, "solo", "joint", case.commit).ticks(chunks) == solo.ticks(chunks)


def test_v17_worked_rows_of_rolling_forcing_and_of_wider_staggers():
    """Spec 02 A.4 (7 chunks, 5 steps) and the closed forms of D.6."""
    rolling = Case([5], 1, "joint", "separate").ticks(7)
    levels = [{slot.chunk: slot.p_in for slot in stepped(tick)} for tick in rolling]
    assert levels == [{k: w - k for k in range(max(0, w - 4), min(6, w) + 1)} for w in range(11)]
    assert [tick.emits for tick in rolling] == [()] * 4 + [(k,) for k in range(7)]
    for n, a, chunks in ((8, 2, 6), (4, 3, 5), (6, 6, 3)):
        case = Case([n], a, "joint", "none")
        assert len(case.ticks(chunks)) == (chunks - 1) * a + n
        assert case.schedule.in_flight(case.steps) == -(-n // a)
    assert Case([5], 1, "joint", "fused").schedule.in_flight(lambda k: 5) == 6  # one rides along


def test_endless_schedules_are_lazy():
    ticks = Case([2], "solo", "solo", "separate").schedule.ticks(lambda k: 2, None)
    assert [tick.emits for tick in islice(ticks, 4)] == [(), (0,), (), (1,)]


@pytest.mark.parametrize("stagger", [0, [0], [2, 0]])
def test_all_chunks_at_once_need_a_finite_stream(stagger):
    case = Case([3], stagger, "joint", "none")
    with pytest.raises(InputError, match="at once: give the stream a number of frames"):
        next(case.schedule.ticks(case.steps, None))
    assert case.schedule.in_flight(case.steps, 5) == 5
    assert case.schedule.in_flight(case.steps) == 1 + (stagger == [2, 0])
    assert [tick.emits for tick in case.ticks(4)][-1] == ((1, 2, 3) if stagger == [2, 0] else (0, 1, 2, 3))


def test_the_ticks_of_the_next_chunk_end_where_it_comes_out():
    case = Case([3], 1, "joint", "separate")
    ticks = case.schedule.ticks(case.steps, 5)
    parts = [until_emission(ticks) for _ in range(6)]
    assert [(len(part), begins(part)) for part in parts] == [(3, 3), (1, 1), (1, 1), (1, 0), (1, 0), (0, 0)]


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match="use separate, fused"):
        ScheduleOptions(commit="seperate")
    for stagger in ("soli", -1, [], [1, -1], 1.5, True):
        with pytest.raises(InputError, match="stagger .* is unknown"):
            ScheduleOptions(stagger=stagger)
    with pytest.raises(InputError, match="stagger=1 .*coupling=solo"):
        SoloSchedule(ScheduleOptions(stagger=1))


def test_registry_names_the_choices_and_refuses_two_owners_of_a_name():
    assert SCHEDULES.get("solo") == (SoloSchedule, ScheduleOptions)
    with pytest.raises(InputError, match="choose one of .*solo"):
        SCHEDULES.get("sola")
    with pytest.raises(ValueError, match="registered twice"):
        register_schedule("solo", ScheduleOptions)(type("Other", (), {}))
    register_schedule("solo", ScheduleOptions)(SoloSchedule)  # a reload of the same class is no conflict
