"""The engine's laws: batches, guidance, gradients, switches, forks, states, and length without growth."""

import io
import math
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.noise import SeededNoise

FP32 = dict(atol=2e-5, rtol=1e-4)  # the same sums in another order, a few layers deep
SIZE = (4, 4)
WINDOWED = ("cache.window=12", "cache.sink=3")


def latents(chunks) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in chunks], 2)


def start(engine, embeds, seed=0, frames=None, **more):
    return engine.start(embeds, SeededNoise(seed), latent_size=SIZE, num_latent_frames=frames, **more)


def advance(rollout, chunks: int) -> torch.Tensor:
    return latents([rollout.advance() for _ in range(chunks)])


def same(state, other) -> bool:
    """Equal bit by bit: nested states of tensors and plain Python."""
    if isinstance(state, torch.Tensor):
        return torch.equal(state, other)
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(same(state[key], other[key]) for key in state)
    if isinstance(state, (list, tuple)):
        return len(state) == len(other) and all(map(same, state, other))
    return state == other


# --- chunks


def test_chunks_carry_number_frame_epoch_and_shape(tiny, model, embeds):
    engine = Engine(model, tiny.config("chunk.latent_frames=2"))
    chunks = list(engine.run(embeds[0], SeededNoise(0), 6, SIZE))
    assert [(c.index, c.first_frame, c.epoch) for c in chunks] == [(0, 0, 0), (1, 2, 0), (2, 4, 0)]
    assert all(c.latents.shape == (1, 4, 2, *SIZE) and not c.latents.requires_grad for c in chunks)


def test_a_run_is_a_function_of_its_seed(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOWED))
    first, again, other = (latents(engine.run(embeds[0], SeededNoise(seed), 9, SIZE)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_a_prefix_does_not_depend_on_the_length(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOWED))
    short = latents(engine.run(embeds[0], SeededNoise(0), 12, SIZE))
    endless = latents(islice(engine.run(embeds[0], SeededNoise(0), None, SIZE), 6))
    torch.testing.assert_close(endless[:, :, :12], short, atol=0, rtol=0)


@pytest.mark.parametrize("overrides", [WINDOWED, (*WINDOWED, "positions.rule=packed"), ()])
def test_i12_a_batch_of_two_is_two_runs(tiny, model, embeds, overrides):
    engine = Engine(model, tiny.config(*overrides))
    together = latents(engine.run(torch.cat(embeds[:2]), SeededNoise([7, 8]), 15, SIZE))
    for row, (text, seed) in enumerate(zip(embeds, (7, 8))):
        alone = latents(engine.run(text, SeededNoise(seed), 15, SIZE))
        torch.testing.assert_close(together[row : row + 1], alone, **FP32)


def test_tensor_noise_brings_its_sizes_and_one_prompt_serves_its_batch(tiny, model, embeds):
    engine, noise = Engine(model, tiny.config()), tiny.noise(2, batch=2)
    assert latents(engine.run(embeds[0], noise)).shape == (2, 4, 6, *SIZE)
    assert latents(engine.run(embeds[0], noise, num_latent_frames=3)).shape == (2, 4, 3, *SIZE)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(num_latent_frames=4), "multiple of chunk.latent_frames=3"),
        (dict(num_latent_frames=-3), "positive"),
        (dict(num_latent_frames=3, latent_size=None), "latent_size"),
        (dict(num_latent_frames=3, latent_size=(5, 4)), "multiple of the patch"),
        (dict(num_latent_frames=3, conditions={"vidoe": 1}), "unknown conditions vidoe"),
        (dict(num_latent_frames=None), "endless"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tiny, model, embeds, arguments, word):
    with pytest.raises(InputError, match=word) as caught:
        next(Engine(model, tiny.config()).run(embeds[0], SeededNoise(0), **{"latent_size": SIZE, **arguments}))
    assert "\n" not in str(caught.value)


def test_unknown_schedule_is_refused(tiny, model):
    with pytest.raises(InputError, match="choose one of .*solo"):
        Engine(model, tiny.config("schedule.coupling=sola"))


# --- guidance


def test_guidance_is_u_plus_s_times_c_minus_u(tiny, model, embeds):
    """First chunk, by hand: two dense forwards per step."""
    engine = Engine(model, tiny.config("guidance.scale=3", "ladder.timesteps=[1000,700,300]"))
    noise = tiny.noise(1, steps=3)
    got = next(engine.run(embeds[0], noise, negative_prompt_embeds=embeds[1])).latents
    x, frames, shape = noise.initial, range(3), (1, 4, *SIZE)
    for p, timestep in enumerate(engine.ladder.timesteps):
        c, u = (model(x, torch.tensor([timestep]), text, return_dict=False)[0] for text in embeds[:2])
        x = engine.ladder.step(x, u + 3 * (c - u), p, lambda p=p: noise.frames("renoise", frames, p, shape))
    torch.testing.assert_close(got, x, **FP32)
    plain = next(Engine(model, tiny.config("ladder.timesteps=[1000,700,300]")).run(embeds[0], noise)).latents
    assert (plain - got).abs().max() > 1e-2


def test_each_branch_reads_its_own_history(tiny, model, embeds):
    """Equal prompts in both branches: guidance cancels, and the run is the unguided one, cache included."""
    noise = tiny.noise(4)
    guided = Engine(model, tiny.config("guidance.scale=3")).run(embeds[0], noise, negative_prompt_embeds=embeds[0])
    torch.testing.assert_close(latents(guided), latents(Engine(model, tiny.config()).run(embeds[0], noise)), **FP32)


@pytest.mark.parametrize("scale, branches", [(1, 1), (0, 2), (3, 2)])
def test_scale_one_runs_one_branch(tiny, model, embeds, scale, branches):
    engine, rows = Engine(model, tiny.config(f"guidance.scale={scale}")), set()
    handle = model.register_forward_pre_hook(lambda module, args: rows.add(len(args[0])))
    latents(engine.run(embeds[0], tiny.noise(2), negative_prompt_embeds=embeds[1]))
    handle.remove()
    assert rows == {branches} == {engine.branches}


def test_commit_branch_positive_commits_both_branches_under_the_prompt(tiny, model, embeds):
    config = tiny.config("guidance.scale=3", "guidance.commit_branch=positive")
    rollout = Engine(model, config).start(
        embeds[0], tiny.noise(2), latent_size=SIZE, num_latent_frames=6, negative_embeds=embeds[1]
    )
    rollout.advance()
    rollout.commit()
    positive, negative = rollout.store.keys[:, :, :3].unbind(1)
    torch.testing.assert_close(positive, negative, **FP32)
    assert positive.abs().max() > 0


def test_guidance_without_a_negative_prompt_is_refused(tiny, model, embeds):
    with pytest.raises(InputError, match="negative_prompt_embeds"):
        next(Engine(model, tiny.config("guidance.scale=3")).run(embeds[0], tiny.noise(1)))


def test_shorter_texts_are_padded_with_zero_rows(tiny, model, embeds):
    engine, noise = Engine(model, tiny.config("guidance.scale=3")), tiny.noise(1)
    short = embeds[1][:, :2]
    padded = torch.cat([short, torch.zeros(1, 3, 8)], 1)
    a, b = (latents(engine.run(embeds[0], noise, negative_prompt_embeds=text)) for text in (short, padded))
    torch.testing.assert_close(a, b, atol=0, rtol=0)


# --- gradients


def loss_of(out: torch.Tensor, tiny) -> torch.Tensor:
    return (out * tiny.draw(*out.shape, seed=9)).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("overrides", [(), ("cache.window=6",), ("cache.window=6", "cache.sink=1")])
def test_i13_gradients_equal_those_of_recomputing_every_frame(tiny, embeds, overrides, checkpointing):
    """Three chunks, the graph running through the cache and the latents, against a computation that has no cache."""
    model, noise = tiny.model(), tiny.noise(3)
    text = embeds[0].clone().requires_grad_()
    engine = Engine(model, tiny.config(*overrides))
    cache = engine.config.cache
    wanted = tiny.rollout(model, text, noise, engine.ladder, 3, 3, cache.window, cache.sink)
    loss_of(wanted, tiny).backward()
    expected, expected_text = gradients(model), text.grad.clone()
    text.grad = None
    if checkpointing:
        model.enable_gradient_checkpointing()
    got = latents(engine.run(text, noise))
    torch.testing.assert_close(got, wanted, **FP32)
    loss_of(got, tiny).backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 50
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= 1e-4 * scale + 1e-6, name  # float32 sums in another order
    torch.testing.assert_close(text.grad, expected_text, atol=1e-4 * expected_text.abs().max().item(), rtol=0)


def test_gradients_reach_earlier_chunks_through_the_cache_alone(tiny, embeds):
    """Loss on the last chunk only: the first chunk's text matters through committed keys and values."""
    model = tiny.model()
    rollout = start(Engine(model, tiny.config()), embeds[0].clone().requires_grad_(), frames=6)
    rollout.advance()
    rollout.pending[0][2].x = rollout.pending[0][2].x.detach().requires_grad_()
    leaf = rollout.pending[0][2].x
    loss_of(rollout.advance().latents, tiny).backward()
    assert leaf.grad.abs().max() > 0


def test_a_recompute_over_a_changed_cache_is_refused(tiny, embeds):
    model = tiny.model()
    model.enable_gradient_checkpointing()
    rollout = start(Engine(model, tiny.config()), embeds[0], frames=6)
    rollout.advance()
    second = rollout.advance().latents
    with torch.no_grad():
        rollout.store.layers[0][0][0].add_(1)
    with pytest.raises(RuntimeError, match="cache changed in place"):
        loss_of(second, tiny).backward()


def test_without_gradients_nothing_keeps_a_graph(tiny, embeds):
    model = tiny.model()
    with torch.no_grad():
        rollout = start(Engine(model, tiny.config()), embeds[0], frames=6)
        assert not advance(rollout, 2).requires_grad
    assert not rollout.store.keys.requires_grad


def test_training_and_inference_stores_give_the_same_stream(tiny, embeds):
    model, noise = tiny.model(), tiny.noise(6)
    for overrides in (WINDOWED, (*WINDOWED, "positions.rule=packed", "switch.mode=recache")):
        engine, outputs = Engine(model, tiny.config(*overrides)), []
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                outputs.append(latents(engine.run(embeds[0], noise, switches={9: embeds[1]})).detach())
        torch.testing.assert_close(*outputs, **FP32)


# --- commits and traces


def test_trace_lists_every_call_with_its_plan(tiny, model, embeds):
    engine = Engine(model, tiny.config("cache.window=9", "cache.sink=3", "positions.rule=packed"))
    engine.tracing = True
    latents(engine.run(embeds[0], tiny.noise(5)))
    calls = engine.trace()
    assert [(c.kind, c.chunks, c.timesteps) for c in calls[:3]] == [
        ("denoise", (0,), (1000.0,)),
        ("denoise", (0,), (pytest.approx(5000 / 6),)),
        ("clean", (0,), (0.0,)),
    ]
    last = calls[-1]
    assert last.tick == 9 and last.frames == (12, 13, 14) and last.source == "flight"
    assert last.key_frames == ((0, 1, 2, 9, 10, 11, 12, 13, 14),)
    assert last.key_positions == (tuple(range(9)),) and last.query_positions == ((6, 7, 8),)
    engine.tracing = True  # setting it empties the list
    assert engine.trace() == []


def test_tracing_is_off_unless_asked_for(tiny, model, embeds):
    engine = Engine(model, tiny.config())
    latents(engine.run(embeds[0], tiny.noise(2)))
    assert engine.trace() == []


@pytest.mark.parametrize(
    "overrides, per_chunk",
    [(("cache.window=12", "cache.sink=3"), 3), (("cache.window=3",), 2), (("schedule.commit=none",), 2)],
)
def test_a_commit_that_nobody_reads_is_skipped(tiny, model, embeds, overrides, per_chunk):
    engine = Engine(model, tiny.config(*overrides))
    engine.tracing = True
    latents(engine.run(embeds[0], tiny.noise(4)))
    skipped = 1 if per_chunk == 3 else 0  # the last chunk's
    assert len(engine.trace()) == 4 * per_chunk - skipped


def test_with_room_for_the_sink_alone_only_the_sink_is_committed(tiny, model, embeds):
    engine = Engine(model, tiny.config("cache.window=6", "cache.sink=3"))
    engine.tracing = True
    latents(engine.run(embeds[0], tiny.noise(4)))
    assert [call.writes for call in engine.trace() if call.kind == "clean"] == [(0, 1, 2)]


def test_commit_level_is_fed_to_the_commit(tiny, model, embeds):
    levels = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: levels.append(args[1].item()) if kwargs["commit_only"] else None, with_kwargs=True
    )
    latents(Engine(model, tiny.config("schedule.commit_level=20")).run(embeds[0], tiny.noise(2)))
    handle.remove()
    assert levels == [20]


def test_an_emitted_chunk_is_never_written_again(tiny, model, embeds):
    rollout = start(Engine(model, tiny.config(*WINDOWED)), embeds[0])
    chunk = rollout.advance()
    copy = chunk.latents.clone()
    rollout.switch(embeds[1], "recache")
    advance(rollout, 3)
    assert torch.equal(chunk.latents, copy)


def test_a_failed_call_can_be_tried_again(tiny, model, embeds):
    """An exception (out of memory, Ctrl-C) in the middle of a chunk costs that chunk's work and nothing else."""
    engine = Engine(model, tiny.config(*WINDOWED))
    wanted = advance(start(engine, embeds[0]), 5)
    for fail_at in range(3, 9):
        rollout, calls, parts = start(engine, embeds[0]), [], []

        def fail(module, args, calls=calls, fail_at=fail_at):
            calls.append(1)
            if len(calls) == fail_at:
                raise KeyboardInterrupt

        handle = model.register_forward_pre_hook(fail)
        while len(parts) < 5:
            try:
                parts.append(rollout.advance())
            except KeyboardInterrupt:
                continue
        handle.remove()
        assert torch.equal(latents(parts), wanted), fail_at


# --- switches


def test_a_switch_takes_effect_at_the_first_chunk_that_starts_at_or_after_it(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOWED, "switch.mode=keep"))
    plain = latents(engine.run(embeds[0], SeededNoise(0), 15, SIZE))
    for frame, effective in ((1, 3), (3, 3), (4, 6), (6, 6), (12, 12)):
        chunks = list(engine.run(embeds[0], SeededNoise(0), 15, SIZE, switches={frame: embeds[1]}))
        assert [c.epoch for c in chunks] == [int(c.first_frame >= effective) for c in chunks]
        switched = latents(chunks)
        assert torch.equal(switched[:, :, :effective], plain[:, :, :effective])
        assert (switched - plain)[:, :, effective : effective + 3].abs().max() > 1e-4


def test_a_switch_at_zero_is_a_start_with_the_new_prompt(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOWED, "switch.mode=recache"))
    a = latents(engine.run(embeds[0], SeededNoise(0), 9, SIZE, switches={0: embeds[1]}))
    assert torch.equal(a, latents(engine.run(embeds[1], SeededNoise(0), 9, SIZE)))


def test_of_switches_that_fall_into_one_chunk_the_newest_counts(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOWED, "switch.mode=recache"))
    both = latents(engine.run(embeds[0], SeededNoise(0), 12, SIZE, switches={5: embeds[2], 4: embeds[1]}))
    last = latents(engine.run(embeds[0], SeededNoise(0), 12, SIZE, switches={6: embeds[2]}))
    torch.testing.assert_close(both, last, **FP32)


def test_the_chunk_owed_at_a_switch_is_committed_under_its_own_prompt(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOWED))
    stores = []
    for text in (None, embeds[1]):
        rollout = start(engine, embeds[0])
        advance(rollout, 2)
        rollout.commit() if text is None else rollout.switch(text, "keep")
        stores.append(rollout.store.state_dict())
    assert same(*stores)


@pytest.mark.parametrize(
    "done, redone, kept",
    [(1, range(3), []), (4, range(12), []), (5, range(6, 15), [0, 1, 2]), (9, range(18, 27), [0, 1, 2])],
)
def test_recache_is_one_bidirectional_call_at_t0_under_the_new_prompt(tiny, model, embeds, done, redone, kept):
    engine = Engine(model, tiny.config(*WINDOWED, "switch.mode=recache"))
    engine.tracing = True
    rollout = start(engine, embeds[0])
    advance(rollout, done)
    rollout.commit()
    before = rollout.store.keys.clone()
    rollout.switch(embeds[1], "recache")
    call = engine.trace()[-1]
    assert [c.source for c in engine.trace()].count("past") == 1
    assert (call.kind, call.source, call.timesteps) == ("clean", "past", (0.0,))
    assert call.frames == tuple(redone)
    assert call.key_frames == ((*kept, *redone),)  # one group: every query sees all of it
    page = rollout.policy.page
    if kept:
        assert torch.equal(before[:, :, :3], rollout.store.keys[:, :, :3])
    # the values that the next chunk reads are those of a forward without any cache under the new prompt
    x = torch.cat([flight.x for flight in rollout.past], 2)[:, :, -len(redone) :]
    if not kept:
        taken = {}

        class Take:
            def __init__(self, inner):
                self.inner = inner

            def attend(self, layer, query, key, value):
                taken[layer] = value
                return self.inner.attend(layer, query, key, value)

        dense = model._dense_context((len(redone), 2, 2), x.device, list(redone), None)
        model(x, torch.tensor([0.0]), embeds[1], context=Take(dense))
        visible = [f for f in redone if f in call.writes]
        for layer, value in taken.items():
            value = value.unflatten(1, (len(redone), -1))
            for frame in visible:
                stored = rollout.store.values[layer, :, page(frame)]
                torch.testing.assert_close(stored, value[:, frame - redone.start], **FP32)


def test_a_stream_that_keeps_its_cache_makes_room_for_a_recache_when_one_comes(tiny, model, embeds, monkeypatch):
    """Out of memory in the middle of that, the stream is as it was, and the switch can be asked for again."""
    configs = [tiny.config(*WINDOWED, f"switch.mode={mode}") for mode in ("keep", "recache")]
    keeps, roomy = (start(Engine(model, config), embeds[0]) for config in configs)
    assert torch.equal(advance(keeps, 5), advance(roomy, 5))
    assert (keeps.store.flight, roomy.store.flight) == (3, 12)
    before, new_zeros, left = keeps.fork(), torch.Tensor.new_zeros, [1]

    def scarce(tensor, *size, **more):
        if not left:
            raise torch.OutOfMemoryError("there is room for one tensor")
        left.pop()
        return new_zeros(tensor, *size, **more)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "new_zeros", scarce)
        keeps.switch(embeds[1], "recache")
    assert keeps.store.keys.shape[2] > keeps.store.values.shape[2] and keeps.epoch == 0
    assert torch.equal(advance(keeps.fork(), 3), advance(before, 3))
    for rollout in (keeps, roomy):
        rollout.switch(embeds[1], "recache")
    assert torch.equal(advance(keeps, 3), advance(roomy, 3))
    assert keeps.store.nbytes == roomy.store.nbytes


def test_i10_after_a_recache_no_visible_key_is_zero(tiny, model, embeds):
    for done in range(1, 8):
        rollout = start(Engine(model, tiny.config(*WINDOWED)), embeds[0])
        advance(rollout, done)
        rollout.switch(embeds[1], "recache")
        sink, recent = rollout.policy.visible(rollout.next_frame, 6)
        pages = [rollout.policy.page(frame) for frame in (*sink, *recent)]
        assert (rollout.store.keys[:, :, pages].abs().amax((-1, -2, -3)) > 0).all()


def test_i9_recaching_one_chunk_under_its_own_prompt_changes_nothing(tiny, model, embeds):
    """Where causal and bidirectional order agree (a single chunk), the stored keys come back."""
    rollout = start(Engine(model, tiny.config(*WINDOWED)), embeds[0])
    rollout.advance()
    rollout.commit()
    before = rollout.store.state_dict()
    rollout.switch(embeds[0], "recache")
    after = rollout.store.state_dict()
    for name in before:
        torch.testing.assert_close(after[name], before[name], **FP32)
    advance(rollout, 1)
    rollout.commit()
    before = rollout.store.state_dict()["keys"]
    rollout.switch(embeds[0], "recache")  # two chunks: the first now sees the second
    assert (rollout.store.state_dict()["keys"] - before).abs().max() > 1e-3


def test_keep_leaves_the_cache_and_cut_hides_what_is_recent(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOWED))
    engine.tracing = True
    for mode, keys in (("keep", (0, 1, 2, *range(9, 18))), ("cut", (0, 1, 2, 15, 16, 17))):
        rollout = start(engine, embeds[0])
        advance(rollout, 5)
        rollout.commit()
        before = rollout.store.state_dict()
        rollout.switch(embeds[1], mode)
        assert same(before, rollout.store.state_dict())
        assert rollout.advance().first_frame == 15
        assert engine.trace()[-1].key_frames == (keys,)


def test_reset_is_no_switch(tiny, model, embeds):
    rollout = start(Engine(model, tiny.config(*WINDOWED)), embeds[0])
    with pytest.raises(InputError, match="reset"):
        rollout.switch(embeds[1], "reset")


# --- forks and states


def test_a_fork_goes_on_like_its_parent_and_leaves_no_trace(tiny, model, embeds):
    engine = Engine(model, tiny.config(*WINDOWED, "switch.mode=recache"))
    wanted = advance(start(engine, embeds[0]), 8)
    for at in (0, 1, 5):
        rollout = start(engine, embeds[0])
        parts = [advance(rollout, at)] if at else []
        other = rollout.fork()
        state = rollout.state_dict()
        side = other.fork()
        side.switch(embeds[1], "recache")
        advance(side, 3)
        side.switch(embeds[2], "cut")
        advance(side, 2)
        assert same(state, rollout.state_dict())
        for one in (rollout, other):
            assert torch.equal(torch.cat([*parts, advance(one, 8 - at)], 2), wanted)


@pytest.mark.parametrize("mode", ["keep", "recache", "cut"])
@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_state_survives_a_file_and_goes_on_bit_by_bit(tiny, model, embeds, at, mode):
    engine = Engine(model, tiny.config(*WINDOWED, "positions.rule=packed"))

    def finish(rollout):
        first = advance(rollout, 2)
        rollout.switch(embeds[1], mode)
        return torch.cat([first, advance(rollout, 3)], 2), rollout.epoch

    rollout = start(engine, embeds[0], seed=2)
    advance(rollout, at)
    rollout.switch(embeds[2], mode)
    advance(rollout, 1)
    file = io.BytesIO()
    torch.save(rollout.state_dict(), file)
    wanted = finish(rollout)
    file.seek(0)
    resumed = start(Engine(model, engine.config), embeds[0], seed=2)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    got = finish(resumed)
    assert torch.equal(got[0], wanted[0]) and got[1] == wanted[1]


def test_fingerprint_tells_weights_apart(tiny, model):
    config = tiny.config()
    other = tiny.model()
    assert Engine(other, config).fingerprint() == Engine(model, config).fingerprint()
    with torch.no_grad():
        other.blocks[1].ffn.net[2].weight[0, 0] += 1e-3
    assert Engine(other, config).fingerprint() != Engine(model, config).fingerprint()


# --- length


def held(rollout) -> tuple[int, ...]:
    """Everything of a roll-out that could grow."""
    lists = (
        rollout.flight, rollout.pending, rollout.owed, rollout.ready, rollout.past, rollout._due,
        rollout.engine.records, rollout.store.sums, *(cache.plans for cache in rollout.caches.values()),
    )  # fmt: skip
    return (rollout.store.nbytes, *map(len, lists), *(f.x.untyped_storage().nbytes() for f in rollout.past))


def endless(tiny, chunks: int, *overrides: str) -> SimpleNamespace:
    """A stub streams `chunks` chunks; what it held after each of the last, and the signatures of its plans."""
    model = tiny.stub()
    # chunks that share a call come joined along time; the stub's tokens are its channels, side by side in memory
    model.register_forward_pre_hook(lambda _, args: (args[0].movedim(1, -1).contiguous().movedim(-1, 1), args[1]))
    config = tiny.config("ladder.timesteps=[1000]", "cache.window=12", "cache.sink=3", *overrides)
    rollout = Engine(model, config).start(torch.zeros(1, 1, 1), SeededNoise(0), latent_size=(1, 1))
    bind, seen = rollout.store.bind, {}

    def watch(plan, rope):
        seen.setdefault(plan.signature(), []).append(rollout.next_chunk)
        return bind(plan, rope)

    rollout.store.bind = watch
    sizes, finite = [], True
    with torch.no_grad():
        for chunk in range(chunks):
            out = rollout.advance().latents
            finite = finite and math.isfinite(out.abs().max().item())
            if chunk >= 20:
                sizes.append(held(rollout))
    return SimpleNamespace(sizes=set(sizes), finite=finite, signatures=seen, rope=model.rope, rollout=rollout)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("positions.rule=packed",),
        ("cache.window=3", "cache.sink=0"),
        ("schedule.commit=none",),
        ("schedule.commit=fused",),
        ("cache.ema_decay=0.9",),
        ("schedule.coupling=joint", "schedule.stagger=1", "ladder.timesteps=[1000,500]", "positions.rule=before"),
    ],
)
def test_i15_a_long_stream_holds_no_more_than_a_short_one(tiny, overrides):
    stream = endless(tiny, 500, *overrides)
    assert stream.finite and len(stream.sizes) == 1
    assert len(stream.rope._angles) <= stream.rope.CACHE_SIZE
    late = [name for name, chunks in stream.signatures.items() if chunks[-1] > 100]
    assert len(late) <= 2  # one for steps, one for commits
    assert all(chunks[0] < 10 for chunks in stream.signatures.values())  # nothing new ever comes


@pytest.mark.parametrize("rule", ["packed", pytest.param("absolute", marks=pytest.mark.slow)])
def test_i15_ten_thousand_chunks(tiny, rule):
    stream = endless(tiny, 10_000, f"positions.rule={rule}")
    assert stream.finite and len(stream.sizes) == 1 and stream.rollout.next_frame == 30_000
