"""Engine + preset compute what the published Self-Forcing loop computes (tests/golden/README.md)."""

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

FOLDER = Path(__file__).parents[1] / "golden"
OVERRIDES = {
    "self_forcing_full": [],
    "self_forcing_window9_sink3": ["cache.window=9", "cache.sink=3"],
}
ATOL = 2e-5  # float32 noise is 2e-6; a wrong eps of the norms already moves latents by 8.5e-5


class Case:
    """One golden run: the model, its inputs, and what is expected; frames-first becomes [B, C, F, h, w]."""

    def __init__(self, name: str) -> None:
        path = FOLDER / f"{name}.safetensors"
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
        video = lambda key: tensors[f"io.{key}"].movedim(-4, -3)
        self.transformer = load_transformer(FOLDER / "self_forcing_weights.safetensors", config)
        self.noise = TensorNoise(video("noise"), video("renoise"))
        self.context, self.timesteps = tensors["io.context"], tensors["io.timesteps"]
        self.latents, self.first_velocity = video("latents"), video("first_velocity")
        self.engine = Engine(self.transformer, load_preset("self-forcing", OVERRIDES[name]))

    def run(self) -> torch.Tensor:
        return torch.cat([chunk.latents for chunk in self.engine.run(self.context, self.noise)], 2)


@pytest.mark.parametrize("name", OVERRIDES)
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
