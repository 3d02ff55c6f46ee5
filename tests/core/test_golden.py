"""Engine + preset compute what the published loops compute (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from streamgen.config import load_preset
from streamgen.engine import Engine
from streamgen.models.loading import load_transformer
from streamgen.noise import TensorNoise
from streamgen.source import MotionStrength

FOLDER = Path(__file__).parents[1] / "golden"
PRESETS = {
    "self_forcing_full": ["self-forcing"],
    "self_forcing_window9_sink3": ["self-forcing", "cache.window=9", "cache.sink=3"],
    "rolling_forcing_long": ["rolling-forcing"],
    "reward_forcing_ema_sink_alpha09": ["reward-forcing", "cache.ema_decay=0.9"],
    "longlive_prompt_switch": ["longlive"],
    "diagonal_distill": ["diagonal"],
    "anchor_forcing_switch": ["anchor-forcing"],
    "memflow_bank": ["memflow"],
    "streamdiffusionv2_stream": ["streamdiffusion-v2"],
}
SHAPE = (
    "patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads", "num_layers",
    "qk_norm", "cross_attn_norm", "eps",
)  # fmt: skip
ATOL = 2e-5  # float32 noise is 2e-6; a wrong eps of the norms already moves latents by 8.5e-5


class Case:
    """One golden run: the model, its inputs, and what is expected; frames-first becomes [B, C, F, h, w]."""

    def __init__(self, name: str) -> None:
        path = FOLDER / f"{name}.safetensors"
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            config, self.seen = (json.loads(file.metadata()[key]) for key in ("config", "seen"))
        video = lambda key: tensors[f"io.{key}"].movedim(-4, -3) if f"io.{key}" in tensors else None
        own = {key: config[key] for key in SHAPE}
        self.transformer = load_transformer(FOLDER / "self_forcing_weights.safetensors", own)
        self.noise = TensorNoise(video("noise"), video("renoise"))
        self.context, self.timesteps = tensors["io.context"], tensors["io.timesteps"]
        self.latents, self.first_velocity = video("latents"), video("first_velocity")
        self.conditions = None
        if "io.clean_latents" in tensors:
            first = [config["denoising_step_list"][0], *tensors["io.first_step_timestep"]]
            strength = tensors["io.noise_scale"]
            self.conditions = {"video": video("clean_latents"), "strength": strength, "first_timestep": first}
            self.pixels = tensors["io.video_for_noise_scale"]
        self.switches = {frame: tensors["io.context_1"] for frame in config.get("switch_frame_indices", [])}
        preset, *overrides = PRESETS[name]
        self.engine = Engine(self.transformer, load_preset(preset, overrides))

    def run(self) -> torch.Tensor:
        chunks = self.engine.run(self.context, self.noise, switches=self.switches, conditions=self.conditions)
        return torch.cat([chunk.latents for chunk in chunks], 2)


@pytest.mark.parametrize("name", PRESETS)
def test_latents_and_what_every_call_saw_match_the_published_loop(name):
    """Which frames each denoising call read, at which positions, then what came of it."""
    case = Case(name)
    case.engine.tracing = True
    with torch.no_grad():
        latents = case.run()
    calls = [call for call in case.engine.trace() if call.kind == "denoise"]
    if case.seen:
        assert len(calls) == len(case.seen)
    for call, (frames, positions, runs) in zip(calls, case.seen):
        assert (call.frames[0], call.frames[-1] + 1) == tuple(frames)
        assert list(call.query_positions[0]) == positions
        wanted = [(f + i, p + i) for f, p, n in runs if p is not None for i in range(n)]
        blended = sum(n for _, p, n in runs if p is None)
        read = list(zip(call.key_frames[0], call.key_positions[0]))
        if -1 in call.key_frames[0]:  # frames that each layer's content chose
            continue
        assert sorted(read[blended:] if blended else read) == sorted(wanted), call
    torch.testing.assert_close(latents, case.latents, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("self_forcing")])
def test_latents_and_first_velocities_match_the_published_loop(name):
    case, first = Case(name), []

    def watch(module, args, kwargs, output):
        if output is not None and args[1].flatten()[0] == 1000:
            first.append(output[0])

    case.transformer.register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad():
        latents = case.run()
    torch.testing.assert_close(torch.tensor(case.engine.ladder.timesteps), case.timesteps)
    torch.testing.assert_close(torch.cat(first, 2), case.first_velocity, atol=ATOL, rtol=0)
    torch.testing.assert_close(latents, case.latents, atol=ATOL, rtol=0)


def test_latents_match_with_gradients_enabled():
    case = Case("self_forcing_window9_sink3")
    latents = case.run()
    assert latents.requires_grad
    torch.testing.assert_close(latents.detach(), case.latents, atol=ATOL, rtol=0)


def test_a_wrong_epsilon_would_be_seen():
    case = Case("self_forcing_full")
    for module in case.transformer.modules():
        if hasattr(module, "norm_q"):
            module.norm_q.eps = module.norm_k.eps = 1e-5
    with torch.no_grad():
        assert (case.run() - case.latents).abs().max() > ATOL


def test_trace_of_the_windowed_run_shows_sink_and_recent_frames():
    case = Case("self_forcing_window9_sink3")
    case.engine.tracing = True
    with torch.no_grad():
        case.run()
    expected = [[*range(3)], [*range(6)]] + [[0, 1, 2, *range(3 * k - 3, 3 * k + 3)] for k in range(2, 12)]
    calls = case.engine.trace()
    assert len(calls) == 12 * 5 - 1  # nobody reads the last chunk's commit
    for call in calls:
        (chunk,) = call.chunks
        assert list(call.key_frames[0]) == expected[chunk] == list(call.key_positions[0])
        assert list(call.query_positions[0]) == [3 * chunk, 3 * chunk + 1, 3 * chunk + 2]
        assert call.writes == (tuple(range(3 * chunk, 3 * chunk + 3)) if call.kind == "clean" else ())
    levels = [call.timesteps for call in calls[:5]]
    assert [round(level, 3) for (level,) in levels] == [1000, 937.5, 833.333, 625, 0]


def test_strength_follows_motion_as_published():
    """The first chunk shows five frames, the others four."""
    case, motion = Case("streamdiffusionv2_stream"), MotionStrength(0.8)
    parts = case.pixels.split([5] + [4] * 13, 2)
    found = [motion.next(part) for part in parts]
    strengths, timesteps = zip(*found)
    torch.testing.assert_close(torch.tensor(strengths), case.conditions["strength"], atol=1e-6, rtol=0)
    assert list(timesteps) == [int(t) for t in case.conditions["first_timestep"][:14]]
