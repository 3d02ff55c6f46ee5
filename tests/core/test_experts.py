"""Two transformers in one stream (Wan2.2-A14B), and channels beside the latents (image-to-video)."""

import io

import pytest
import torch

from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.noise import SeededNoise

SIZE = (4, 4)
STEPS = "ladder.timesteps=[1000,750,500,250]"
BOUNDARY = "experts.boundary=600"  # two steps each


@pytest.fixture(scope="module")
def high(tiny):
    return tiny.model(0).requires_grad_(False)


@pytest.fixture(scope="module")
def low(tiny):
    return tiny.model(7).requires_grad_(False)


@pytest.fixture(scope="module")
def embeds(tiny):
    return [tiny.draw(1, 5, 8, seed=40 + i) for i in range(2)]


def config(tiny, *overrides):
    return tiny.config("cache.window=12", "cache.sink=3", STEPS, "ladder.warp=false", BOUNDARY, *overrides)


def latents(chunks) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in chunks], 2)


def start(engine, embeds, **more):
    return engine.start(embeds, SeededNoise(0), latent_size=SIZE, **more)


def test_two_equal_experts_are_one_transformer(tiny, high, embeds):
    run = dict(noise=SeededNoise(0), num_latent_frames=18, latent_size=SIZE, switches={9: embeds[1]})
    one = latents(Engine(high, config(tiny)).run(embeds[0], **run))
    two = latents(Engine(high, config(tiny), transformer_2=high).run(embeds[0], **run))
    assert torch.equal(one, two)


def test_each_expert_works_at_its_levels_and_keeps_a_cache_of_its_own(tiny, high, low, embeds):
    engine = Engine(high, config(tiny), transformer_2=low)
    engine.tracing = True
    rollout = start(engine, embeds[0])
    for _ in range(3):
        rollout.advance()
    rollout.commit()
    first = [(r.kind, r.timesteps, r.expert) for r in engine.trace() if r.chunks == (1,)]
    steps = [("denoise", (1000.0,), 0), ("denoise", (750.0,), 0), ("denoise", (500.0,), 1), ("denoise", (250.0,), 1)]
    assert first == [*steps, ("clean", (0.0,), 0), ("clean", (0.0,), 1)]
    keys = [store.keys[:, :, :9] for store in rollout.stores]
    assert all((k.abs().amax((-1, -2, -3)) > 0).all() for k in keys) and (keys[0] - keys[1]).abs().max() > 0.1


def test_each_experts_cache_holds_what_it_alone_would_have_written(tiny, high, low, embeds):
    """Commits depend on the finished latents alone: so replay them through either expert and compare."""
    rollout = start(Engine(high, config(tiny), transformer_2=low), embeds[0])
    chunks = [rollout.advance() for _ in range(3)]
    rollout.commit()
    for index, expert in enumerate((high, low)):
        alone = start(Engine(expert, config(tiny)), embeds[0])
        for chunk in chunks:
            alone.advance()
            tick, call, flight = alone.pending[0]
            flight.x = chunk.latents
            alone.commit()
        assert torch.equal(alone.store.keys[:, :, :9], rollout.stores[index].keys[:, :, :9])


def test_a_saved_or_forked_stream_of_two_experts_goes_on_bit_by_bit(tiny, high, low, embeds):
    engine = Engine(high, config(tiny), transformer_2=low)
    rollout = start(engine, embeds[0])
    rollout.advance()
    rollout.switch(embeds[1], "recache")
    rollout.advance()
    file = io.BytesIO()
    torch.save(rollout.state_dict(), file)
    fork = rollout.fork()
    wanted = latents([rollout.advance() for _ in range(3)])
    file.seek(0)
    other = start(engine, embeds[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    for stream in (other, fork):
        assert torch.equal(latents([stream.advance() for _ in range(3)]), wanted)


def test_two_transformers_without_a_boundary_are_refused(tiny, high, low):
    with pytest.raises(InputError, match="experts.boundary"):
        Engine(high, tiny.config(), transformer_2=low)


# --- channels beside the latents


class Numbered:
    """Two channels that hold the number of their frame; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked, self.last = [], 0

    def frames(self, frames: range) -> torch.Tensor:
        self.asked.append(frames)
        self.last = frames.stop
        column = torch.tensor([float(f) for f in frames]) / 10
        return column.view(1, 1, -1, 1, 1).expand(1, 2, -1, *SIZE)

    def fork(self):
        other = Numbered()
        other.last = self.last
        return other

    def state_dict(self):
        return {"last": self.last}

    def load_state_dict(self, state):
        self.last = state["last"]


@pytest.fixture(scope="module")
def wide(tiny):
    return tiny.model(3, in_channels=6, out_channels=4).requires_grad_(False)


def test_channels_arrive_beside_every_forward_of_their_chunk(tiny, wide, embeds):
    engine, seen = Engine(wide, config(tiny)), []
    handle = wide.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 4:, :, 0, 0]))
    source = Numbered()
    rollout = start(engine, embeds[0], conditions={"channels": source})
    chunks = [rollout.advance() for _ in range(2)]
    rollout.switch(embeds[1], "recache")
    handle.remove()
    assert source.asked == [range(0, 3), range(3, 6)] and chunks[0].latents.shape == (1, 4, 3, *SIZE)
    frames = [(10 * x[0]).round().int().tolist() for x in seen]
    assert frames == [[0, 1, 2]] * 5 + [[3, 4, 5]] * 5 + [[0, 1, 2, 3, 4, 5]]


def test_channels_change_the_result_and_survive_a_saved_state(tiny, wide, embeds):
    engine = Engine(wide, config(tiny, "guidance.scale=2"))
    more = dict(negative_embeds=embeds[1])
    rollout = start(engine, embeds[0], conditions={"channels": Numbered()}, **more)
    rollout.advance()
    state = rollout.state_dict()
    wanted = latents([rollout.advance() for _ in range(2)])
    other = start(engine, embeds[0], conditions={"channels": Numbered()}, **more)
    other.load_state_dict(state)
    assert torch.equal(latents([other.advance() for _ in range(2)]), wanted)

    class Zero(Numbered):
        def frames(self, frames):
            return 0 * super().frames(frames)

    dark = start(engine, embeds[0], conditions={"channels": Zero()}, **more)
    dark.advance()
    assert (latents([dark.advance() for _ in range(2)]) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("conditions, model, words", [
    (None, "wide", "reads 2 channels beside the latents"),
    ({"channels": Numbered()}, "high", "no channels beside"),
    ({"audio": 1}, "high", "unknown conditions audio"),
])  # fmt: skip
def test_conditions_that_do_not_fit_are_refused(tiny, request, embeds, conditions, model, words):
    engine = Engine(request.getfixturevalue(model), config(tiny))
    with pytest.raises(InputError, match=words):
        start(engine, embeds[0], conditions=conditions)
