"""What keeps an accelerator busy: in a steady stream nothing is compiled anew, and no call waits for a number."""

import pytest
import torch
from torch._dynamo.utils import counters

from streamgen.config import available, load_preset
from streamgen.engine import Engine
from streamgen.noise import SeededNoise

STEPS = "ladder.timesteps=[1000,500]"
SMALL = {  # with windows that are full after a few chunks
    "default": [STEPS, "cache.window=9"],
    "rolling-forcing": [STEPS, "cache.window=9", "cache.capacity=12"],
    "streamdiffusion-v2": [STEPS, "cache.window=4", "cache.sink=1"],  # from text: its ladder begins at pure noise
}
QUICK = {"ar-diffusion": ["ladder.timesteps=[1000,800,600,400,200]", "schedule.stagger=1"]}  # of fifty steps


pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def compiled():
    """How many graphs there are; whatever a test compiled is forgotten."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("preset", SMALL)
def test_a_stream_compiles_nothing_once_its_window_is_full(tiny, compiled, embeds, preset):
    """Blocks as diffusers compiles them, without a break in their graphs; a new prompt is none of their business."""
    model = tiny.model().requires_grad_(False)
    model.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=False)
    engine = Engine(model, load_preset(preset, SMALL[preset]))
    rollout = engine.start(embeds[0], SeededNoise(0), latent_size=(4, 4))
    for _ in range(8):
        rollout.advance()
    warm = compiled()
    assert warm >= 2 * len(model.blocks)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for chunk in range(10):
            if chunk == 5:
                rollout.switch(embeds[1], "keep")
            rollout.advance()
    assert compiled() == warm


@pytest.mark.parametrize("preset", available("presets"))
def test_no_call_waits_for_a_number(stub, preset):
    """On the meta device there are none: whoever reads one back from it, or chooses by it, raises."""
    # collapse_text looks at a text once, where it is new
    config = load_preset(preset, ["cache.collapse_text=false", *QUICK.get(preset, ())])
    text = torch.ones(1, 2, 4, device="meta")
    rollout = Engine(stub.to("meta"), config).start(
        text, SeededNoise(0), latent_size=(2, 2), num_latent_frames=config.chunk.frames(13).stop, negative_embeds=text
    )
    for _ in range(10):
        assert rollout.advance().latents.is_meta
    rollout.switch(text, config.switch.mode if config.switch.mode != "reset" else "cut")
    for _ in range(3):
        rollout.advance()


def test_reading_a_number_from_the_meta_device_raises():
    number = torch.ones(2, device="meta")
    for read in (torch.Tensor.tolist, lambda x: x[0].item(), lambda x: bool(x.all()), torch.nonzero, torch.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(number)
