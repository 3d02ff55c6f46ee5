"""Every bounded preset without end: constant memory, and calls that repeat themselves."""


import pytest
import torch

from streamgen.building import build_policy
from streamgen.config import available, load_preset
from streamgen.engine import Engine
from streamgen.noise import SeededNoise
from streamgen.walk import steady_calls, walk

BOUNDED = [name for name in available("presets") if load_preset(name).cache.window != -1]


@pytest.mark.parametrize("name", BOUNDED)
def test_ten_thousand_chunks_of_plans_repeat_themselves(name):
    """I1, I15: no page beyond the policy's, and nothing new comes late."""
    config, seen, late, pages = load_preset(name), {}, set(), 0
    held = build_policy(config, Engine(None, config).flight_frames, None).pages
    last = config.chunk.frames(10_000).start
    for call in walk(Engine(None, config)):
        seen.setdefault((call.call.kind, call.row.lane, call.plan.signature()), call.frames[0].start)
        pages = max([pages, *(w.page + 1 for w in call.plan.writes)])
        if call.frames[-1].stop > last // 2:
            late.add((call.call.kind, call.plan.signature()))
        if call.frames[0].start >= last:
            break
    steady = steady_calls(Engine(None, config))
    assert late == {(call.call.kind, call.plan.signature()) for call in steady} and len(steady) <= 5
    assert max(seen.values()) < 200 * config.chunk.latent_frames and pages <= held


def stream(engine, frames=None):
    size = (2, 2) if engine.transformer.config.patch_size[1:] == (1, 1) else (4, 4)
    text = torch.ones(1, 2, 4)
    return engine.start(text, SeededNoise(0), latent_size=size, num_latent_frames=frames, negative_embeds=text)


@pytest.mark.parametrize("chunks", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BOUNDED)
def test_long_streams_hold_what_short_ones_do(stub, name, chunks):
    rollout, sizes = stream(Engine(stub, load_preset(name))), []
    with torch.no_grad():
        for _ in range(chunks):
            chunk = rollout.advance()
            stores = [store.nbytes for cache in rollout.caches.values() for store in cache.stores]
            lists = (rollout.past, rollout.flight, rollout.held, rollout.pending, rollout.owed, rollout.ready)
            sizes.append((sum(stores), *map(len, lists)))
    most = lambda part: tuple(map(max, zip(*part, strict=True)))
    assert most(sizes[30:80]) == most(sizes[-50:]) and torch.isfinite(chunk.latents).all()
