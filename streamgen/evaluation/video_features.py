"""Fréchet distance between sets of videos, in a feature space that can be exchanged.

    frechet_distance(features(clips), features(references))     # both [N, D]

The default space is the latents of the embedded VAE. Another is named as `package.module:attribute` (a torch module,
or something without arguments that makes one) or as a TorchScript file.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from streamgen.device import resolve_device
from streamgen.errors import InputError
from streamgen.evaluation.video_frames import check_frames

Features = Callable[[np.ndarray], np.ndarray]  # uint8 [F, H, W, 3] -> [n, D]

ENCODED_FRAMES = 32  # pixel frames that the VAE sees at a time
CLIP_FRAMES = 16  # frames that a user's module sees at a time


def frechet_distance(clips: np.ndarray, references: np.ndarray) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features.

    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2·(Σ₁Σ₂)^½), as in FID (arXiv:1706.08500) and FVD (arXiv:1812.01717). It falls as sets
    grow: compare numbers that were taken from equally many features.
    Args:
        clips, references: [N, D] and [M, D], at least two rows each.
    Returns: >= 0 in squared feature units, 0 for equal sets.
    Raises: InputError.
    """
    a, b = (np.asarray(side, np.float64) for side in (clips, references))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"features of shapes {list(a.shape)} and {list(b.shape)}: give [N, D] and [M, D]")
    if min(len(a), len(b)) < 2:
        raise InputError(f"{len(a)} and {len(b)} feature vectors have no covariance; give longer or more videos")
    first, second = (np.atleast_2d(np.cov(side, rowvar=False)) for side in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # Σ₁Σ₂ has the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first) + np.trace(second) - 2 * shared
    return max(0.0, float(distance))


class VAEFeatures:
    """Mean and deviation over space of every latent frame: [n, 2·C], one row per four frames.

    The first latent frame stands for one frame repeated, so it counts only where there is no other. Pictures are
    continued at their right and lower edges to whole latents.
    Args:
        vae: with the interface of `streamgen.models.vae.StreamingVAE`; None: the embedded one.
    """

    def __init__(self, vae: nn.Module | None = None, device: str | torch.device = "cpu") -> None:
        if vae is None:
            from streamgen.hub import assets_root
            from streamgen.models.vae import StreamingVAE

            vae = StreamingVAE.from_pretrained(assets_root() / "sprites" / "vae")
        self.device = resolve_device(device)
        self.vae = vae.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        check_frames(frames)
        time, space = self.vae.temporal_ratio, self.vae.spatial_ratio
        bottom, right = -frames.shape[1] % space, -frames.shape[2] % space
        stop = 1 + (len(frames) - 1) // time * time
        rows, state, first = [], None, 0
        while first < stop:
            last = min(stop, first + ENCODED_FRAMES + (first == 0))
            part = np.pad(frames[first:last], ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
            latents, state = self.vae.encode(_to_tensor(part, self.device), state)  # [1, C, f, h, w]
            pixels = latents.float().flatten(3)
            rows.append(torch.cat([pixels.mean(3), pixels.std(3, correction=0)], 1)[0].T)  # [f, 2C]
            first = last
        found = torch.cat(rows)
        return (found[1:] if len(found) > 1 else found).cpu().numpy()


class ModuleFeatures:
    """A torch module's features of runs of 16 frames; a rest is left out, unless it is all there is.

    Args:
        module: takes float32 [1, 3, f, H, W] in [-1, 1], returns [D] or [n, D].
        name: for messages.
    """

    def __init__(self, module: Callable[[Tensor], Tensor], name: str, device: str | torch.device = "cpu") -> None:
        self.device, self.name = resolve_device(device), name
        self.module = module.to(self.device).eval() if isinstance(module, nn.Module) else module

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        check_frames(frames)
        stop = max(len(frames) // CLIP_FRAMES * CLIP_FRAMES, min(len(frames), CLIP_FRAMES))
        starts = range(0, stop, CLIP_FRAMES)
        return np.concatenate([self._features(frames[first : min(stop, first + CLIP_FRAMES)]) for first in starts])

    def _features(self, frames: np.ndarray) -> np.ndarray:
        found = self.module(_to_tensor(frames, self.device))
        if not isinstance(found, Tensor) or found.ndim not in (1, 2):
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"features {self.name} returned {what}: they must be a tensor [D] or [n, D]")
        return np.atleast_2d(found.float().cpu().numpy())


def _to_tensor(frames: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [1, 3, F, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
    return (pixels.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def load_features(name: str = "vae", device: str | torch.device = "cpu") -> Features:
    """A feature space by name: `vae` (embedded), `package.module:attribute`, or a TorchScript file.

    The last two run their author's code. An attribute that is no module is called without arguments and must return
    one (or any function of a tensor).
    Raises: InputError.
    """
    if name == "vae":
        return VAEFeatures(device=device)
    if Path(name).is_file():
        try:
            return ModuleFeatures(torch.jit.load(name, map_location="cpu"), name, device)
        except (RuntimeError, ValueError):  # torch's own message is a page long
            raise InputError(f"cannot read features {name}: it is no TorchScript module; save one there") from None
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InputError(f"unknown features {name!r}: give vae, MODULE:ATTRIBUTE or an existing TorchScript file")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"cannot load features {name!r}: {error}; is its folder on PYTHONPATH?") from None
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise InputError(f"features {name!r} are a {type(found).__name__}: name a torch module or what makes one")
        found = found()
    return ModuleFeatures(found, name, device)
