"""Who may read what, on plans alone; and attention that follows a plan, against dense attention written out."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from streamgen.cache import GraphStore, Group, KVStore, Plan, Segment, Sizes, WindowPolicy, Write
from streamgen.cache.options import WindowOptions
from streamgen.cache.plan import FLIGHT
from streamgen.cache.policies import POLICIES
from streamgen.cache.store import Geometry
from streamgen.config import load_preset
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.models.masks import teacher_forcing_mask
from streamgen.models.rope import RotaryEmbedding
from streamgen.schedules import Call, CallKind, Row, Slot, SlotOp, clean_call

FP32 = dict(atol=2e-5, rtol=1e-4)  # float32 attention against float64 written out


def denoise(chunk: int) -> Call:
    return Call(CallKind.DENOISE, (Row((Slot(chunk, SlotOp.STEP, 0, 1),)),))


def plan_of(policy: WindowPolicy, call: Call, frames: range) -> Plan:
    return policy.plan(call, call.rows[0], (frames,))


def walk(policy: WindowPolicy, size: int, chunks: int):
    """Plans of a stream: (frames of the chunk, plan of its steps, plan of its commit), committing as it goes."""
    for chunk in range(chunks):
        frames = range(chunk * size, (chunk + 1) * size)
        yield (
            frames,
            plan_of(policy, denoise(chunk), frames),
            plan_of(policy, clean_call((chunk,), lambda k: 1), frames),
        )
        policy.commit(list(frames))


def window(size: int, sink: int, window: int, positions: str = "absolute") -> WindowPolicy:
    return WindowPolicy(WindowOptions(window, sink, positions), Sizes(size, size))


@st.composite
def streams(draw):
    """(chunk size, sink, window, position rule, chunks), every window legal."""
    size, sink = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    extra = draw(st.integers(0, 14))
    return size, sink, sink + size + extra, draw(st.sampled_from(["absolute", "packed"])), draw(st.integers(1, 14))


# --- plans


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((3, 1, 6), [[*range(3)], [*range(6)], [0, *range(4, 9)], [0, *range(7, 12)]]),
        ((3, 3, 9), [[*range(3)], [*range(6)], [*range(9)], [0, 1, 2, *range(6, 12)], [0, 1, 2, *range(9, 15)]]),
        ((3, 0, 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),  # nothing but the chunk itself
        ((3, 3, 6), [[0, 1, 2], [*range(6)], [0, 1, 2, 6, 7, 8]]),  # the floor: sink and chunk
        ((1, 1, 3), [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]),  # MotionStream's c·s1·w1 in frames
    ],
)
def test_worked_tables_of_visible_frames(sizes, expected):
    size, sink, frames = sizes
    seen = [list(plan.groups[0].key_frames) for _, plan, _ in walk(window(size, sink, frames), size, len(expected))]
    assert seen == expected


@pytest.mark.parametrize(
    "sizes, positions, keys, queries",
    [
        ((3, 3, 12), "absolute", [0, 1, 2, *range(45, 54)], [51, 52, 53]),  # LongLive
        ((3, 3, 12), "packed", [*range(12)], [9, 10, 11]),  # LongLive infinity
        ((3, 3, 9), "packed", [*range(9)], [6, 7, 8]),  # MotionStream c3s1w1
    ],
)
def test_worked_positions_at_frame_51(sizes, positions, keys, queries):
    size, sink, frames = sizes
    *_, (_, plan, commit) = walk(window(size, sink, frames, positions), size, 18)
    for one in (plan, commit):
        assert list(one.groups[0].key_frames) == [*range(sink), *range(54 - (frames - sink), 54)]
        assert list(one.groups[0].key_positions) == keys
        assert list(one.groups[0].query_positions) == queries


@given(streams())
def test_i1_i3_i4_i5_v10_plans_are_bounded_causal_unique_and_ordered(stream):
    size, sink, frames, positions, chunks = stream
    policy = window(size, sink, frames, positions)
    for own, plan, commit in walk(policy, size, chunks):
        (group,) = plan.groups
        cached = [s for s in group.segments if s.region != FLIGHT]
        assert {s.region: s.frames for s in group.segments}[FLIGHT] == tuple(own)
        seen, past = group.key_frames, [f for s in cached for f in s.frames]
        assert len(seen) <= frames  # I1: the window counts the chunk itself
        assert max(seen) < own.stop and all(f < own.start for f in past)  # I3
        assert len(set(seen)) == len(seen)  # I4
        assert list(group.key_positions) == sorted(set(group.key_positions))  # I5, V13
        assert group.query_positions == group.key_positions[-size:]
        if positions == "packed":  # I2
            assert max(group.key_positions) < frames
        else:
            assert group.key_positions == seen
        pages = [p for s in cached for p in s.pages]
        assert all(0 <= p < policy.pages for p in pages) and len(set(pages)) == len(pages)
        assert all(f in past for f in range(min(sink, own.start)))  # V10: the sink stays
        assert past == sorted(past) and past[sink:] == list(range(own.start - len(past[sink:]), own.start))  # oldest go
        assert not plan.writes  # a step publishes nothing
        assert commit.groups == plan.groups


@given(streams())
def test_as_much_is_visible_as_the_window_holds(stream):
    size, sink, frames, positions, chunks = stream
    for own, plan, _ in walk(window(size, sink, frames, positions), size, chunks):
        assert len(plan.groups[0].key_frames) == min(own.stop, frames)


@given(streams())
def test_two_visible_frames_never_share_a_page(stream):
    size, sink, frames, positions, chunks = stream
    policy = window(size, sink, frames, positions)
    pages: dict[int, int] = {}  # what a store would hold: page -> frame
    for _, plan, commit in walk(policy, size, chunks):
        for segment in plan.groups[0].segments:
            if segment.region != FLIGHT:
                assert [pages[page] for page in segment.pages] == list(segment.frames)
        assert len({w.page for w in commit.writes}) == len(commit.writes)
        pages.update({w.page: w.frame for w in commit.writes})
        assert len(pages) <= policy.pages == frames - size


@given(streams())
def test_i8_planning_and_committing_twice_change_nothing(stream):
    size, sink, frames, positions, chunks = stream
    policy, again = window(size, sink, frames, positions), window(size, sink, frames, positions)
    for (own, plan, commit), (_, plan_2, commit_2) in zip(walk(policy, size, chunks), walk(again, size, chunks)):
        for _ in range(3):
            assert plan_of(again, denoise(own.start // size), own) == plan == plan_2
        again.commit(list(own))
        again.commit(list(own))
        assert commit == commit_2
    assert policy.state_dict() == again.state_dict()


@given(streams())
def test_steady_state_repeats_one_signature_per_kind_of_call(stream):
    size, sink, frames, positions, _ = stream
    full = -(-frames // size)  # chunks until the window is full
    later = list(walk(window(size, sink, frames, positions), size, full + 20))[full:]
    for plans in list(zip(*later))[1:]:  # steps, commits
        assert len({plan.signature() for plan in plans}) == 1


@given(streams(), st.integers(1, 8))
def test_recache_re_encodes_what_the_window_holds_and_keeps_an_old_sink(stream, done):
    """LongLive's rule: everything while the stream fits the window; later window - sink frames behind the old sink."""
    size, sink, frames, positions, _ = stream
    policy = window(size, sink, frames, positions)
    list(walk(policy, size, done))
    total = done * size
    redo = policy.switch("recache", policy.frames)
    assert redo == (range(total) if total <= frames else range(max(sink, total - (frames - sink)), total))
    plan = plan_of(policy, clean_call((0,), lambda k: 1, source="past"), redo)
    kept = list(range(sink)) if total > frames else []
    assert list(plan.groups[0].key_frames) == [*kept, *redo]
    assert len(plan.groups[0].key_frames) <= frames
    assert len(plan.groups[0].query_frames) == len(redo)  # bidirectional: one group
    written = [w.frame for w in plan.writes]
    assert not set(written) & set(kept)
    # what the next chunk reads is exactly what was kept or written again
    following = plan_of(policy, denoise(done), range(total, total + size)).groups[0]
    assert set(following.key_frames) - set(range(total, total + size)) <= {*kept, *written}


@pytest.mark.parametrize(
    "done, frames, keys",
    [
        (3, range(9), [*range(9)]),
        (4, range(12), [*range(12)]),
        (5, range(6, 15), [0, 1, 2, *range(6, 15)]),
        (14, range(33, 42), [0, 1, 2, *range(33, 42)]),
    ],
)
def test_worked_table_of_longlive_recache(done, frames, keys):
    """Window 12, sink 3 (spec 03 A.2): of LongLive's 12 frames the first 3 come to nothing in a longer stream."""
    policy = window(3, 3, 12)
    list(walk(policy, 3, done))
    assert policy.switch("recache", policy.frames) == frames
    plan = plan_of(policy, clean_call((0,), lambda k: 1, source="past"), frames)
    assert list(plan.groups[0].key_frames) == keys


@given(streams(), st.integers(0, 8), st.integers(1, 6))
def test_cut_hides_recent_frames_and_keeps_the_sink(stream, before, after):
    size, sink, frames, positions, _ = stream
    policy = window(size, sink, frames, positions)
    list(walk(policy, size, before))
    total = before * size
    assert policy.switch("cut", policy.frames) is None
    for chunk in range(before, before + after):
        own = range(chunk * size, (chunk + 1) * size)
        seen = plan_of(policy, denoise(chunk), own).groups[0].key_frames
        limit = max(total, own.stop - (frames - sink))
        assert list(seen) == [f for f in range(own.stop) if f < min(sink, own.start) or f >= limit]
        policy.commit(list(own))
    assert policy.switch("keep", policy.frames) is None
    if total:  # what was cut is not re-encoded either
        first = max(sink, total, own.stop - (frames - sink))
        assert policy.switch("recache", policy.frames) == (range(first, own.stop) if first < own.stop else None)


def test_recache_right_after_a_cut_has_nothing_to_re_encode():
    policy = window(3, 3, 12)
    list(walk(policy, 3, 6))
    policy.switch("cut", policy.frames)
    assert policy.switch("recache", policy.frames) is None


def test_nothing_to_re_encode_before_the_first_chunk():
    assert window(3, 3, 12).switch("recache", 0) is None


@given(streams(), st.integers(0, 8))
def test_policy_state_round_trip(stream, done):
    size, sink, frames, positions, _ = stream
    policy, other = window(size, sink, frames, positions), window(size, sink, frames, positions)
    list(walk(policy, size, done))
    policy.switch("cut", policy.frames)
    other.load_state_dict(policy.state_dict())
    own = range(policy.frames, policy.frames + size)
    assert plan_of(policy, denoise(done), own) == plan_of(other, denoise(done), own)


def test_window_below_its_floor_is_refused_with_both_numbers():
    with pytest.raises(InputError, match=r"cache\.window=5 is below its floor 6 = cache\.sink 3 \+ 3 frames in flight"):
        window(3, 3, 5)
    with pytest.raises(InputError, match="floor 6"):
        Engine(None, load_preset("self-forcing", ["cache.window=5", "cache.sink=3"]))


def test_everything_visible_is_refused_for_endless_streams():
    with pytest.raises(InputError, match="endless"):
        WindowPolicy(WindowOptions(-1, 0), Sizes(3, 3))
    policy = WindowPolicy(WindowOptions(-1, 0), Sizes(3, 3, 30))
    *_, (_, plan, _) = walk(policy, 3, 10)
    assert list(plan.groups[0].key_frames) == [*range(30)]


@pytest.mark.parametrize(
    "options, word",
    [(dict(sink=-1), "cache.sink"), (dict(window=0), "cache.window"), (dict(positions="pakced"), "use absolute")],
)
def test_bad_options_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        WindowOptions(**options)


def test_unknown_policy_is_refused_with_the_choices():
    with pytest.raises(InputError, match="choose one of .*window"):
        POLICIES.get("windw")


# --- attention that follows a plan

GEOMETRY = Geometry(layers=2, batch=2, height=2, width=1, heads=2, head_dim=12)
TOKENS = GEOMETRY.tokens_per_frame


def tensors(store: KVStore) -> dict[str, torch.Tensor]:
    """What a store holds for good."""
    return {name: tensor for name, tensor in store.state_dict().items() if name != "sums"}


class Laboratory:
    """A store whose pages 0 … 5 hold known frames, and what attention over it should give."""

    def __init__(self, tiny, flight: int = 4) -> None:
        self.tiny, self.rope = tiny, RotaryEmbedding(GEOMETRY.head_dim)
        self.store = KVStore(GEOMETRY, 6, 6, torch.float32, torch.device("cpu"))
        shape = (GEOMETRY.batch, 6 * TOKENS, GEOMETRY.heads, GEOMETRY.head_dim)
        self.past = [(2 * tiny.draw(*shape, seed=10 + i), tiny.draw(*shape, seed=20 + i)) for i in range(2)]
        own = (GEOMETRY.batch, flight * TOKENS, GEOMETRY.heads, GEOMETRY.head_dim)
        self.own = [tuple(2 * tiny.draw(*own, seed=30 + 3 * i + j) for j in range(3)) for i in range(2)]
        writes = tuple(Write(i, i, i) for i in range(6))
        self.write(Plan((Group(tuple(range(6)), tuple(range(6)), (flight_segment(range(6)),)),), writes), self.past)

    def write(self, plan: Plan, layers) -> None:
        context = self.store.bind(plan, self.rope)
        for layer, (key, value) in enumerate(layers):
            context.stage(layer, key, value)
        self.store.publish(plan)

    def attend(self, plan: Plan) -> list[torch.Tensor]:
        context = self.store.bind(plan, self.rope)
        return [context.attend(layer, *self.own[layer]) for layer in range(GEOMETRY.layers)]

    def turn(self, x, positions, phase: float = 0.0):
        turns = self.tiny.turns(self.rope, positions, GEOMETRY.height, GEOMETRY.width)
        turns[:, : self.rope.pairs[0]] += phase
        return self.tiny.rotate(x, turns)

    def expected(self, plan: Plan) -> list[torch.Tensor]:
        """Per layer, each query frame on its own: gather, rotate raw keys directly, attend in float64."""
        out = []
        for (query, key, value), (past_keys, past_values) in zip(self.own, self.past):
            frames = lambda x, pages: x.unflatten(1, (-1, TOKENS))[:, list(pages)].flatten(1, 2)
            result = torch.zeros_like(query)
            for group in plan.groups:
                for index, position in zip(group.query_frames, group.query_positions):
                    keys, values, bias = [], [], []
                    for segment in group.segments:
                        k, v = (key, value) if segment.region == FLIGHT else (past_keys, past_values)
                        keys.append(self.turn(frames(k, segment.pages), segment.positions, segment.phase))
                        values.append(frames(v, segment.pages).double())
                        bias += [segment.log_bias] * len(segment.pages) * TOKENS
                    part = slice(index * TOKENS, (index + 1) * TOKENS)
                    q = self.turn(query[:, part], [position])
                    bias = torch.tensor(bias, dtype=torch.float64)
                    result[:, part] = self.tiny.attention(q, torch.cat(keys, 1), torch.cat(values, 1), bias)
            out.append(result)
        return out

    def check(self, plan: Plan) -> None:
        for got, wanted in zip(self.attend(plan), self.expected(plan), strict=True):
            torch.testing.assert_close(got, wanted, **FP32)


def cached(*pages: int, positions=None, phase: float = 0.0, log_bias: float = 0.0, region: str = "ring") -> Segment:
    return Segment(region, pages, pages, tuple(positions or pages), phase, log_bias)


def flight_segment(frames, positions=None, **more) -> Segment:
    return Segment(FLIGHT, tuple(frames), tuple(frames), tuple(positions or frames), **more)


@pytest.fixture
def lab(tiny):
    return Laboratory(tiny)


def own_group(*segments: Segment, positions=(6, 7, 8, 9), own=None) -> Group:
    return Group((0, 1, 2, 3), positions, (*segments, own or flight_segment(range(4), positions)))


@pytest.mark.parametrize("pages", [(0, 1, 2, 3, 4, 5), (2, 3), (5, 0, 3), (4, 5, 2, 3), ()])
def test_attention_reads_exactly_the_planned_pages(lab, pages):
    lab.check(Plan((own_group(*([cached(*pages)] if pages else [])),)))


def test_fused_commit_two_groups_equal_masked_dense_attention(lab, tiny):
    """MAGI's fused commit: clean chunk (frames 0, 1) and noisy chunk (2, 3) in one call; clean does not see noisy."""
    past = cached(0, 1, 4)
    clean = Group((0, 1), (6, 7), (past, flight_segment((0, 1), (6, 7))))
    noisy = Group((2, 3), (8, 9), (past, flight_segment((0, 1, 2, 3), (6, 7, 8, 9))))
    for plan in (Plan((clean, noisy)), Plan((noisy, clean))):
        lab.check(plan)
    # the same once more as one dense attention under a mask, without the words of a plan
    for layer, got in enumerate(lab.attend(Plan((clean, noisy)))):
        query, key, value = lab.own[layer]
        kept = torch.tensor([0, 1, 4])
        keys = torch.cat([lab.past[layer][0].unflatten(1, (-1, TOKENS))[:, kept].flatten(1, 2), key], 1)
        values = torch.cat([lab.past[layer][1].unflatten(1, (-1, TOKENS))[:, kept].flatten(1, 2), value], 1)
        mask = torch.ones(4, 7, dtype=torch.bool)
        mask[:2, 5:] = False
        bias = torch.zeros(4, 7).masked_fill(~mask, -torch.inf)
        bias = bias.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
        wanted = tiny.attention(
            lab.turn(query, (6, 7, 8, 9)), lab.turn(keys, (0, 1, 4, 6, 7, 8, 9)), values, bias.double()
        )
        torch.testing.assert_close(got.double(), wanted, **FP32)


def test_groups_may_interleave_frames_and_leave_some_own_keys_out(lab):
    even = Group((0, 2), (6, 8), (cached(1, 2), flight_segment((0, 2), (6, 8))))
    odd = Group((3, 1), (9, 7), (cached(5), flight_segment((3, 1), (9, 7))))
    lab.check(Plan((even, odd)))


def test_in_flight_keys_may_sit_at_other_positions_than_queries(lab):
    lab.check(Plan((own_group(cached(0, 1), own=flight_segment(range(4), (2, 3, 4, 5))),)))


def test_phase_turns_temporal_pairs_of_a_segment(lab):
    plan = Plan((own_group(cached(0, 1, phase=1 / 6), cached(2, 3, region="sink")),))
    lab.check(plan)
    plain = Plan((own_group(cached(0, 1), cached(2, 3, region="sink")),))
    assert not torch.allclose(lab.attend(plan)[0], lab.attend(plain)[0], atol=1e-3)


@pytest.mark.parametrize("count", [2, 5])
def test_log_bias_of_ln_n_equals_n_copies_of_the_key(lab, tiny, count):
    plan = Plan((own_group(cached(1, 2, log_bias=math.log(count)), cached(4)),))
    lab.check(plan)
    for layer, got in enumerate(lab.attend(plan)):
        query, key, value = lab.own[layer]
        order = [1, 2] * count + [4]
        frames = lambda x, order=order: x.unflatten(1, (-1, TOKENS))[:, order].flatten(1, 2)
        keys = torch.cat([frames(lab.past[layer][0]), key], 1)
        values = torch.cat([frames(lab.past[layer][1]), value], 1)
        positions = (6, 7, 8, 9)
        wanted = tiny.attention(lab.turn(query, positions), lab.turn(keys, (*order, *positions)), values)
        torch.testing.assert_close(got.double(), wanted, **FP32)


@pytest.mark.parametrize("shift", [1, 1000, -7, 0.5])
def test_i7_adding_one_constant_to_all_positions_changes_nothing(lab, shift):
    before = lab.attend(Plan((own_group(cached(0, 1, 2)),)))
    past = cached(0, 1, 2, positions=(shift, 1 + shift, 2 + shift))
    moved = own_group(past, positions=tuple(6 + shift + i for i in range(4)))
    for a, b in zip(before, lab.attend(Plan((moved,)))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)  # angles are rounded to float32 at other values


def test_rerotation_equals_direct_rotation_and_never_drifts(lab):
    """The rotated copy follows every plan from the raw keys: a hundred moves leave no trace."""
    for step in range(100):
        lab.attend(Plan((own_group(cached(0, 1, 2, positions=(step, step + 1, step + 2))),)))
    lab.check(Plan((own_group(cached(0, 1, 2, 3, positions=(3, 0, 1, 2))),)))
    lab.check(Plan((own_group(cached(0, 1, 2, 3)),)))


def test_the_store_for_training_follows_the_same_plans(lab):
    """Pages, positions, phases and biases: what inference reads, training reads."""
    graph = GraphStore(GEOMETRY)
    six = tuple(range(6))
    whole = Plan((Group(six, six, (flight_segment(six),)),), tuple(Write(i, i, i) for i in six))
    context = graph.bind(whole, lab.rope)
    for layer, pair in enumerate(lab.past):
        context.stage(layer, *pair)
    graph.publish(whole, context)
    for plan in (
        Plan((own_group(cached(5, 0, 3)),)),
        Plan((own_group(cached(0, 1, phase=1 / 6), cached(2, positions=(9,), log_bias=math.log(3))),)),
    ):
        context = graph.bind(plan, lab.rope)
        for layer, wanted in enumerate(lab.expected(plan)):
            torch.testing.assert_close(context.attend(layer, *lab.own[layer]), wanted, **FP32)


def test_one_page_at_two_positions_in_one_call_is_refused(lab):
    with pytest.raises(ValueError, match="two positions"):
        lab.attend(Plan((own_group(cached(0), cached(0, positions=(3,), region="sink")),)))


def test_i8_calls_change_nothing_until_they_are_published(lab):
    committed = {name: tensor.clone() for name, tensor in tensors(lab.store).items()}
    plan = Plan((own_group(cached(0, 1)),), (Write(0, 6, 2), Write(1, 7, 3)))
    first = lab.attend(plan)
    for got, again in zip(first, lab.attend(plan)):
        assert torch.equal(got, again)
    assert all(torch.equal(committed[name], tensor) for name, tensor in tensors(lab.store).items())
    lab.store.publish(plan)
    published = {name: tensor.clone() for name, tensor in tensors(lab.store).items()}
    assert not torch.equal(published["keys"], committed["keys"])
    lab.store.publish(plan)  # a second time with the same input is no change
    assert all(torch.equal(published[name], tensor) for name, tensor in tensors(lab.store).items())
    for page in (0, 1, 4, 5):
        assert torch.equal(published["keys"][:, :, page], committed["keys"][:, :, page])


def test_published_frames_are_read_back(lab):
    plan = Plan((own_group(cached(0, 1)),), (Write(3, 9, 4), Write(1, 7, 0)))
    lab.attend(plan)
    lab.store.publish(plan)
    for layer in range(GEOMETRY.layers):
        for mine, own in zip(lab.past[layer], lab.own[layer][1:]):
            pages, frames = mine.unflatten(1, (-1, TOKENS)), own.unflatten(1, (-1, TOKENS))
            pages[:, 4], pages[:, 0] = frames[:, 3], frames[:, 1]
    lab.check(Plan((own_group(cached(0, 1, 4)),)))


def test_a_fork_of_a_store_shares_nothing(lab):
    other = lab.store.fork()
    plan = Plan((own_group(),), (Write(0, 6, 0),))
    lab.attend(plan)
    lab.store.publish(plan)
    assert not torch.equal(other.keys[:, :, 0], lab.store.keys[:, :, 0])
    assert other.layer_keys[0].data_ptr() == other.keys.data_ptr()
    assert other.nbytes == lab.store.nbytes


def test_store_state_round_trip(lab):
    plan = Plan((own_group(cached(0, 3)),))
    before = lab.attend(plan)
    fresh = KVStore(GEOMETRY, 6, 6, torch.float32, torch.device("cpu"))
    fresh.angles = list(lab.store.angles)  # stale on purpose: loading must forget them
    fresh.load_state_dict(lab.store.state_dict())
    lab.store = fresh
    for a, b in zip(before, lab.attend(plan)):
        assert torch.equal(a, b)


# --- the whole network over a cache


def roll(engine: Engine, embeds, noise) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([chunk.latents for chunk in engine.run(embeds, noise)], 2)


@pytest.mark.parametrize("rule", ["absolute", "packed"])
@pytest.mark.parametrize("sizes", [(3, -1, 0), (3, 15, 3), (2, 5, 1), (3, 9, 3), (3, 6, 3), (1, 3, 1)])
def test_i6_cached_rollout_equals_recomputing_every_frame_without_a_cache(tiny, sizes, rule):
    size, frames, sink = sizes
    model, chunks = tiny.model(), 15 // size if frames == -1 else 6
    noise, embeds = tiny.noise(chunks, size), tiny.draw(1, 5, 8)
    config = tiny.config(
        f"chunk.latent_frames={size}", f"cache.window={frames}", f"cache.sink={sink}", f"positions.rule={rule}"
    )
    engine = Engine(model, config)
    with torch.no_grad():
        wanted = tiny.rollout(model, embeds, noise, engine.ladder, chunks, size, frames, sink, rule == "packed")
    torch.testing.assert_close(roll(engine, embeds, noise), wanted, **FP32)


def test_i6_within_the_window_absolute_and_packed_are_plain_full_attention(tiny):
    """PACK = ABS before the first eviction; after it they part, or this test could not fail."""
    model, noise, embeds = tiny.model(), tiny.noise(6), tiny.draw(1, 5, 8)
    whole, absolute, packed = (
        roll(Engine(model, tiny.config(*overrides)), embeds, noise)
        for overrides in (
            [],
            ["cache.window=12", "cache.sink=3"],
            ["cache.window=12", "cache.sink=3", "positions.rule=packed"],
        )
    )
    inside, outside = (slice(None), slice(None), slice(0, 12)), (slice(None), slice(None), slice(12, None))
    torch.testing.assert_close(absolute[inside], whole[inside], **FP32)
    torch.testing.assert_close(packed[inside], whole[inside], **FP32)
    for a, b in ((absolute, whole), (packed, absolute)):
        assert (a[outside] - b[outside]).abs().max() > 1e-3


@pytest.mark.parametrize("frames, sink", [(None, 0), (6, 0), (9, 3)])
def test_streaming_over_clean_context_equals_one_teacher_forcing_forward(tiny, frames, sink):
    """Chunk by chunk over cached clean latents = one masked forward over [clean | noisy] (spec 01, check 3)."""
    model, chunks, size = tiny.model(), 4, 3
    total = chunks * size
    noise, embeds = tiny.noise(chunks, size), tiny.draw(1, 5, 8)
    config = tiny.config("ladder.timesteps=[600]", f"cache.window={frames or -1}", f"cache.sink={sink}")
    engine, velocities = Engine(model, config), []

    def watch(module, args, kwargs, output):
        if output is not None:
            velocities.append(output[0])

    handle = model.register_forward_hook(watch, with_kwargs=True)
    clean = roll(engine, embeds, noise)
    handle.remove()
    with torch.no_grad():
        wanted = model(
            torch.cat([clean, noise.initial], 2),
            torch.tensor([[0.0] * total + [engine.ladder.timesteps[0]] * total]),
            embeds,
            frame_positions=[*range(total)] * 2,
            frame_mask=teacher_forcing_mask(total, size, frames, sink),
            return_dict=False,
        )[0]
    torch.testing.assert_close(torch.cat(velocities, 2), wanted[:, :, total:], **FP32)


@given(st.data())
def test_page_contents_follow_from_the_frame_number(data):
    size, sink, frames, _, chunks = data.draw(streams())
    assume(frames > sink + size)
    policy = window(size, sink, frames)
    list(walk(policy, size, chunks))
    for frame in range(chunks * size):
        assert policy.page(frame) == (frame if frame < sink else sink + (frame - sink) % (frames - sink - size))
