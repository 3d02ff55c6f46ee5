"""The recipes of the embedded model at toy size: what a batch holds, what a mask allows, and that losses fall."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from streamgen.config import available
from streamgen.distill import recipes, vae
from streamgen.distill.data import ClipSpec, LatentClips, tell, vocabulary
from streamgen.distill.flow import FlowTask, FlowTrainer
from streamgen.distill.vae import VAETask, VAETrainer
from streamgen.errors import InputError
from streamgen.models.text import build_tokenizer
from streamgen.models.vae import StreamingVAE
from streamgen.worlds.sprites import SpritesDataset, parse, split


@pytest.fixture
def flow(monkeypatch) -> FlowTrainer:
    small = dict(batch=2, dim=24, heads=2, layers=1, ffn=32, text_dim=16, latent_channels=4, codec="unused")
    config = FlowTask(**small, patterns={"clean": 1.0})
    task = FlowTrainer(config, torch.device("cpu"), autocast=False, compiled=False)
    sets = {chunks: random_clips(chunks) for chunks in (1, 9)}
    monkeypatch.setattr(task, "clips", lambda chunks: sets[1 if chunks == 1 else 9])
    return task


def random_clips(chunks: int) -> LatentClips:
    """Six clips of noise, each with the scenes of a real one."""
    latents = torch.randn(6, 4, 3 * chunks, 4, 4, generator=torch.Generator().manual_seed(chunks)).half()
    world = SpritesDataset(6, chunks)
    return LatentClips(latents, [[(c.frame, c.scene) for c in world[i].scenes] for i in range(6)], 3)


@pytest.mark.parametrize("pattern", ["clean", "start", "window", "matched", "whole"])
def test_a_batch_is_what_its_pattern_says(flow, pattern):
    flow.config.patterns = {pattern: 1.0}
    for seed in range(4):
        torch.manual_seed(seed)
        batch, prompts = flow.batch(np.random.default_rng(seed))
        frames = batch.sequence.shape[2]
        assert frames == {"clean": 42, "start": 3}.get(pattern, 21)
        if pattern in ("clean", "matched"):
            assert sorted(frame for mine, _ in batch.mask for frame in mine) == list(range(frames))
        elif pattern == "window":
            assert batch.mask.shape == (len(prompts), frames, frames) and batch.mask.any(-1).all()
        else:
            assert batch.mask is None  # everything sees everything
        noisy = batch.weight > 0
        level = (batch.timestep / 1000)[:, None, :, None, None]
        # x + (1 - σ)·v = ε and x - σ·v = x0: so x - σ·(ε - x0) is the clean clip wherever something is learnt
        clean = batch.sequence - level * batch.target
        where = noisy[:, None, :, None, None].expand_as(clean)
        source = flow.clips(7).latents.float().flatten(2).std()
        assert noisy.any() and (clean[where].std() / source - 1).abs() < 0.3
        assert (batch.timestep[noisy] > 0).all()
        if pattern == "clean":  # nothing noisy is ever a key for another chunk, nothing clean looks at noise
            assert all(mine[0] >= 21 or max(seen) < 21 for mine, seen in batch.mask)
            assert all(mine[0] < 21 or {f for f in seen if f >= 21} == set(mine) for mine, seen in batch.mask)
            assert (batch.positions[:, :21] == batch.positions[:, 21:]).all()
            assert (batch.timestep[:, :21] <= flow.config.context_noise).all()
        if pattern == "matched":
            assert (batch.timestep == batch.timestep[:, :1]).all()
        if pattern == "window":
            steps = batch.timestep.diff(dim=1)
            assert ((steps >= 0) | (batch.timestep[:, 1:] == 0)).all()


def test_a_recipe_trains_on_the_mix_it_names_and_no_other():
    assert recipes.load_recipe("sprites/teacher").flow.patterns == {"whole": 1.0}
    assert set(recipes.load_recipe("sprites/causal").flow.patterns) == {"clean", "start", "window", "matched", "whole"}
    for wrong, words in (
        ({"patterns": {"clen": 1.0}}, "'clen' is unknown .did you mean 'clean'"),
        ({"patterns": {"clean": -1.0}}, "cannot have a share of -1.0"),
        ({"chunks": 10}, "flow.chunks=10: give 2 to flow.clip_chunks=9"),
    ):
        with pytest.raises(InputError, match=words):
            FlowTask(**wrong)
    with pytest.raises(InputError, match="flow.patterns is empty"):
        FlowTrainer(FlowTask(), torch.device("cpu"), autocast=False, compiled=False)


def test_what_is_not_there_is_said_before_training(flow, tmp_path):
    with pytest.raises(InputError, match="flow.codec=unused is no folder of a codec"):
        flow.prepare()
    with pytest.raises(InputError, match="flow.init=.* is no model"):
        FlowTrainer(replace(flow.config, init=str(tmp_path)), torch.device("cpu"), autocast=False, compiled=False)
    with pytest.raises(InputError, match="'training' is unknown"):
        SpritesDataset(1, side="training")
    with pytest.raises(InputError, match="vae.latent_frames=1"):
        VAETask(latent_frames=1)


def test_the_codec_never_sees_a_held_out_scene(monkeypatch):
    shown = []
    play = vae.play
    monkeypatch.setattr(vae, "play", lambda told, *rest, **more: shown.append(told) or play(told, *rest, **more))
    rng = np.random.default_rng(0)
    for _ in range(60):
        vae.sample_window(rng, 5)
    scenes = [change.scene for timeline in shown for change in timeline.changes]
    assert len(scenes) > 65 and {split(scene) for scene in scenes} == {"train"}


def test_clips_of_another_codec_have_another_name(tmp_path):
    spec = ClipSpec(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = spec.file_name
    (tmp_path / "model.safetensors").write_bytes(b"2")
    others = {before, spec.file_name, replace(spec, chunk_frames=2).file_name, replace(spec, seed=1).file_name}
    assert len(others) == 4 and spec.file_name.startswith("4800x9x3-seed0-")


def test_clean_history_target_matches_the_clip(flow):
    flow.config.patterns, flow.config.gap = {"whole": 1.0}, 0.0
    batch, _ = flow.batch(np.random.default_rng(3))
    clean = batch.sequence - (batch.timestep / 1000)[:, None, :, None, None] * batch.target
    candidates = flow.clips(7).latents.float().unfold(2, 21, 3).movedim(-1, 3).movedim(2, 1).flatten(0, 1)
    for clip in clean:
        assert (candidates - clip).abs().amax((1, 2, 3, 4)).min() < 1e-4


def test_the_loss_falls_and_every_parameter_learns(flow):
    flow.config.patterns = {"start": 0.5, "clean": 0.5}
    optimizer = torch.optim.Adam(flow.module.parameters(), 1e-2)
    losses = []
    for step in range(24):
        torch.manual_seed(step)
        loss, _ = flow.loss(step, np.random.default_rng(step % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    # the zero head lets nothing through at first; now everything has a gradient
    silent = [name for name, p in flow.module.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []


def test_prompts_of_a_step_are_on_the_training_side_and_say_what_changes():
    rng = np.random.default_rng(0)
    world = SpritesDataset(40)
    for index in range(40):
        scenes = [change.scene for change in world[index].scenes]
        prompts = tell(scenes, rng)
        assert all(split(prompt) == "train" for prompt in prompts)
        assert len(set(map(parse, prompts))) == len(set(scenes))


def test_favoured_clips_come_up_more_often():
    said = ("square spinning", "ring pulsing", "square circling")
    scenes = [parse(f"a red {words} on a navy background") for words in said]
    clips = lambda favour: LatentClips(torch.zeros(3, 4, 3, 2, 2), [[(0, scene)] for scene in scenes], 3, favour)
    drawn = lambda it, rng: np.bincount([it.draw(rng) for _ in range(3000)], minlength=3) / 3000
    share = lambda favour: drawn(clips(favour), np.random.default_rng(0))
    assert share({}) == pytest.approx([1 / 3] * 3, abs=0.05)
    assert share({"spinning": 6.0, "ring": 3.0}) == pytest.approx([0.6, 0.3, 0.1], abs=0.05)


@pytest.mark.parametrize("favour", ["{spinnning: 2}", "{spinning: 0}"])
def test_favouring_nothing_that_there_is_is_refused(favour):
    with pytest.raises(InputError, match=r"flow\.favour: .*spinn"):
        recipes.build("sprites/causal", [f"flow.favour={favour}"])


def test_every_word_of_the_world_has_a_token():
    tokenizer = build_tokenizer(vocabulary(), 32)
    rng = np.random.default_rng(1)
    world = SpritesDataset(60, chunks=1)
    from streamgen.worlds.sprites import describe

    for index in range(60):
        ids = tokenizer(describe(world[index].scenes[0].scene, rng, 0.9))["input_ids"]
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id and len(ids) <= 32
    assert tokenizer("a zebra")["input_ids"][1] == tokenizer.unk_token_id


def test_the_codec_recipe_learns(tmp_path):
    task = VAETrainer(VAETask(latent_channels=4, batch=2, latent_frames=2, crop=32, crop_until=10**9),
                      torch.device("cpu"), autocast=False)  # fmt: skip
    task.module = StreamingVAE(latent_channels=4, widths=(8, 8, 8))
    optimizer = torch.optim.Adam(task.module.parameters(), 3e-3)
    losses = []
    for step in range(30):
        torch.manual_seed(step)
        loss, _ = task.loss(step, np.random.default_rng(step % 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    task.export(task.module, tmp_path, {"recipe": "toy"})
    again = StreamingVAE.from_pretrained(tmp_path)
    with torch.no_grad():
        latents, _ = again.encode(task.batch(0, np.random.default_rng(5)))
    assert 0.5 < latents.std() < 2 and json.loads((tmp_path / "manifest.json").read_text())


def test_every_recipe_loads_and_typos_do_not():
    for name in available("distill"):
        assert recipes.load_recipe(name).train.recipe == name
    with pytest.raises(InputError, match="did you mean 'train.steps'"):
        recipes.load_recipe("sprites/vae", ["train.stepz=3"])
    with pytest.raises(InputError, match="sprites/vae"):
        recipes.load_recipe("sprites/vea")
