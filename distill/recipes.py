"""From a recipe's name to a running trainer: `configs/distill/TARGET/RECIPE.yaml` against the dataclasses.

    streamgen train sprites/vae train.steps=100
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import OmegaConf

from streamgen.config import available, check_choice, config_root, read_config
from streamgen.device import resolve_device
from streamgen.distill.flow import FlowTask, FlowTrainer
from streamgen.distill.trainer import TrainConfig, Trainer
from streamgen.distill.vae import VAETask, VAETrainer
from streamgen.errors import InputError

TASKS = {"vae": VAETrainer, "flow": FlowTrainer}


@dataclass
class Recipe:
    """A recipe file: which task, how it is trained, and the task's own section."""

    task: str = "vae"
    train: TrainConfig = field(default_factory=TrainConfig)
    vae: VAETask = field(default_factory=VAETask)
    flow: FlowTask = field(default_factory=FlowTask)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Raises InputError for an unknown recipe or key."""
    path = config_root() / "distill" / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"unknown recipe {name!r}: choose one of {', '.join(available('distill'))}")
    recipe = read_config(Recipe, path, overrides)
    recipe.train.recipe = name
    return recipe


def provenance(name: str, recipe: Recipe, device: torch.device) -> dict:
    """What a manifest says besides steps and seconds."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except OSError:
        commit = ""
    return {
        "recipe": name,
        "commit": commit or "unknown",
        "device": str(device),
        "torch": torch.__version__,
        "seed": recipe.train.seed,
        "config": OmegaConf.to_container(OmegaConf.structured(recipe)),
    }


def build(name: str, overrides: Sequence[str] = ()) -> Trainer:
    """A trainer ready to `resume()` and `run()`."""
    recipe = load_recipe(name, overrides)
    config = recipe.train
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    check_choice("task", recipe.task, tuple(TASKS))
    task = TASKS[recipe.task](getattr(recipe, recipe.task), device, config.autocast, config.compile)
    return Trainer(task, config, provenance(name, recipe, device))
