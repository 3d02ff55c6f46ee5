"""Every cache policy under every schedule: who reads what and where (spec 03 E.3), sinks that fold, anchors, banks."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamgen.building import build_policy
from streamgen.cache import BankPolicy, Fold, KVStore, Plan, Sizes, WindowPolicy
from streamgen.cache.bank import BankOptions
from streamgen.cache.options import WindowOptions
from streamgen.cache.plan import FLIGHT, Group, Route, Segment
from streamgen.cache.store import Geometry
from streamgen.config import (
    BankConfig,
    CacheConfig,
    ChunkConfig,
    LadderConfig,
    PositionsConfig,
    ScheduleConfig,
    StreamConfig,
    SwitchConfig,
    load_preset,
)
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.models.blocks import TextKeys
from streamgen.models.rope import RotaryEmbedding
from streamgen.schedules import SCHEDULES, Call, CallKind, Row, ScheduleOptions, Slot, SlotOp, clean_call


class Walk:
    """A policy under a schedule, without weights. `held`: the frame that each page of a store would hold."""

    def __init__(self, config: StreamConfig, chunks: int) -> None:
        self.config, self.chunks, self.size = config, chunks, config.chunk.latent_frames
        self.engine = Engine(None, config)
        self.policy = build_policy(config, self.engine.flight_frames, chunks * self.size)
        self.held: dict[int, int | None] = {}  # None = one that content chose
        self.folded: list[int] = []

    def calls(self, switches: dict[int, str] = {}) -> Iterator[tuple[Call, Row, tuple[range, ...], Plan]]:  # noqa: B006
        """Every call with its plan, before what it publishes is known. `switches`: entering chunk -> mode."""
        pending, owed = [], []
        for tick in self.engine.schedule.ticks(self.engine.steps, self.chunks):
            for call in pending:
                yield from self.call(call, call.rows[0])
            for op in tick.ops:
                if op.chunk in switches:
                    for chunk in owed:
                        call = clean_call((chunk,), self.engine.steps)
                        yield from self.call(call, call.rows[0])
                    owed = []
                    yield from self.switch(switches[op.chunk], op.chunk * self.size)
            for call in tick.calls:
                (row,) = call.rows
                row = replace(row, slots=tuple(s for s in row.slots if s.op is SlotOp.STEP or s.chunk in owed))
                yield from self.call(call, row)
            pending, owed = tick.commits, tick.emits if self.config.schedule.commit == "fused" else ()

    def switch(self, mode: str, requested: int):
        frames = self.policy.switch(mode, requested)
        if frames is not None:
            call = clean_call((frames.start // self.size,), self.engine.steps, source="past")
            yield from self.call(call, call.rows[0], (frames,))
        self.policy.switched(mode, requested)

    def call(self, call: Call, row: Row, frames=None):
        frames = frames or tuple(range(s.chunk * self.size, (s.chunk + 1) * self.size) for s in row.slots)
        plan = self.policy.plan(call, row, frames)
        yield call, row, frames, plan
        own = [f for part in frames for f in part]
        for fold in plan.folds:
            self.folded.append(self.held[fold.source])
        for write in (*plan.stages, *plan.writes):
            assert own[write.index] == write.frame
            self.held[write.page] = write.frame
        if plan.record:
            self.held[plan.record.page] = own[plan.record.index]
        if plan.merge:
            pages, place = plan.merge.pages, plan.merge.place
            chosen = [self.held[plan.merge.source] if i == place else self.held.get(p) for i, p in enumerate(pages)]
            self.held.update(zip(pages, [None] * len(pages) if place is None else chosen))
        clean = call.source == "past"
        if published := [f for s, part in zip(row.slots, frames) if s.publish or clean for f in part]:
            self.policy.commit(published)


POLICIES = ["window", "ema", "anchor", "bank"]


@st.composite
def configs(draw):
    """Any policy × positions × schedule × commit that can be combined, with sizes that fit."""
    size, steps, policy = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(POLICIES))
    coupling = draw(st.sampled_from(["solo", "joint", "joint-causal"]))
    stagger = "solo" if coupling == "solo" else draw(st.integers(1, steps))
    commits = ["separate"] if policy in ("anchor", "bank") else ["separate", "fused", "inplace", "none"]
    commit = draw(st.sampled_from(commits))
    schedule = SCHEDULES.get(coupling)[0](ScheduleOptions(stagger, commit))
    flight = schedule.in_flight(lambda k: steps) * size
    sink = draw(st.integers(policy in ("ema", "anchor"), 4))
    window = sink + flight + (size if policy == "ema" else 0) + draw(st.integers(0, 8))
    parts = commit == "fused" or (coupling == "joint-causal" and flight > size)
    rule = "absolute" if parts else draw(st.sampled_from(["absolute", "packed", "before", "tri-region"]))
    anchors = draw(st.integers(0, 2)) if policy == "anchor" else 0
    bank = BankConfig(draw(st.integers(1, 3)), draw(st.integers(1, 3)), repeat=draw(st.booleans()))
    most = bank.size if policy == "bank" else anchors * size
    tail = commit == "separate" and coupling != "joint-causal" and draw(st.booleans())
    kept = window + sink if tail else draw(st.sampled_from([None, window + 2 * size]))
    return StreamConfig(
        chunk=ChunkConfig(size),
        ladder=LadderConfig([1000.0 - 100 * p for p in range(steps)]),
        schedule=ScheduleConfig(coupling, stagger, commit),
        cache=CacheConfig(
            policy if policy in ("anchor", "bank") else "window", window, sink=sink, anchors=anchors, bank=bank,
            ema_decay=0.9 if policy == "ema" else None, commit_reads="tail" if tail else "same",
            capacity=kept,
        ),
        positions=PositionsConfig(rule, window + sink + most),
        switch=SwitchConfig(sink=draw(st.sampled_from(["keep", "replace"]))),
    )  # fmt: skip


changes = st.dictionaries(st.integers(0, 12), st.sampled_from(["keep", "recache", "cut"]), max_size=3)


def check(walk: Walk, call: Call, frames: tuple[range, ...], plan: Plan) -> None:
    """The laws of one call."""
    config, policy = walk.config, walk.policy
    cache, rule, span = config.cache, config.positions.rule, config.positions.span
    bank = cache.policy == "bank"
    more = {"bank": cache.bank.size, "anchor": cache.anchors * walk.size}.get(cache.policy, 0)
    own, at = [f for part in frames for f in part], {}
    for group in plan.groups:
        regions = {s.region: s for s in group.segments}
        assert len(regions) == len(group.segments)
        besides = [s for s in group.segments if s.region in ("anchor", "bank")]
        plain = [s for s in group.segments if s not in besides]
        assert sum(len(s.frames) for s in plain) <= cache.window  # I1
        assert sum(len(s.frames) for s in besides) <= more
        past = [(s, *item) for s in group.segments if s.region != FLIGHT for item in zip(s.pages, s.frames)]
        for _, page, frame in past:
            assert 0 <= page < policy.pages
            assert frame < (own[-1] if bank and call.source == "past" else own[0])  # I3
            assert frame == -1 or walk.held[page] == frame
        pages = [page for _, page, _ in past]
        assert len(set(pages)) == len(pages)
        seen = [f for s in (plain if bank else group.segments) for f in s.frames]
        assert len(set(seen)) == len(seen)  # I4; a bank may hold what the sink and the window hold as well
        ordered = [p for s in plain for p in s.positions]
        assert ordered == sorted(set(ordered))  # I5, V13
        tail = call.commits and cache.commit_reads == "tail"
        if rule in ("packed", "before") and not tail:
            assert list(group.key_positions) == list(range(group.key_positions[0], ordered[-1] + 1))
        if rule == "packed" and not tail:
            assert 0 <= group.key_positions[0] and ordered[-1] < cache.window + more  # I2
        if rule == "tri-region" and not tail:
            assert 0 <= min(group.key_positions) and max(group.key_positions) < span
        flight = regions[FLIGHT]
        assert list(flight.frames) == own[: len(flight.frames)]
        assert group.query_positions == tuple(flight.positions[i] for i in group.query_frames)
        if config.schedule.coupling == "joint-causal" and call.source == "flight":
            assert max(group.query_frames) == max(flight.pages)
        known = [p for s in group.segments if not s.fixed for p in s.positions]
        if policy.reach() is not None:
            assert max(known) - min(known) < policy.reach()
        for segment, page, _ in past:  # no page at two positions in one call
            position = segment.positions[segment.pages.index(page)]
            assert at.setdefault(page, position) == position
    queries = [i for group in plan.groups for i in group.query_frames]
    assert sorted(queries) == list(range(len(own)))
    written = [w.page for w in plan.writes]
    assert len(set(written)) == len(written)


@given(configs(), changes)
def test_i1_to_i5_v6_v10_v13_hold_in_every_call_of_every_combination(config, changes):
    walk = Walk(config, 20)
    for call, _, frames, plan in walk.calls(changes):
        check(walk, call, frames, plan)


@given(configs())
def test_i1_steady_streams_repeat_a_finite_set_of_signatures(config):
    walk, last = Walk(config, 60), {}
    kinds = {}
    for call, _, frames, plan in walk.calls():
        if frames[-1].stop < 54 * walk.size:  # not the drain
            last[call.kind, plan.signature()] = frames[0].start // walk.size
            kinds.setdefault((call.kind, plan.signature()), frames[0].start // walk.size)
    assert all(first < 36 for first in kinds.values())  # nothing new comes late
    steady = [1 for chunk in last.values() if chunk > 45]
    assert len(steady) <= 3 * (config.cache.bank.interval if config.cache.policy == "bank" else 1) * len(SlotOp)


@given(configs())
def test_i8_plans_change_nothing_and_follow_from_a_state(config):
    walk = Walk(config, 12)
    other = build_policy(config, walk.engine.flight_frames, None)
    for call, row, frames, plan in walk.calls({3: "recache", 7: "cut"}):
        before = walk.policy.state_dict()
        assert walk.policy.plan(call, row, frames) == plan and walk.policy.state_dict() == before
        other.load_state_dict(before)
        assert other.plan(call, row, frames) == plan


# --- what cannot be combined


def refuses(*words: str, preset: str = "self-forcing", **overrides) -> None:
    values = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    with pytest.raises(InputError) as caught:
        Engine(None, load_preset(preset, values))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


SLIDING = dict(cache__window=12, cache__sink=3)
JOINT = dict(schedule__coupling="joint-causal", schedule__stagger=2, cache__window=12, cache__sink=3)


def test_combinations_without_a_meaning_are_refused_where_the_engine_is_built():
    for rule in ("packed", "before", "tri-region"):
        place = f"positions.rule={rule}"
        refuses("schedule.commit=fused", place, schedule__commit="fused", positions__rule=rule, **SLIDING)
        refuses("schedule.coupling=joint-causal", place, positions__rule=rule, **JOINT)
    for commit in ("fused", "inplace", "none"):
        refuses("commit_reads=tail", f"commit={commit}", cache__commit_reads="tail", schedule__commit=commit, **SLIDING)
        for preset, policy in (("anchor-forcing", "anchor"), ("memflow", "bank")):
            refuses(f"cache.policy={policy}", f"schedule.commit={commit}", preset=preset, schedule__commit=commit)
    refuses("commit_branch=positive", "commit=inplace", guidance__commit_branch="positive", schedule__commit="inplace")
    for more in (dict(cache__window=-1), dict(SLIDING), dict(SLIDING, cache__capacity=14)):
        refuses("commit_reads=tail", "cache.capacity is", cache__commit_reads="tail", **more)
    refuses("cache.window=8", "floor 9", "cache.sink 3 + 6", schedule__commit="fused", cache__window=8, cache__sink=3)
    refuses("tri-region", "cache.window is 24", positions__rule="tri-region", cache__window=24, cache__sink=3)
    refuses("tri-region", "cache.window is -1", positions__rule="tri-region")
    refuses("cache.anchors=3 of 3 frames", "leaves 6 positions", preset="anchor-forcing", cache__anchors=3)
    refuses("anchor_every", "coupling=solo", preset="anchor-forcing", cache__anchor_every=2,
            schedule__coupling="joint", schedule__stagger=3)  # fmt: skip


def test_what_does_have_a_meaning_is_not_refused():
    for overrides in (
        ["schedule.commit=fused", "positions.rule=packed"],  # everything visible: ranks are frame numbers
        ["schedule.coupling=joint-causal", "positions.rule=packed", "cache.window=6", "cache.sink=3"],  # one in flight
        ["schedule.commit=fused", "cache.window=9", "cache.sink=3"],
    ):
        Engine(None, load_preset("self-forcing", overrides))


# --- positions past the trained span


@pytest.mark.parametrize(
    "overrides, frames, reach",
    [
        ([], 21, 21),
        ([], 24, 24),
        (["cache.window=12"], None, 12),  # no sink: nothing stays behind
        (["cache.window=12", "cache.sink=3"], None, None),
        (["cache.window=12", "cache.sink=3"], 15, 15),
        (["cache.window=12", "cache.sink=3", "positions.rule=packed"], None, 12),
        (["cache.window=24", "cache.sink=3", "positions.rule=before"], None, 24),
    ],
)
def test_streams_past_the_trained_span_are_warned_about_once_or_refused(tiny, caplog, overrides, frames, reach):
    span = 21 if frames == 21 else 23 if reach == 24 else 20
    past = reach is None or reach > span
    start = lambda *more: Engine(tiny.stub(), tiny.config(*overrides, f"positions.span={span}", *more)).start(
        torch.zeros(1, 1, 1), None, latent_size=(1, 1), num_latent_frames=frames
    )
    rollout = start()
    assert rollout.policy.reach() == reach
    start()
    said = [record.message for record in caplog.records if "positions.span" in record.message]
    caplog.clear()
    assert len(said) <= past and all("\n" not in line and f"span={span}" in line for line in said)
    if past:
        with pytest.raises(InputError, match=f"positions.span={span}.*positions.strict=false"):
            start("positions.strict=true")
    else:
        start("positions.strict=true")


def test_a_warning_about_positions_is_given_once(tiny, caplog):
    for _ in range(3):
        Engine(tiny.stub(), tiny.config("positions.span=5")).start(
            torch.zeros(1, 1, 1), None, latent_size=(1, 1), num_latent_frames=9
        )
    assert len([1 for record in caplog.records if "positions.span=5" in record.message]) == 1


# --- a sink that frames fold into

GEOMETRY = Geometry(layers=2, batch=2, height=2, width=1, heads=2, head_dim=12)
TOKENS = GEOMETRY.tokens_per_frame
CLEAN = lambda chunk: clean_call((chunk,), lambda k: 1)


class Bench:
    """A policy and a store that chunks of known keys and values are committed to; [layers, B, frames, T, H, D]."""

    def __init__(self, tiny, policy, size: int, chunks: int, dtype=torch.float64) -> None:
        self.policy, self.size, self.rope = policy, size, RotaryEmbedding(GEOMETRY.head_dim)
        self.store = KVStore(GEOMETRY, policy.pages, size, dtype, torch.device("cpu"))
        shape = (2, 2, chunks * size, TOKENS, 2, 12)
        self.keys, self.values = (tiny.draw(*shape, seed=50 + i, dtype=torch.float64) for i in range(2))

    def commit(self, chunk: int, text: TextKeys | None = None) -> Plan:
        frames = range(chunk * self.size, (chunk + 1) * self.size)
        call = CLEAN(chunk)
        plan = self.policy.plan(call, call.rows[0], (frames,))
        context = self.store.bind(plan, self.rope)
        for layer in range(2):
            own = (t[layer][:, frames.start : frames.stop].flatten(1, 2) for t in (self.keys, self.values))
            context.stage(layer, *(t.to(self.store.keys.dtype) for t in own))
        self.store.publish(plan, context, text)
        self.policy.commit(list(frames))
        return plan


@pytest.mark.parametrize(
    "size, sink, window, decay", [(3, 3, 9, 0.9), (1, 2, 5, 0.5), (2, 3, 9, 1e-9), (3, 3, 9, 1 - 1e-9)]
)
def test_frames_that_leave_are_folded_into_the_sink_in_turn(tiny, size, sink, window, decay):
    """s <- α·s + (1 - α)·frame, keys and values, raw, by hand in float64."""
    policy = WindowPolicy(WindowOptions(window, sink, "packed", ema_decay=decay), Sizes(size, size))
    bench, chunks = Bench(tiny, policy, size, 10), 10
    wanted = [t[:, :, :sink].clone() for t in (bench.keys, bench.values)]
    ring, evicted = window - sink - size, 0
    for chunk in range(chunks):
        plan = bench.commit(chunk)
        leaving = range(sink + evicted, max(sink, (chunk + 1) * size - ring))
        assert len(plan.folds) == len(leaving)
        for frame in leaving:
            for sums, all_frames in zip(wanted, (bench.keys, bench.values)):
                slot = (frame - sink) % sink
                sums[:, :, slot] = decay * sums[:, :, slot] + (1 - decay) * all_frames[:, :, frame]
        evicted += len(leaving)
        if (chunk + 1) * size >= sink:
            for sums, pages in zip(wanted, (bench.store.keys, bench.store.values)):
                torch.testing.assert_close(pages[:, :, :sink], sums, atol=1e-12, rtol=0)
    assert evicted == chunks * size - sink - ring > 5


def test_a_sink_in_sixteen_bit_needs_sums_beside_it():
    """α = 0.999: rounded to the cache every time, the sink stops moving; with a sum beside it, it arrives."""
    found, steps, decay = {}, 1500, 0.999
    for precision in ("fp32", "cache"):
        store = KVStore(GEOMETRY, 2, 1, torch.bfloat16, torch.device("cpu"))
        store.keys[:, :, 1], store.values[:, :, 1] = 1.0, -1.0
        plan = Plan((), folds=(Fold(1, 0, decay, precision),))
        for _ in range(steps):
            store.publish(plan)
        found[precision] = store.keys[0, 0, 0, 0, 0, 0].item()
        assert store.values[0, 0, 0, 0, 0, 0].item() == -found[precision]
        fresh = KVStore(GEOMETRY, 2, 1, torch.bfloat16, torch.device("cpu"))
        fresh.load_state_dict(store.state_dict())
        for one in (store, fresh):
            one.publish(plan)
        assert torch.equal(fresh.keys[:, :, 0], store.keys[:, :, 0]) and fresh.sums.keys() == store.sums.keys()
    exact = 1 - decay**steps
    assert abs(found["fp32"] - exact) < 2**-8 and abs(found["cache"] - exact) > 0.3


def test_a_sink_that_carries_folds_is_kept_by_a_recache_and_cut_frames_are_not_folded():
    def walked(chunks, **more):
        config = StreamConfig(ladder=LadderConfig([1000.0]), cache=CacheConfig(window=12, sink=3, **more))
        walk = Walk(config, chunks)
        list(walk.calls())
        walk.policy.commit([chunks * 3 - 1])
        return walk.policy

    assert walked(4).switch("recache", 12) == range(12)  # LongLive's rule
    assert walked(3, ema_decay=0.9).switch("recache", 9) == range(9)
    assert walked(4, ema_decay=0.9).switch("recache", 12) == range(3, 12)  # three frames are in the sink already
    config = StreamConfig(ladder=LadderConfig([1000.0]), cache=CacheConfig(window=9, sink=3, ema_decay=0.9))
    walk = Walk(config, 8)
    list(walk.calls({4: "cut"}))
    assert walk.folded == [3, 4, 5, 6, 7, 8, *range(12, 18)]  # 9-11 were cut


# --- anchors


def anchor_config(size=3, sink=3, window=12, anchors=1, rule="tri-region", **schedule) -> StreamConfig:
    return StreamConfig(
        chunk=ChunkConfig(size),
        ladder=LadderConfig([1000.0, 500.0]),
        schedule=ScheduleConfig(**schedule),
        cache=CacheConfig("anchor", window, sink=sink, anchors=anchors),
        positions=PositionsConfig(rule, 21),
        switch=SwitchConfig(mode="recache"),
    )


def seen_anchors(config: StreamConfig, chunks: int, switches: dict[int, int]) -> tuple[dict, dict]:
    """First frame of a call -> (anchor frames it read, their positions), for steps and for re-encodings.

    `switches`: chunk that enters -> the latent frame that was asked for.
    """
    walk, steps, recached = Walk(config, chunks), {}, {}
    walk.switch = lambda mode, start, inner=walk.switch: inner(mode, switches[start // walk.size])
    for call, _, frames, plan in walk.calls({chunk: "recache" for chunk in switches}):
        for group in plan.groups:
            read = [(s.frames, s.positions) for s in group.segments if s.region == "anchor"] or [((), ())]
            (steps if call.source == "flight" else recached)[frames[0].start] = read[0]
    return steps, recached


def test_worked_timeline_of_anchors():
    """Spec 03 B.4: switches asked for at 40 and 80, window 12, sink 3."""
    steps, recached = seen_anchors(anchor_config(), 34, {14: 40, 27: 80})
    assert all(steps[c] == ((), ()) for c in range(0, 51, 3))  # 42-44 are still local at 45 and 48
    assert all(steps[c] == ((42, 43, 44), (6, 7, 8)) for c in range(51, 81, 3))
    assert all(steps[c] == ((), ()) for c in range(81, 90, 3))
    assert all(steps[c] == ((81, 82, 83), (6, 7, 8)) for c in range(90, 102, 3))
    assert list(recached.values()) == [((), ()), ((42, 43, 44), (6, 7, 8))]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 7), st.data())
def test_anchors_are_read_once_their_switch_has_left_the_window(size, sink, extra, data):
    """Visible iff switch + window - sink < first frame, as asked for; not what sink or window show already."""
    window = sink + size + extra
    asked = data.draw(st.lists(st.integers(1, 30), unique_by=lambda f: -(-f // size), max_size=3).map(sorted))
    config = anchor_config(size, sink, window, rule="absolute")
    steps, _ = seen_anchors(config, 60 // size, {-(-frame // size): frame for frame in asked})
    for first, (frames, _) in steps.items():
        past = [frame for frame in asked if -(-frame // size) * size <= first]
        wanted = []
        if past and past[-1] + window - sink < first:
            start = -(-past[-1] // size) * size
            elsewhere = [*range(sink), *range(first - extra, first)]
            wanted = [f for f in range(start, start + size) if f not in elsewhere]
        assert list(frames) == wanted, first


def test_with_chunks_in_flight_the_anchor_is_the_first_that_entered_under_the_prompt():
    config = anchor_config(coupling="joint", stagger=1)
    steps, _ = seen_anchors(config, 20, {6: 17})
    assert {read for read, _ in steps.values()} == {(), (18, 19, 20)}
    assert min(first for first, (read, _) in steps.items() if read) == 27  # 17 + 9 < 27


def test_two_anchors_are_the_two_newest():
    steps, _ = seen_anchors(anchor_config(anchors=2), 40, {4: 12, 12: 36, 20: 60})
    assert steps[33] == ((12, 13, 14), (6, 7, 8))
    assert steps[57] == ((12, 13, 14, 36, 37, 38), (3, 4, 5, 6, 7, 8))
    assert steps[99] == ((36, 37, 38, 60, 61, 62), (3, 4, 5, 6, 7, 8))


# --- a memory bank


def by_hand(bench: Bench, texts: list[torch.Tensor], size: int, interval: int, repeat: bool, rotated: bool, chunks):
    """Per layer and sample the frames in the bank after each commit, slowly, from spec 03 C.2."""
    turn = lambda key, frame: bench.tiny.rotate(
        key[None], bench.tiny.turns(bench.rope, [frame], GEOMETRY.height, GEOMETRY.width)
    )[0]
    held = [[[] for _ in range(2)] for _ in range(2)]
    out, newest = [], None
    for chunk in range(chunks):
        if chunk % interval == 0:
            newest = chunk * bench.size
        if chunk % interval == 0 or repeat:
            count = chunk // interval + 1
            for layer in range(2):
                for sample in range(2):
                    bank = held[layer][sample]
                    if count <= size:
                        bank[count - 1 :] = [newest]
                        continue
                    prompt, scores = texts[layer][sample, 0].double(), []
                    for frame in bank:
                        key = bench.keys[layer, sample, frame]  # [T, H, D]
                        key = turn(key, frame) if rotated else key
                        products = torch.einsum("lhd,thd->hlt", prompt, key) / math.sqrt(GEOMETRY.head_dim)
                        scores.append(products.mean().item())
                    best = sorted(range(size), key=lambda i: -scores[i])[: size - 1]
                    bank[:] = [bank[i] for i in best] + [newest]
        out.append([[list(bank) for bank in layer] for layer in held])
    return out


@pytest.mark.parametrize("rule", ["absolute", "packed"])
@pytest.mark.parametrize(
    "size, interval, repeat", [(3, 3, True), (3, 3, False), (2, 2, False), (1, 1, True), (2, 1, False)]
)
def test_a_bank_holds_what_the_prompt_asks_for_in_every_layer(tiny, size, interval, repeat, rule):
    policy = BankPolicy(BankOptions(8, 2, rule, size=size, interval=interval, repeat=repeat), Sizes(2, 2))
    bench, chunks = Bench(tiny, policy, 2, 20), 20
    bench.tiny = tiny
    texts = [tiny.draw(2, 1, 5, 2, 12, seed=80 + i, dtype=torch.float64) for i in range(2)]
    text = TextKeys(tuple(texts), tuple(texts))
    wanted = by_hand(bench, texts, size, interval, repeat, rule == "absolute", chunks)
    for chunk in range(chunks):
        call = Call(CallKind.DENOISE, (Row((Slot(chunk, SlotOp.STEP, 0, 1),)),))
        (group,) = policy.plan(call, call.rows[0], (range(2 * chunk, 2 * chunk + 2),)).groups
        reads = [s for s in group.segments if s.region == "bank"]
        visible = min(-(-chunk // interval), size)  # its own record is not among them
        assert sum(len(s.pages) for s in reads) == visible and all(s.fixed == (rule == "absolute") for s in reads)
        bench.commit(chunk, text)
        for layer in range(2):
            for sample in range(2):
                frames = wanted[chunk][layer][sample]
                for page, frame in enumerate(frames, start=2):
                    keys, values = (t[layer, sample, page] for t in (bench.store.keys, bench.store.values))
                    key = bench.keys[layer, sample, frame]
                    if rule == "absolute":
                        key = tiny.rotate(key[None], tiny.turns(bench.rope, [frame], 2, 1))[0]
                    torch.testing.assert_close(keys, key, atol=1e-6, rtol=0)  # angles are rounded to float32
                    assert torch.equal(values, bench.values[layer, sample, frame])
    assert len({str(bank) for layer in wanted[-1] for bank in layer}) > 1 or size == 1  # layers choose for themselves


def test_a_bank_without_a_window_behind_it_is_filled_all_the_same(tiny):
    """Nothing recent is kept, so a commit writes no page but the record's."""
    policy = BankPolicy(BankOptions(4, 2, "packed", size=2, interval=1), Sizes(2, 2))
    bench = Bench(tiny, policy, 2, 3)
    texts = tuple(tiny.draw(2, 1, 5, 2, 12, seed=i, dtype=torch.float64) for i in range(2))
    plans = [bench.commit(chunk, TextKeys(texts, texts)) for chunk in range(3)]
    assert [bool(plan.writes) for plan in plans] == [True, False, False] and all(plan.publishes for plan in plans)
    assert torch.equal(bench.store.values[:, :, 3], bench.values[:, :, 4])  # the newest is always there


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sparse_routing_equals_dense_attention_over_the_frames_each_head_chose(tiny, count):
    store, rope = KVStore(GEOMETRY, 6, 2, torch.float64, torch.device("cpu")), RotaryEmbedding(12)
    for tensor, seed in ((store.keys, 1), (store.values, 2)):
        tensor.copy_(tiny.draw(*tensor.shape, seed=seed, dtype=torch.float64))
    own = [tiny.draw(2, 2 * TOKENS, 2, 12, seed=5 + i, dtype=torch.float64) for i in range(3)]
    segments = (
        Segment("sink", (0, 1), (0, 1), (0, 1)), Segment("bank", (2, 3, 4), (9, 12, 15), (2, 3, 4)),
        Segment("recent", (5,), (20,), (5,)), Segment(FLIGHT, (0, 1), (21, 22), (6, 7)),
    )  # fmt: skip
    group = Group((0, 1), (6, 7), segments, Route(("sink", "bank"), count))
    turn = lambda x, positions: tiny.rotate(x, tiny.turns(rope, positions, 2, 1))
    for layer in range(2):
        got = store.bind(Plan((group,)), rope).attend(layer, *own)
        keys = turn(store.keys[layer, :, :6].flatten(1, 2), range(6)).unflatten(1, (6, TOKENS))
        query, key = turn(own[0], (6, 7)), turn(own[1], (6, 7))
        choices = set()
        for sample in range(2):
            for head in range(2):
                mean = query[sample, :, head].mean(0)
                agrees = [(mean @ keys[sample, i, :, head].mean(0)).item() for i in range(5)]
                chosen = sorted(sorted(range(5), key=lambda i: -agrees[i])[:count]) + [5]
                choices.add(tuple(chosen))
                part = lambda x, sample=sample, head=head: x[sample, None, :, head, None]
                k = torch.cat([keys[sample, chosen, :, head].flatten(0, 1), key[sample, :, head]])
                v = torch.cat([store.values[layer, sample, chosen, :, head].flatten(0, 1), own[2][sample, :, head]])
                wanted = tiny.attention(part(query), k[None, :, None], v[None, :, None])
                torch.testing.assert_close(part(got), wanted, atol=1e-6, rtol=0)
        assert len(choices) > 1  # heads and samples choose for themselves


def test_a_released_bank_is_scored_again_under_a_new_prompt():
    """I11: with `repeat`, re-encoding merges the newest record under the new text; else every record is merged once."""
    for repeat in (True, False):
        policy = BankPolicy(BankOptions(12, 3, size=2, interval=2, repeat=repeat), Sizes(3, 3))
        for chunk in range(7):
            policy.commit(list(range(3 * chunk, 3 * chunk + 3)))
        call = clean_call((0,), lambda k: 1, source="past")
        plan = policy.plan(call, call.rows[0], (policy.switch("recache", 21),))
        assert plan.record is None and (plan.merge is not None) == repeat
