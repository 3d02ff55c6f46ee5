"""The trainer's promises: resumed = uninterrupted, many small batches = one large one, a signal loses nothing."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from streamgen.distill.trainer import Optimizers, TrainConfig, Trainer, learning_rate_factor, matrix_view
from streamgen.errors import InputError


class Task:
    """Least squares on data that follow from the step's generator."""

    init = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential()
        self.module.add_module("blocks", nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)))
        self.module.add_module("head", nn.Linear(6, 2))
        self.seen = []

    def prepare(self):
        assert not self.seen

    def loss(self, step, rng):
        x = torch.from_numpy(rng.standard_normal((16, 6))).float()
        self.seen.append((step, float(x[0, 0])))
        error = self.module(x) - x[:, :2].tanh()
        noise = torch.randn(1)  # a recipe may draw from torch as well
        return error.square().mean() + 0 * noise.sum(), {"noise": float(noise)}

    def sample(self, module, path):
        path.write_bytes(b"png")
        return {"score": 1.0}

    def export(self, module, folder, manifest):
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps(manifest))


def make(folder, **changes) -> Trainer:
    settings = dict(recipe="toy", output=str(folder), warmup_steps=2, matrix_learning_rate=1e-2, ema=0.9, steps=8)
    return Trainer(Task(), TrainConfig(**{**settings, **changes}), {"recipe": "toy"})


def weights(trainer: Trainer) -> torch.Tensor:
    parts = [*trainer.task.module.parameters(), *trainer.average.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def test_resumed_equals_uninterrupted_bit_by_bit(tmp_path):
    whole = make(tmp_path / "a")
    assert whole.run()
    first = make(tmp_path / "b")
    for _ in range(3):
        first.train_step()
    first.save()
    second = make(tmp_path / "b")
    torch.manual_seed(99)
    assert second.resume() and second.step == 3
    assert second.run()
    assert torch.equal(weights(whole), weights(second))
    assert second.task.seen == whole.task.seen[3:]


def test_training_lowers_the_loss_and_logs_every_step(tmp_path):
    trainer = make(tmp_path, steps=60, learning_rate=3e-2, matrix_learning_rate=3e-2)
    assert trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "toy" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert lines[-1]["quality"] == {"score": 1.0}
    assert json.loads((tmp_path / "toy" / "export" / "manifest.json").read_text())["steps"] == 60


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    small, large = make(tmp_path / "a", accumulate=4), make(tmp_path / "b")
    seen = {}
    for name, trainer in (("small", small), ("large", large)):
        trainer.optimizers.step = lambda factor, t=trainer, n=name: seen.setdefault(
            n, [p.grad.clone() for p in t.task.module.parameters()]
        )

    def four(step, rng):
        rngs = [np.random.default_rng([0, step, part]) for part in range(4)]
        for rng in rngs:
            rng.integers(2**31)  # the trainer seeds torch with a batch's first number
        return torch.stack([draw_large(step, r)[0] for r in rngs]).mean(), {}

    draw_large = large.task.loss
    large.task.loss = four
    small.train_step()
    large.train_step()
    for a, b in zip(seen["small"], seen["large"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_signal_ends_the_step_and_saves(tmp_path):
    trainer = make(tmp_path, steps=10_000)
    step = trainer.train_step

    def interrupted():
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.train_step = interrupted
    assert not trainer.run()
    again = make(tmp_path)
    assert again.resume() and again.step == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_broken_gradient_is_refused_before_it_reaches_the_weights(tmp_path):
    trainer = make(tmp_path)
    before = weights(trainer).clone()
    trainer.task.loss = lambda step, rng: (sum(p.sum() for p in trainer.task.module.parameters()) * float("nan"), {})
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.train_step()
    assert torch.equal(before, weights(trainer))


def test_rates_warm_up_hold_and_fall():
    config = TrainConfig(steps=100, warmup_steps=10, decay_from=0.5, decay_to=0.1)
    assert learning_rate_factor(0, config) == pytest.approx(0.1)
    assert learning_rate_factor(9, config) == learning_rate_factor(50, config) == 1
    assert learning_rate_factor(75, config) == pytest.approx(0.55)
    assert learning_rate_factor(100, config) == pytest.approx(0.1)


def test_matrices_and_kernels_go_to_muon_and_share_memory():
    module = nn.Sequential()
    module.add_module("blocks", nn.Sequential(nn.Linear(4, 4)))
    module.add_module("conv", nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last))
    optimizers = Optimizers(module, TrainConfig(matrix_learning_rate=1e-2))
    assert [tuple(v.shape) for v in optimizers.views] == [(4, 4), (5, 27)]
    kernel = module.conv.weight
    view = matrix_view(kernel)
    view.zero_()
    assert kernel.abs().sum() == 0
    with pytest.raises(ValueError, match="channels_last"):
        matrix_view(nn.Conv2d(3, 5, 3).weight)


def test_a_complete_run_leaves_its_manifest_alone(tmp_path):
    assert make(tmp_path).run(quiet=True)
    manifest = tmp_path / "toy" / "export" / "manifest.json"
    manifest.write_text("how it was made")
    again = make(tmp_path)
    assert again.resume() and again.run() and manifest.read_text() == "how it was made"


def test_a_resumed_run_takes_the_settings_it_is_given(tmp_path):
    make(tmp_path, steps=3).run(quiet=True)
    more = make(tmp_path, betas=[0.5, 0.6], weight_decay=0.25)
    more.resume()
    adam, muon = (part.param_groups[0] for part in more.optimizers.parts)
    assert adam["betas"] == (0.5, 0.6) and adam["weight_decay"] == muon["weight_decay"] == 0.25
    more.task.init = "elsewhere"
    with pytest.raises(InputError, match="not from elsewhere"):
        more.resume()


def test_an_export_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    trainer.save()

    def half(module, folder, manifest):
        folder.mkdir()
        (folder / "manifest.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(trainer.task, "export", half)
    with pytest.raises(OSError):
        trainer.save()
    assert json.loads((tmp_path / "toy" / "export" / "manifest.json").read_text())["steps"] == 0


def test_an_interrupted_preparation_ends_the_run_at_once(tmp_path, monkeypatch):
    trainer = make(tmp_path)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.task, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.step == 0 and not trainer.checkpoint.exists()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"accumulate": 0}, {"seed": -1}, {"betas": [0.9]}, {"threads": -1}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError, match=f"train.{next(iter(wrong))}="):
        TrainConfig(**wrong)
