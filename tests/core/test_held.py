"""Windows whose chunks ride along unchanged, MAGI's look-back, and the worked tables of spec 02 (V17)."""

import io
import re
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import drain

from streamgen.cli import main
from streamgen.cli.presets import tick_table
from streamgen.config import load_preset
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.held import HeldCausalSchedule, HeldOptions, HeldSchedule
from streamgen.models.masks import block_causal_mask
from streamgen.noise import SeededNoise
from streamgen.schedules import SCHEDULES, OpKind, ScheduleOptions, SlotOp
from streamgen.session import Spec, StreamSession
from streamgen.walk import walk

FP32 = dict(atol=5e-5, rtol=1e-4)
SIZE = (4, 4)
FOUR = "ladder.timesteps=[1000,750,500,250]"
SLIDING = ["ladder.timesteps=[1000,700,400]", "schedule.stagger=1", "schedule.held.chunks=4", "cache.window=4"]
SEGMENTS = [
    "chunk.latent_frames=2", "ladder.timesteps=[1000,700,400]", "schedule.stagger=1", "schedule.held.chunks=3",
    "cache.window=6", "guidance.scale=1", "ladder.shift=3",
]  # fmt: skip
PIPELINE = [
    "chunk.latent_frames=2", "ladder.timesteps=[1000,900,700,400]", "schedule.stagger=1", "cache.window=10",
]  # fmt: skip
CASES = {"sliding": ("ar-diffusion", SLIDING), "segments": ("skyreels-df", SEGMENTS), "magi": ("magi", PIPELINE)}


pytestmark = pytest.mark.usefixtures("no_gradients")


def start(engine, embeds, chunks=None, **more):
    frames = None if chunks is None else chunks * engine.config.chunk.latent_frames
    return engine.start(
        embeds[0], SeededNoise(0), latent_size=SIZE, num_latent_frames=frames, negative_embeds=embeds[2], **more
    )


def run(model, embeds, preset: str, overrides, chunks: int, **more) -> torch.Tensor:
    return drain(start(Engine(model, load_preset(preset, overrides)), embeds, chunks, **more))


def slots(tick, *ops):
    return [s for call in tick.calls for row in call.rows for s in row.slots if not ops or s.op in ops]


def held(steps=3, stagger=1, cls=HeldSchedule, **options):
    """Its ticks for a number of chunks."""
    schedule = cls(HeldOptions(stagger=stagger, **options))
    return lambda chunks, first=0: schedule.ticks(lambda k: steps, chunks, first)


# --- V17: the worked tables


def table(preset: str, chunks: int, *overrides: str) -> list[str]:
    engine = Engine(None, load_preset(preset, overrides))
    return [" ".join(line.split()[1:]) for line in tick_table(walk(engine, chunks)).splitlines()[1:]]


def test_v17_ar_diffusion_four_frames_of_four_steps_two_apart():
    """Spec 02 D.2: counters, [x] = moved in this row."""
    rows = [
        "[1] 0 0 0", "[2] 0 0 0", "[3] [1] 0 0", "[4] [2] 0 0", "4 [3] [1] 0", "4 [4] [2] 0", "4 4 [3] [1]",
        "4 4 [4] [2]", "4 4 4 [3]", "4 4 4 [4]",
    ]  # fmt: skip
    ticks = held(steps=4, stagger=2, cls=HeldCausalSchedule, chunks=4)(4)
    shown = [" ".join(f"[{s.p_out}]" if s.op is SlotOp.STEP else str(s.p_in) for s in slots(tick)) for tick in ticks]
    assert shown == rows


def counters(steps: int, stagger: int, frames: int) -> list[list[int]]:
    """The recursion of the public sampler, as spec 02 D.2 tells it."""
    rows = [[0] * frames]
    while rows[-1] != [steps] * frames:
        row, before = [], rows[-1]
        for i in range(frames):
            if i == 0 or before[i - 1] == steps:
                value = before[i] + 1
            else:
                value = row[i - 1] - stagger
            row.append(min(max(value, 0), steps))
        rows.append(row)
    return rows[1:]


@given(st.integers(1, 7), st.integers(0, 7), st.integers(1, 6))
def test_ad_counters_are_a_stagger(steps, stagger, frames):
    stagger = min(stagger, steps)
    ticks = list(held(steps, stagger, chunks=frames)(frames))
    assert [[slot.p_out for slot in slots(tick)] for tick in ticks] == counters(steps, stagger, frames)
    assert len(ticks) == steps + (frames - 1) * stagger


def test_v17_skyreels_takes_fifty_iterations_at_the_levels_of_its_padded_template(model, embeds):
    """Spec 02 D.3: [999, t_1..t_30, 0] read at a counter, block j a·j iterations behind the first."""
    engine = Engine(model, load_preset("skyreels-df", ["guidance.scale=1"]))
    engine.tracing = True
    list(engine.run(embeds[0], SeededNoise(0), 25, (2, 2)))
    template = [999.0, *engine.ladder.timesteps, 0.0]
    wanted = [[template[min(max(0, i + 1 - 5 * block), 31)] for block in range(5)] for i in range(50)]
    assert [list(call.timesteps) for call in engine.trace()] == wanted
    assert engine.ladder.timesteps[:2] == pytest.approx([1000, 8000 * 29 / (1 * 30 + 7 * 29)])


def test_skyreels_257_frames_are_three_segments_that_overlap_by_a_block():
    """65 latents: 1 + (65 - 25 - 1) // 20 + 1 = 3 restarts."""
    engine = Engine(None, load_preset("skyreels-df"))
    assert [(list(old), first, count) for old, first, count in engine.schedule.segments(13)] == [
        ([], 0, 5), ([4], 5, 4), ([8], 9, 4),
    ]  # fmt: skip
    ticks = list(engine.schedule.ticks(engine.steps, 13))
    assert len(ticks) == 50 + 2 * 45
    assert [[s.chunk for s in slots(tick)] for tick in (ticks[50], ticks[95])] == [[4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    assert {s.chunk for tick in ticks for s in slots(tick) if s.overlap} == {4, 8}


def test_v17_magi_four_chunks_of_eight_steps_two_apart():
    """Spec 02 D.4: fourteen ticks; c = committed within a call, after which it is read from the cache."""
    steps = "ladder.timesteps=[1000,900,800,700,600,500,400,300]"
    assert table("magi", 4, steps, "schedule.stagger=2") == [
        "0 . . .", "1 . . .", "2 0 . .", "3 1 . .", "4 2 0 .", "5 3 1 .", "6 4 2 0", "7* 5 3 1", "c 6 4 2", ". 7* 5 3",
        ". c 6 4", ". . 7* 5", ". . c 6", ". . . 7*",
    ]  # fmt: skip


@pytest.mark.parametrize("steps, window, chunks", [(8, 4, 4), (16, 4, 7), (12, 3, 5), (6, 6, 9), (5, 1, 3)])
def test_v16_magi_of_a_window_is_a_stagger_of_its_part(steps, window, chunks):
    """Spec 02 D.4: stage i, sub-step j moves chunks max(0, i - W + 1) .. min(K, i + 1) - 1 at level (i - k)·P + j."""
    part = steps // window
    wanted = [
        {k: (i - k) * part + j for k in range(max(0, i - window + 1), min(chunks, i + 1))}
        for i in range(chunks + window - 1)
        for j in range(part)
    ]
    schedule = SCHEDULES.get("joint-causal")[0](ScheduleOptions(part, "fused"))
    ticks = list(schedule.ticks(lambda k: steps, chunks))
    assert [{s.chunk: s.p_in for s in slots(tick, SlotOp.STEP)} for tick in ticks] == wanted
    riding = [(tick.index, s.chunk) for tick in ticks for s in slots(tick, SlotOp.CLEAN)]
    assert riding == [(k * part + steps, k) for k in range(chunks - 1)]  # V11: the last one nobody reads


@pytest.mark.parametrize("buffer, micro", [(2, 2), (8, 1), (3, 4), (1, 5)])
def test_v16_a_primed_buffer_is_a_stagger_of_its_micro_steps(buffer, micro):
    """Spec 02 D.1: chunk j of the buffer, 0 the oldest, is at (N - 1 - j)·s + m; ours fills up from empty first."""
    steps = buffer * micro
    schedule = SCHEDULES.get("joint")[0](ScheduleOptions(micro, "none"))
    ticks = list(schedule.ticks(lambda k: steps, buffer + 4))[steps - micro :][: 4 * micro]
    assert [[(s.chunk, s.p_in) for s in slots(tick)] for tick in ticks] == [
        [(i + j, (buffer - 1 - j) * micro + m) for j in range(buffer)] for i in range(4) for m in range(micro)
    ]
    assert [tick.emits for tick in ticks[micro - 1 :: micro]] == [(i,) for i in range(4)]


def test_v17_what_the_windows_and_commits_of_rolling_forcing_read():
    """Spec 02 A.4, without the commits of unfinished chunks that the released loop makes and nobody reads."""
    steps, reads, commits = [], {}, {}
    for call in walk(Engine(None, load_preset("rolling-forcing")), 7):
        (group,) = call.plan.groups
        part = {s.region: (s.frames, s.positions) for s in group.segments}
        if call.call.commits:
            commits[call.tick] = (group.key_frames[0], group.key_frames[-1])
            assert group.key_positions == group.key_frames
        else:
            steps.append({s.chunk: s.p_in for s in call.row.slots})
            sink, recent = part.get("sink", ((), ())), part.get("recent", ((), ()))[0]
            own = part["flight"][0]
            ends = lambda frames: (frames[0], frames[-1]) if frames else None
            reads[call.tick] = (sink[1][0] if sink[1] else None, ends(recent), ends(own))
    assert steps == [{k: w - k for k in range(max(0, w - 4), min(6, w) + 1)} for w in range(11)]
    assert reads == {
        0: (None, None, (0, 2)), 1: (None, None, (0, 5)), 2: (None, None, (0, 8)), 3: (None, None, (0, 11)),
        4: (None, None, (0, 14)), 5: (0, None, (3, 17)), 6: (0, (3, 5), (6, 20)), 7: (0, (3, 8), (9, 20)),
        8: (0, (3, 11), (12, 20)), 9: (0, (3, 14), (15, 20)), 10: (0, (3, 17), (18, 20)),
    }  # fmt: skip
    assert commits == {4: (0, 2), 5: (0, 5), 6: (0, 8), 7: (0, 11), 8: (0, 14), 9: (0, 17)}
    late = {c.tick: c for c in walk(Engine(None, load_preset("rolling-forcing")), 42) if not c.call.commits}
    sunk = {tick: late[tick].plan.groups[0].key_positions[:1] for tick in (7, 10, 20, 41, 45)}
    assert sunk == {7: (3,), 10: (12,), 20: (42,), 41: (105,), 45: (105,)}  # it slides with the stream


@pytest.mark.parametrize(
    "overrides, ladders",
    [
        ([], [[1000, 933, 733, 357], [1000, 933, 357], [1000, 357.1429]]),
        (
            ["ladder.timesteps=[[1000,750,500,100],[1000,750,100],[1000,100]]", "ladder.warp=true"],
            [[1000, 937.5, 833.3333, 357.1429], [1000, 937.5, 357.1429], [1000, 357.1429]],
        ),
    ],
    ids=["first-code", "two-stage"],
)
def test_v17_diagonal_ladders_and_what_their_steps_read(overrides, ladders):
    """Spec 02 C.1 and C.2: 17 calls of three frames, no commit, the sink and the six frames before."""
    engine = Engine(None, load_preset("diagonal", overrides))
    for chunk in range(5):
        assert engine.ladder_of(chunk).timesteps == pytest.approx(ladders[min(chunk, 2)], abs=1e-3)
    calls = list(walk(engine, 7))
    assert len(calls) == 17 and all(len(call.frames[0]) == 3 for call in calls)
    assert calls[-1].plan.groups[0].key_frames == (0, 1, 2, *range(12, 21))


# --- laws of the schedule


@st.composite
def windows(draw):
    """Ticks of a held schedule as a function of the number of chunks, and what it was made of."""
    steps, stagger = draw(st.integers(1, 5)), draw(st.integers(0, 5))
    overlap = draw(st.one_of(st.none(), st.integers(1, 3)))
    least = -(-steps // stagger) if stagger else 1
    chunks = (least if overlap is None else overlap + 1) + draw(st.integers(0, 3))
    most = chunks if overlap is None and not stagger else 11
    waiting = draw(st.booleans())
    return held(steps, stagger, chunks=chunks, overlap=overlap, waiting=waiting), steps, chunks, draw(
        st.integers(1, most)
    )


@given(windows())
def test_each_chunk_takes_each_step_once_in_order_whatever_is_held_beside_it(window):
    """V2, V4, V8, V12; what is held is finished before what moves, and noise behind it."""
    ticks, steps, size, chunks = window
    taken, begun, emitted = {}, [], []
    for tick in ticks(chunks):
        begun += [op.chunk for op in tick.ops]
        assert all(op.kind is OpKind.BEGIN for op in tick.ops)
        now = slots(tick)
        assert [s.chunk for s in now] == list(range(now[0].chunk, now[-1].chunk + 1)) and len(now) <= size
        assert {s.chunk for s in now} <= set(begun)
        levels = [s.p_in for s in now]
        assert levels == sorted(levels, reverse=True)  # V5
        for slot in now:
            if slot.op is SlotOp.STEP:
                taken.setdefault(slot.chunk, []).append((slot.p_in, slot.p_out))
                assert slot.chunk not in emitted
            else:
                assert slot.op is SlotOp.HOLD and slot.p_in == slot.p_out == (steps if slot.chunk in emitted else 0)
                assert not slot.overlap or slot.chunk in emitted
        emitted += tick.emits
        assert set(tick.holds) == {s.chunk for s in now} & set(emitted)
    assert taken == {k: [(p, p + 1) for p in range(steps)] for k in range(chunks)}
    assert begun == emitted == list(range(chunks))


@given(windows(), st.integers(0, 30))
def test_what_is_held_was_kept_and_a_resumed_stream_runs_what_was_left(window, first):
    ticks, steps, _, chunks = window
    whole, kept = list(ticks(chunks)), set()
    for tick in whole:
        assert {s.chunk for s in slots(tick, SlotOp.HOLD) if s.p_in} <= kept
        if tick.emits:
            kept = (kept | set(tick.emits)) & set(tick.holds)
    assert list(ticks(chunks, first)) == [tick for tick in whole if tick.index >= first]


@given(windows(), st.integers(1, 6))
def test_v14_a_longer_stream_begins_like_a_shorter_one(window, more):
    """As long as a shorter one has the same window before it; a call with chunks that wait sees a window of them."""
    ticks, steps, size, chunks = window
    try:
        long, short = list(ticks(chunks + more)), list(ticks(chunks))
    except InputError:  # all at once, and more of them than the window has room for
        return
    entered = next(i for i, tick in enumerate(long) if chunks in [s.chunk for s in slots(tick)])
    assert long[:entered] == short[:entered]
    if chunks >= size:
        assert list(islice(ticks(None), entered)) == short[:entered]


def test_v16_no_stagger_and_a_window_of_one_are_what_they_were_before(model, embeds):
    """All blocks at once are ordinary diffusion of the clip; one chunk in the window is one chunk at a time."""
    more = ["schedule.stagger=0", "positions.rule=absolute"]
    for coupling in ("joint", "joint-causal"):
        name = coupling.replace("joint", "held")
        a, b = (run(model, embeds, "skyreels-df", [*SEGMENTS, *more, f"schedule.coupling={c}"], 3) for c in
                (coupling, name))  # fmt: skip
        assert torch.equal(a, b)
    alone = ["schedule.stagger=solo", "cache.window=2", "schedule.held.overlap=null", "schedule.held.chunks=1"]
    a, b = (run(model, embeds, "skyreels-df", [*SEGMENTS, *alone, f"schedule.coupling={c}"], 4) for c in
            ("solo", "held"))  # fmt: skip
    assert torch.equal(a, b)


# --- what comes out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("overlap", [None, 1, 2])
def test_held_windows_are_dense_forwards_of_all_their_chunks(model, embeds, causal, overlap):
    """Without engine, cache or plan: all latents of a window through the model, those that are due take their step."""
    n, a, size, chunks, c = 3, 1, 3, 6, 2
    coupling = "held-causal" if causal else "held"
    overrides = [
        *SEGMENTS, f"schedule.coupling={coupling}", f"schedule.held.overlap={'null' if overlap is None else overlap}",
        "schedule.held.overlap_level=30", "schedule.held.done_level=10",
    ]  # fmt: skip
    engine = Engine(model, load_preset("skyreels-df", overrides))
    got, noise, ladder = drain(start(engine, embeds, chunks)), SeededNoise(0), engine.ladder
    part = lambda k: range(k * c, (k + 1) * c)
    x = [noise.frames("initial", part(k), 0, (1, 4, *SIZE)) for k in range(chunks)]
    if overlap is None:
        starts = {k: k * a for k in range(chunks)}
        last = starts[chunks - 1] + n
        window = [range(max(0, max(size, min(chunks, t // a + 1)) - size), max(size, min(chunks, t // a + 1)))
                  for t in range(last)]  # fmt: skip
        old = [range(0)] * last
    else:
        starts, window, old, first = {}, [], [], 0
        while first < chunks:
            begin, before = len(window), range(max(0, first - overlap), first)
            new = range(first, min(chunks, first + size - len(before)))
            starts.update({k: begin + (k - first) * a for k in new})
            ticks = (len(new) - 1) * a + n
            window += [range(before.start if before else first, new.stop)] * ticks
            old += [before] * ticks
            first = new.stop
    for t, (seen, before) in enumerate(zip(window, old, strict=True)):
        fed, times = [], []
        for k in seen:
            p = t - starts[k]
            level = 999.0 if p < 0 else ladder.timesteps[p] if p < n else 30.0 if k in before else 10.0
            eps = noise.frames("context", part(k), t, (1, 4, *SIZE))
            fed.append(0.97 * x[k] + 0.03 * eps if k in before else x[k])
            times += c * [level]
        mask = block_causal_mask(len(times), c) if causal else None
        out = model(torch.cat(fed, 2), torch.tensor([times]), embeds[0], return_dict=False, frame_mask=mask)[0]
        for k, velocity in zip(seen, out.split(c, 2), strict=True):
            if 0 <= t - starts[k] < n:
                x[k] = ladder.step(x[k], velocity, t - starts[k], None)
    torch.testing.assert_close(got, torch.cat(x, 2), **FP32)


def test_v3_a_held_chunk_is_fed_bit_by_bit_what_it_was_and_overlap_with_new_noise_every_time(model, embeds):
    engine = Engine(model, load_preset("skyreels-df", SEGMENTS))
    engine.tracing = True
    inputs = []
    handle = model.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    video = drain(start(engine, embeds, 5)).split(2, 2)
    handle.remove()
    noise = [SeededNoise(0).frames("initial", range(2 * k, 2 * k + 2), 0, (1, 4, *SIZE)) for k in range(5)]
    waited, finished, overlapped = 0, 0, []
    for call, x in zip(engine.trace(), inputs, strict=True):
        for chunk, level, part in zip(call.chunks, call.timesteps, x.split(2, 2), strict=True):
            if level == 999:
                waited += 1
                assert torch.equal(part, noise[chunk])
            elif level == 0:
                finished += 1
                assert torch.equal(part, video[chunk])
            elif level == 20:
                overlapped.append((part - 0.98 * video[chunk]) / 0.02)
    assert (waited, finished, len(overlapped)) == (1 + 2 + 1, 1 + 2 + 1, 4)
    for i, eps in enumerate(overlapped):
        assert eps.std() == pytest.approx(1, abs=0.3) and not any(torch.equal(eps, e) for e in overlapped[:i])


def test_what_waits_is_seen_by_nobody_under_causal_attention(model, embeds):
    run_with = lambda coupling, waiting: run(
        model, embeds, "ar-diffusion",
        [*SLIDING, f"schedule.coupling={coupling}", f"schedule.held.waiting={waiting}"], 7,
    )  # fmt: skip
    torch.testing.assert_close(run_with("held-causal", "true"), run_with("held-causal", "false"), **FP32)
    assert (run_with("held", "true") - run_with("held", "false")).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_a_state_taken_after_any_chunk_goes_on_bit_by_bit_and_so_does_a_fork(model, embeds, name):
    """A new prompt, too, whichever chunks it reaches."""
    preset, overrides = CASES[name]
    engine, wanted = Engine(model, load_preset(preset, overrides)), []
    switches = {4: embeds[1]}
    rollout = start(engine, embeds, switches=switches)
    for at in range(9):
        file = io.BytesIO()
        torch.save(rollout.state_dict(), file)
        file.seek(0)
        resumed = start(engine, embeds)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        twin = rollout.fork()
        ahead = [resumed.advance() for _ in range(2)]
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(ahead, (twin.advance(), twin.advance())))
        chunk = rollout.advance()
        assert torch.equal(chunk.latents, ahead[0].latents) and chunk.index == ahead[0].index == at
        assert chunk.epoch == ahead[0].epoch
        wanted.append(chunk)
    assert {chunk.epoch for chunk in wanted} == {0, 1} or engine.config.switch.in_flight == "follow"


def test_an_interrupted_call_is_made_again(model, embeds):
    engine = Engine(model, load_preset("skyreels-df", SEGMENTS))
    wanted, rollout, calls = drain(start(engine, embeds, 5)), start(engine, embeds, 5), []

    def stop(module, args, out):
        calls.append(1)
        if len(calls) % 2:
            raise KeyboardInterrupt

    handle, parts = model.register_forward_hook(stop), []
    while not rollout.finished:
        try:
            parts.append(rollout.advance().latents)
        except KeyboardInterrupt:
            pass
    handle.remove()
    assert torch.equal(torch.cat(parts, 2), wanted) and len(calls) > 10


@pytest.mark.parametrize("name", CASES)
def test_a_roll_out_with_gradients_computes_the_same(tiny, embeds, name):
    preset, overrides = CASES[name]
    weights, config = tiny.model(), load_preset(preset, overrides)
    wanted = drain(start(Engine(weights, config), embeds, 6))
    with torch.enable_grad():
        got = drain(start(Engine(weights, config), embeds, 6))
        got.square().sum().backward()
    torch.testing.assert_close(got.detach(), wanted, **FP32)
    assert all(w.grad.isfinite().all() for w in weights.parameters() if w.grad is not None)
    assert weights.blocks[0].attn1.to_k.weight.grad.abs().max() > 0


def test_a_prompt_reaches_held_chunks_as_in_flight_says(model, embeds):
    """Chunks that wait have begun: kept prompts change with the next segment, followed ones at once."""
    heard = {}
    for how in ("keep", "follow"):
        engine = Engine(model, load_preset("skyreels-df", [*SEGMENTS, f"switch.in_flight={how}"]))
        plain, told = start(engine, embeds, 5), start(engine, embeds, 5)
        parts = [(plain.advance(), told.advance())]
        told.switch(embeds[1], "keep")
        while not plain.finished:
            parts.append((plain.advance(), told.advance()))
        heard[how] = [k for k, (a, b) in enumerate(parts) if not torch.equal(a.latents, b.latents)]
    assert heard == {"keep": [3, 4], "follow": [1, 2, 3, 4]}


# --- MAGI


def test_magi_reads_further_back_the_noisier_a_chunk_is():
    """Five chunks with itself, then four, three, two; a finished one itself alone."""
    for call in walk(Engine(None, load_preset("magi")), 12):
        for slot, part, group in zip(call.row.slots, call.frames, call.plan.groups, strict=True):
            reach = 1 if slot.op is SlotOp.CLEAN else 5 - slot.p_in // 4
            wanted = range(max(0, slot.chunk + 1 - reach) * 6, part.stop)
            assert group.key_frames == group.key_positions == tuple(wanted)
            assert [call.frames[0].start + i for i in group.query_frames] == list(part)
            assert group.query_positions == tuple(part)


@pytest.mark.parametrize("overrides", [[], ["cache.look_back=[3,2,2]", "cache.window=60"]], ids=["four", "two-stages"])
def test_v11_every_commit_is_read(overrides):
    calls = list(walk(Engine(None, load_preset("magi", overrides)), 9))
    for i, call in enumerate(calls):
        riding = {k for k in call.committed}
        for chunk in riding:
            frames = set(range(6 * chunk, 6 * chunk + 6))
            cached = (set(s.frames) for later in calls[i + 1 :] for g in later.plan.groups for s in g.segments
                      if s.region == "recent")  # fmt: skip
            assert any(frames <= read for read in cached)
    assert [sorted(call.committed) for call in calls if call.committed] == [[k] for k in range(8)]


@pytest.mark.parametrize("branch", ["own", "negative"])
def test_magis_fused_commit_is_a_separate_one_in_fewer_calls(model, embeds, branch):
    """Seen by the noisier chunks of the same call, seeing itself alone, told what the branch says."""
    found, clean = [], []
    for commit in ("separate", "fused"):
        engine = Engine(
            model, load_preset("magi", [*PIPELINE, f"schedule.commit={commit}", f"guidance.commit_branch={branch}"])
        )
        engine.tracing = True
        found.append(drain(start(engine, embeds, 8, switches={10: embeds[1]})))
        alone = [call for call in engine.trace() if call.kind == "clean"]
        assert all(call.key_frames == (call.frames,) and call.timesteps == pytest.approx((0.1,)) for call in alone)
        clean.append(len(alone))
    torch.testing.assert_close(*found, **FP32)
    assert clean == [7, 1]  # the one is owed when the new prompt comes


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("commit", ["separate", "fused"])
def test_a_negative_commit_branch_tells_commits_the_negative_prompt(model, embeds, commit, scale):
    """As if the prompt itself had been that, in every branch."""
    overrides = [
        "ladder.timesteps=[1000,500]", "cache.window=9", f"schedule.commit={commit}", f"guidance.scale={scale}",
    ]  # fmt: skip
    config = lambda branch: load_preset("self-forcing", [*overrides, f"guidance.commit_branch={branch}"])
    rollout = start(Engine(model, config("negative")), embeds)
    other = start(Engine(model, config("own")), [embeds[2]] * 3)
    other.advance()
    chunk = rollout.advance().latents
    for flight in (*(flight for _, _, flight in other.pending), *other.owed.values()):
        flight.x = chunk  # the same latents, under the negative prompt throughout
    rollout.advance(), other.advance()
    first = lambda stream: stream.store.keys[:, :, :3]
    torch.testing.assert_close(first(rollout), first(other), **FP32)
    assert first(rollout).abs().max() > 0.1


def test_commits_under_a_negative_prompt_need_one(model, embeds):
    engine = Engine(model, load_preset("magi", PIPELINE))
    assert engine.reads_negative and engine.branches == 1
    with pytest.raises(InputError, match="commit_branch=negative needs negative_prompt_embeds"):
        next(engine.run(embeds[0], SeededNoise(0), 4, SIZE))


def test_a_session_encodes_the_negative_prompt_for_commits_alone(model, embeds):
    codec = SimpleNamespace(temporal_ratio=1, decode=lambda x, state: (x[:, :3].clamp(-1, 1), None))
    encode = lambda prompts: torch.cat([{"red": embeds[0], "dull": embeds[2]}[prompt] for prompt in prompts])
    spec = Spec("red", negative_prompt="dull", num_frames=6, latent_size=SIZE)
    engine = Engine(model, load_preset("magi", PIPELINE))
    chunks = list(StreamSession(engine, codec, encode, spec))
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks], 2), drain(start(engine, embeds, 3)))


@pytest.mark.parametrize("branch, same", [("negative", False), ("own", True)])
def test_magi_hears_the_negative_prompt_through_its_commits_alone(model, embeds, branch, same):
    engine = Engine(model, load_preset("magi", [*PIPELINE, f"guidance.commit_branch={branch}"]))
    a = drain(start(engine, embeds, 6))
    b = drain(start(engine, [embeds[0], embeds[1], embeds[1]], 6))
    assert torch.equal(a[:, :, :2], b[:, :, :2])  # the first chunk has nothing before it
    assert torch.equal(a, b) == same


# --- what is refused


@pytest.mark.parametrize(
    "preset, overrides, words",
    [
        ("ar-diffusion", ["schedule.commit=fused"], ["schedule.commit=fused", "use schedule.commit=none"]),
        ("ar-diffusion", ["schedule.held.chunks=0"], ["schedule.held.chunks", "got 0"]),
        ("ar-diffusion", ["cache.window=12"], ["cache.window=12", "floor 16", "16 frames in flight"]),
        ("ar-diffusion", ["schedule.held.waiting_level=1001"], ["waiting_level", "0-1000", "1001"]),
        ("skyreels-df", ["schedule.held.overlap=5"], ["held.overlap=5", "held.chunks=5"]),
        ("skyreels-df", ["schedule.held.overlap=0"], ["held.overlap=0", "slides"]),
        ("magi", ["cache.window=24", "schedule.stagger=16"], ["[5, 4, 3, 2, 1]", "30 frames", "cache.window=24"]),
        ("magi", ["cache.look_back=[5,4,1,1]"], ["16 steps", "3 equal stages"]),
        ("magi", ["cache.look_back=[5]"], ["cache.look_back=[5]", "two entries"]),
        ("magi", ["cache.look_back=[5,0]"], ["cache.look_back=[5, 0]", "at least 1"]),
        ("magi", ["positions.rule=packed", "schedule.coupling=solo", "schedule.stagger=solo"],
         ["cache.policy=look-back", "positions.rule=packed"]),
        ("magi", ["schedule.coupling=joint"], ["look-back", "schedule.coupling=joint", "joint-causal"]),
        ("magi", ["ladder.timesteps=[[1000,500],[1000]]"], ["of 1 and", "of 2 steps"]),
        ("magi", ["schedule.commit=inplace"], ["commit_branch=negative", "commit=inplace"]),
    ],
)
def test_options_without_a_meaning_are_refused_in_one_line(preset, overrides, words):
    with pytest.raises(InputError) as caught:
        Engine(None, load_preset(preset, overrides))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("stagger, chunks, taken", [(1, None, 4), (0, None, 0), (1, 5, 4), (3, 9, 12)])
def test_a_window_does_not_slide_past_a_chunk_that_is_not_finished(stagger, chunks, taken):
    steps = 5 if taken < 5 else 13
    with pytest.raises(InputError) as caught:
        next(held(steps, stagger, chunks=4)(chunks))
    said = f"chunk 4 would push chunk 0 out of a window of schedule.held.chunks=4 after {taken} of its {steps} steps"
    assert "\n" not in str(caught.value) and said in str(caught.value)
    assert len(list(held(steps, stagger, chunks=4)(4))) == steps + 3 * stagger  # a clip of one window does not slide


# --- the tables a user sees


def test_ticks_of_held_windows_say_what_is_finished_and_what_waits():
    short = ["schedule.stagger=2", "schedule.held.chunks=3", "ladder.timesteps=[1000,700,400]"]
    assert table("ar-diffusion", 4, *short, "cache.window=3") == [
        "0 ~ ~ .", "1 ~ ~ .", "2* 0 ~ .", "= 1 ~ .", "= 2* 0 .", "= = 1 .", ". = 2* 0", ". = = 1", ". = = 2*",
    ]  # fmt: skip
    assert table("skyreels-df", 5, *short, "cache.window=15")[6:] == [
        "= = 2* . .", ". . = 0 ~", ". . = 1 ~", ". . = 2* 0", ". . = = 1", ". . = = 2*",
    ]  # fmt: skip


def test_presets_that_hold_cost_what_their_schedules_say(capsys):
    """Ticks to the first chunk, frames kept, calls and frames per chunk: of segments n + (B - 2)·a for B - 1 chunks."""
    assert main(["presets"]) == 0
    rows = {line.split()[0]: re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()}
    shown = {name: rows[name][1:8] for name in ("ar-diffusion", "skyreels-df", "magi")}
    assert shown == {
        "ar-diffusion": ["held-causal +5", "flight 16", "packed", "50", "0", "5", "80"],
        "skyreels-df": ["held +5", "flight 25", "packed", "30", "0", "11.25", "281.25"],
        "magi": ["joint-causal +4", "flight 30", "absolute", "16", "24", "4", "102"],
    }
    assert main(["presets", "show", "skyreels-df", "--ticks", "12"]) == 0
    out = capsys.readouterr().out
    assert "= held as context, ~ as noise that waits" in out
    assert ["0", "0", "~", "~", "~", "~"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_presets_that_hold_stream_as_they_are(model, embeds, name):
    engine = Engine(model, load_preset(CASES[name][0]))
    size = engine.config.chunk.latent_frames
    chunk = start(engine, embeds).advance()
    assert chunk.latents.shape == (1, 4, size, *SIZE) and chunk.latents.isfinite().all()
    assert engine.config.parity == "schedule"  # nothing was compared with
