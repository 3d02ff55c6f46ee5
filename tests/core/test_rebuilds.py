"""Frames that run once more: before every chunk, at a new shot, sinks at a new prompt; and weights on past keys."""

import math
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import SIZE, advance, latents, saved, start

from streamgen.cache import KVStore
from streamgen.cache.bank import BankOptions
from streamgen.cache.options import WindowOptions
from streamgen.cache.plan import FLIGHT, Group, Plan, Route, Segment
from streamgen.cache.rebuild import Rebuild, attenuated, block_causal
from streamgen.cache.shots import share, spread
from streamgen.cache.store import Geometry
from streamgen.config import load_preset
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.models.rope import RotaryEmbedding
from streamgen.noise import SeededNoise
from streamgen.walk import walk

FP32 = dict(atol=5e-5, rtol=1e-4)  # the same sums in calls of other sizes
STEPS = "ladder.timesteps=[1000,500]"
SHORT = ["chunk.latent_frames=1", "cache.window=3", "cache.context.frames=2", "cache.context.phase=0.6", STEPS]
REFRESH = ["switch.sink=refresh", "switch.mode=recache", "cache.window=12", "cache.sink=3", STEPS]


pytestmark = pytest.mark.usefixtures("no_gradients")


# --- an oracle without a cache


class Dense:
    """Attention of a whole call: frame i reads {frame of the call: position}, stands at own[i], turned by phases[i]."""

    def __init__(self, tiny, rope, reads, own, phases, grid=(2, 2)) -> None:
        self.tiny, self.rope, self.reads, self.own, self.phases, self.grid = tiny, rope, reads, own, phases, grid

    def turns(self, positions, phases):
        turns = self.tiny.turns(self.rope, positions, *self.grid)
        turns[:, : self.rope.pairs[0]] += torch.tensor(phases).repeat_interleave(self.grid[0] * self.grid[1])[:, None]
        return turns

    def attend(self, layer, query, key, value):
        split, out = (len(self.reads), -1), []
        for i, seen in enumerate(self.reads):
            frames = sorted(seen)
            part = lambda x, frames=frames: x.unflatten(1, split)[:, frames].flatten(1, 2)
            turned = self.turns([seen[f] for f in frames], [self.phases[f] for f in frames])
            q = self.tiny.rotate(query.unflatten(1, split)[:, i], self.turns([self.own[i]], [self.phases[i]]))
            out.append(self.tiny.attention(q, self.tiny.rotate(part(key), turned), part(value)))
        return torch.cat(out, 1).to(query.dtype)


class Oracle:
    """One chunk behind clean frames, all of them in every forward. Clean frames are told by `texts`, one each."""

    def __init__(self, tiny, model, engine) -> None:
        self.tiny, self.model, self.engine, self.noise = tiny, model, engine, SeededNoise(0)

    def chunk(self, clean, texts, frames: range, text, reads, own, phases=None) -> torch.Tensor:
        phases = phases or [0.0] * len(own)
        context = Dense(self.tiny, self.model.rope, reads, own, phases)
        draw = lambda name, p: self.noise.frames(name, frames, p, (1, 4, *SIZE))
        x, ladder = draw("initial", 0), self.engine.ladder
        told = torch.stack([*texts, *[text] * len(frames)], 1)  # [B, P, L, D], a prompt per frame
        for p, level in enumerate(ladder.timesteps):
            time = torch.tensor([[0.0] * len(texts) + [level] * len(frames)])
            which = torch.arange(told.shape[1])[None]
            out = self.model(
                torch.cat([clean, x], 2), time, told, prompt_index=which, context=context, return_dict=False
            )[0]
            x = ladder.step(x, out[:, :, len(texts) :].float(), p, lambda p=p: draw("renoise", p))
        return x


# --- context made anew before every chunk


CONTEXTS = {  # (chunk, window, sink): first frame of a chunk -> its context
    (3, 6, 0): {0: (), 3: (0, 1, 2), 6: (3, 4, 5), 9: (6, 7, 8)},
    (3, 6, 1): {3: (0, 1, 2), 6: (0, 4, 5), 9: (0, 7, 8)},
    (1, 4, 0): {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (1, 2, 3), 5: (2, 3, 4)},
    (2, 5, 0): {2: (0, 1), 4: (0, 2, 3), 6: (3, 4, 5)},  # the first frame leads until i - 1 chunks fill the context
}


def krea(*overrides: str, sizes=(3, 6, 0)):
    own = [f"chunk.latent_frames={sizes[0]}", f"cache.window={sizes[1]}", f"cache.sink={sizes[2]}"]
    return load_preset("krea", [STEPS, *own, *overrides])


@pytest.mark.parametrize("sizes", CONTEXTS)
def test_context_is_the_latest_frames_behind_the_first_one(sizes):
    calls = list(walk(Engine(None, krea(sizes=sizes)), 7))
    for first, context in CONTEXTS[sizes].items():
        again = [c for c in calls if c.rebuilt and first == 1 + max(f for part in c.frames for f in part)]
        steps = [c for c in calls if not c.rebuilt and c.frames[0].start == first]
        assert [f for c in again for part in c.frames for f in part] == list(context)
        for call in steps:
            (group,) = call.plan.groups
            assert group.key_frames == (*context, *range(first, first + sizes[0]))
            assert group.key_positions == tuple(range(len(group.key_frames)))  # they never leave the window
            assert group.query_positions == tuple(range(len(context), len(context) + sizes[0]))
            assert not call.plan.writes


def test_a_context_takes_the_place_of_the_clean_pass():
    """Krea's cost: as many calls and frames as with a commit, one per chunk from the second on."""
    calls = list(walk(Engine(None, load_preset("krea")), 6))
    kinds = [(call.call.kind.value, call.call.source) for call in calls]
    assert kinds.count(("clean", "past")) == 5 and kinds.count(("denoise", "flight")) == 6 * 5
    assert all(len(call.frames[0]) == 3 for call in calls)
    levels = Engine(None, load_preset("krea")).ladder.timesteps
    assert levels == pytest.approx([1000, 937.5, 833.333, 625, 4.98], abs=1e-2)


@pytest.mark.parametrize("mask", ["bidirectional", "block-causal"])
@pytest.mark.parametrize("sizes, lag", [((3, 6, 0), True), ((1, 4, 0), True), ((1, 4, 0), False), ((3, 6, 1), False)])
def test_a_stream_with_its_context_made_anew_is_one_without_a_cache(tiny, model, embeds, sizes, lag, mask):
    """Keys follow from the context's latents alone, whatever the frames once saw; a new prompt lags or not."""
    size = sizes[0]
    engine = Engine(model, krea(f"cache.context.lag={str(lag).lower()}", f"switch.mask={mask}", sizes=sizes))
    oracle, at = Oracle(tiny, model, engine), 2 * size
    done = latents(engine.run(embeds[0], SeededNoise(0), 6 * size, SIZE, switches={at: embeds[1]}))
    for first, context in CONTEXTS[sizes].items():
        frames = range(first, first + size)
        blocks = [i // size if mask == "block-causal" else 0 for i in range(len(context))]
        reads = [{j: j for j in range(len(context)) if blocks[j] <= blocks[i]} for i in range(len(context))]
        reads += [{j: j for j in range(len(context) + size)}] * size
        told = embeds[first >= at + size * lag]
        x = oracle.chunk(
            done[:, :, list(context)], [told] * len(context), frames, embeds[first >= at], reads, range(len(reads))
        )
        torch.testing.assert_close(done[:, :, frames.start : frames.stop], x, **FP32)


def test_a_cut_leaves_the_first_frames_that_stay(tiny, model, embeds):
    seen = {}
    for sink in (0, 1):
        engine = Engine(model, krea("switch.mode=cut", sizes=(3, 6, sink)))
        engine.tracing = True
        list(engine.run(embeds[0], SeededNoise(0), 18, SIZE, switches={9: embeds[1]}))
        steps = [call for call in engine.trace() if call.kind == "denoise"]
        seen[sink] = [call.key_frames[0] for call in steps if call.frames[0] in (9, 12)][::2]
    assert seen[0] == [(9, 10, 11), (9, 10, 11, 12, 13, 14)]
    assert seen[1] == [(0, 9, 10, 11), (0, 10, 11, 12, 13, 14)]


# --- shots


def test_every_shot_gives_its_share_of_frames():
    """Spec 03 D.1."""
    table = {1: [6], 2: [3, 3], 3: [2] * 3, 4: [1, 1, 2, 2], 5: [1, 1, 1, 1, 2], 6: [1] * 6, 7: [0] + [1] * 6}
    for shots, counts in table.items():
        assert [share(shot, shots, 6) for shot in range(shots)] == counts
    assert spread(0, 20, 6) == [0, 4, 8, 12, 16, 20] and spread(21, 41, 3) == [21, 31, 41]
    assert spread(0, 20, 1) == [0] and spread(0, 20, 0) == [] and spread(3, 5, 6) == [3, 4, 5]


def test_worked_table_of_shotstream():
    """Spec 03 E.2: chunk 4 of a shot reads six context frames at 0-5 and frames 0-14 of the shot at 6-20."""
    calls = list(walk(Engine(None, load_preset("shotstream")), 28, [21, 42, 63]))
    for shot, context in enumerate(
        ([*range(-6, 0)], [0, 4, 8, 12, 16, 20], [0, 10, 20, 21, 31, 41], [0, 20, 21, 41, 42, 62])
    ):
        first = 21 * shot
        (again,) = [c for c in calls if c.rebuilt and c.tick == 28 * shot]
        assert [f for part in again.frames for f in part] == context
        assert again.call.source == ("past" if shot else "external")
        (group,) = again.plan.groups
        assert group.key_positions == group.query_positions == tuple(range(6))  # one group: all see each other
        flags = [0] * 6 if not shot else [frame // 21 for frame in context]
        assert group.query_phases == pytest.approx([flag / 6 for flag in flags])
        call = next(c for c in calls if c.frames[0].start == first + 12 and not c.call.commits)
        (group,) = call.plan.groups
        assert group.key_frames == (*context, *range(first, first + 15))
        assert group.key_positions == tuple(range(21)) and group.query_positions == (18, 19, 20)
        phases = [s.phase for s in group.segments for _ in s.pages]
        assert phases == pytest.approx([flag / 6 for flag in flags] + [max(1, shot) / 6] * 15)
        assert group.query_phases == pytest.approx([max(1, shot) / 6] * 3)
    last = calls[-1].plan.groups[0]
    assert last.key_positions == tuple(range(27))  # a whole shot and its context


def test_a_shot_longer_than_its_window_slides_at_the_same_positions():
    calls = [c for c in walk(Engine(None, load_preset("shotstream")), 14) if c.frames[0].start == 39]
    (group,) = calls[0].plan.groups
    assert group.key_frames == (*range(-6, 0), *range(21, 42)) and group.key_positions == tuple(range(27))


@pytest.mark.parametrize("blank", [False, True])
def test_a_shot_is_a_stream_behind_its_context_without_a_cache(tiny, model, embeds, blank):
    """Chunks of one frame: context frames under their own prompts, an angle between shots, a window that slides."""
    config = load_preset("shotstream", [*SHORT, f"cache.context.blank={str(blank).lower()}"])
    engine = Engine(model, config)
    cuts = [0, 4, 6, 12]
    switches = {frame: embeds[shot] for shot, frame in enumerate(cuts[1:3], 1)}
    done = latents(engine.run(embeds[0], SeededNoise(0), cuts[-1], SIZE, switches=switches))
    # a window of three: of the four frames of the first shot the latest three may be chosen
    contexts = [[-2, -1] if blank else [], [1, 3], [1, 4]]
    shot_of = lambda frame: 0 if frame < 4 else 1 if frame < 6 else 2
    oracle = Oracle(tiny, model, engine)
    for frame in range(cuts[-1]):
        shot, context = shot_of(frame), contexts[shot_of(frame)]
        own = [*context, *range(cuts[shot], frame + 1)]
        reads = [{i: i for i in range(len(context))} for _ in context]
        for at in range(cuts[shot], frame + 1):
            window = [f for f in range(cuts[shot], at + 1) if f > at - 3]
            local = {own.index(f, len(context)): 2 + i for i, f in enumerate(window)}
            reads.append({**{i: i for i in range(len(context))}, **local})
        places = [reads[i][i] for i in range(len(own))]
        clean = torch.cat([done[:, :, f : f + 1] if f >= 0 else torch.zeros(1, 4, 1, *SIZE) for f in own[:-1]] or [
            done[:, :, :0]
        ], 2)  # fmt: skip
        texts = [embeds[shot_of(f) if f >= 0 else 0] for f in own[:-1]]
        flags = [0 if f < 0 else shot_of(f) if shot_of(f) or not blank or f in context else 1 for f in own]
        x = oracle.chunk(
            clean, texts, range(frame, frame + 1), embeds[shot], reads, places, [0.6 * flag for flag in flags]
        )
        torch.testing.assert_close(done[:, :, frame : frame + 1], x, **FP32)


def test_i14_shots_apart_count_by_the_cosine_of_their_angle(tiny):
    """Equal q and k in one temporal pair at one position: the logit is |z|²·cos((a - b)/6), whatever the pair."""
    rope = RotaryEmbedding(12)
    geometry = Geometry(layers=1, batch=1, height=1, width=1, heads=1, head_dim=12)
    for pair in range(rope.pairs[0]):
        for a, b in ((0, 3), (2, 1), (4, 4)):
            z = torch.zeros(1, 1, 1, 12, dtype=torch.float64)
            z[..., 2 * pair : 2 * pair + 2] = torch.tensor([1.7, -0.8])
            store = KVStore(geometry, 1, 1, torch.float64, torch.device("cpu"))
            store.keys[0, :, 0, :, :], store.values[0, :, 0] = z, 1.0
            segments = (
                Segment("context", (0,), (0,), (9.0,), phase=b / 6), Segment(FLIGHT, (0,), (1,), (9.0,), phase=a / 6)
            )  # fmt: skip
            plan = Plan((Group((0,), (9.0,), segments, query_phases=(a / 6,)),))
            out = store.bind(plan, rope).attend(0, z, torch.zeros_like(z), torch.zeros_like(z))[0, 0, 0, 0].item()
            logit = math.log(out / (1 - out)) * math.sqrt(12)  # against a key of zeros
            assert logit == pytest.approx((1.7**2 + 0.8**2) * math.cos((a - b) / 6), abs=1e-5)


def test_a_stream_of_many_shots_keeps_a_bounded_past(tiny, model, embeds):
    config = load_preset("shotstream", [*SHORT, "cache.context.frames=3", "ladder.timesteps=[1000]"])
    engine = Engine(model, config)
    switches = {frame: embeds[frame % 3] for frame in range(4, 60, 4)}
    rollout, held = start(engine, embeds[0], switches=switches), []
    for _ in range(56):
        rollout.advance()
        held.append((len(rollout.past), len(rollout.policy.shots), rollout.store.nbytes))
    assert max(held[40:]) == max(held[20:40]) and max(held)[0] < 13


# --- laws of all three, as integers


def laws(config, chunks: int, switches) -> None:
    """Every page holds the frame that a plan says; nothing is read twice, ahead of time, or outside the span."""
    held: dict[int, int] = {}
    engine = Engine(None, config)
    reach = config.cache.window + (config.cache.context.frames if config.cache.policy == "shots" else 0)
    for call in walk(engine, chunks, switches):
        own = [f for part in call.frames for f in part]
        assert sorted(i for g in call.plan.groups for i in g.query_frames) == list(range(len(own)))
        for group in call.plan.groups:
            past = [(s, *item) for s in group.segments if s.region != FLIGHT for item in zip(s.pages, s.frames)]
            assert all(held[page] == frame for _, page, frame in past)  # I10: what is read was written
            assert all(frame < own[-1] for _, _, frame in past)  # I3
            assert len(set(group.key_frames)) == len(group.key_frames) <= reach  # I1, I4
            positions = group.key_positions
            assert len(set(positions)) == len(positions)  # I5
            if config.positions.rule == "packed":
                assert 0 <= min(positions) and max(positions) < reach  # I2
            flight = {i: p for s in group.segments if s.region == FLIGHT for i, p in zip(s.pages, s.positions)}
            assert group.query_positions == tuple(flight[i] for i in group.query_frames)
        for write in call.plan.writes:
            assert own[write.index] == write.frame
            held[write.page] = write.frame


@settings(max_examples=20)
@given(
    st.sampled_from(["keep", "recache", "cut"]), st.lists(st.integers(1, 40), max_size=4),
    st.sampled_from(["bidirectional", "block-causal"]), st.integers(1, 3), st.integers(0, 1),
)  # fmt: skip
def test_what_a_rebuilt_cache_reads_was_written(mode, switches, mask, size, sink):
    more = [f"switch.mode={mode}", f"switch.mask={mask}", f"chunk.latent_frames={size}"]
    laws(load_preset("krea", [*more, f"cache.sink={sink}", f"cache.window={size + 3}"]), 14, switches)
    laws(load_preset("shotstream", [*more, f"cache.window={size + 5}", "cache.context.frames=4"]), 14, switches)


@settings(max_examples=20)
@given(
    st.sampled_from(["absolute", "packed", "before", "tri-region"]), st.lists(st.integers(1, 40), max_size=4),
    st.sampled_from(["bidirectional", "block-causal"]), st.integers(1, 3), st.integers(0, 4), st.integers(0, 5),
    st.sampled_from(["longlive", "anchor-forcing"]),
)  # fmt: skip
def test_what_a_refreshed_window_reads_was_written(rule, switches, mask, size, sink, extra, preset):
    """I10: the sink is encoded again with the window, at the places where steps read it."""
    sink = max(1, sink) if preset == "anchor-forcing" else sink
    config = load_preset(preset, [
        "switch.sink=refresh", f"switch.mask={mask}", f"positions.rule={rule}", f"chunk.latent_frames={size}",
        f"cache.sink={sink}", f"cache.window={sink + size + extra}", "positions.span=30", "cache.anchors=1",
    ])  # fmt: skip
    if preset == "longlive":
        laws(config, 14, switches)
    for call in walk(Engine(None, config), 14, switches):
        own = [f for part in call.frames for f in part]
        if call.call.source == "past":
            assert set(range(min(sink, own[-1] + 1))) <= {write.frame for write in call.plan.writes}
            places = call.plan.groups[-1].segments[-1].positions
            if len(own) > sink and rule == "before":  # directly before the window, an anchor apart
                assert places[sink] - sink - size <= places[0] <= places[sink] - sink
            elif len(own) > sink:
                assert places[:sink] == tuple(range(sink))


# --- sinks at a new prompt


@pytest.mark.parametrize("rule", ["absolute", "packed"])
@pytest.mark.parametrize("mask", ["bidirectional", "block-causal"])
def test_a_refreshed_sink_is_encoded_with_the_window_under_the_new_prompt(tiny, model, embeds, rule, mask):
    """I10, and where every frame stands: the next chunk is one behind clean frames that were all told the new text."""
    engine = Engine(model, load_preset("longlive", [*REFRESH, f"positions.rule={rule}", f"switch.mask={mask}"]))
    rollout = start(engine, embeds[0])
    done = advance(rollout, 7)
    kept = {flight.frames.start for flight in rollout.past}
    assert kept == {0, 9, 12, 15, 18}  # the sink's chunk is kept
    rollout.switch(embeds[1], "recache")
    got = rollout.advance().latents
    own = [0, 1, 2, *range(12, 24)]
    place = {f: i if rule == "packed" else f for i, f in enumerate(own)}
    step = [0, 1, 2, *range(15, 24)]  # a chunk reads three frames less than were encoded
    stands = {f: i if rule == "packed" else f for i, f in enumerate(step)}
    reads = []
    for frame in own[:12]:
        seen = own[:12] if mask == "bidirectional" else [f for f in own[:12] if f // 3 <= frame // 3]
        reads.append({own.index(f): place[f] for f in seen})
    reads += [{own.index(f): stands[f] for f in step}] * 3
    at = [place[f] for f in own[:12]] + [stands[f] for f in own[12:]]
    wanted = Oracle(tiny, model, engine).chunk(
        done[:, :, own[:12]], [embeds[1]] * 12, range(21, 24), embeds[1], reads, at
    )
    torch.testing.assert_close(got, wanted, **FP32)
    assert (rollout.store.keys[:, :, : rollout.policy.pages].abs().amax((-1, -2, -3)) > 0).all()


def test_without_a_refresh_the_sink_keeps_its_first_prompt(model, embeds):
    found = {}
    for sink in ("keep", "refresh"):
        rollout = start(Engine(model, load_preset("longlive", [*REFRESH, f"switch.sink={sink}"])), embeds[0])
        advance(rollout, 7)
        rollout.commit()
        before = rollout.store.values[:, :, :3].clone()
        rollout.switch(embeds[1], "recache")
        found[sink] = (rollout.store.values[1, :, :3] - before[1]).abs().max().item()
        assert len(rollout.past) == (4 if sink == "keep" else 5)
    assert found["keep"] == 0 and found["refresh"] > 1e-2


@pytest.mark.parametrize("preset, rule", [("longlive", "absolute"), ("default", "packed"), ("default", "before")])
def test_i9_block_causal_re_encoding_under_the_same_prompt_changes_nothing(tiny, embeds, preset, rule):
    """While the whole history fits the window; bidirectional re-encoding gives other keys."""
    model, text = tiny.model().double(), embeds[0].double()
    found = {}
    for mask in ("block-causal", "bidirectional"):
        config = load_preset(preset, [STEPS, "cache.window=12", f"positions.rule={rule}", f"switch.mask={mask}"])
        rollout = start(Engine(model.requires_grad_(False), config), text)
        advance(rollout, 4)
        rollout.commit()
        pages = [page for page in map(rollout.policy.page, range(3, 12))][-6:]
        before = [t[:, :, pages].clone() for t in (rollout.store.keys, rollout.store.values)]
        sink = rollout.store.values[:, :, :3].clone()
        rollout.switch(text, "recache")
        after = [t[:, :, pages] for t in (rollout.store.keys, rollout.store.values)]
        found[mask] = max((a - b).abs().max().item() for a, b in zip(before, after))
        found[mask] = max(found[mask], (rollout.store.values[:, :, :3] - sink).abs().max().item())
    assert found["block-causal"] < 1e-6 and found["bidirectional"] > 1e-2  # angles are rounded to float32


# --- weights on past keys

GEOMETRY = Geometry(layers=2, batch=2, height=2, width=1, heads=2, head_dim=12)


@pytest.mark.parametrize("weight", [0.3, 0.01])
def test_a_weight_on_recent_keys_is_two_attentions_merged_by_their_sums(tiny, weight):
    """out = (e^lseA·oA + b·e^lseB·oB)/(e^lseA + b·e^lseB), B = recent keys, in float64."""
    rope, store = RotaryEmbedding(12), KVStore(GEOMETRY, 4, 2, torch.float64, torch.device("cpu"))
    for tensor, seed in ((store.keys, 1), (store.values, 2)):
        tensor.copy_(tiny.draw(*tensor.shape, seed=seed, dtype=torch.float64))
    own = [tiny.draw(2, 4, 2, 12, seed=5 + i, dtype=torch.float64) for i in range(3)]
    segments = (
        Segment("sink", (0,), (0,), (0,)), Segment("recent", (1, 2, 3), (7, 8, 9), (1, 2, 3)),
        Segment(FLIGHT, (0, 1), (10, 11), (4, 5)),
    )  # fmt: skip
    group = Group((0, 1), (4, 5), segments)
    turn = lambda x, positions: tiny.rotate(x, tiny.turns(rope, positions, 2, 1))
    for layer in range(2):
        got = store.bind(Plan((attenuated(group, math.log(weight)),)), rope).attend(layer, *own)
        query = turn(own[0], (4, 5))
        keys = turn(store.keys[layer, :, :4].flatten(1, 2), range(4))
        values = store.values[layer, :, :4].flatten(1, 2)
        plain = (torch.cat([keys[:, :2], turn(own[1], (4, 5))], 1), torch.cat([values[:, :2], own[2]], 1))
        parts = []
        for k, v in (plain, (keys[:, 2:8], values[:, 2:8])):
            logits = torch.einsum("bqhd,bkhd->bqhk", query, k) / math.sqrt(12)
            parts.append((logits.logsumexp(-1).exp()[..., None], tiny.attention(query, k, v)))
        (a, out_a), (b, out_b) = parts
        wanted = (a * out_a + weight * b * out_b) / (a + weight * b)
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)  # angles are rounded to float32
        assert (got - store.bind(Plan((group,)), rope).attend(layer, *own)).abs().max() > 1e-2


def test_a_weight_beside_frames_that_each_head_chooses(tiny):
    """What is routed counts in full: the same as all of a single candidate page."""
    rope, store = RotaryEmbedding(12), KVStore(GEOMETRY, 3, 1, torch.float64, torch.device("cpu"))
    for tensor, seed in ((store.keys, 1), (store.values, 2)):
        tensor.copy_(tiny.draw(*tensor.shape, seed=seed, dtype=torch.float64))
    own = [tiny.draw(2, 2, 2, 12, seed=5 + i, dtype=torch.float64) for i in range(3)]
    segments = (
        Segment("sink", (0,), (0,), (0,)), Segment("recent", (1, 2), (7, 8), (1, 2)), Segment(FLIGHT, (0,), (9,), (3,))
    )  # fmt: skip
    found = [
        store.bind(Plan((attenuated(Group((0,), (3,), segments, route), -1.2),)), rope).attend(0, *own)
        for route in (None, Route(("sink",), 1))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("preset", ["krea", "longlive", "shotstream", "memflow"])
def test_a_weight_is_put_on_recent_keys_of_steps_alone(preset):
    config = load_preset(preset, ["cache.attention_bias=0.3"])
    plain = load_preset(preset)
    regions = set()
    for call, other in zip(walk(Engine(None, config), 9, [12]), walk(Engine(None, plain), 9, [12]), strict=True):
        for group in call.plan.groups:
            for segment in group.segments:
                recent = segment.region == "recent" and call.call.kind.value == "denoise"
                assert segment.log_bias == pytest.approx(math.log(0.3) if recent else 0)
                regions.add((segment.region, segment.log_bias != 0))
        assert call.frames == other.frames and all(not s.log_bias for g in other.plan.groups for s in g.segments)
    assert ("recent", True) in regions and (FLIGHT, False) in regions


# --- pictures


class Codec:
    """One latent = 4 pictures that remember the one before; a picture alone gives another latent than it came from."""

    temporal_ratio, spatial_ratio, latent_channels = 4, 1, 4

    def decode(self, x, state=None):
        past = torch.zeros_like(x[:, :, :1]) if state is None else state["last"]
        mixed = x + 0.5 * torch.cat([past, x[:, :, :-1]], 2)
        steps = torch.linspace(0.7, 1, 4)[None, None, :, None, None]
        pixels = torch.cat([mixed[:, :3, i : i + 1] * steps for i in range(x.shape[2])], 2)
        return pixels[:, :, 3:] if state is None else pixels, {"last": x[:, :, -1:].clone()}

    def encode(self, frames, state=None):
        assert frames.shape[2] == 1 and state is None  # alone, as the first of a clip
        return torch.cat([frames, frames.mean(1, keepdim=True)], 1) * 0.9, None


PIXELS = {
    "krea": [STEPS, "cache.context.pixels=true"],
    "shotstream": [*SHORT, "cache.context.pixels=true"],
}


@pytest.mark.parametrize("preset", PIXELS)
def test_latents_are_made_anew_from_the_last_picture_they_stand_for(model, embeds, preset):
    codec = Codec()
    engine, fed = Engine(model, load_preset(preset, PIXELS[preset]), codec), []
    engine.tracing = True
    handle = model.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    done = latents(engine.run(embeds[0], SeededNoise(0), 12, SIZE, switches={6: embeds[1]}))
    handle.remove()
    pixels = codec.decode(done)[0]
    anew = lambda frame: codec.encode(pixels[:, :, 4 * frame : 4 * frame + 1])[0]
    calls = [(call.frames, call.source, x) for call, x in zip(engine.trace(), fed, strict=True) if call.kind == "clean"]
    calls = [call for call in calls if call[1] != "flight"]
    if preset == "krea":  # the first context holds the stream's first frame, which is such a latent already
        assert [call[:2] for call in calls] == [((0, 1, 2), "past"), ((3, 4, 5), "pixels"), ((6, 7, 8), "pixels")]
    else:
        assert [call[:2] for call in calls] == [((-2, -1), "external"), ((3, 5), "pixels")]
        assert not calls[0][2].any()
    for frames, source, x in calls:
        for i, frame in enumerate(frames):
            made = source == "pixels" and (i == 0 or preset == "shotstream")
            if frame >= 0:
                torch.testing.assert_close(x[:, :, i : i + 1], anew(frame) if made else done[:, :, frame : frame + 1])
    assert (anew(3) - done[:, :, 3:4]).abs().max() > 0.1


def test_pixels_without_a_codec_are_refused(model, embeds):
    with pytest.raises(InputError, match="needs a codec") as caught:
        start(Engine(model, load_preset("krea", PIXELS["krea"])), embeds[0])
    assert "\n" not in str(caught.value)


# --- states, failures, batches, the walk

CASES = {
    "krea": ("krea", ["guidance.scale=3"]),
    "krea-pixels": ("krea", ["cache.context.pixels=true", "cache.context.lag=false"]),
    "krea-sink": ("krea", ["cache.sink=1", "switch.mode=cut", "cache.attention_bias=0.3"]),
    "shots": ("shotstream", [*SHORT[1:3], "guidance.scale=3", "guidance.commit_branch=positive"]),
    "shots-pixels": ("shotstream", [*SHORT[1:], "cache.context.pixels=true"]),
    "shots-recache": ("shotstream", [*SHORT[1:3], "cache.window=9", "switch.mode=recache", "switch.mask=block-causal"]),
    "refresh": ("longlive", [*REFRESH, "cache.window=9"]),
    "refresh-rolling": ("rolling-forcing", ["switch.sink=refresh", "switch.mode=recache", "switch.mask=block-causal"]),
}  # fmt: skip
CHUNKS, CHANGES = 7, {4: 1, 12: 2, 16: 0}


class Case:
    def __init__(self, name: str, model, embeds) -> None:
        preset, overrides = CASES[name]
        overrides = [o if not o.startswith(("cache.window=3", "chunk.")) else "cache.window=6" for o in overrides]
        steps = [] if preset == "rolling-forcing" else [STEPS]
        self.engine, self.embeds = Engine(model, load_preset(preset, [*overrides, *steps]), Codec()), embeds

    def begin(self, prompts=None, seeds=0):
        switches = {frame: self.embeds[text] for frame, text in CHANGES.items()}
        prompts = self.embeds[0] if prompts is None else prompts
        return self.engine.start(
            prompts, SeededNoise(seeds), latent_size=SIZE, switches=switches, negative_embeds=self.embeds[2]
        )


@pytest.fixture(scope="module", params=CASES)
def case(request, model, embeds):
    return Case(request.param, model, embeds)


def test_a_state_goes_on_bit_by_bit_and_a_fork_leaves_no_trace(case, embeds):
    rollout, wanted, states = case.begin(), [], []
    for _ in range(CHUNKS):
        states.append(saved(rollout))
        wanted.append(rollout.advance().latents)
    for at in (1, 3, 5, 6):
        resumed = case.begin()
        resumed.load_state_dict(states[at])
        twin, side = resumed.fork(), resumed.fork()
        side.switch(embeds[1], "cut")
        side.advance()
        for stream in (resumed, twin):
            assert torch.equal(advance(stream, CHUNKS - at), torch.cat(wanted[at:], 2)), at


def test_every_call_may_fail_and_be_made_again(case, model, monkeypatch):
    """Forwards and the decoder are hit by Ctrl-C at their first attempt."""
    wanted, attempts = advance(case.begin(), CHUNKS), []

    def fail(*args):
        attempts.append(1)
        if len(attempts) % 2:
            raise KeyboardInterrupt

    decode = case.engine.codec.decode
    monkeypatch.setattr(case.engine.codec, "decode", lambda *args: (fail(), decode(*args))[1])
    handle, rollout, parts = model.register_forward_pre_hook(fail), case.begin(), []
    while len(parts) < CHUNKS:
        try:
            parts.append(rollout.advance().latents)
        except KeyboardInterrupt:
            continue
    handle.remove()
    assert torch.equal(torch.cat(parts, 2), wanted)


def test_i12_a_batch_of_two_is_two_runs(case, embeds):
    together = advance(case.begin(torch.cat(embeds[:2]), [7, 8]), 5)
    for row in range(2):
        alone = advance(case.begin(embeds[row], [7 + row]), 5)
        torch.testing.assert_close(together[row : row + 1], alone, **FP32)


def test_the_walk_makes_the_same_calls(case):
    engine = case.engine
    engine.tracing = True
    size = engine.config.chunk.latent_frames
    rollout = engine.start(
        case.embeds[0], SeededNoise(0), latent_size=SIZE, num_latent_frames=CHUNKS * size,
        switches={frame: case.embeds[0] for frame in CHANGES}, negative_embeds=case.embeds[2],
    )  # fmt: skip
    advance(rollout, CHUNKS)
    ran = [(c.kind, c.source, c.frames, c.key_frames, c.key_positions, c.query_positions) for c in engine.trace()]
    engine.tracing = False
    reads = lambda plan: zip(*((g.key_frames, g.key_positions, g.query_positions) for g in plan.groups))
    planned = [
        (c.call.kind.value, c.call.source, tuple(f for part in c.frames for f in part), *reads(c.plan))
        for c in walk(engine, CHUNKS, list(CHANGES))
    ]
    assert planned == ran


@pytest.mark.parametrize("preset", ["krea", "shotstream"])
def test_training_sees_what_a_stream_does(tiny, model, embeds, preset):
    """Angles, weights and context in the cache that gradients pass."""
    config = load_preset(preset, [*SHORT, "cache.attention_bias=0.4"] if preset == "shotstream" else [STEPS])
    run = lambda net, text: latents(
        Engine(net, config).run(text, SeededNoise(0), 9, SIZE, switches={6: embeds[1]})
    )
    wanted = run(model, embeds[0])
    with torch.enable_grad():
        text = embeds[0].clone().requires_grad_()
        net = tiny.model()
        got = run(net, text)
        got[:, :, -1].sum().backward()
    torch.testing.assert_close(got.detach(), wanted, **FP32)
    assert text.grad.abs().max() > 0  # through the context: the last frames are told another prompt


@pytest.mark.parametrize("preset", ["krea", "shotstream"])
def test_steady_streams_repeat_a_few_signatures(preset):
    calls = list(islice(walk(Engine(None, load_preset(preset)), None), 160))
    steady = {(call.call.source, call.call.kind, call.plan.signature()) for call in calls[80:]}
    assert len(steady) == 2 and steady <= {(c.call.source, c.call.kind, c.plan.signature()) for c in calls[40:80]}


def test_prompts_of_other_lengths_cannot_stand_beside_each_other_in_a_context(tiny, embeds):
    model = tiny.model(text_len=None).requires_grad_(False)
    rollout = start(Engine(model, load_preset("shotstream", SHORT)), embeds[0])
    rollout.advance()
    with pytest.raises(InputError, match="7 tokens cannot stand beside .*5 tokens"):
        rollout.switch(tiny.draw(1, 7, 8, seed=3), "cut")
    rollout.switch(embeds[1], "cut")
    rollout.advance()


# --- words


def test_frames_of_a_rebuild_are_runs_and_name_their_source():
    assert Rebuild((0, 4, 5, 9)).parts == (range(0, 1), range(4, 6), range(9, 10))
    assert Rebuild((-2, -1)).source == "external" and Rebuild((3, 4), pixels=(3,)).source == "pixels"
    call = Rebuild((0, 4, 5, 9)).call(lambda frame: frame // 3, lambda k: 2)
    assert [slot.chunk for slot in call.rows[0].slots] == [0, 1, 3] and call.source == "past" and not call.commits


def test_blocks_see_themselves_and_what_lies_before_at_unchanged_positions():
    segments = (Segment("sink", (0,), (0,), (0,)), Segment(FLIGHT, (0, 1, 2), (7, 8, 9), (1, 2, 3)))
    one, two = block_causal(Group((0, 1, 2), (1, 2, 3), segments), [0, 2])
    assert (one.query_frames, one.query_positions, one.key_frames) == ((0, 1), (1, 2), (0, 7, 8))
    assert (two.query_frames, two.query_positions, two.key_positions) == ((2,), (3,), (0, 1, 2, 3))


@pytest.mark.parametrize(
    "preset, overrides, words",
    [
        ("krea", ["schedule.commit=separate"], ["schedule.commit=separate", "use none"]),
        ("krea", ["positions.rule=absolute"], ["cache.policy=rebuild", "absolute", "use packed"]),
        ("krea", ["cache.window=-1"], ["cache.window is -1"]),
        ("krea", ["cache.window=3"], ["cache.window=3", "no context"]),
        ("krea", ["schedule.coupling=joint", "schedule.stagger=2", "cache.window=12"], ["coupling=solo"]),
        ("krea", ["cache.ema_decay=0.9", "cache.sink=1"], ["ema_decay"]),
        ("shotstream", ["schedule.commit=fused"], ["cache.policy=shots", "commit=fused"]),
        ("shotstream", ["cache.sink=3"], ["cache.sink=3", "use 0"]),
        ("shotstream", ["cache.context.frames=22"], ["cache.context.frames=22", "cache.window=21"]),
        ("shotstream", ["schedule.coupling=joint", "schedule.stagger=2"], ["coupling=solo"]),
        ("reward-forcing", ["switch.sink=refresh"], ["switch.sink=refresh", "ema_decay=0.999"]),
        ("longlive", ["switch.sink=fresh"], ["switch.sink", "did you mean 'refresh'"]),
        ("longlive", ["switch.mask=causal"], ["switch.mask", "block-causal"]),
        ("longlive", ["cache.attention_bias=0"], ["cache.attention_bias=0"]),
        ("longlive", ["cache.attention_bias=1.5"], ["cache.attention_bias=1.5"]),
        ("longlive", ["cache.attention_bias=0.5", "schedule.commit=fused"], ["cache.attention_bias=0.5", "separate"]),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(preset, overrides, words):
    with pytest.raises(InputError) as caught:
        Engine(None, load_preset(preset, overrides))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_options_of_subclasses_take_mask_and_weight():
    assert BankOptions(12, 3, mask="block-causal", attention_bias=0.5).mask == "block-causal"
    assert WindowOptions().attention_bias == 1 and WindowOptions().mask == "bidirectional"
