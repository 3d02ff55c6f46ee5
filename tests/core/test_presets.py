"""Streams with chunks in flight, fused commits and memories of several kinds: equalities, states, failures, prompts."""

import io
from types import SimpleNamespace

import pytest
import torch
from running import SIZE, advance, drain, latents, saved, start

from streamgen.config import load_preset
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.noise import SeededNoise
from streamgen.session import Change, Spec, StreamSession

FP32 = dict(atol=5e-5, rtol=1e-4)  # the same sums in calls of other sizes, several chunks deep
WINDOW = ["cache.window=15", "cache.sink=3"]
ROLLING = ["ladder.timesteps=[1000,800,500]", "schedule.stagger=1", "cache.window=15", "cache.sink=3"]


pytestmark = pytest.mark.usefixtures("no_gradients")


# --- equalities


@pytest.mark.parametrize(
    "coupling, mode, branch",
    [
        *((coupling, mode, "plain") for coupling in ("solo", "joint", "joint-causal") for mode in ("keep", "recache")),
        ("solo", "cut", "own"), ("solo", "keep", "positive"), ("joint", "keep", "own"), ("joint", "cut", "positive"),
    ],
)  # fmt: skip
def test_a_fused_commit_is_a_separate_one_in_fewer_calls(tiny, model, embeds, coupling, mode, branch):
    """Window and sink, guided or not; at a new prompt what is owed is published under its own."""
    stagger = "solo" if coupling == "solo" else "1"
    guided = [] if branch == "plain" else ["guidance.scale=3", f"guidance.commit_branch={branch}"]
    found, calls = [], []
    for commit in ("separate", "fused"):
        config = tiny.config(
            *WINDOW, f"schedule.coupling={coupling}", f"schedule.stagger={stagger}", f"schedule.commit={commit}",
            f"switch.mode={mode}", "switch.in_flight=keep", "schedule.commit_level=20", *guided,
        )  # fmt: skip
        engine = Engine(model, config)
        engine.tracing = True
        rollout = start(engine, embeds[0], 24, switches={9: embeds[1]}, negative_embeds=embeds[2])
        found.append(drain(rollout))
        calls.append([(call.kind, call.source) for call in engine.trace()])
    torch.testing.assert_close(*found, **FP32)
    clean = [kinds.count(("clean", "flight")) for kinds in calls]
    assert clean == [7, 1]  # the one is owed when the new prompt comes
    assert len(calls[0]) - len(calls[1]) == 6
    riding = [call for call in engine.trace() if call.kind == "denoise" and 20 in call.timesteps]
    assert len(riding) == 6 and all(call.timesteps[0] == 20 for call in riding)  # V7: at the commit level
    assert all(call.writes == call.frames[:3] for call in riding)


def test_a_fused_commit_needs_room_in_the_store_and_no_window(tiny, model, embeds):
    found = [
        drain(start(Engine(model, tiny.config(f"schedule.commit={commit}", "positions.rule=packed")), embeds[0], 15))
        for commit in ("separate", "fused")
    ]
    torch.testing.assert_close(*found, **FP32)


@pytest.mark.parametrize("commit", ["separate", "inplace", "none"])
def test_v16_a_stagger_of_the_ladders_length_is_solo(tiny, model, embeds, commit):
    run = lambda *schedule: drain(
        start(Engine(model, tiny.config(*WINDOW, f"schedule.commit={commit}", *schedule)), embeds[0], 18)
    )
    wanted = run()
    for stagger in ("solo", "2", "[2]"):
        for coupling in ("joint", "joint-causal"):
            got = run(f"schedule.coupling={coupling}", f"schedule.stagger={stagger}")
            assert torch.equal(got, wanted), (stagger, coupling)
    assert torch.equal(run("schedule.coupling=joint-causal", "schedule.stagger=5"), wanted)  # pauses change nothing
    assert not torch.allclose(run("schedule.coupling=joint", "schedule.stagger=1"), wanted, atol=1e-3)


class Blind(torch.nn.Module):
    """Tells a frame's velocity from that frame and its level alone."""

    def __init__(self, stub) -> None:
        super().__init__()
        self.config, self.rope, self.scale, self.text_keys = stub.config, stub.rope, stub.scale, stub.text_keys

    def forward(self, x, timestep, **kwargs):
        return (self.scale * x * (1 + timestep[:, None, :, None, None] / 1000),)


def test_v15_noise_is_addressed_so_what_looks_at_nobody_is_the_same_under_every_schedule(tiny):
    model = Blind(tiny.stub())
    run = lambda *schedule: drain(
        Engine(model, tiny.config("ladder.timesteps=[1000,800,500]", "chunk.latent_frames=2", *schedule)).start(
            torch.zeros(1, 1, 1), SeededNoise(0), latent_size=(1, 2), num_latent_frames=12
        )
    )
    wanted = run()
    couplings, commits = ("joint", "joint-causal") * 4, ("separate", "fused", "inplace", "none") * 2
    for stagger, coupling, commit in zip(("0", "1", "2", "[3,1]", "7", "1", "2", "1"), couplings, commits):
        options = (f"schedule.coupling={coupling}", f"schedule.stagger={stagger}", f"schedule.commit={commit}")
        assert torch.equal(run(*options), wanted), options


def test_v16_no_stagger_is_ordinary_diffusion_of_the_whole_clip(tiny, model, embeds):
    config = tiny.config("schedule.coupling=joint", "schedule.stagger=0", "schedule.commit=none")
    engine, noise = Engine(model, config), tiny.noise(4)
    got = latents(engine.run(embeds[0], noise))
    x = noise.initial
    for p, timestep in enumerate(engine.ladder.timesteps):
        velocity = model(x, torch.tensor([timestep]), embeds[0], return_dict=False)[0]
        x = engine.ladder.step(x, velocity, p, lambda p=p: noise.frames("renoise", range(12), p, (1, 4, *SIZE)))
    torch.testing.assert_close(got, x, **FP32)
    with pytest.raises(InputError, match="cache.window=9 is below its floor 12"):
        windowed = tiny.config("schedule.coupling=joint", "schedule.stagger=0", "cache.window=9")
        Engine(model, windowed).start(embeds[0], noise, latent_size=SIZE, num_latent_frames=12)


@pytest.mark.parametrize("coupling", ["joint", "joint-causal"])
@pytest.mark.parametrize("stagger", [1, 2])
def test_the_beginning_of_a_longer_stream(tiny, model, embeds, coupling, stagger):
    """Chunks that come out before the first one that is missing would have entered are the same, bit by bit.

    Those after it saw chunks in flight that the shorter stream has not: they differ, unless nobody looks ahead.
    """
    steps, chunks = 4, 6
    config = tiny.config(
        "ladder.timesteps=[1000,800,600,300]", f"schedule.coupling={coupling}", f"schedule.stagger={stagger}",
        "cache.window=18", "cache.sink=3",
    )  # fmt: skip
    short = drain(start(Engine(model, config), embeds[0], 3 * chunks))
    long = advance(start(Engine(model, config), embeds[0]), chunks)
    same = [k for k in range(chunks) if k * stagger + steps - 1 < chunks * stagger]
    assert 3 * len(same) < short.shape[2] and same
    before = 3 * len(same)
    assert torch.equal(short[:, :, :before], long[:, :, :before])
    if coupling == "joint-causal":
        torch.testing.assert_close(short, long, **FP32)
    else:
        assert all((short - long)[:, :, f].abs().max() > 1e-4 for f in range(before, 3 * chunks))


def test_inplace_keeps_the_keys_of_the_last_noisy_step(tiny, model, embeds):
    """Chunks in flight share that call, so the page holds what the chunk looked like from within it."""
    config = tiny.config(*ROLLING, "schedule.coupling=joint", "schedule.commit=inplace")
    engine = Engine(model, config)
    engine.tracing = True
    rollout = start(engine, embeds[0])
    for chunk in range(6):
        rollout.advance()
        store, pages = rollout.store, [rollout.policy.page(f) for f in range(3 * chunk, 3 * chunk + 3)]
        for tensor in (store.keys, store.values):
            assert torch.equal(tensor[:, :, pages], tensor[:, :, store.pages : store.pages + 3])
    calls = engine.trace()
    assert {call.kind for call in calls} == {"denoise"} and len(calls) == 6 + 2
    assert calls[-1].timesteps == engine.ladder.timesteps[::-1]
    assert calls[-1].key_frames == ((0, 1, 2, 12, 13, 14, *range(15, 24)),)


def test_ladders_of_their_own_stagger_and_share_calls(tiny, model, embeds):
    """Later chunks with fewer steps, in flight together: each is fed its own levels."""
    config = tiny.config(
        "ladder.timesteps=[[1000,750,500,250],[1000,700,400],[1000,500]]", "schedule.coupling=joint",
        "schedule.stagger=[2,1]", "cache.window=15", "cache.sink=3", "ladder.warp=false",
    )  # fmt: skip
    engine = Engine(model, config)
    engine.tracing = True
    drain(start(engine, embeds[0], 15))
    told = {}
    for call in engine.trace():
        if call.kind == "denoise":
            for chunk, level in zip(call.chunks, call.timesteps, strict=True):
                told.setdefault(chunk, []).append(round(level))
    assert told == {0: [1000, 750, 500, 250], 1: [1000, 700, 400], **{k: [1000, 500] for k in (2, 3, 4)}}


def test_two_chunks_that_finish_together_are_committed_and_delivered_in_turn(tiny, model, embeds):
    """The second waits while the first is delivered; a state taken in between goes on."""
    for commit in ("separate", "fused"):
        config = tiny.config(
            "ladder.timesteps=[[1000,750,500],[1000,500]]", "schedule.coupling=joint", "schedule.stagger=[1,2]",
            f"schedule.commit={commit}", "cache.window=15", "cache.sink=3",
        )  # fmt: skip
        engine = Engine(model, config)
        engine.tracing = True
        rollout = start(engine, embeds[0], 12)
        first = rollout.advance()
        assert first.index == 0 and [chunk.index for chunk in rollout.ready] == [1]
        resumed = start(engine, embeds[0], 12)
        resumed.load_state_dict(saved(rollout))
        rest = drain(rollout)
        assert torch.equal(drain(resumed), rest) and rest.shape[2] == 9
        for read in engine.trace()[-1].key_frames[-1:]:
            assert read == tuple(range(12))
        other = start(engine, embeds[0], 12)
        other.advance()
        other.switch(embeds[0], "keep")  # both are owed, and published one by one
        torch.testing.assert_close(drain(other), rest, **FP32)


# --- states, forks, failures

STEPS, KEEP = "ladder.timesteps=[1000,800,500]", "switch.in_flight=keep"
CASES = {
    "rolling": ("rolling-forcing", [STEPS, "cache.window=15", "cache.capacity=18"], "keep"),
    "rolling-keep": ("rolling-forcing", [STEPS, "cache.window=15", "cache.capacity=18", KEEP], "cut"),
    "diagonal": ("diagonal", ["ladder.timesteps=[[1000,733,357],[1000,357]]"], "recache"),
    "reward": ("reward-forcing", ["ladder.timesteps=[1000,500]", "cache.ema_decay=0.9"], "keep"),
    "anchor": ("anchor-forcing", ["ladder.timesteps=[1000,500]"], "recache"),
    "memflow": ("memflow", ["ladder.timesteps=[1000,500]", "cache.bank.size=2", "cache.bank.interval=2"], "recache"),
    "sparse": ("memflow", ["ladder.timesteps=[1000,500]", "cache.bank.sparse=true"], "recache"),
    "fused": ("self-forcing", ["ladder.timesteps=[1000,500]", *WINDOW, "schedule.commit=fused"], "recache"),
    "fused-rolling": ("self-forcing", [*ROLLING, "schedule.coupling=joint", "schedule.commit=fused"], "recache"),
    "causal": ("self-forcing", [*ROLLING, "schedule.coupling=joint-causal", "schedule.commit=inplace"], "cut"),
    "wide": ("self-forcing", ["ladder.timesteps=[1000,900,700,400]", "schedule.stagger=2", *WINDOW,
                              "schedule.coupling=joint", "schedule.commit=fused", "guidance.scale=2"], "keep"),
}  # fmt: skip
CHUNKS, SWITCH = 9, 2


@pytest.fixture(params=CASES)
def case(request, model, embeds):
    """An engine, and streams under it that change their prompt as they deliver chunk SWITCH."""
    preset, overrides, mode = CASES[request.param]
    engine = Engine(model, load_preset(preset, [*overrides, f"switch.mode={mode}"]))

    def begin():
        return start(engine, embeds[0], negative_embeds=embeds[2])

    def step(rollout):
        if rollout.next_chunk == SWITCH and rollout.epoch == 0:
            rollout.switch(embeds[1], mode)
        return rollout.advance()

    return SimpleNamespace(name=request.param, engine=engine, begin=begin, step=step)


def test_a_state_taken_after_any_chunk_goes_on_bit_by_bit(case):
    rollout, wanted, states = case.begin(), [], []
    for _ in range(CHUNKS):
        states.append(saved(rollout))
        wanted.append(case.step(rollout))
    assert {chunk.epoch for chunk in wanted} == {0, 1}
    for at in range(1, CHUNKS):
        resumed = case.begin()
        resumed.load_state_dict(states[at])
        tail = [case.step(resumed) for _ in range(CHUNKS - at)]
        assert torch.equal(latents(tail), latents(wanted[at:])), at
        assert [(c.index, c.epoch) for c in tail] == [(c.index, c.epoch) for c in wanted[at:]]


def test_a_fork_goes_on_like_its_parent_and_leaves_no_trace(case, embeds):
    whole, rollout = case.begin(), case.begin()
    wanted = latents([case.step(whole) for _ in range(CHUNKS)])
    parts = []
    for chunk in range(CHUNKS):
        if chunk in (1, 5):
            twin, side = rollout.fork(), rollout.fork()
            side.switch(embeds[2], "keep")
            advance(side, 2)
            assert torch.equal(latents([case.step(twin) for _ in range(2)]), wanted[:, :, 3 * chunk : 3 * chunk + 6])
        parts.append(case.step(rollout))
    assert torch.equal(latents(parts), wanted)


def test_every_call_may_fail_and_be_made_again(case, model, embeds):
    """Each forward is hit twice by Ctrl-C, before and after its work; re-encodings and commits too."""
    switches = {3 * SWITCH: embeds[1]}
    begin = lambda: start(case.engine, embeds[0], negative_embeds=embeds[2], switches=switches)
    wanted, attempts, parts = advance(begin(), CHUNKS), [], []

    def fail(step):
        def hook(*args):
            attempts.append(step) if step == "begin" else None
            if len(attempts) % 3 == {"begin": 1, "end": 2}[step]:
                raise KeyboardInterrupt

        return hook

    handles = [model.register_forward_pre_hook(fail("begin")), model.register_forward_hook(fail("end"))]
    rollout = begin()
    while len(parts) < CHUNKS:
        try:
            parts.append(rollout.advance())
        except KeyboardInterrupt:
            if len(attempts) % 10 == 0:  # what is saved in the middle of a chunk goes on as well
                state = saved(rollout)
                rollout = begin()
                rollout.load_state_dict(state)
    for handle in handles:
        handle.remove()
    assert torch.equal(latents(parts), wanted)
    assert len(attempts) > 3 * CHUNKS


@pytest.mark.parametrize("case", ["rolling-keep", "reward", "memflow", "sparse"], indirect=True)
def test_i12_a_batch_of_two_is_two_runs(case, embeds):
    """Samples choose for themselves what a bank keeps and a head reads."""
    def run(prompts, seeds):
        rollout = case.engine.start(prompts, SeededNoise(seeds), latent_size=SIZE, negative_embeds=embeds[2])
        return latents([case.step(rollout) for _ in range(7)])

    together = run(torch.cat(embeds[:2]), [7, 8])
    for row, seed in enumerate((7, 8)):
        torch.testing.assert_close(together[row : row + 1], run(embeds[row], [seed]), **FP32)


def test_switches_that_are_to_come_are_part_of_the_state(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOW, "switch.mode=recache"))
    begin = lambda: start(engine, embeds[0], 24, switches={6: embeds[1], 15: embeds[2]})
    rollout = begin()
    advance(rollout, 4)
    resumed = begin()
    resumed.load_state_dict(saved(rollout))
    wanted = [rollout.advance() for _ in range(4)]
    got = [resumed.advance() for _ in range(4)]
    assert torch.equal(latents(got), latents(wanted)) and [c.epoch for c in got] == [1, 2, 2, 2]


# --- prompts and guidance of chunks in flight


class Spy:
    """Which prompt each frame of each call was told, by number."""

    def __init__(self, engine, prompts) -> None:
        self.engine, self.calls = engine, []
        self.known = [engine.text(prompt, None, 1, 0).keys[0].keys[0][:, 0] for prompt in prompts]
        self.handle = engine.transformer.register_forward_pre_hook(self, with_kwargs=True)
        engine.tracing = True

    def __call__(self, module, args, kwargs):
        keys, which = kwargs["text_keys"].keys[0], kwargs.get("prompt_index")
        frames = args[0].shape[2]
        rows = [0] * frames if which is None else which[0].tolist()
        self.calls.append([[torch.equal(keys[:, row], known) for known in self.known].index(True) for row in rows])

    def told(self) -> dict[int, list[int]]:
        """Frame -> prompts in the order of its calls."""
        self.handle.remove()
        out = {}
        for record, prompts in zip(self.engine.trace(), self.calls, strict=True):
            for frame, prompt in zip(record.frames, prompts, strict=True):
                if record.source == "flight":
                    out.setdefault(frame, []).append(prompt)
        return out


@pytest.mark.parametrize("commit", ["separate", "fused"])
@pytest.mark.parametrize("coupling", ["joint", "joint-causal"])
def test_prompts_are_kept_by_chunks_in_flight(tiny, model, embeds, coupling, commit):
    engine = Engine(model, tiny.config(*ROLLING, f"schedule.coupling={coupling}", f"schedule.commit={commit}"))
    spy = Spy(engine, embeds)
    chunks = list(engine.run(embeds[0], SeededNoise(0), 24, SIZE, switches={9: embeds[1], 13: embeds[2]}))
    entered = lambda frame: 0 if frame < 9 else 1 if frame < 15 else 2
    told = spy.told()
    assert all(set(prompts) == {entered(frame)} for frame, prompts in told.items())  # its commit too
    assert {len(prompts) for prompts in told.values()} == {3, 4}  # the last commit is never made
    assert [chunk.epoch for chunk in chunks] == [entered(chunk.first_frame) for chunk in chunks]


def test_prompts_are_followed_by_chunks_in_flight(tiny, model, embeds):
    engine = Engine(model, tiny.config(*ROLLING, "schedule.coupling=joint", "switch.in_flight=follow"))
    spy = Spy(engine, embeds)
    chunks = list(engine.run(embeds[0], SeededNoise(0), 24, SIZE, switches={12: embeds[1]}))
    told = spy.told()
    assert told[6] == [0, 0, 1, 1] and told[9] == [0, 1, 1, 1] and told[12] == [1, 1, 1, 1]
    assert told[3] == [0, 0, 0, 0]  # finished before, published under its own prompt
    assert [chunk.epoch for chunk in chunks] == [0, 0, 1, 1, 1, 1, 1, 1]


def test_prompts_of_other_lengths_cannot_stand_beside_each_other(tiny, embeds):
    model = tiny.model(text_len=None)
    long = tiny.draw(1, 7, 8, seed=3)
    config = lambda *more: tiny.config(*ROLLING, "schedule.coupling=joint", *more)
    rollout = start(Engine(model, config()), embeds[0])
    rollout.advance()
    with pytest.raises(InputError, match="7 tokens cannot stand beside .*5 tokens.*follow") as caught:
        rollout.switch(long, "keep")
    assert "\n" not in str(caught.value)
    rollout.switch(embeds[1], "keep")
    rollout.advance()
    rollout = start(Engine(model, config("switch.in_flight=follow")), embeds[0])
    rollout.advance()
    rollout.switch(long, "keep")
    rollout.advance()


@pytest.mark.parametrize("follow", [False, True])
def test_guidance_is_kept_or_followed_like_a_prompt(tiny, model, embeds, follow):
    """Joint-causal: chunks that were in flight see nothing of those told otherwise."""
    config = tiny.config(
        *ROLLING, "schedule.coupling=joint-causal", "guidance.scale=3",
        f"switch.in_flight={'follow' if follow else 'keep'}",
    )  # fmt: skip
    plain, changed = (start(Engine(model, config), embeds[0], negative_embeds=embeds[1]) for _ in range(2))
    a, b = [plain.advance() for _ in range(2)], [changed.advance() for _ in range(2)]
    changed.guidance_scale = 6.0
    changed.relabel(1)
    a, b = a + [plain.advance() for _ in range(5)], b + [changed.advance() for _ in range(5)]
    first = 2 if follow else 4  # two were in flight
    assert [chunk.epoch for chunk in b] == [int(k >= first) for k in range(7)]
    for k in range(7):
        difference = (a[k].latents - b[k].latents).abs().max()
        assert difference > 1e-3 if k >= first else difference < 1e-4


# --- sessions over streams with chunks in flight

RED, BLUE, GREEN = "red", "blue", "green"


class Pictures:
    """A codec for the eye of a test: latents as pixels."""

    temporal_ratio = spatial_ratio = 1
    latent_channels = 4

    def decode(self, x, state):
        return x[:, :3].clamp(-1, 1), None


def session(tiny, model, *overrides, num_frames=None, scale=1) -> StreamSession:
    config = tiny.config(*ROLLING, "schedule.coupling=joint", "switch.mode=keep", f"guidance.scale={scale}", *overrides)
    texts = {name: tiny.draw(1, 5, 8, seed=60 + i) for i, name in enumerate((RED, BLUE, GREEN, ""))}
    encode = lambda prompts: torch.cat([texts[prompt] for prompt in prompts])
    return StreamSession(Engine(model, config), Pictures(), encode, Spec(RED, num_frames=num_frames, latent_size=SIZE))


def take(stream, count: int) -> list:
    return [stream.next() for _ in range(count)]


@pytest.mark.parametrize("follow, first", [(False, 4), (True, 2)])
def test_a_change_is_announced_for_the_chunk_that_will_carry_it(tiny, model, follow, first):
    stream = session(tiny, model, f"switch.in_flight={'follow' if follow else 'keep'}", scale=2)
    assert stream.set_prompt(BLUE) == Change(0, 1)  # nothing has entered yet
    chunks = take(stream, 2)
    assert stream.set_prompt(GREEN) == Change(first, 2)
    chunks += take(stream, 1)
    assert stream.update(guidance_scale=5) == Change(first + 1, 3)
    chunks += take(stream, 1)
    assert stream.set_prompt(RED, blend=1) == Change(first + 2, 4)
    assert stream.set_prompt(BLUE, mode="reset") == Change(4, 5)  # whatever is in flight
    chunks += take(stream, 1)
    assert stream.set_prompt(RED) == Change(7 if not follow else 5, 6)
    chunks += take(stream, 5)
    wanted = [(1, BLUE)] * 10
    for at, told in ((first, (2, GREEN)), (first + 1, (3, GREEN)), (4, (5, BLUE)), (7 if not follow else 5, (6, RED))):
        wanted[at:] = [told] * (10 - at)
    assert [(chunk.epoch, chunk.prompt) for chunk in chunks] == wanted
    assert [chunk.index for chunk in chunks] == list(range(10))


@pytest.mark.parametrize("follow", [False, True])
def test_a_change_made_while_chunks_are_computed_is_announced_for_the_next_boundary(tiny, model, follow):
    stream = session(tiny, model, f"switch.in_flight={'follow' if follow else 'keep'}")
    changes, prompts = [], [BLUE, GREEN]

    def steer(module, args):
        if prompts and len(chunks) in (0, 3):
            changes.append((stream.set_prompt(prompts[0]), prompts.pop(0) if len(chunks) == 3 else prompts[0]))
            prompts[:] = prompts if len(chunks) == 0 else []

    handle, chunks = model.register_forward_pre_hook(steer), []
    for _ in range(9):
        chunks.append(stream.next())
    handle.remove()
    assert changes[0][0].chunk == (1 if follow else 3) and changes[-1][0].chunk == (4 if follow else 6)
    for chunk in chunks:
        due = [(change.epoch, prompt) for change, prompt in changes if change.chunk <= chunk.index]
        assert (chunk.epoch, chunk.prompt) == (due[-1] if due else (0, RED))


def test_a_session_with_chunks_in_flight_survives_a_file(tiny, model):
    """Prompts that were asked for and are not yet on screen, in the middle of a blend."""

    def steer(stream, until):
        out = []
        while stream.index < until:
            if stream.index == 2:
                stream.set_prompt(BLUE, blend=2)
            if stream.index == 5:
                stream.update(guidance_scale=4)
            if stream.index == 7:
                stream.set_prompt(GREEN, mode="reset")
            out.append(stream.next())
        return out

    make = lambda: session(tiny, model, "switch.in_flight=keep", scale=2, num_frames=36)
    wanted = steer(make(), 12)
    for at in (1, 4, 8):
        stream = make()
        head = steer(stream, at)
        file = io.BytesIO()
        torch.save(stream.state_dict(), file)
        file.seek(0)
        resumed = make()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        chunks = head + steer(resumed, 12)
        assert torch.equal(latents(chunks), latents(wanted)), at
        assert [(c.index, c.epoch, c.prompt) for c in chunks] == [(c.index, c.epoch, c.prompt) for c in wanted]
    assert {chunk.prompt for chunk in wanted} == {RED, BLUE, GREEN}


# --- gradients


@pytest.mark.parametrize(
    "overrides",
    [
        [*ROLLING, "schedule.coupling=joint"],
        [*ROLLING, "schedule.coupling=joint", "positions.rule=before", "schedule.commit=inplace"],
        [*ROLLING, "schedule.coupling=joint-causal", "schedule.commit=fused"],
        ["ladder.timesteps=[1000,500]", *WINDOW, "schedule.commit=fused"],
        ["ladder.timesteps=[1000,500]", "cache.window=9", "cache.sink=3", "cache.ema_decay=0.6"],
    ],
    ids=["rolling", "rolling-inplace", "causal-fused", "fused", "ema"],
)
def test_gradients_of_a_roll_out_are_finite_differences(tiny, embeds, overrides):
    """In float64, along one direction through all weights and the text: whatever the graph passes, and nothing else."""
    model, text = tiny.model().double(), embeds[0].double()
    engine = Engine(model, load_preset("self-forcing", overrides))
    weights = [*model.parameters(), text]
    steps = [0.1 * tiny.draw(*w.shape, seed=90 + i, dtype=torch.float64) for i, w in enumerate(weights)]

    def loss() -> torch.Tensor:
        chunks = engine.run(text, SeededNoise(0), 15, SIZE, switches={6: embeds[1].double()})
        return sum((c.latents * tiny.draw(*c.latents.shape, seed=c.index, dtype=torch.float64)).sum() for c in chunks)

    def moved(by: float) -> float:
        for weight, step in zip(weights, steps):
            weight.add_(step, alpha=by)
        return loss().item()

    with torch.enable_grad():
        text.requires_grad_()
        value = loss()
        value.backward()
    slope = sum((w.grad * step).sum().item() for w, step in zip(weights, steps) if w.grad is not None)
    text.requires_grad_(False)
    assert value.dtype == torch.float64 and loss().item() == pytest.approx(value.item(), rel=1e-9)
    above, below = moved(1e-5), moved(-2e-5)
    assert slope == pytest.approx((above - below) / 2e-5, rel=1e-4) and abs(slope) > 1e-2


def test_a_bank_refuses_gradients_in_one_line(tiny, embeds):
    engine = Engine(tiny.model(), load_preset("memflow", ["ladder.timesteps=[1000]"]))
    with torch.enable_grad(), pytest.raises(InputError, match="no gradient passes") as caught:
        list(engine.run(embeds[0], SeededNoise(0), 6, SIZE))
    assert "\n" not in str(caught.value)


def test_two_experts_refuse_commits_that_fill_one_cache(tiny, model, embeds):
    for commit in ("fused", "inplace"):
        config = tiny.config("experts.boundary=700", f"schedule.commit={commit}")
        with pytest.raises(InputError, match=f"commit={commit} fills that of one alone"):
            start(Engine(model, config, transformer_2=model), embeds[0], 6)
