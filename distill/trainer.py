"""One trainer for every recipe: resumable bit by bit, safe to interrupt, with samples one can look at.

A recipe is a `Task`: modules, a loss for a step, a picture. Batches are a pure function of (seed, step), so a resumed
run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from streamgen.errors import InputError, UnavailableError

log = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """What every recipe has. Its YAML adds a `task` section of its own."""

    recipe: str = ""
    steps: int = 1000
    seed: int = 0
    learning_rate: float = 7e-4
    matrix_learning_rate: float | None = None  # Muon for the matrices of transformer blocks; None = AdamW for all
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    warmup_steps: int = 50
    decay_from: float = 0.67  # share of the run after which the rate falls linearly …
    decay_to: float = 0.03  # … to this share of its peak
    clip: float = 1.0
    ema: float = 0.999
    accumulate: int = 1
    autocast: bool = True
    compile: bool = False
    device: str = "auto"
    threads: int | None = None
    checkpoint_minutes: float = 5.0
    sample_minutes: float = 10.0
    max_minutes: float | None = None  # stop (resumable) after this long
    output: str = "runs"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accumulate", 1), ("seed", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"train.{name}={value}: give {least} or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"train.betas={self.betas}: give two numbers from 0 to below 1, as [0.9, 0.99]")


class Task(Protocol):
    """What a recipe supplies."""

    module: nn.Module  # everything that is trained
    init: str | None  # what its weights were read from

    def prepare(self) -> None: ...  # what may take long before the first step, such as making data
    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]: ...
    def sample(self, module: nn.Module, path: Path) -> dict[str, float]: ...
    def export(self, module: nn.Module, folder: Path, manifest: dict) -> None: ...


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay over the last part of the run."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = step / max(1, config.steps)
    fall = min(1.0, max(0.0, (progress - config.decay_from) / max(1e-9, 1 - config.decay_from)))
    return warm * (1 - (1 - config.decay_to) * fall)


def matrix_view(parameter: Tensor) -> Tensor:
    """A weight as the matrix it is, sharing memory: linear [out, in], or a convolution's [out, h·w·in]."""
    if parameter.ndim == 2:
        return parameter.detach()
    view = parameter.detach().permute(0, 2, 3, 1)
    if not view.is_contiguous():
        raise ValueError("convolutions are trained in channels_last memory, where their kernels are rows of a matrix")
    return view.flatten(1)


class Optimizers:
    """AdamW, and Muon (RMS-matched) for weight matrices where the recipe asks for it."""

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        wanted = bool(config.matrix_learning_rate)
        self.sources = [p for name, p in named if wanted and (p.ndim == 4 or ("blocks." in name and p.ndim == 2))]
        self.views = [matrix_view(p) for p in self.sources]
        taken = set(map(id, self.sources))
        rest = [p for _, p in named if id(p) not in taken]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                rest, lr=config.learning_rate, betas=tuple(config.betas), weight_decay=config.weight_decay, fused=True
            )
        ]
        if self.views:
            rate = config.matrix_learning_rate
            if not hasattr(torch.optim, "Muon"):
                raise UnavailableError(
                    f"train.matrix_learning_rate needs Muon, which torch {torch.__version__} does not have: update "
                    "torch, or leave it out"
                )
            self.parts.append(
                torch.optim.Muon(
                    self.views, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        self.peaks = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rates; gradients are consumed."""
        for source, view in zip(self.sources, self.views, strict=True):
            view.grad = source.grad if source.ndim == 2 else source.grad.permute(0, 2, 3, 1).flatten(1)
        for part, peak in zip(self.parts, self.peaks, strict=True):
            part.param_groups[0]["lr"] = peak * factor
            part.step()
        for source in self.sources:
            source.grad = None
        self.parts[0].zero_grad(set_to_none=True)

    def configure(self, config: TrainConfig) -> None:
        """Take over what a loaded state knows otherwise (rates are set at every step)."""
        for part in self.parts:
            for group in part.param_groups:
                group["weight_decay"] = config.weight_decay
                if "betas" in group:
                    group["betas"] = tuple(config.betas)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Trainer:
    """Runs a task: optimisers, EMA, log, checkpoints. `run()` returns when done, out of time, or asked to stop."""

    def __init__(self, task: Task, config: TrainConfig, manifest: dict) -> None:
        self.task, self.config, self.manifest = task, config, manifest
        self.folder = Path(config.output) / config.recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        self.optimizers = Optimizers(task.module, config)
        self.average = AveragedModel(task.module, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.step, self.seconds, self.stopping = 0, 0.0, False

    # ------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "module": self.task.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": self.optimizers.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.task.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.optimizers.configure(self.config)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint and the averaged weights; the old ones stay until the new ones are whole."""
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(self.state_dict(), temporary)
        os.replace(temporary, self.checkpoint)
        manifest = {**self.manifest, "steps": self.step, "seconds": round(self.seconds)}
        target, new, old = (self.folder / name for name in ("export", "export.new", "export.old"))
        for left in (new, old):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.task.export(self.average.module, new, manifest)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
        shutil.rmtree(old, ignore_errors=True)

    def resume(self) -> bool:
        if not self.checkpoint.exists():
            return False
        if self.task.init:
            raise InputError(
                f"{self.checkpoint} is there, and goes on from its own weights, not from {self.task.init}: "
                "--no-resume starts over, --output elsewhere keeps it"
            )
        self.load_state_dict(torch.load(self.checkpoint, weights_only=True, map_location="cpu"))
        log.info("resumed %s at step %d", self.config.recipe, self.step)
        return True

    # ------------------------------------------------------------------------------------------- running
    def train_step(self) -> dict[str, float]:
        """One optimiser update from `accumulate` batches; equal to one large batch."""
        config, metrics = self.config, {}
        factor = learning_rate_factor(self.step, config)
        for part in range(config.accumulate):
            rng = np.random.default_rng([config.seed, self.step, part])
            torch.manual_seed(int(rng.integers(2**31)))
            loss, extra = self.task.loss(self.step, rng)
            (loss / config.accumulate).backward()
            for name, value in {"loss": float(loss.detach()), **extra}.items():
                metrics[name] = metrics.get(name, 0.0) + value / config.accumulate
        norm = nn.utils.clip_grad_norm_(self.task.module.parameters(), config.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient at step {self.step} is not finite: lower learning_rate and resume")
        self.optimizers.step(factor)
        self.average.update_parameters(self.task.module)
        self.step += 1
        return {**metrics, "norm": float(norm), "rate": factor}

    def run(self, quiet: bool = False) -> bool:
        """Train until `steps`, `max_minutes` or a signal. Returns whether the run is complete.

        A run that is complete already writes nothing: what is there says how it was made.
        """
        config = self.config
        if self.step >= config.steps:
            return True
        self.task.prepare()  # not in the time of training, and Ctrl-C ends it at once
        begin = last_save = last_sample = time.monotonic()
        bar = tqdm(
            total=config.steps, initial=self.step, desc=config.recipe, mininterval=5, dynamic_ncols=True, disable=quiet
        )
        with self._signals(), open(self.folder / "log.jsonl", "a", buffering=1) as lines:
            while self.step < config.steps and not self.stopping:
                start = time.monotonic()
                metrics = self.train_step()
                now = time.monotonic()
                self.seconds += now - start
                record = {"step": self.step, "time": round(self.seconds, 1), **metrics}
                lines.write(json.dumps({k: round(v, 5) for k, v in record.items()}) + "\n")
                bar.update(1)
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
                if now - last_sample > 60 * config.sample_minutes:
                    self._sample(lines)
                    last_sample = time.monotonic()
                if now - last_save > 60 * config.checkpoint_minutes:
                    self.save()
                    last_save = time.monotonic()
                if config.max_minutes and now - begin > 60 * config.max_minutes:
                    break
            self.save()
            if self.step >= config.steps:
                self._sample(lines)
        bar.close()
        return self.step >= config.steps

    def _sample(self, lines) -> None:
        path = self.folder / "samples" / f"{self.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        with torch.no_grad():
            quality = self.task.sample(self.average.module, path)
        lines.write(json.dumps({"step": self.step, "quality": quality}) + "\n")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Finish the step, save, and leave on SIGTERM or Ctrl-C."""

        def stop(number, frame):
            self.stopping = True

        old = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
