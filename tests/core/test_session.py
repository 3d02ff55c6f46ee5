"""Sessions and the pipeline over them: a stream can be steered, saved, forked and drained, and stays one stream."""

import io
import logging
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from streamgen.config import ChunkConfig, available, load_preset
from streamgen.errors import BrokenStreamError, InputError
from streamgen.models.codecs import TiledCodec
from streamgen.models.text import TextEncoder, build_tokenizer
from streamgen.models.vae import StreamingVAE
from streamgen.pipelines import StreamingVideoPipeline
from streamgen.session import Change, latent_frames_for

RED, BLUE, GREEN = "a red circle", "a blue star bouncing", "a green cross"
ENDING = ("self-forcing", "causal-forcing")  # presets that keep every frame
FP32 = dict(atol=2e-5, rtol=1e-4)  # convolutions over other batch sizes
SIDE = 32


def build(tiny, seed: int = 0, *overrides: str) -> StreamingVideoPipeline:
    words = "a red blue green circle star cross bouncing".split()
    tokenizer = build_tokenizer(words, 8)
    model = tiny.model(seed, in_channels=6, out_channels=6, text_dim=16, text_len=8)
    torch.manual_seed(seed + 1)
    encoder = TextEncoder(len(tokenizer), dim=16, num_heads=2, max_length=8).eval()
    vae = StreamingVAE(latent_channels=6, widths=(8, 8, 8)).eval()
    with torch.no_grad():  # a fresh codec ignores the frame before: its last convolutions start at zero
        for name, weight in vae.named_parameters():
            if name.endswith("conv2.weight"):
                weight.copy_(tiny.draw(*weight.shape, seed=len(name)) * 0.2)
    pipe = StreamingVideoPipeline(tokenizer, encoder, model.requires_grad_(False), vae)
    pipe.settings.height, pipe.settings.width = SIDE, SIDE
    pipe.stream_config = load_preset(
        "default", ["ladder.timesteps=[1000,500]", "cache.window=12", "cache.sink=3", *overrides]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny):
    return build(tiny)


def take(session, count: int) -> list:
    return list(islice(session, count))


def pixels(chunks) -> torch.Tensor:
    return torch.cat([chunk.pixels for chunk in chunks], 2)


def codes(chunks) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in chunks], 2)


def saved(session) -> dict:
    """The session's state after a trip through a file."""
    file = io.BytesIO()
    torch.save(session.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- chunks


def test_chunks_have_frames_numbers_and_timings(pipe):
    with pipe.stream(RED) as session:
        first, second = take(session, 2)
    assert first.frames.shape == (9, SIDE, SIDE, 3) and second.frames.shape == (12, SIDE, SIDE, 3)
    assert first.frames.dtype == np.uint8 and first.frames.std() > 1
    assert 0 <= first.pixels.min() and first.pixels.max() <= 1
    assert first.latents.shape == (1, 6, 3, SIDE // 16, SIDE // 16)
    assert [(c.index, c.epoch, c.prompt) for c in (first, second)] == [(0, 0, RED), (1, 0, RED)]
    assert {"text", "denoise", "decode"} <= first.timings.keys() and {"commit", "denoise"} <= second.timings.keys()
    assert "text" not in second.timings and all(seconds >= 0 for seconds in second.timings.values())


def test_a_drained_session_is_the_call(pipe):
    out = pipe(RED, num_frames=30, seed=3)
    with pipe.stream(RED, num_frames=30, seed=3) as session:
        chunks = list(session)
    frames = pixels(chunks)[0].permute(1, 2, 3, 0).numpy()
    assert out.frames.shape == (30, SIDE, SIDE, 3) and out.frames.dtype == np.float32
    assert np.array_equal(out.frames, frames)
    assert np.array_equal(np.concatenate([c.frames for c in chunks]), (frames * 255).round().astype(np.uint8))


def test_streamed_decode_equals_whole_decode(pipe):
    chunks = take(pipe.stream(RED), 4)
    whole, _ = pipe.vae.decode(codes(chunks))
    torch.testing.assert_close(pixels(chunks), (whole + 1) / 2, **FP32)
    fresh = torch.cat([pipe.vae.decode(chunk.latents)[0] for chunk in chunks[1:]], 2)
    late = whole[:, :, -fresh.shape[2] :]
    assert (fresh - late).abs().max() > 1e-2  # the decoder's state matters, or the line above could not fail


def test_streams_run_without_gradients(pipe):
    assert torch.is_grad_enabled()
    (chunk,) = take(pipe.stream(RED), 1)
    assert not chunk.pixels.requires_grad and not chunk.latents.requires_grad


def test_streams_of_different_seeds_and_prompts_differ(pipe):
    base, seed, prompt = (pixels(take(pipe.stream(p, seed=s), 1)) for p, s in ((RED, 0), (RED, 1), (BLUE, 0)))
    assert (base - seed).abs().max() > 1e-2 and (base - prompt).abs().max() > 1e-3
    assert torch.equal(base, pixels(take(pipe.stream(RED), 1)))  # no seed = seed 0


def test_two_interleaved_sessions_are_each_alone(pipe):
    alone = [take(pipe.stream(p, seed=s), 5) for p, s in ((RED, 1), (BLUE, 2))]
    a, b = pipe.stream(RED, seed=1), pipe.stream(BLUE, seed=2)
    mixed = [[], []]
    for which in (0, 1, 1, 0, 0, 1, 0, 1, 1, 0):
        mixed[which].append((a, b)[which].next())
    for one, other in zip(alone, mixed):
        assert torch.equal(pixels(one), pixels(other))


@pytest.mark.parametrize("count", [1, 5, 9, 10, 81])
def test_num_frames_is_exact(pipe, count):
    assert pipe(RED, num_frames=count).frames.shape[0] == count
    with pipe.stream(RED, num_frames=count) as session:
        assert sum(chunk.frames.shape[0] for chunk in session) == count
        with pytest.raises(StopIteration):
            session.next()


def test_latent_frames_cover_the_pixels_asked_for():
    assert [latent_frames_for(n, 4, ChunkConfig(3)) for n in (1, 9, 10, 21, 22, 81)] == [3, 3, 6, 6, 9, 21]


def test_a_clip_is_the_beginning_of_a_longer_one(pipe):
    assert np.array_equal(pipe(RED, num_frames=20).frames, pipe(RED, num_frames=40).frames[:20])


# --- steering


def expected(pipe, prompts: dict[int, tuple[str, str]], chunks: int, seed: int = 0) -> torch.Tensor:
    """Latents of a roll-out driven by hand: {chunk: (prompt, mode)}."""
    from streamgen.engine import Engine
    from streamgen.noise import SeededNoise

    out = []
    with torch.no_grad():
        rollout = Engine(pipe.transformer, pipe.stream_config).start(
            pipe.encode_prompt(prompts[0][0]), SeededNoise(seed), latent_size=(SIDE // 16, SIDE // 16)
        )
        for chunk in range(chunks):
            if chunk and chunk in prompts:
                prompt, mode = prompts[chunk]
                rollout.switch(pipe.encode_prompt(prompt), mode)
            out.append(rollout.advance().latents)
    return torch.cat(out, 2)


def test_set_prompt_modes_take_effect_at_the_next_chunk(pipe):
    plain, seen = codes(take(pipe.stream(RED), 7)), [None]
    for mode in ("keep", "recache", "cut"):
        session = pipe.stream(RED)
        first = take(session, 5)
        change = session.set_prompt(BLUE, mode=mode)
        chunks = first + take(session, 2)
        assert change == Change(chunk=5, epoch=1)
        assert [c.epoch for c in chunks] == [0] * 5 + [1] * 2
        assert [c.prompt for c in chunks] == [RED] * 5 + [BLUE] * 2
        assert [c.index for c in chunks] == list(range(7))
        out = codes(chunks)
        assert torch.equal(out[:, :, :15], plain[:, :, :15])
        assert torch.equal(out, expected(pipe, {0: (RED, ""), 5: (BLUE, mode)}, 7))
        seen.append(out[:, :, 15:])
    for i, j in ((1, 2), (1, 3), (2, 3)):
        assert (seen[i] - seen[j]).abs().max() > 1e-4


def test_without_a_mode_the_preset_decides(tiny):
    for mode in ("keep", "cut"):
        pipe = build(tiny, 0, f"switch.mode={mode}")
        session = pipe.stream(RED)
        take(session, 4)
        session.set_prompt(BLUE)
        assert torch.equal(session.next().latents, expected(pipe, {0: (RED, ""), 4: (BLUE, mode)}, 5)[:, :, 12:])


def test_the_newest_pending_prompt_wins(pipe):
    session, only = pipe.stream(RED), pipe.stream(RED)
    take(session, 2), take(only, 2)
    assert session.set_prompt(GREEN, mode="cut") == Change(2, 1)
    assert session.set_prompt(BLUE, mode="keep") == Change(2, 2)
    only.set_prompt(BLUE, mode="keep")
    got, wanted = session.next(), only.next()
    assert torch.equal(got.latents, wanted.latents)
    assert (got.epoch, got.prompt, wanted.epoch) == (2, BLUE, 1)
    assert session.set_prompt(RED) == Change(3, 3)


def test_pending_changes_of_different_things_do_not_undo_each_other(pipe):
    def run(*changes):
        session = pipe.stream(RED, guidance_scale=3)
        take(session, 2)
        for change in changes:
            session.update(**change)
        return session.next().latents

    both = run(dict(prompt=BLUE, guidance_scale=6))
    assert torch.equal(run(dict(prompt=BLUE), dict(guidance_scale=6)), both)
    assert torch.equal(run(dict(guidance_scale=6), dict(prompt=BLUE)), both)
    assert torch.equal(run(dict(guidance_scale=9), dict(guidance_scale=6), dict(prompt=BLUE)), both)
    assert not torch.equal(run(dict(prompt=BLUE)), both) and not torch.equal(run(dict(guidance_scale=6)), both)


def test_guidance_changes_at_a_chunk_boundary(pipe):
    session, plain = pipe.stream(RED, guidance_scale=3), pipe.stream(RED, guidance_scale=3)
    a, b = take(session, 2), take(plain, 2)
    assert session.update(guidance_scale=6) == Change(2, 1)
    a, b = a + take(session, 2), b + take(plain, 2)
    assert [c.epoch for c in a] == [0, 0, 1, 1] and [c.prompt for c in a] == [RED] * 4
    assert torch.equal(codes(a[:2]), codes(b[:2])) and not torch.equal(a[2].latents, b[2].latents)


def test_a_change_made_while_a_chunk_is_computed_is_announced_for_the_one_after(pipe):
    session, changes = pipe.stream(RED), []

    def steer(module, args):
        if len(changes) < 3:
            changes.append(session.set_prompt(BLUE, mode="keep"))

    handle = pipe.transformer.register_forward_pre_hook(steer)
    first = session.next()
    handle.remove()
    second = session.next()
    assert changes[0] == Change(chunk=1, epoch=1)
    assert (first.epoch, first.prompt) == (0, RED)
    assert (second.epoch, second.prompt) == (changes[-1].epoch, BLUE)
    assert {change.chunk for change in changes} == {1}


def test_prompts_from_another_thread_take_effect_where_they_were_announced(pipe):
    session, changes, stop = pipe.stream(RED), [], threading.Event()

    def steer():
        while not stop.is_set():
            prompt = (BLUE, GREEN, RED)[len(changes) % 3]
            changes.append((session.set_prompt(prompt, mode="keep"), prompt))
            stop.wait(0.002)

    thread, chunks = threading.Thread(target=steer), []
    thread.start()
    while len(chunks) < 12 or len({change.chunk for change, _ in changes}) < 3:  # until several had their turn
        chunks.append(session.next())
    stop.set()
    thread.join()
    assert [change.epoch for change, _ in changes] == list(range(1, len(changes) + 1))
    for chunk in chunks:
        due = [(change.epoch, prompt) for change, prompt in changes if change.chunk <= chunk.index]
        assert (chunk.epoch, chunk.prompt) == (due[-1] if due else (0, RED))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))


def test_many_threads_draw_one_stream(pipe):
    """Whoever asks gets the next chunk; none is lost, none comes twice."""
    session, got = pipe.stream(RED), []
    threads = [threading.Thread(target=lambda: got.extend(session.next() for _ in range(3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chunks = sorted(got, key=lambda chunk: chunk.index)
    assert [chunk.index for chunk in chunks] == list(range(9))
    assert torch.equal(pixels(chunks), pixels(take(pipe.stream(RED), 9)))


def test_blend_moves_the_text_in_equal_steps(pipe):
    session, texts = pipe.stream(RED), []
    old, new = pipe.encode_prompt(RED), pipe.encode_prompt(BLUE)
    take(session, 1)
    assert session.set_prompt(BLUE, mode="keep", blend=2) == Change(1, 1)
    for _ in range(4):
        chunk = session.next()
        assert (chunk.epoch, chunk.prompt) == (1, BLUE)
        texts.append(session._rollout.text.embeds)
    for text, weight in zip(texts, (1 / 3, 2 / 3, 1, 1)):
        torch.testing.assert_close(text, torch.lerp(old, new, weight))


def test_a_new_prompt_ends_a_blend_where_it_stands(pipe):
    session = pipe.stream(RED)
    take(session, 1)
    session.set_prompt(BLUE, mode="keep", blend=3)
    session.next()
    session.set_prompt(GREEN, mode="keep", blend=1)
    middle = torch.lerp(pipe.encode_prompt(RED), pipe.encode_prompt(BLUE), 1 / 4)
    session.next()
    torch.testing.assert_close(session._rollout.text.embeds, torch.lerp(middle, pipe.encode_prompt(GREEN), 0.5))
    session.set_prompt(RED, mode="keep")
    for _ in range(2):
        session.next()
        torch.testing.assert_close(session._rollout.text.embeds, pipe.encode_prompt(RED))


@pytest.mark.parametrize("when", [1, 4])
def test_reset_is_a_fresh_stream_whose_numbers_go_on(pipe, when):
    session, fresh = pipe.stream(RED, seed=5), take(pipe.stream(BLUE, seed=5), 3)
    before = take(session, when)
    change = session.set_prompt(BLUE, mode="reset")
    after = take(session, 3)
    assert change == Change(when, 1)
    assert torch.equal(pixels(after), pixels(fresh)) and torch.equal(codes(after), codes(fresh))
    assert [c.index for c in before + after] == list(range(when + 3))
    assert [c.epoch for c in before + after] == [0] * when + [1] * 3
    assert after[0].frames.shape[0] == 9  # frame 0 again: the first latent is one frame


@pytest.mark.parametrize("name", available("presets"))
def test_after_a_reset_every_preset_streams_what_a_fresh_one_does(pipe, name, monkeypatch):
    monkeypatch.setattr(pipe, "stream_config", load_preset(name))
    frames = None if name not in ENDING else 48
    with pipe.stream(RED, num_frames=frames, seed=3) as session, pipe.stream(BLUE, num_frames=frames, seed=3) as fresh:
        take(session, 2)
        session.set_prompt(BLUE, mode="reset")
        assert torch.equal(codes(take(session, 2)), codes(take(fresh, 2)))


def test_nothing_computed_before_a_reset_is_delivered_after_it(pipe):
    session = pipe.stream(RED)
    take(session, 3)
    session.set_prompt(BLUE, mode="keep", blend=4)
    session.next()
    session.set_prompt(GREEN, mode="reset")
    assert torch.equal(pixels(take(session, 3)), pixels(take(pipe.stream(GREEN), 3)))  # no blend, no cache, no decoder


def test_num_frames_stays_exact_through_a_reset(pipe):
    session = pipe.stream(RED, num_frames=40)
    frames = take(session, 2)
    session.set_prompt(BLUE, mode="reset")
    assert sum(chunk.frames.shape[0] for chunk in [*frames, *session]) == 40


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(prompt=BLUE, mode="recahce"), r"did you mean 'recache'.*keep, recache, reset, cut"),
        (dict(prompt=" "), "prompt is empty"),
        (dict(prompt=BLUE, blend=-1), "blend"),
        (dict(guidance_scale=3), "without guidance"),
        (dict(strength=0.5), "strength"),
        (dict(options={"speed": 1}), "speed"),
    ],
)
def test_bad_changes_are_refused_at_once_and_change_nothing(pipe, arguments, word):
    session = pipe.stream(RED)
    take(session, 1)
    with pytest.raises(InputError, match=word) as caught:
        session.update(**arguments)
    assert "\n" not in str(caught.value)
    assert session.next().epoch == 0
    assert session.set_prompt(BLUE).epoch == 1


def test_recache_is_refused_where_no_latents_are_kept(tiny):
    pipe = build(tiny, 0, "cache.window=-1", "cache.sink=0", "switch.mode=keep")
    with pipe.stream(RED, num_frames=30) as session, pytest.raises(InputError, match="re-encode"):
        session.set_prompt(BLUE, mode="recache")


def test_condition_streams_are_refused(pipe):
    with pipe.stream(RED) as session, pytest.raises(InputError, match="trajectory"):
        session.push("trajectory", None, 0.0)


# --- pause, play, close


def test_a_paused_stream_waits(pipe):
    session = pipe.stream(RED)
    take(session, 1)
    session.pause()
    with pytest.raises(TimeoutError, match="paused"):
        session.next(timeout=0.01)
    timer = threading.Timer(0.05, session.play)
    timer.start()
    assert session.next(timeout=120).index == 1
    timer.join()
    assert torch.equal(session.next().latents, take(pipe.stream(RED), 3)[2].latents)  # a pause leaves no trace


def test_closing_ends_the_iteration_and_frees_waiting_callers(pipe):
    session, ended = pipe.stream(RED), []
    take(session, 1)
    session.pause()
    thread = threading.Thread(target=lambda: ended.append(list(session)), daemon=True)
    thread.start()
    session.close()
    thread.join(120)
    assert ended == [[]]
    assert list(session) == [] and session.finished
    session.close()  # twice does no harm


def test_a_closed_stream_refuses_in_one_line(pipe):
    with pipe.stream(RED) as session:
        for chunk in session:
            if chunk.index == 1:
                session.close()
        assert chunk.index == 1
    for use in (session.state_dict, session.fork, lambda: session.set_prompt(BLUE)):
        with pytest.raises(InputError, match="closed"):
            use()


# --- states and forks


def steer(session, script: dict[int, dict], chunks: int) -> list:
    """Deliver `chunks` chunks; `script` says what changes before which chunk."""
    out = []
    while len(out) < chunks:
        if session.index in script:
            session.update(**script[session.index])
        out.append(session.next())
    return out


SCRIPT = {
    2: dict(prompt=BLUE, mode="recache", blend=2),
    6: dict(prompt=GREEN, mode="cut"),
    7: dict(prompt=RED, mode="reset"),
}


@pytest.mark.parametrize("at", [1, 3, 4, 5, 6, 7, 8])
def test_a_resumed_stream_is_the_uninterrupted_one(pipe, at):
    """Saved after any chunk: also in the middle of a blend (3, 4), right before a cut (6), after a reset (8)."""
    wanted = steer(pipe.stream(RED, seed=4), SCRIPT, 10)
    session = pipe.stream(RED, seed=4)
    head = steer(session, SCRIPT, at)
    tail = steer(pipe.resume(saved(session)), SCRIPT, 10 - at)
    assert torch.equal(pixels(head + tail), pixels(wanted)) and torch.equal(codes(head + tail), codes(wanted))
    for got, one in zip(head + tail, wanted):
        assert (got.index, got.epoch, got.prompt) == (one.index, one.epoch, one.prompt)


def test_a_pending_request_is_part_of_the_state(pipe):
    session = pipe.stream(RED)
    take(session, 2)
    session.set_prompt(BLUE, mode="recache", blend=1)
    resumed = pipe.resume(saved(session))
    a, b = take(session, 3), take(resumed, 3)
    assert [c.epoch for c in b] == [1, 1, 1] and torch.equal(pixels(a), pixels(b))
    assert resumed.set_prompt(RED) == Change(5, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_frames=50, seed=3),
        dict(guidance_scale=3.0, negative_prompt=GREEN),
        dict(num_inference_steps=3, height=48),
        dict(generator=torch.Generator().manual_seed(11)),
        dict(latents=torch.randn(1, 6, 15, 2, 2, generator=torch.Generator().manual_seed(0))),
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_state_keeps_how_the_stream_was_started(pipe, arguments):
    session = pipe.stream(RED, **arguments)
    take(session, 2)
    resumed = pipe.resume(saved(session))
    assert torch.equal(pixels(take(session, 3)), pixels(take(resumed, 3)))


def test_a_batch_resumes(pipe):
    session = pipe.stream([RED, BLUE], seed=1)
    take(session, 2)
    resumed = pipe.resume(saved(session))
    a, b = session.next(), resumed.next()
    assert torch.equal(a.pixels, b.pixels) and a.prompt == b.prompt == (RED, BLUE)


def test_a_state_is_not_changed_by_going_on(pipe):
    session = pipe.stream(RED)
    take(session, 2)
    state = session.state_dict()
    wanted = take(session, 4)
    for _ in range(2):
        assert torch.equal(pixels(take(pipe.resume(state), 4)), pixels(wanted))


def test_states_that_do_not_fit_are_refused(pipe, tiny):
    session = pipe.stream(RED)
    take(session, 1)
    state = session.state_dict()
    with pytest.raises(InputError, match="other weights"):
        build(tiny, 1).resume(state)
    tiled = build(tiny)
    tiled.codec = TiledCodec(tiled.codec, tile=8, overlap=2)
    with pytest.raises(InputError, match="another decoder"):
        tiled.resume(state)
    for wrong in ({**state, "version": 0}, {}, None):
        with pytest.raises(InputError, match="version"):
            pipe.resume(wrong)


def test_a_fork_is_independent(pipe):
    wanted = take(pipe.stream(RED), 6)
    session = pipe.stream(RED)
    take(session, 3)
    side, other = session.fork(), session.fork()
    side.set_prompt(BLUE, mode="recache")
    changed = take(side, 3)
    side.close()
    assert torch.equal(pixels(take(session, 3)), pixels(wanted[3:]))
    assert torch.equal(pixels(take(other, 3)), pixels(wanted[3:]))
    assert [c.epoch for c in changed] == [1, 1, 1] and not torch.equal(pixels(changed), pixels(wanted[3:]))


# --- the call


def test_a_list_of_prompts_is_a_batch(pipe):
    batch = pipe([RED, BLUE], num_frames=14, seed=2)
    assert batch.frames.shape == (2, 14, SIDE, SIDE, 3)
    np.testing.assert_allclose(batch.frames[0], pipe(RED, num_frames=14, seed=2).frames, **FP32)
    assert pipe([RED], num_frames=5).frames.shape == (1, 5, SIDE, SIDE, 3)
    with pipe.stream([RED, BLUE]) as session:
        chunk = session.next()
        assert chunk.frames.shape == (2, 9, SIDE, SIDE, 3) and chunk.prompt == (RED, BLUE)
        session.set_prompt(GREEN)
        assert session.next().prompt == (GREEN, GREEN)


def test_each_of_a_batch_is_given_its_own_prompt(pipe):
    with pipe.stream([RED, BLUE], seed=2) as batch, pipe.stream(RED, seed=2) as alone:
        take(batch, 2), take(alone, 2)
        assert batch.set_prompt([GREEN, RED]) == alone.set_prompt(GREEN)
        both, one = batch.next(), alone.next()
        assert both.prompt == (GREEN, RED)
        torch.testing.assert_close(both.pixels[:1], one.pixels, **FP32)
        for wrong in ([GREEN], [GREEN] * 3, [GREEN, " "]):
            with pytest.raises(InputError, match="batch of 2|is empty"):
                batch.set_prompt(wrong)
        with pytest.raises(InputError, match="1 prompts for a batch of 1"):
            alone.set_prompt([RED])


def test_several_videos_of_one_embedding(pipe):
    embeds = pipe.encode_prompt(RED)
    many = pipe(prompt_embeds=embeds, num_frames=9, num_videos_per_prompt=3).frames
    single = pipe([RED] * 3, num_frames=9).frames
    assert many.shape[0] == 3 and np.array_equal(many, single)


def test_several_videos_per_prompt_differ(pipe):
    frames = pipe(RED, num_frames=9, num_videos_per_prompt=2).frames
    assert frames.shape == (2, 9, SIDE, SIDE, 3) and np.abs(frames[0] - frames[1]).max() > 1e-2


def test_generators_give_seeds(pipe):
    generator = lambda seed: torch.Generator().manual_seed(seed)
    frames = {seed: pipe(RED, num_frames=9, seed=seed).frames for seed in (0, 7, 8)}
    assert np.array_equal(pipe(RED, num_frames=9, generator=generator(7)).frames, frames[7])
    batch = pipe([RED, RED], num_frames=9, generator=[generator(7), generator(8)]).frames
    for row, seed in zip(batch, (7, 8)):
        np.testing.assert_allclose(row, frames[seed], **FP32)
    drawn = generator(7)
    torch.randn(5, generator=drawn)  # a used generator is still its seed
    assert np.array_equal(pipe(RED, num_frames=9, generator=drawn).frames, frames[7])


def test_output_types(pipe):
    base = pipe(RED, num_frames=10).frames
    tensor = pipe(RED, num_frames=10, output_type="pt").frames
    assert tensor.shape == (1, 10, 3, SIDE, SIDE)
    assert np.array_equal(tensor[0].permute(0, 2, 3, 1).numpy(), base)
    pictures = pipe(RED, num_frames=10, output_type="pil").frames
    assert len(pictures) == 10 and pictures[0].size == (SIDE, SIDE)
    assert np.array_equal(np.stack([np.asarray(p) for p in pictures]), (base * 255).round().astype(np.uint8))
    assert len(pipe([RED, BLUE], num_frames=5, output_type="pil").frames[1]) == 5
    latents = pipe(RED, num_frames=10, output_type="latent").frames
    assert latents.shape == (1, 6, 4, 2, 2)
    assert torch.equal(latents, codes(take(pipe.stream(RED), 2))[:, :, :4])
    (frames,) = pipe(RED, num_frames=10, return_dict=False)
    assert np.array_equal(frames, base)


def test_given_latents_and_embeds_are_used(pipe):
    embeds = pipe.encode_prompt(RED)
    base = pipe(RED, num_frames=9)
    assert np.array_equal(pipe(prompt_embeds=embeds, num_frames=9).frames[0], base.frames)
    from streamgen.noise import SeededNoise

    noise = SeededNoise(0).frames("initial", range(3), 0, (1, 6, 2, 2))
    assert np.array_equal(pipe(RED, num_frames=9, latents=noise).frames, base.frames)
    assert not np.array_equal(pipe(RED, num_frames=9, latents=noise.flip(2)).frames, base.frames)


@pytest.mark.parametrize("size, snapped", [((40, 90), (32, 96)), ((1, 33), (32, 32)), ((64, 32), (64, 32))])
def test_sizes_off_the_grid_are_snapped_and_said_so(pipe, caplog, size, snapped):
    with caplog.at_level(logging.WARNING):
        frames = pipe(RED, num_frames=1, height=size[0], width=size[1]).frames
    assert frames.shape == (1, *snapped, 3)
    off = sum(a != b for a, b in zip(size, snapped))
    assert sum("not a multiple of 32" in record.message for record in caplog.records) == off


def test_a_long_prompt_is_cut_and_said_so(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt("a red circle " * 10)
    assert any("the model reads the first 8" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(prompt=""), "prompt is empty"),
        (dict(prompt=["a red circle", "  "]), "prompt is empty"),
        (dict(prompt=[]), "prompt is empty"),
        (dict(prompt=None), "either a prompt or prompt_embeds"),
        (dict(prompt=RED, prompt_embeds=torch.zeros(1, 8, 16)), "either a prompt or prompt_embeds"),
        (dict(num_frames=0), "num_frames must be positive"),
        (dict(num_frames=-3), "num_frames must be positive"),
        (dict(height=-16), "height must be positive"),
        (dict(seed=1.5), "seed must be an integer"),
        (dict(seed="7"), "seed must be an integer"),
        (dict(seed=0, generator=torch.Generator()), "either seed or generator"),
        (dict(num_inference_steps=0), "num_inference_steps must be positive"),
        (dict(output_type="mp4"), "np, pt, pil or latent"),
        (dict(image=object()), "image"),
        (dict(video=object()), "video"),
        (dict(conditions={"audio": 1}), "conditions"),
    ],
)
def test_bad_calls_are_refused_in_one_line(pipe, arguments, word):
    with pytest.raises(InputError, match=word) as caught:
        pipe(**{"prompt": RED, **arguments})
    assert "\n" not in str(caught.value)


def test_the_number_of_generators_must_fit(pipe):
    with pytest.raises(ValueError, match="1 seeds for a batch of 2"):
        pipe([RED, BLUE], num_frames=5, generator=[torch.Generator()])


def test_callback_sees_every_chunk_and_may_interrupt(pipe):
    seen = []

    def watch(owner, index, timestep, kwargs):
        assert owner is pipe
        seen.append((index, kwargs["latents"].shape))
        owner._interrupt = index == stop_at

    stop_at = None
    pipe(RED, num_frames=30, callback_on_step_end=watch)
    assert seen == [(i, (1, 6, 3, 2, 2)) for i in range(3)]
    seen.clear()
    stop_at = 1
    frames = pipe(RED, num_frames=81, callback_on_step_end=watch).frames
    assert len(seen) == 2 and np.array_equal(frames, pipe(RED, num_frames=21).frames)


def test_a_saved_pipeline_gives_the_same_stream(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    chunks = take(pipe.stream(RED), 3)

    def load() -> StreamingVideoPipeline:
        other = StreamingVideoPipeline.from_pretrained(tmp_path)
        other.settings.height, other.settings.width = SIDE, SIDE
        other.stream_config = pipe.stream_config
        return other

    # weights read from a file lie elsewhere in memory, which is enough for other last bits than those just made
    session = load().stream(RED)
    first = take(session, 2)
    torch.testing.assert_close(pixels(first), pixels(chunks[:2]), **FP32)
    resumed, last = load().resume(saved(session)).next(), session.next()
    assert torch.equal(resumed.pixels, last.pixels) and torch.equal(resumed.latents, last.latents)
    torch.testing.assert_close(last.pixels, chunks[2].pixels, **FP32)


# --- failures


def failing(function, times: int = 1):
    """`function`, whose first calls run out of memory."""
    left = [times]

    def call(*args):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return function(*args)

    return call


def test_a_decoder_that_ran_out_of_memory_loses_no_chunk(pipe, monkeypatch):
    with pipe.stream(RED) as whole:
        wanted = pixels(take(whole, 3))
    with pipe.stream(RED) as session:
        parts = take(session, 1)
        monkeypatch.setattr(pipe.vae, "decode", failing(pipe.vae.decode))
        with pytest.raises(torch.OutOfMemoryError):
            session.next()
        with pipe.resume(session.state_dict()) as other:
            assert torch.equal(pixels(take(other, 2)), wanted[:, :, parts[0].pixels.shape[2] :])
        assert session.update(guidance_scale=1).chunk == 2  # chunk 1 is computed, it only waits to be decoded
        assert torch.equal(pixels([*parts, *take(session, 2)]), wanted)


def test_a_reset_drops_a_chunk_that_was_computed_before_it(pipe, monkeypatch):
    with pipe.stream(RED) as session, pipe.stream(BLUE) as fresh:
        take(session, 2)
        monkeypatch.setattr(pipe.vae, "decode", failing(pipe.vae.decode))
        with pytest.raises(torch.OutOfMemoryError):
            session.next()
        session.set_prompt(BLUE, "reset")
        assert torch.equal(pixels(take(session, 2)), pixels(take(fresh, 2)))


def test_a_change_whose_text_could_not_be_encoded_is_still_pending(pipe, monkeypatch):
    with pipe.stream(RED) as session, pipe.stream(RED) as other:
        take(session, 1), take(other, 1)
        change = session.set_prompt(BLUE), other.set_prompt(BLUE)
        monkeypatch.setattr(session, "_encode_text", failing(session._encode_text))
        with pytest.raises(torch.OutOfMemoryError):
            session.next()
        ours, theirs = session.next(), other.next()
        assert torch.equal(ours.pixels, theirs.pixels) and ours.epoch == theirs.epoch == change[0].epoch


@pytest.mark.parametrize("mode", ["keep", "recache", "cut"])
def test_a_change_waits_for_a_chunk_whose_making_was_interrupted(pipe, monkeypatch, mode):
    with pipe.stream(RED) as session, pipe.stream(RED) as other:
        take(session, 5), take(other, 6)
        calls, forward = [], pipe.transformer.forward

        def second_fails(*args, **more):
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("out of memory")
            return forward(*args, **more)

        monkeypatch.setattr(pipe.transformer, "forward", second_fails)
        with pytest.raises(torch.OutOfMemoryError):
            session.next()
        assert session.set_prompt(BLUE, mode).chunk == other.set_prompt(BLUE, mode).chunk == 6
        assert session.next().prompt == RED
        for ours, theirs in zip(take(session, 2), take(other, 2), strict=True):
            assert torch.equal(ours.latents, theirs.latents) and ours.prompt == BLUE


def test_a_step_of_a_blend_that_failed_is_taken_once(pipe, monkeypatch):
    with pipe.stream(RED) as session, pipe.stream(RED) as other:
        take(session, 2), take(other, 2)
        session.set_prompt(BLUE, "recache", blend=1), other.set_prompt(BLUE, "recache", blend=1)
        for _ in range(2):  # the first step, and the last
            with monkeypatch.context() as patch:
                patch.setattr(session._rollout, "switch", failing(session._rollout.switch))
                with pytest.raises(torch.OutOfMemoryError):
                    session.next()
                assert torch.equal(session.next().latents, other.next().latents)
        assert torch.equal(session._embeds, other._embeds) and session._blend is None


def test_a_prompt_that_failed_is_not_lost_to_a_change_of_something_else(pipe, monkeypatch):
    with pipe.stream(RED) as session:
        take(session, 1)
        session.set_prompt(BLUE)

        def fails(prompts):
            monkeypatch.undo()
            session.update(guidance_scale=1)  # as another thread may
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(session, "_encode_text", fails)
        with pytest.raises(torch.OutOfMemoryError):
            session.next()
        chunk = session.next()
        assert chunk.prompt == BLUE and chunk.epoch == 2


@pytest.mark.parametrize("value, words", [(float("nan"), "not finite"), (0.25, "blank frames")])
def test_what_is_no_picture_is_never_delivered(pipe, monkeypatch, value, words):
    decode = pipe.vae.decode
    with pipe.stream(RED) as session:
        take(session, 1)
        monkeypatch.setattr(pipe.vae, "decode", lambda *args: (decode(*args)[0] * 0 + value, None))
        for _ in range(2):
            with pytest.raises(BrokenStreamError, match=f"chunk 1 holds .*{words}"):
                session.next()
        assert session.delivered == 9


def test_three_thousand_frames_leave_nothing_behind(pipe):
    with pipe.stream(RED, num_frames=3000) as session:
        sizes, frames = set(), 0
        for chunk in session:
            frames += len(chunk.frames)
            if chunk.index > 20:
                rollout = session._rollout
                sizes.add((rollout.store.nbytes, len(rollout.past), len(rollout.flight), len(rollout.pending)))
        assert frames == session.delivered == 3000 and len(sizes) == 1
