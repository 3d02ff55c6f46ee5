"""Policies that choose or merge tokens by content (Deep Forcing, TempCache), and collapsed padding."""

import io
import math
from itertools import islice

import pytest
import torch
from running import advance, latents

from streamgen.cache import DeepPolicy, KVStore, MergedPolicy, Sizes
from streamgen.cache.deep import DeepOptions
from streamgen.cache.merged import MergedOptions
from streamgen.cache.plan import FLIGHT, Choose, Group, Plan, Segment
from streamgen.cache.refresh import RefreshOptions, RefreshPolicy
from streamgen.cache.store import Geometry
from streamgen.cli.presets import regions
from streamgen.config import load_preset
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.kernels.rope import rotate
from streamgen.memory import estimate
from streamgen.models.blocks import TextKeys, collapse_padding
from streamgen.models.geometry import CodecGeometry, ModelGeometry, TransformerGeometry
from streamgen.models.rope import RotaryEmbedding
from streamgen.models.transformer import CausalWanTransformer3DModel
from streamgen.noise import SeededNoise
from streamgen.schedules import Call, CallKind, Row, Slot, SlotOp, clean_call
from streamgen.walk import walk

FP32 = dict(atol=5e-5, rtol=1e-4)
GEOMETRY = Geometry(layers=2, batch=2, height=2, width=1, heads=2, head_dim=12)
TOKENS, SIZE = GEOMETRY.tokens_per_frame, (4, 4)
STEPS = "ladder.timesteps=[1000,500]"
DEEP = ("deep-forcing", [STEPS, "cache.window=13", "cache.sink=4", "cache.deep.kept=1", "cache.deep.reuse=2"])
MERGED = ("tempcache", [STEPS, "cache.window=9", "cache.merged.size=2", "cache.merged.threshold=0.2"])
BOTH = pytest.mark.parametrize("preset, overrides", [DEEP, MERGED], ids=["deep", "merged"])


pytestmark = pytest.mark.usefixtures("no_gradients")


class Bench:
    """A policy over a store, fed with known queries, keys and values [layers, B, frames, T, H, D], chunk by chunk."""

    def __init__(self, tiny, policy, chunks: int, dtype=torch.float64) -> None:
        self.policy, self.size, self.rope = policy, policy.sizes.chunk, RotaryEmbedding(GEOMETRY.head_dim)
        self.store = KVStore(GEOMETRY, policy.pages, self.size, dtype, torch.device("cpu"), policy.aside)
        shape = (2, 2, chunks * self.size, TOKENS, 2, 12)
        draw = lambda seed: tiny.draw(*shape, seed=seed, dtype=torch.float64).to(dtype)
        self.asked, self.keys, self.values = draw(1), draw(2), draw(3)
        self.noisy = draw(4)  # queries of first steps

    def frames(self, chunk: int) -> range:
        return range(chunk * self.size, (chunk + 1) * self.size)

    def step(self, chunk: int, p: int = 0) -> tuple[Plan, list[torch.Tensor]]:
        row = Row((Slot(chunk, SlotOp.STEP, p, p + 1),))
        return self._run(Call(CallKind.DENOISE, (row,)), chunk, self.noisy)[::2]

    def commit(self, chunk: int) -> Plan:
        plan, context, _ = self._run(clean_call((chunk,), lambda k: 1), chunk, self.asked)
        self.store.publish(plan, context)
        self.policy.commit(list(self.frames(chunk)))
        return plan

    def _run(self, call: Call, chunk: int, queries: torch.Tensor):
        frames = self.frames(chunk)
        plan = self.policy.plan(call, call.rows[0], (frames,))
        context, own = self.store.bind(plan, self.rope), slice(frames.start, frames.stop)
        parts = lambda layer: (t[layer, :, own].flatten(1, 2) for t in (queries, self.keys, self.values))
        return plan, context, [context.attend(layer, *parts(layer)) for layer in range(2)]

    def turn(self, x: torch.Tensor, positions) -> torch.Tensor:
        """[B, F·T, H, D] by the very tables a store uses."""
        return rotate(x, *self.rope.angles([float(p) for p in positions], GEOMETRY.height, GEOMETRY.width))


# --- what is chosen (Deep Forcing)


def test_the_worked_table_of_deep_forcing():
    """Spec 04 B.3, S=10, N=16, R=4: trigger at 21, 27, 33 …; the sink lies a chunk before what was chosen."""
    wanted = {  # chunk: sink's first position, recent frames, candidate frames, whether chosen tokens are candidates
        18: (0, range(10, 18), None), 21: (5, range(20, 21), (range(10, 20), False)), 24: (5, range(20, 24), None),
        27: (11, range(26, 27), (range(20, 26), True)), 30: (11, range(26, 30), None),
        33: (17, range(32, 33), (range(26, 32), True)),
    }  # fmt: skip
    seen = {}
    for call in walk(Engine(None, load_preset("deep-forcing")), 12):
        seen.setdefault(call.frames[0].start, []).append(call)
    for first, (sink, recent, chosen_from) in wanted.items():
        calls = seen[first]
        assert len(calls) == (4 if first == 33 else 5)  # four steps, and a commit except after the last
        for i, call in enumerate(calls):
            (group,) = call.plan.groups
            regions = {s.region: s for s in group.segments}
            assert regions["sink"].frames == tuple(range(10)) and regions["sink"].positions[0] == sink
            assert regions["recent"].frames == regions["recent"].positions == tuple(recent)
            assert group.query_positions == tuple(range(first, first + 3))
            assert ("chosen" in regions) == (first > 18) and len(regions[FLIGHT].pages) == 3
            assert bool(call.plan.choose) == (i == 0 and chosen_from is not None)
        if chosen_from:
            frames, again = chosen_from
            choose = calls[0].plan.choose
            assert [s.region for s in choose.segments] == ["chosen"] * again + ["recent"]
            assert choose.segments[-1].frames == tuple(frames) and choose.limit == 7 and len(choose.target) == 2
            chosen = [s.pages for s in calls[-1].plan.groups[0].segments if s.region == "chosen"]
            assert chosen == [choose.target] and (not again or choose.segments[0].pages != choose.target)


def test_a_deep_sink_alone_is_a_window_whose_sink_trails():
    """Spec 04 B.2: W=21, S=10; the first sink frame at current start - 21 once the window is full."""
    config = load_preset("deep-forcing", ["cache.deep.kept=0"])
    plain = load_preset("deep-forcing", ["cache.policy=window"])
    calls = list(walk(Engine(None, config), 14))
    assert calls == list(walk(Engine(None, plain), 14))
    for call in calls:
        (group,), first = call.plan.groups, call.frames[0].start
        if first >= 10:
            assert group.key_frames[:11] == (*range(10), max(10, first - 8)) and group.key_frames[-1] == first + 2
            assert group.key_positions[0] == max(0, first - 21)
            assert group.key_positions[10:] == group.key_frames[10:]


def choose_by_hand(bench: Bench, layer: int, sample: int, tokens: list, asked: torch.Tensor, count: int, limit: int):
    """The tokens (frame, place, uses) that are kept, slowly; `asked` = sum of rotated queries, [H, D]."""
    scores = []
    for frame, place, uses in tokens:
        key = bench.turn(bench.keys[layer, sample, frame][None], [frame])[0, place]
        scores.append(-math.inf if uses >= limit else (asked * key).sum().item())
    best = sorted(sorted(range(len(tokens)), key=lambda i: -scores[i])[:count])
    return [(tokens[i][0], tokens[i][1], tokens[i][2] + 1) for i in best]


@pytest.mark.parametrize("rule", ["trail", "absolute"])
@pytest.mark.parametrize("kept, recent, limit", [(1, 3, 7), (2, 2, 2), (1, 5, 1)])
def test_the_tokens_that_recent_queries_ask_for_are_kept_in_every_layer(tiny, rule, kept, recent, limit):
    """Queries of the chunk's first step and of what was committed before it; recent=5 reaches two commits back.

    What a step gives is dense attention, written out, over the sink, what is kept, recent frames and its own.
    """
    window, sink, chunks = 11, 3, 12
    policy = DeepPolicy(DeepOptions(window, sink, rule, kept=kept, recent=recent, reuse=limit), Sizes(2, 2))
    bench = Bench(tiny, policy, chunks)
    held = {(layer, sample): [] for layer in range(2) for sample in range(2)}
    tail, made, again = [], 0, 0
    for chunk in range(chunks):
        own = bench.frames(chunk)
        chooses = sink + kept * bool(made) + len(tail) + 2 > window
        plan, outputs = bench.step(chunk)
        assert bool(plan.choose) == chooses
        if chooses:
            leaving = (tail + list(own))[:-recent]
            past = list(range(own.start - (recent - 2), own.start))
            for (layer, sample), before in held.items():
                query = [bench.noisy[layer, sample, f] for f in own] + [bench.asked[layer, sample, f] for f in past]
                asked = bench.turn(torch.cat(query)[None], [*own, *past])[0].sum(0)
                tokens = before + [(f, place, 0) for f in leaving for place in range(TOKENS)]
                kept_now = choose_by_hand(bench, layer, sample, tokens, asked, kept * TOKENS, limit)
                again += any(uses > 1 for *_, uses in kept_now)
                assert all(uses <= limit for *_, uses in kept_now)
                held[layer, sample] = kept_now
                for i, (frame, place, uses) in enumerate(kept_now):
                    page, at = plan.choose.target[i // TOKENS], i % TOKENS
                    key = bench.turn(bench.keys[layer, sample, frame][None], [frame])[0, place]
                    for tensor in (bench.store.keys, bench.store.rotated):
                        assert torch.equal(tensor[layer, sample, page, at], key)
                    assert torch.equal(
                        bench.store.values[layer, sample, page, at], bench.values[layer, sample, frame, place]
                    )
                    assert bench.store.aside["uses"][layer, sample, page, at] == uses
            tail, made = (tail + list(own))[-recent:], made + 1
        else:
            tail += [f for f in own if f >= sink]
        whole = [*range(min(sink, own.stop)), *tail]
        first = min(tail[0] if tail else 0, own.start)
        start = max(0, first - 2 - kept * bool(made) - sink) if rule == "trail" else 0
        at = [f + start if f < sink and own.start >= sink else f for f in whole]
        for (layer, sample), tokens in held.items():
            keys = [bench.turn(bench.keys[layer, sample, f][None], [p])[0] for f, p in zip(whole, at)]
            keys += [
                bench.turn(bench.keys[layer, sample, f][None], [f])[0, place : place + 1] for f, place, _ in tokens
            ]
            values = [bench.values[layer, sample, f] for f in whole]
            values += [bench.values[layer, sample, f, place : place + 1] for f, place, _ in tokens]
            query = bench.turn(bench.noisy[layer, sample, own.start : own.stop].flatten(0, 1)[None], own)
            wanted = tiny.attention(query, torch.cat(keys)[None], torch.cat(values)[None])
            torch.testing.assert_close(outputs[layer][sample : sample + 1], wanted, atol=1e-10, rtol=0)
        bench.commit(chunk)
    assert made >= 3 and bool(again) == (limit > 1)
    assert len({str(tokens) for tokens in held.values()}) > 1  # layers and samples choose for themselves


def test_choosing_everything_is_reading_everything(tiny):
    """Spec 04 B.5: with room for all candidates the output is that of no compression."""
    store, rope = (
        KVStore(GEOMETRY, 6, 2, torch.float64, torch.device("cpu"), {"uses": None, "queries": 0}),
        RotaryEmbedding(12),
    )
    for tensor, seed in ((store.keys, 1), (store.values, 2)):
        tensor.copy_(tiny.draw(*tensor.shape, seed=seed, dtype=torch.float64))
    own = [tiny.draw(2, 2 * TOKENS, 2, 12, seed=5 + i, dtype=torch.float64) for i in range(3)]
    frames, flight = Segment("recent", (0, 1, 2), (4, 5, 6), (4, 5, 6)), Segment(FLIGHT, (0, 1), (7, 8), (7, 8))
    chosen = Segment("chosen", (3, 4, 5), (-1,) * 3, (-1,) * 3, fixed=True)
    reads = [Plan((Group((0, 1), (7, 8), (frames, flight)),)),
             Plan((Group((0, 1), (7, 8), (chosen, flight)),), choose=Choose((frames,), (3, 4, 5), 7))]  # fmt: skip
    for layer in range(2):
        wanted, got = (store.bind(plan, rope).attend(layer, *own) for plan in reads)
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


# --- what is merged (TempCache)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_merged_equal_keys_are_the_attention_over_all_of_them(tiny, dtype, atol):
    """Spec 04 C.1: n equal keys = one key, the mean of their values, ln n on its logit."""
    policy = MergedPolicy(MergedOptions(5, 1, size=3, threshold=0.999, most=5), Sizes(2, 2))
    bench, chunks = Bench(tiny, policy, 6, dtype), 5
    bench.keys[:, :, 1:7] = bench.keys[:, :, 1:2]  # frames 1 … 6 repeat each other
    for chunk in range(chunks):
        bench.step(chunk)
        bench.commit(chunk)
    plan, outputs = bench.step(chunks)
    (group,) = plan.groups
    assert [s.counted for s in group.segments] == [False, True, False, False]
    counts = bench.store.aside["counts"][:, :, 1:4].sum(2)
    assert (counts == 7).all()  # frames 1 … 7 have left
    at = {
        0: 0,
        **dict.fromkeys(range(1, 6), 5),
        6: 6,
        7: 7,
        **{f: f for f in range(8, 12)},
    }  # most=5 begins an entry anew
    for layer, got in enumerate(outputs):
        query = bench.turn(bench.noisy[layer, :, 10:12].flatten(1, 2), (10, 11))
        keys = bench.turn(bench.keys[layer].flatten(1, 2), at.values())
        wanted = tiny.attention(query, keys, bench.values[layer].flatten(1, 2))
        torch.testing.assert_close(got.double(), wanted, atol=atol, rtol=0)


def merge_by_hand(
    bench: Bench, layer: int, sample: int, place: int, leaving: list, options: MergedOptions
) -> list[dict]:
    """Entries of one place of the picture after these frames."""
    entries: list[dict] = []
    for frame in leaving:
        key, value = (t[layer, sample, frame, place] for t in (bench.keys, bench.values))
        cosine = lambda e, key=key: torch.cosine_similarity(e["key"], key, dim=-1).mean().item()
        open_ = [e for e in entries if e["n"] < options.most]
        best = max(open_, key=cosine, default=None)
        if best is not None and cosine(best) >= options.threshold:
            best.update(
                key=key, value=(best["value"] * best["n"] + value) / (best["n"] + 1), n=best["n"] + 1, time=frame
            )
            continue
        entry = dict(key=key, value=value, n=1, time=frame)
        if len(entries) < options.size:
            entries.append(entry)
        else:
            worth = [e["n"] * math.exp((e["time"] - frame) / options.half_life) for e in entries]
            entries[worth.index(min(worth))] = entry
    return entries


def check_reads(tiny, bench: Bench, outputs: list[torch.Tensor], whole: list[int], options: MergedOptions) -> None:
    """A step's output against dense attention over these frames and over entries with ln n on their logits."""
    own = whole[-2:]
    for layer, sample in ((a, b) for a in range(2) for b in range(2)):
        keys = [bench.turn(bench.keys[layer, sample, f][None], [f])[0] for f in whole]
        values, bias = [bench.values[layer, sample, f] for f in whole], [0.0] * len(whole) * TOKENS
        for place in range(TOKENS):
            for entry in merge_by_hand(bench, layer, sample, place, list(range(1, own[0] - 2)), options):
                token = entry["key"].expand(1, TOKENS, -1, -1)
                keys.append(bench.turn(token, [entry["time"]])[0, place : place + 1])
                values.append(entry["value"][None])
                bias.append(math.log(entry["n"]))
        query = bench.turn(bench.noisy[layer, sample, own].flatten(0, 1)[None], own)
        bias = torch.tensor(bias, dtype=torch.float64)
        wanted = tiny.attention(query, torch.cat(keys)[None], torch.cat(values)[None], bias)
        torch.testing.assert_close(outputs[layer][sample : sample + 1], wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("threshold, most, half_life", [(0.3, 3, 4.0), (0.3, 100, 2.0), (-1.0, 2, 50.0), (1.0, 8, 4.0)])
def test_tokens_join_what_they_are_like_at_their_place(tiny, threshold, most, half_life):
    options = MergedOptions(5, 1, size=2, threshold=threshold, most=most, half_life=half_life)
    bench, chunks, shapes = Bench(tiny, MergedPolicy(options, Sizes(2, 2)), 12), 12, set()
    bench.keys[:, :, 1:] += 0.8 * bench.keys[:, :, :-1]  # neighbours in time are alike
    for chunk in range(chunks):
        outputs = bench.step(chunk)[1]
        if chunk > 1:  # sink 0, entries, the two recent frames, its own
            check_reads(tiny, bench, outputs, [0, *range(2 * chunk - 2, 2 * chunk + 2)], options)
        plan = bench.commit(chunk)
        assert (plan.absorb is not None) == (chunk > 0)
        leaving = list(range(1, max(1, 2 * chunk)))
        for layer, sample, place in ((a, b, c) for a in range(2) for b in range(2) for c in range(TOKENS)):
            entries = merge_by_hand(bench, layer, sample, place, leaving, options)
            counts, times = (bench.store.aside[n][layer, sample, 1:3, place].tolist() for n in ("counts", "times"))
            assert counts == [e["n"] for e in entries] + [0] * (2 - len(entries))
            assert times[: len(entries)] == [e["time"] for e in entries]
            for page, entry in enumerate(entries, start=1):
                assert torch.equal(bench.store.keys[layer, sample, page, place], entry["key"])
                mean = bench.store.values[layer, sample, page, place]
                torch.testing.assert_close(mean, entry["value"], atol=1e-12, rtol=0)
            shapes.add(tuple(counts))
    assert len(shapes) > 2 and max(max(counts) for counts in shapes) <= most


def test_entries_are_rotated_to_times_of_their_own(tiny):
    """One page, tokens of different frames: each as a whole frame at its time would be, bit by bit."""
    store = KVStore(GEOMETRY, 3, 1, torch.float32, torch.device("cpu"), MergedPolicy.aside)
    rope = RotaryEmbedding(12)
    store.keys.copy_(tiny.draw(*store.keys.shape, seed=1))
    times = torch.randint(0, 50, store.aside["times"].shape, generator=torch.Generator().manual_seed(0))
    store.aside["times"].copy_(times)
    segment = Segment("merged", (1, 2), (-1, -1), (-1, -1), counted=True)
    store.bind(Plan((Group((0,), (60,), (segment, Segment(FLIGHT, (0,), (60,), (60,)))),)), rope)
    for layer in range(2):
        for sample in range(2):
            for page in (1, 2):
                for place in range(TOKENS):
                    cos, sin = rope.angles([float(times[layer, sample, page, place])], 2, 1)
                    whole = rotate(store.keys[layer, sample, page][None], cos, sin)[0]
                    assert torch.equal(store.rotated[layer, sample, page, place], whole[place])


# --- a prompt's padding


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_collapsed_padding_is_the_attention_over_all_of_it(tiny, dtype, atol):
    model = tiny.model(text_len=40).to(dtype)
    texts = [tiny.draw(2, 1, rows, 8, seed=rows).to(dtype) for rows in (5, 9)]
    texts[0][1, :, 3:] = 0  # samples of a batch may differ in length
    texts[1][:, :, 7:] = 0  # rows of zeros that came with the prompt
    keys = [model.text_keys(text) for text in texts]
    short = [collapse_padding(each, text) for each, text in zip(keys, texts)]
    assert [each.keys[0].shape[2] for each in short] == [6, 8]
    assert short[0].keys[1].untyped_storage().nbytes() < keys[0].keys[1].untyped_storage().nbytes() / 5
    x, which = tiny.draw(2, 4, 3, 4, 4, seed=1).to(dtype), torch.tensor([[0, 1, 1], [1, 0, 1]])
    run = lambda text, **more: model(x, torch.tensor([500.0]), text_keys=text, return_dict=False, **more)[0]
    for whole, collapsed in zip(keys, short):
        torch.testing.assert_close(run(collapsed), run(whole), atol=atol, rtol=0)
    wanted = run(TextKeys.join(keys), prompt_index=which)
    for pair in (short, [short[0], keys[1]]):  # of other lengths beside each other
        torch.testing.assert_close(run(TextKeys.join(pair), prompt_index=which), wanted, atol=atol, rtol=0)
    full = tiny.draw(1, 40, 8, seed=2).to(dtype)
    assert collapse_padding(model.text_keys(full), full).bias is None


def test_streams_read_collapsed_padding(tiny, embeds):
    """Guided, with chunks in flight under two prompts of other lengths."""
    model, found = tiny.model(text_len=20).requires_grad_(False), []
    for collapse in ("true", "false"):
        config = tiny.config(
            "cache.window=12", "cache.sink=3", "schedule.coupling=joint", "schedule.stagger=1", "guidance.scale=3",
            f"cache.collapse_text={collapse}", "switch.in_flight=keep",
        )  # fmt: skip
        chunks = Engine(model, config).run(
            embeds[0], SeededNoise(0), 15, SIZE, switches={6: tiny.draw(1, 8, 8, seed=9)},
            negative_prompt_embeds=embeds[2],
        )  # fmt: skip
        found.append(latents(chunks))
    torch.testing.assert_close(*found, **FP32)


# --- streams


@pytest.mark.parametrize("rule", ["absolute", "trail"])
@pytest.mark.parametrize("policy", ["deep", "merged"])
def test_i6_with_all_history_in_the_window_it_is_full_attention(tiny, model, embeds, policy, rule):
    chunks, noise = 5, tiny.noise(5)
    config = tiny.config(
        f"cache.policy={policy}", "cache.window=21", "cache.sink=4", f"positions.rule={rule}"
    )  # fmt: skip
    engine = Engine(model, config)
    got = latents(engine.run(embeds[0], noise, 3 * chunks))
    wanted = tiny.rollout(model, embeds[0], noise, engine.ladder, chunks, 3)
    torch.testing.assert_close(got, wanted, **FP32)


@BOTH
def test_i1_memory_is_bounded_and_calls_repeat_themselves(preset, overrides):
    engine = Engine(None, load_preset(preset, overrides))
    window, kinds, pages = engine.config.cache.window, {}, set()
    for call in islice(walk(engine), 3 * 80):
        (group,), chunk = call.plan.groups, call.row.slots[0].chunk
        besides = sum(len(s.pages) for s in group.segments if s.region == "merged")
        assert len(group.key_frames) - besides <= window and besides <= engine.config.cache.merged.size
        kinds.setdefault((call.call.kind, call.plan.signature()), []).append(chunk)
        pages |= {page for s in group.segments if s.region != FLIGHT for page in s.pages}
    assert max(pages) < 24 and chunk == 79
    assert all(seen[0] < 12 for seen in kinds.values())  # nothing new comes late
    assert sum(seen[-1] > 70 for seen in kinds.values()) <= 6


@BOTH
def test_calls_of_a_chunk_change_nothing_that_is_committed(tiny, preset, overrides):
    cache = load_preset(preset, overrides).cache
    if preset == "tempcache":
        policy = MergedPolicy(MergedOptions(9, 3, size=2, threshold=0.2), Sizes(3, 3))
    else:
        policy = DeepPolicy(DeepOptions(13, 4, "trail", kept=cache.deep.kept), Sizes(3, 3))
    bench, chosen = Bench(tiny, policy, 8), 0
    for chunk in range(8):
        before, state = bench.store.state_dict(), policy.state_dict()
        first, (plan, again) = bench.step(chunk)[1], bench.step(chunk)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        bench.step(chunk, 1)
        own = plan.choose.target if plan.choose else ()  # what the chunk keeps for itself until it is committed
        chosen += bool(own)
        others = [page for page in range(policy.pages) if page not in own]
        for name, tensor in bench.store.state_dict().items():
            if name in ("keys", "values", "uses", "counts", "times"):
                assert torch.equal(tensor[:, :, others], before[name][:, :, others]), name
        assert policy.state_dict() == state
        if own and policy.held:  # nobody else reads those pages
            assert not set(own) & set(policy._set(policy.choices - 1))
        bench.commit(chunk)
    assert chosen == (2 if preset == "deep-forcing" else 0)


@BOTH
@pytest.mark.parametrize("mode", ["keep", "recache", "cut", "recache switch.sink=replace"])
def test_a_stream_resumes_forks_and_switches(model, embeds, preset, overrides, mode):
    """After a chunk, and in the middle of one; guided, a switch on the way."""
    switch = f"switch.mode={mode}".split()
    engine = Engine(model, load_preset(preset, [*overrides, *switch, "guidance.scale=2"]))
    begin = lambda: engine.start(
        embeds[0], SeededNoise(0), latent_size=SIZE, switches={20: embeds[1]}, negative_embeds=embeds[2]
    )

    def reopened(rollout):
        file = io.BytesIO()
        torch.save(rollout.state_dict(), file)
        file.seek(0)
        other = begin()
        other.load_state_dict(torch.load(file, weights_only=True))
        return other

    whole = begin()
    wanted = [whole.advance() for _ in range(10)]
    assert {chunk.epoch for chunk in wanted} == {0, 1}
    rollout, interrupted, calls = begin(), [], []

    def fail(*args):
        calls.append(1)
        if len(calls) % 5 == 0:  # before or after the work of a call
            raise KeyboardInterrupt

    for chunk in range(10):
        if chunk in (3, 5, 8):
            twin = rollout.fork()
            side = rollout.fork()
            side.switch(embeds[2], "keep")
            for _ in range(2):
                side.advance()
            assert torch.equal(latents([twin.advance() for _ in range(2)]), latents(wanted[chunk : chunk + 2]))
        rollout = reopened(rollout)
        handles = [model.register_forward_pre_hook(fail), model.register_forward_hook(fail)]
        while len(interrupted) == chunk:
            try:
                interrupted.append(rollout.advance())
            except KeyboardInterrupt:
                rollout = reopened(rollout)
        for handle in handles:
            handle.remove()
    assert torch.equal(latents(interrupted), latents(wanted))


@BOTH
def test_i12_a_batch_of_two_is_two_runs(model, embeds, preset, overrides):
    engine = Engine(model, load_preset(preset, overrides))

    def run(prompts, seeds):
        rollout = engine.start(prompts, SeededNoise(seeds), latent_size=SIZE)
        return latents([rollout.advance() for _ in range(8)])

    together = run(torch.cat(embeds[:2]), [7, 8])
    for row, seed in enumerate((7, 8)):
        torch.testing.assert_close(together[row : row + 1], run(embeds[row], [seed]), **FP32)


def test_content_shows_in_the_result(model, embeds):
    """Neither mechanism is idle: what is chosen, and what is merged, is read."""

    def run(preset, overrides, *more):
        engine = Engine(model, load_preset(preset, [*overrides, *more]))
        return latents(engine.run(embeds[0], SeededNoise(0), 30, SIZE))

    for (preset, overrides), *more in ((DEEP, "cache.deep.kept=0"), (MERGED, "cache.policy=window")):
        with_, without = run(preset, overrides), run(preset, overrides, *more)
        same = 4 if preset == "deep-forcing" else 2  # chunks before the window is full
        torch.testing.assert_close(with_[:, :, : 3 * same], without[:, :, : 3 * same], **FP32)
        assert all((with_ - without)[:, :, f].abs().max() > 1e-4 for f in range(3 * same + 3, 30))


def test_recent_keys_weigh_less_beside_merged_ones_too(model, embeds):
    preset, overrides = MERGED
    engines = [Engine(model, load_preset(preset, [*overrides, *more])) for more in ([], ["cache.attention_bias=0.4"])]
    first, second = (engine.start(embeds[0], SeededNoise(0), latent_size=SIZE) for engine in engines)
    advance(first, 6)  # by then something is merged
    second.load_state_dict(first.state_dict())
    assert (advance(first, 1) - advance(second, 1)).abs().max() > 1e-4


def test_a_recache_encodes_what_is_kept_whole():
    """Chosen and merged tokens keep their prompt, as the sink does; the rest is encoded again beside them."""
    deep = DeepPolicy(DeepOptions(21, 10, "trail"), Sizes(3, 3))
    merged = MergedPolicy(MergedOptions(12, 3), Sizes(3, 3))
    wanted = {deep: {4: range(0, 12), 7: range(0, 21), 8: range(20, 24), 9: range(20, 27), 10: range(26, 30)},
              merged: {3: range(0, 9), 4: range(6, 12), 7: range(15, 21)}}  # fmt: skip
    for policy, frames in wanted.items():
        for chunk in range(10):
            policy.commit(list(range(3 * chunk, 3 * chunk + 3)))
            if chunk + 1 in frames:
                again = policy.switch("recache", policy.frames)
                assert again == frames[chunk + 1]
                call = clean_call((0,), lambda k: 1, source="past")
                plan = policy.plan(call, call.rows[0], (again,))
                reads = [f for f in plan.groups[0].key_frames if f >= 0]
                assert reads == sorted(set(reads)) and not plan.absorb and not plan.choose
        policy.switch("cut", policy.frames)
        call = Call(CallKind.DENOISE, (Row((Slot(10, SlotOp.STEP, 0, 1),)),))
        plan = policy.plan(call, call.rows[0], (range(30, 33),))
        assert plan.groups[0].key_frames == (*range(policy.sink), 30, 31, 32)


@BOTH
@pytest.mark.parametrize("batch, scale", [(1, 1), (2, 3)])
def test_the_estimate_is_what_is_allocated(embeds, preset, overrides, batch, scale):
    net = TransformerGeometry(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=64, in_channels=4, out_channels=4,
        text_dim=8, text_len=6, freq_dim=16,
    )  # fmt: skip
    config = load_preset(preset, [*overrides, f"guidance.scale={scale}"])
    model = CausalWanTransformer3DModel(**net.arguments()).to(torch.bfloat16)
    rollout = Engine(model, config).start(
        embeds[0], SeededNoise(0), latent_size=(8, 12), batch=batch, negative_embeds=embeds[1]
    )
    geometry = ModelGeometry(transformer=net, codec=CodecGeometry(latent_channels=4, base_dim=4))
    found, store = estimate(geometry, config, 64, 96, batch=batch, dtype="bf16"), rollout.store
    beside = sum(tensor.nbytes for tensor in store.aside.values())
    assert found.cache == store.nbytes == 3 * store.keys.nbytes + beside and beside > 0
    assert found.frames_in_cache == store.keys.shape[2]


# --- refusals


@pytest.mark.parametrize(
    "preset, overrides, words",
    [
        ("deep-forcing", ["cache.window=15"], "cache.window=15 is compressed to 16 = cache.sink 10"),
        ("deep-forcing", ["cache.deep.recent=2"], "cache.deep.recent=2 frames stay whole, and a chunk has 3"),
        ("deep-forcing", ["cache.deep.kept=-1"], "cache.deep.kept cannot be negative, got -1"),
        ("deep-forcing", ["cache.deep.reuse=0"], "cache.deep.reuse must be at least 1, got 0"),
        ("deep-forcing", ["positions.rule=packed"], "positions.rule=packed .*use positions.rule=absolute or trail"),
        ("deep-forcing", ["cache.window=-1", "cache.sink=0"], "cache.window=-1 forgets nothing"),
        ("deep-forcing", ["schedule.commit=inplace"], "schedule.commit=inplace has none: use separate"),
        ("deep-forcing", ["schedule.coupling=joint", "schedule.stagger=1", "cache.window=40"], "flight, and 4 are"),
        ("deep-forcing", ["experts.boundary=875"], "experts.boundary=875 makes"),
        ("deep-forcing", ["cache.ema_decay=0.9"], "cache.ema_decay=0.9 would fold"),
        ("tempcache", ["cache.window=8"], "cache.window=8 keeps 2 beside cache.sink 3 and a chunk: give 9 or more"),
        ("tempcache", ["cache.merged.size=0"], "cache.merged.size must be at least 1, got 0"),
        ("tempcache", ["cache.merged.most=0"], "cache.merged.most must be at least 1, got 0"),
        ("tempcache", ["cache.merged.threshold=1.5"], "between -1 and 1, got 1.5"),
        ("tempcache", ["cache.merged.half_life=0"], "above 0, got 0"),
        (
            "tempcache",
            ["positions.rule=tri-region"],
            "positions.rule=tri-region .*use positions.rule=absolute or trail",
        ),
        ("memflow", ["cache.collapse_text=true"], "cache.collapse_text=true leaves one"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(preset, overrides, words):
    with pytest.raises(InputError, match=words) as caught:
        Engine(None, load_preset(preset, overrides))
    assert "\n" not in str(caught.value)


@BOTH
def test_gradients_are_refused_in_one_line(tiny, embeds, preset, overrides):
    engine = Engine(tiny.model(), load_preset(preset, overrides))
    with torch.enable_grad(), pytest.raises(InputError, match="no gradient passes.*cache.policy=window") as caught:
        list(engine.run(embeds[0], SeededNoise(0), 12, SIZE))
    assert "\n" not in str(caught.value)


def test_what_is_said_of_the_two():
    """Regions in steady state, and how far positions reach: spec 04 B.3 and B.2."""
    said = lambda name, *more: regions(Engine(None, load_preset(name, more)))
    assert said("deep-forcing") == "sink 10, chosen 2, recent 4, flight 3"
    assert said("deep-forcing", "cache.deep.kept=0") == "sink 10, recent 8, flight 3"
    assert said("tempcache") == "sink 3, merged 6, recent 6, flight 3"
    reach = lambda *sink_and_rule, **more: DeepPolicy(DeepOptions(21, *sink_and_rule, **more), Sizes(3, 3)).reach()
    assert reach(10, "trail", kept=0) == 24  # the window, and the gap before it
    assert reach(10, "trail") == reach(10, "trail", reuse=7) == 53  # 11 frames old at first, then 7 times 6 frames
    assert reach(10, "absolute") is None and reach(0, "absolute", kept=12) == 21 + 7 * 6
    assert MergedPolicy(MergedOptions(12, 3), Sizes(3, 3)).reach() is None


# --- a sink that is renewed

REFRESH = [
    STEPS, "cache.policy=refresh", "cache.window=9", "cache.sink=2", "cache.refresh=0.05", "positions.rule=packed",
]  # fmt: skip


def renewed_by_hand(bench: Bench, sink: int, ring: int, chunks: int, threshold: float):
    """[layer][sample] -> the frame each sink place holds, one frame after the other as it leaves the ring."""
    cosine = torch.nn.functional.cosine_similarity
    held = [[list(range(sink)) for _ in range(2)] for _ in range(2)]
    for leaving in range(sink, chunks * bench.size - ring):
        for layer in range(2):
            for sample in range(2):
                mean = lambda t, f, at=(layer, sample): t[at][f].mean(0).flatten()
                alike = [
                    sum(float(cosine(mean(t, f), mean(t, leaving), dim=0)) for t in (bench.keys, bench.values)) / 2
                    for f in held[layer][sample]
                ]
                if min(alike) < threshold:
                    held[layer][sample][alike.index(min(alike))] = leaving
    return held


def test_what_leaves_takes_the_place_of_what_it_is_least_like(tiny):
    options = RefreshOptions(9, 2, "packed", threshold=0.05)
    policy = RefreshPolicy(options, Sizes(3, 3))
    bench = Bench(tiny, policy, 8)
    for chunk in range(8):
        bench.step(chunk)
        bench.commit(chunk)
    held = renewed_by_hand(bench, 2, policy.ring, 8, 0.05)
    assert {tuple(frames) for layer in held for frames in layer} != {(0, 1)}  # something was renewed, not all alike
    assert len({tuple(frames) for layer in held for frames in layer}) > 1
    for layer in range(2):
        for sample in range(2):
            for page, frame in enumerate(held[layer][sample]):
                assert torch.equal(bench.store.keys[layer, sample, page], bench.keys[layer, sample, frame])
                assert torch.equal(bench.store.values[layer, sample, page], bench.values[layer, sample, frame])


def test_a_sink_that_nothing_is_unlike_enough_for_is_a_fixed_one(tiny, model, embeds):
    run = lambda *changes: latents(
        Engine(model, tiny.config(STEPS, "cache.window=9", "cache.sink=2", "positions.rule=packed", *changes)).run(
            embeds[0], SeededNoise(0), 24, SIZE
        )
    )
    wanted = run()
    assert torch.equal(run("cache.policy=refresh", "cache.refresh=-0.999"), wanted)
    assert not torch.allclose(run("cache.policy=refresh", "cache.refresh=1"), wanted, atol=1e-3)


@pytest.mark.parametrize("mode", ["keep", "recache", "cut"])
def test_a_renewed_sink_goes_on_bit_by_bit(tiny, model, embeds, mode):
    engine = Engine(model, tiny.config(*REFRESH, f"switch.mode={mode}"))
    start = lambda: engine.start(embeds[0], SeededNoise(0), latent_size=SIZE, switches={15: embeds[1]})
    rollout = start()
    latents(islice(iter(rollout.advance, None), 4))
    file = io.BytesIO()
    torch.save(rollout.state_dict(), file)
    fork, wanted = rollout.fork(), latents(islice(iter(rollout.advance, None), 4))
    file.seek(0)
    resumed = start()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(latents(islice(iter(resumed.advance, None), 4)), wanted)
    assert torch.equal(latents(islice(iter(fork.advance, None), 4)), wanted)


def test_a_renewed_sink_is_never_named():
    """Its frames are content's; plans are bounded and repeat."""
    engine = Engine(None, load_preset("default", REFRESH))
    calls = list(islice(walk(engine), 200))
    assert {call.plan.signature() for call in calls[60:120]} == {call.plan.signature() for call in calls[120:]}
    late = [s for call in calls[60:] for g in call.plan.groups for s in g.segments if s.region == "sink"]
    assert late and {s.frames for s in late} == {(-1, -1)} and {s.positions for s in late} == {(0, 1)}
    assert regions(engine) == "sink 2, recent 4, flight 3"


@pytest.mark.parametrize(
    "changes, words",
    [
        (["cache.refresh=2"], ["cache.refresh=2", "cosine"]),
        (["cache.sink=0"], ["cache.sink=0"]),
        (["positions.rule=absolute"], ["positions.rule=absolute", "packed"]),
        (["cache.ema_decay=0.9"], ["cache.ema_decay"]),
        (["cache.window=5"], ["cache.window=5", "8 or more"]),
    ],
)
def test_sinks_that_cannot_be_renewed_are_refused(changes, words):
    with pytest.raises(InputError) as caught:
        Engine(None, load_preset("default", [*REFRESH, *changes]))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
