"""From a model's name to a pipeline: the embedded one by its name, folders and files by their path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from streamgen.config import StreamConfig, available, config_root, load_preset, merge, suggest
from streamgen.device import default_dtype, resolve_device, resolve_dtype
from streamgen.errors import InputError


@dataclass
class ModelConfig:
    """`configs/models/NAME.yaml`: what a model brings to any preset."""

    preset: str = "default"
    fps: float = 16
    height: int = 480
    width: int = 832
    stream: dict[str, Any] = field(default_factory=dict)  # laid over the preset


def assets_root() -> Path:
    """Where the package's own weights lie, one folder per model."""
    return Path(str(resources.files("streamgen"))) / "assets"


def embedded_models() -> list[str]:
    """Names that need no download."""
    return sorted(p.name for p in assets_root().iterdir() if (p / "model_index.json").is_file())


def model_config(name: str | None) -> ModelConfig:
    """The settings of a model known by name; plain defaults for any other."""
    if name not in available("models"):
        return ModelConfig()
    return merge(ModelConfig, config_root() / "models" / f"{name}.yaml")


def model_folder(model: str) -> Path:
    """Where a model's pipeline lies. Raises InputError that names the embedded ones."""
    known = embedded_models()
    folder = assets_root() / model if model in known else Path(model)
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"no model at {model!r}{suggest(model, known)}: give an embedded model ({', '.join(known) or 'none'}) "
            "or a diffusers folder that holds model_index.json"
        )
    return folder


def model_settings(model: str) -> ModelConfig:
    """The settings that go with a model: its folder says which."""
    index = json.loads((model_folder(model) / "model_index.json").read_text())
    return model_config(index.get("model_name"))


def load(
    model: str = "sprites",
    checkpoint: str | None = None,
    preset: str | None = None,
    device: str = "auto",
    dtype=None,
    overrides: Sequence[str] = (),
):
    """A pipeline, ready to stream.

    Args:
        model: an embedded model's name, or a diffusers folder.
        checkpoint: a .pt or .safetensors whose transformer replaces the folder's.
        preset: None = the model's own default.
        device: auto (cuda > mps > cpu), or a torch device.
        dtype: "bf16", "fp16" or "fp32"; None = bfloat16 where it is fast, else float32 (see `default_dtype`).
        overrides: dotlist over the configuration, e.g. ["cache.window=9"].
    Raises: InputError in one line for anything that is not there or does not fit.
    """
    from streamgen.pipelines.streaming import StreamingVideoPipeline

    target = resolve_device(device)
    number = resolve_dtype(dtype) or default_dtype(target)
    folder, settings = model_folder(model), model_settings(model)
    config = stream_config(preset or settings.preset, settings, overrides)  # before weights: typos fail at once
    pipe = StreamingVideoPipeline.from_pretrained(folder, **dtype_argument(number))
    pipe.stream_config = config
    if checkpoint is not None:
        from streamgen.models.loading import load_transformer

        other = load_transformer(checkpoint, dict(pipe.transformer.config))
        pipe.register_modules(transformer=other.to(number).eval())
    return pipe.to(target)


def dtype_argument(dtype) -> dict:
    """The keyword of `from_pretrained`: `dtype` in new releases of diffusers, `torch_dtype` in older ones."""
    from diffusers.pipelines import pipeline_utils

    return {"dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype": dtype}


def stream_config(preset: str, settings: ModelConfig, overrides: Sequence[str] = ()) -> StreamConfig:
    """defaults < preset < the model's overrides < dotlist."""
    return load_preset(preset, overrides, settings.stream)
