"""A model's settings over every preset: what the embedded one was trained for still fits, and each keeps its idea."""

import pytest
import torch

from streamgen.building import build_policy
from streamgen.config import available, load_preset, merge
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.hub import ModelConfig, model_config, stream_config
from streamgen.noise import SeededNoise
from streamgen.schedules import OpKind

NAMES = available("presets")
SPRITES = model_config("sprites")
TRAINED = 21  # positions that a clip of the embedded model's training has
UNBOUNDED = {"memflow", "tempcache"}  # memories that stay at their numbers
RULES = {  # where ranks would be refused, or lose the idea
    "anchor-forcing": "tri-region", "deep-forcing": "trail", "magi": "absolute", "memflow": "absolute",
    "rolling-forcing": "before", "tempcache": "trail", "timestep-pipeline": "ahead",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_model_streams_under_every_preset(stub, name):
    """81 pictures are 21 latent frames; a new prompt in the middle, in the preset's own way."""
    config = stream_config(name, SPRITES, ["positions.strict=true"])  # refused past what it was trained on
    engine = Engine(stub, config)
    text, switches = torch.ones(1, 2, 4), {10: torch.full((1, 2, 4), 2.0)}
    with torch.no_grad():
        chunks = list(engine.run(text, SeededNoise(0), 21, (2, 2), switches, negative_prompt_embeds=0 * text))
    latents = torch.cat([chunk.latents for chunk in chunks], 2)
    assert latents.shape == (1, 4, 21, 2, 2) and latents.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_what_the_embedded_model_was_trained_for_fits(name):
    """Chunks of three, at most five of them denoised together, over no more positions than a clip has."""
    config = stream_config(name, SPRITES)
    engine = Engine(None, config)
    assert (config.chunk.first, config.chunk.latent_frames) == (3, 3) and engine.steps(0) == 12
    solver = "euler" if name == "timestep-pipeline" else "renoise"
    assert config.guidance.scale == 3 and config.ladder.solver == solver and config.positions.span == TRAINED
    steps = [
        sum(slot.p_in < slot.p_out for slot in row.slots)
        for tick in engine.schedule.ticks(engine.steps, 12) for call in tick.calls for row in call.rows
    ]  # fmt: skip
    assert max(steps) <= 5
    ticks = list(engine.schedule.ticks(engine.steps, 12))
    begun = [sum(op.kind is OpKind.BEGIN for tick in ticks[: i + 1] for op in tick.ops) for i in range(len(ticks))]
    left = [sum(len(tick.emits) for tick in ticks[:i]) for i in range(len(ticks))]
    assert max(a - b for a, b in zip(begun, left)) <= (7 if name == "ar-diffusion" else 5)  # how long a prompt waits
    if name not in UNBOUNDED:
        assert build_policy(config, engine.flight_frames, None).reach() <= TRAINED


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_keeps_its_idea_under_the_embedded_model(name):
    own, config = load_preset(name), stream_config(name, SPRITES)
    for key in ("coupling", "commit", "commit_level", "clone"):
        assert getattr(config.schedule, key) == getattr(own.schedule, key)
    assert (config.cache.policy, config.cache.ema_decay) == (own.cache.policy, own.cache.ema_decay)
    assert bool(config.cache.sink) == bool(own.cache.sink) and config.switch.mode == own.switch.mode
    assert (config.schedule.stagger == "solo") == (own.schedule.stagger == "solo")
    assert (config.schedule.held.overlap, config.schedule.held.waiting) == (
        own.schedule.held.overlap, own.schedule.held.waiting,
    )  # fmt: skip
    assert len(config.ladder.lists) == len(own.ladder.lists)
    assert config.positions.rule == RULES.get(name, "packed")


def test_a_models_settings_for_one_preset_lie_between_its_own_and_the_command_line():
    model = merge(ModelConfig, {
        "stream": {"cache": {"window": 12, "sink": 3}},
        "presets": {"longlive": {"cache": {"window": 15}}},
    })  # fmt: skip
    assert stream_config("longlive", model).cache.window == 15
    assert stream_config("longlive", model).cache.sink == 3
    assert stream_config("longlive", model, ["cache.window=18"]).cache.window == 18
    assert stream_config("default", model).cache.window == 12


def test_settings_for_a_preset_that_is_none_are_refused():
    with pytest.raises(InputError, match="did you mean 'longlive'"):
        merge(ModelConfig, {"presets": {"longlife": {}}})
