"""Rows: a cache per step of the ladder, several streams in one forward, chunks that begin from a video."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import drain

from streamgen.cache.positions import Seen, ahead, restart
from streamgen.config import ChunkConfig, load_preset
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.forward import BoundRow
from streamgen.noise import SeededNoise
from streamgen.schedules import Call, Lane, OpKind, RowsOptions, RowsSchedule, Tick
from streamgen.source import MotionStrength, Source
from streamgen.walk import cost, walk

FP32 = dict(atol=5e-5, rtol=1e-4)
SIZE = (4, 4)
ROWS = [
    "ladder.timesteps=[1000,800,500]", "schedule.coupling=rows", "schedule.commit=inplace", "cache.window=9",
    "cache.sink=3", "ladder.warp=false", "ladder.shift=1",
]  # fmt: skip
FORMS = {
    "at once": ["schedule.stagger=1"],
    "first alone": ["schedule.stagger=[solo,1]"],
    "cloned": ["schedule.stagger=[solo,1]", "schedule.clone=true"],
    "two frames first": [
        "schedule.stagger=[solo,1]", "schedule.clone=true", "chunk.latent_frames=1", "chunk.first_latent_frames=2",
        "cache.window=6",
    ],
    "every other tick": ["schedule.stagger=2"],
}  # fmt: skip
form = pytest.mark.parametrize("form", FORMS)


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def engine(tiny, model):
    return lambda *changes: Engine(model, tiny.config(*ROWS, *changes))


def start(engine, embeds, chunks=None, seed=0, **more):
    frames = engine.config.chunk.frames(chunks - 1).stop if chunks else None
    return engine.start(embeds, SeededNoise(seed), latent_size=SIZE, num_latent_frames=frames, **more)


# --- the schedule


def ticks(steps: int, chunks: int, **options) -> list[str]:
    schedule = RowsSchedule(RowsOptions(commit="inplace", **options))
    name = lambda row: "+".join(f"{slot.chunk}.{slot.p_in}@{row.lane.level}" for slot in row.slots)
    return [" ".join(name(row) for row in tick.calls[0].rows) for tick in schedule.ticks(lambda k: steps, chunks)]


def test_the_worked_timelines():
    """Spec 02 D.6 (tick 4 of N=4), 05 B.4, and a first chunk that runs alone."""
    pipeline = ticks(4, 9, stagger=1)
    assert pipeline[4] == "4.0@0 3.1@1 2.2@2 1.3@3"
    assert pipeline[0] == "0.0@0" and pipeline[2] == "2.0@0 1.1@1 0.2@2" and pipeline[-1] == "8.3@3"
    assert ticks(2, 4, stagger=["solo", 1]) == ["0.0@0", "0.1@1", "1.0@0", "2.0@0 1.1@1", "3.0@0 2.1@1", "3.1@1"]


def test_the_first_chunk_fills_every_lane_as_the_second_enters():
    schedule = RowsSchedule(RowsOptions(stagger=["solo", 1], commit="inplace", clone=True))
    clones = [(tick.index, op) for tick in schedule.ticks(lambda k: 3, 6) for op in tick.ops if op.kind is OpKind.CLONE]
    assert [(index, op.lanes) for index, op in clones] == [(3, (Lane(2), Lane(0), Lane(1)))]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(commit="separate"), ["schedule.commit=separate", "inplace"]),
        (dict(commit="inplace", stagger=0), ["schedule.stagger=0", "1 or more"]),
        (dict(commit="inplace", stagger=[1, 0]), ["[1, 0]", "1 or more"]),
        (dict(commit="inplace", stagger=1, clone=True), ["schedule.stagger=1", "[solo, 1]"]),
    ],
)
def test_rows_that_cannot_be_are_refused(options, words):
    with pytest.raises(InputError) as caught:
        RowsSchedule(RowsOptions(**options))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_clean_pass_cannot_renew_what_noisy_steps_left(engine, embeds):
    with pytest.raises(InputError, match="switch.mode=recache"):
        engine("schedule.stagger=1", "switch.mode=recache")
    rollout = start(engine("schedule.stagger=1"), embeds[0])
    with pytest.raises(InputError, match="keeps no latents"):
        rollout.switch(embeds[1], "recache")


# --- what a row reads


def test_a_step_reads_what_the_same_step_left(engine, embeds):
    traced = engine("schedule.stagger=1")
    traced.tracing = True
    drain(start(traced, embeds[0], 6))
    for call in traced.trace():
        last = call.frames[-1]
        wanted = [f for f in range(last + 1) if f < 3 or f > last - 6]
        assert sorted(call.key_frames[0]) == wanted and call.level == [1000.0, 800.0, 500.0].index(call.timesteps[0])
        assert call.writes in (call.frames, ())


@form
def test_a_walk_without_weights_is_what_runs(engine, embeds, form):
    traced = engine(*FORMS[form])
    traced.tracing = True
    drain(start(traced, embeds[0], 6))
    planned = list(walk(traced, 6))
    assert len(planned) == len(traced.trace()) and [c.emits for c in planned if c.emits] == [(k,) for k in range(6)]
    for call, record in zip(planned, traced.trace(), strict=True):
        assert tuple(f for part in call.frames for f in part) == record.frames
        assert (call.tick, call.row.lane.level) == (record.tick, record.level)
        assert tuple(group.key_frames for group in call.plan.groups) == record.key_frames
        assert tuple(group.key_positions for group in call.plan.groups) == record.key_positions


def test_cost_counts_forwards_not_rows(engine):
    spent = cost(engine("schedule.stagger=1"))
    assert (spent.first, spent.calls, spent.frames) == (3, 1, 9)
    assert spent.kept == 3 * 6  # three lanes of a window of 9 without the chunk in flight


def test_a_sink_stays_ahead_once_the_stream_has_left_it():
    seen = lambda recent, own: Seen([0, 1], [], recent, own, window=7, span=32, lead=10)
    assert ahead(seen([2, 3], [4, 5])) == [0, 1, 2, 3, 4, 5]
    assert ahead(seen([3, 4], [5, 6])) == [15, 16, 3, 4, 5, 6]
    assert ahead(seen([998, 999], [1000, 1001])) == [1010, 1011, 998, 999, 1000, 1001]


def test_numbers_go_back_before_they_reach_the_limit():
    """Spec 05 A.4 with a limit of 10: keys written before sit ahead of the query until they leave."""
    seen = lambda recent, own: Seen([0, 1, 2], [], recent, own, window=6, span=21, restart=10)
    assert restart(seen([7, 8], [9])) == [0, 1, 2, 7, 8, 9]
    assert restart(seen([8, 9], [10])) == [0, 1, 2, 8, 9, 5]
    assert restart(seen([13, 14], [15])) == [0, 1, 2, 8, 9, 5]
    assert restart(seen([998, 999], [1000])) == [0, 1, 2, 8, 9, 5]


@pytest.mark.parametrize("changes", [["positions.rule=restart"], ["positions.restart=9"],
                                     ["positions.rule=restart", "positions.restart=9"]])  # fmt: skip
def test_a_restart_needs_its_rule_and_room(tiny, model, changes):
    with pytest.raises(InputError, match="positions.restart"):
        Engine(model, tiny.config("cache.window=9", *changes))


def test_a_lead_belongs_to_its_rule(tiny, model):
    for changes in (["positions.rule=ahead"], ["positions.lead=5"]):
        with pytest.raises(InputError, match="positions.lead"):
            Engine(model, tiny.config("cache.window=9", *changes))


def test_a_lead_reaches_as_far_as_it_says():
    """The widest spread of positions in any call is what `positions.span` is checked against."""
    engine = Engine(None, load_preset("timestep-pipeline"))
    calls = [call.plan.groups[0] for call in walk(engine, 60)]
    spread = max(max(g.key_positions + g.query_positions) - min(g.key_positions) for g in calls) + 1
    assert spread <= engine.config.positions.span


# --- one forward or several


@form
def test_rows_run_together_as_they_run_apart_in_any_order(engine, embeds, form, monkeypatch):
    """A rank of its own for every step computes the same."""
    wanted = drain(start(engine(*FORMS[form]), embeds[0], 7))
    monkeypatch.setattr(BoundRow, "signature", lambda row: id(row))
    torch.testing.assert_close(drain(start(engine(*FORMS[form]), embeds[0], 7)), wanted, **FP32)

    for order in (lambda rows: rows[::-1], lambda rows: rows[1:] + rows[:1]):
        shuffled = engine(*FORMS[form])
        shuffled.schedule = Reordered(shuffled.schedule, order)
        torch.testing.assert_close(drain(start(shuffled, embeds[0], 7)), wanted, **FP32)


class Reordered:
    """A schedule whose calls list their rows in another order."""

    def __init__(self, inner, order) -> None:
        self.inner, self.order = inner, order

    def ticks(self, *args):
        for tick in self.inner.ticks(*args):
            calls = tuple(Call(call.kind, self.order(call.rows), call.source) for call in tick.calls)
            yield Tick(tick.index, tick.ops, calls, tick.emits, tick.commits)

    def in_flight(self, *args) -> int:
        return self.inner.in_flight(*args)


def count_forwards(engine, monkeypatch) -> list[int]:
    sizes, forward = [], type(engine.transformer).forward
    spy = lambda self, x, *args, **kw: sizes.append(x.shape[0]) or forward(self, x, *args, **kw)
    monkeypatch.setattr(type(engine.transformer), "forward", spy)
    return sizes


def test_rows_of_a_tick_share_a_forward(engine, embeds, monkeypatch):
    built = engine("schedule.stagger=1")
    sizes = count_forwards(built, monkeypatch)
    drain(start(built, embeds[0], 5))
    assert sizes == [1, 2, 3, 3, 3, 2, 1]


@pytest.mark.parametrize(
    "changes", [ROWS + FORMS["at once"], ["cache.window=9"], ["cache.window=9", "guidance.scale=3"]]
)
def test_streams_at_different_chunks_share_forwards_and_stay_themselves(tiny, model, embeds, changes, monkeypatch):
    """Other prompts, other noise, one of them three chunks ahead: each is what it would be alone."""
    make = lambda: Engine(model, tiny.config(*changes))
    more = {"negative_embeds": embeds[2]}
    alone = [drain(start(make(), embeds[i], seed=i, **more), 6) for i in range(2)]
    built = make()
    first, second = (start(built, embeds[i], seed=i, **more) for i in range(2))
    got = [[first.advance().latents for _ in range(3)], []]
    sizes = count_forwards(built, monkeypatch)
    for _ in range(3):
        for parts, chunk in zip(got, built.advance([first, second]), strict=True):
            parts.append(chunk.latents)
    assert max(sizes) > min(sizes)
    got[1] += [second.advance().latents for _ in range(3)]
    for parts, wanted in zip(got, alone, strict=True):
        torch.testing.assert_close(torch.cat(parts, 2), wanted, **FP32)


def test_a_call_that_fails_costs_several_streams_nothing(tiny, model, embeds, monkeypatch):
    built = Engine(model, tiny.config("cache.window=9"))
    wanted = [drain(start(Engine(model, built.config), embeds[i], seed=i), 3) for i in range(2)]
    rollouts = [start(built, embeds[i], seed=i) for i in range(2)]
    got = [[chunk.latents] for chunk in built.advance(rollouts)]
    forward, left = type(model).forward, [2]

    def failing(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        built.advance(rollouts)
    for _ in range(2):
        for parts, chunk in zip(got, built.advance(rollouts), strict=True):
            parts.append(chunk.latents)
    for parts, alone in zip(got, wanted, strict=True):
        torch.testing.assert_close(torch.cat(parts, 2), alone, **FP32)


# --- states


@form
def test_a_saved_stream_goes_on_bit_by_bit(engine, embeds, form):
    built = engine(*FORMS[form])
    for at in (1, 2, 4):
        rollout = start(built, embeds[0], 7)
        drain(rollout, at)
        file = io.BytesIO()
        torch.save(rollout.state_dict(), file)
        fork, wanted = rollout.fork(), drain(rollout)
        file.seek(0)
        resumed = start(built, embeds[0], 7)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(drain(resumed), wanted) and torch.equal(drain(fork), wanted)


@form
def test_every_forward_may_fail_once(engine, model, embeds, form, monkeypatch):
    wanted = drain(start(engine(*FORMS[form]), embeds[0], 5))
    forward, failed = type(model).forward, set()

    def failing(self, x, timestep, **kwargs):
        key = (tuple(timestep.flatten().tolist()), x.sum().item())
        if key not in failed:
            failed.add(key)
            raise RuntimeError("out of memory")
        return forward(self, x, timestep, **kwargs)

    monkeypatch.setattr(type(model), "forward", failing)
    rollout, out = start(engine(*FORMS[form]), embeds[0], 5), []
    while not rollout.finished:
        try:
            out.append(rollout.advance().latents)
        except RuntimeError:
            continue
    assert torch.equal(torch.cat(out, 2), wanted) and failed


def test_a_cut_forgets_in_every_lane(engine, embeds):
    built = engine("schedule.stagger=1")
    built.tracing = True
    rollout = start(built, embeds[0])
    drain(rollout, 4)
    rollout.switch(embeds[1], "cut")
    seen = len(built.trace())
    drain(rollout, 3)
    newest = [call for call in built.trace()[seen:] if call.frames[0] >= 18]
    assert newest and {call.level for call in newest} == {0, 1, 2}
    assert all(not 3 <= frame < 12 for call in newest for frame in call.key_frames[0])


# --- from a video


def test_a_strength_of_one_is_a_stream_from_noise(engine, embeds):
    video, built = torch.randn(1, 4, 12, *SIZE), engine(*FORMS["first alone"])
    noise_only = drain(start(built, embeds[0], 4))
    whole = drain(start(built, embeds[0], 4, conditions={"video": video, "strength": 1.0}))
    assert torch.equal(whole, noise_only)
    half = drain(start(built, embeds[0], 4, conditions={"video": video, "strength": lambda k: 0.5}))
    assert not torch.allclose(half, noise_only, atol=1e-2)


class Live:
    """Latents that come when they are asked for."""

    def __init__(self, latents) -> None:
        self.latents, self.asked = latents, []

    def frames(self, frames):
        self.asked.append(frames)
        return self.latents[:, :, frames.start : frames.stop]


def test_a_live_video_is_asked_in_order_and_starts_at_its_ladders_level(engine, embeds):
    latents, built = torch.randn(1, 4, 9, *SIZE), engine(*FORMS["two frames first"], "ladder.timesteps=[700,500]")
    live = Live(latents)
    got = drain(start(built, embeds[0], 8, conditions={"video": live}))
    assert live.asked == [built.config.chunk.frames(k) for k in range(8)]
    exact = drain(start(built, embeds[0], 8, conditions={"video": latents, "strength": [0.7] * 8}))
    torch.testing.assert_close(got, exact)


def test_first_timesteps_of_their_own(engine, embeds):
    built = engine(*FORMS["at once"], "ladder.timesteps=[700,500]")
    built.tracing = True
    told = [700, 684, 650.5]
    drain(start(built, embeds[0], 3, conditions={"video": torch.randn(1, 4, 9, *SIZE), "first_timestep": told}))
    assert [call.timesteps[0] for call in built.trace() if call.level == 0] == told
    assert {call.timesteps[0] for call in built.trace() if call.level == 1} == {500}


@pytest.mark.parametrize(
    "conditions, word",
    [
        ({"strength": 0.5}, "give a video"),
        ({"video": torch.zeros(1, 4, 12, 2, 2)}, "is needed here"),
        ({"video": torch.zeros(1, 4, 2, *SIZE)}, "frames 0-2"),
        ({"video": torch.zeros(1, 4, 12, *SIZE), "strength": 1.5}, "not in 0-1"),
        ({"video": torch.zeros(1, 4, 12, *SIZE), "strength": []}, "needs one of its own"),
        ({"video": torch.zeros(1, 4, 12, *SIZE), "first_timestep": 400}, "fall strictly"),
        ({"film": 1}, "unknown conditions film"),
    ],
)
def test_videos_that_do_not_fit_are_refused(engine, embeds, conditions, word):
    with pytest.raises(InputError, match=word) as caught:
        drain(start(engine("schedule.stagger=1"), embeds[0], 4, conditions=conditions))
    assert "\n" not in str(caught.value)


def test_more_motion_less_noise():
    still, moving = torch.zeros(1, 3, 4, 8, 8), torch.rand(1, 3, 4, 8, 8) * 2 - 1
    motion = MotionStrength(0.8)
    assert motion.next(still) == motion.next(still) == (0.8, 700)
    strength, first = motion.next(moving)
    assert strength == pytest.approx(0.9 * 0.7 + 0.1 * 0.8) and first == int(1000 * strength) - 100
    for _ in range(5):
        strength, _ = motion.next(moving.roll(1, 2))
    assert strength == pytest.approx(0.7, abs=1e-3)
    with pytest.raises(InputError, match="not in 0-1"):
        MotionStrength(0)


def test_a_source_is_taken_out_of_conditions():
    conditions = {"video": torch.zeros(1), "strength": 0.5, "image_embeds": 1}
    assert Source.take(conditions).strength == 0.5 and conditions == {"image_embeds": 1}
    assert Source.take(conditions) is None


# --- chunks of two sizes


@given(size=st.integers(1, 6), first=st.none() | st.integers(1, 6), chunk=st.integers(0, 40))
def test_frames_and_chunks_count_each_other(size, first, chunk):
    config = ChunkConfig(size, first)
    frames = config.frames(chunk)
    assert frames.start == (config.frames(chunk - 1).stop if chunk else 0)
    assert len(frames) == (size if chunk or first is None else first)
    assert {config.holding(frame) for frame in frames} == {chunk}
    assert config.count(frames.stop) == chunk + 1
    assert {config.whole(frame + 1) for frame in frames} == {frames.stop}
    if len(frames) > 1:
        with pytest.raises(InputError, match="chunk.latent_frames"):
            config.count(frames.stop - 1)


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_fixed_noise_is_that_of_the_first_frames(engine, embeds, noise):
    built = engine("schedule.stagger=1", f"ladder.fixed_noise={noise == 'fixed'}")
    rollout, asked = start(built, embeds[0], 4), []
    frames = rollout.noise.frames
    rollout.noise.frames = lambda purpose, which, *rest: asked.append(which) or frames(purpose, which, *rest)
    drain(rollout)
    assert (set(asked) == {range(3)}) == (noise == "fixed")
