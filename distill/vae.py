"""Recipe `sprites/vae`: the embedded codec, trained on pictures the world draws as it goes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamgen.distill.data import to_pixels
from streamgen.errors import InputError
from streamgen.media import save_image
from streamgen.models.vae import TIME, StreamingVAE
from streamgen.worlds.sprites.dataset import change_within
from streamgen.worlds.sprites.language import Change, Timeline, sample_scene
from streamgen.worlds.sprites.renderer import SIZE, draw, play


@dataclass
class VAETask:
    """Windows of `1 + 4·(latent_frames - 1)` frames; crops around the bodies, whole pictures later in the run."""

    latent_channels: int = 24
    batch: int = 16
    latent_frames: int = 4
    crop: int = 64
    crop_until: int = 0  # steps; afterwards whole pictures, a quarter as many
    kl: float = 1e-4

    def __post_init__(self) -> None:
        if self.latent_frames < 2:
            raise InputError(f"vae.latent_frames={self.latent_frames}: give 2 or more, or nothing is learnt about time")


def sample_window(rng: np.random.Generator, frames: int, side: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """A random window of a random scene: uint8 [F, 128, 128, 3], and a point near a body, in pixels."""
    scene = sample_scene(rng, side)
    first = int(rng.integers(0, 64))
    changes = [Change(0, scene)]
    if rng.random() < 0.3:
        new, cut = change_within(scene, rng, side)
        changes.append(Change(first + int(rng.integers(1, frames)), new, cut))
    script = play(Timeline(tuple(changes)), first + frames, seed=int(rng.integers(2**31)))
    body = script.bodies[rng.integers(len(script.bodies))][-1]
    centre = np.array([body.pose.y[-1], body.pose.x[-1]]) * SIZE + rng.uniform(-24, 24, 2)
    return draw(script, frames, first=first), centre


class VAETrainer:
    """L1 + 2·L2 + KL on reconstructions."""

    def __init__(self, config: VAETask, device: torch.device, autocast: bool, compiled: bool = False) -> None:
        self.config, self.device, self.autocast = config, device, autocast
        if compiled:
            raise InputError("train.compile=true does nothing for a codec, which runs as it is: leave it out")
        self.init = None
        self.module = StreamingVAE(latent_channels=config.latent_channels).to(device)

    def prepare(self) -> None:
        """Nothing: pictures are drawn as it goes."""

    def batch(self, step: int, rng: np.random.Generator) -> Tensor:
        """[B, 3, F, S, S] in [-1, 1]."""
        config, frames = self.config, 1 + TIME * (self.config.latent_frames - 1)
        cropped = step < config.crop_until
        count = config.batch if cropped else max(1, config.batch * config.crop**2 // SIZE**2)
        clips = []
        for _ in range(count):
            clip, centre = sample_window(rng, frames)
            if cropped:
                y, x = np.clip(centre - config.crop // 2, 0, SIZE - config.crop).astype(int)
                clip = clip[:, y : y + config.crop, x : x + config.crop]
            clips.append(clip)
        return to_pixels(np.stack(clips)).to(self.device)

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        frames = self.batch(step, rng)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            mean, log_variance, _ = self.module.moments(frames)
            mean, log_variance = mean.float(), log_variance.float().clamp(-12, 4)
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            out, _ = self.module.reconstruct(latents)
        error = out.float() - frames
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + self.config.kl * kl
        return loss, {"psnr": psnr(error), "kl": float(kl.detach())}

    def sample(self, module: StreamingVAE, path: Path) -> dict[str, float]:
        rng = np.random.default_rng(12345)
        clips = np.stack([sample_window(rng, 17, side="val")[0] for _ in range(8)])
        frames = to_pixels(clips).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            out, _ = module.reconstruct(module.moments(frames)[0])
        rows = torch.stack([frames, out.float().clamp(-1, 1)], 1).flatten(0, 1)[:, :, ::4]  # [16, 3, 5, H, W]
        sheet = ((rows + 1) * 127.5).permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
        save_image(path, sheet.round().byte().cpu().numpy())
        return {"psnr": psnr(out.float() - frames)}

    def export(self, module: StreamingVAE, folder: Path, manifest: dict) -> None:
        """A diffusers folder with the latents' statistics in its config."""
        rng = np.random.default_rng(54321)
        frames = to_pixels(np.stack([sample_window(rng, 33)[0] for _ in range(24)])).to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            mean = module.moments(frames)[0].float()
        module.register_to_config(
            latents_mean=mean.mean((0, 2, 3, 4)).tolist(), latents_std=mean.std((0, 2, 3, 4)).tolist()
        )
        module.save_pretrained(folder)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def psnr(error: Tensor) -> float:
    """Of an error on the [-1, 1] scale, in dB."""
    return float(10 * torch.log10(4 / error.detach().square().mean()))
