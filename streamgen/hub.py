"""From a model's name to a pipeline: the embedded one by its name, folders and files by their path, or a Hub id."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from streamgen.config import (
    StreamConfig,
    available,
    check_choice,
    config_root,
    load_preset,
    merge,
    preset_path,
    suggest,
)
from streamgen.device import default_dtype, resolve_device, resolve_dtype
from streamgen.download import hub_name, licence_of, resolve_checkpoint, snapshot
from streamgen.errors import InputError
from streamgen.models.geometry import ModelGeometry
from streamgen.models.reading import read_json

log = logging.getLogger(__name__)


@dataclass
class ModelConfig:
    """`configs/models/NAME.yaml`: what a model brings to any preset, and, by a preset's name, to that one alone."""

    preset: str = "default"
    fps: float = 16
    height: int | None = None  # None = a caller has to say
    width: int | None = None
    stream: dict[str, Any] = field(default_factory=dict)  # laid over the preset
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)  # laid over that, for one preset
    geometry: ModelGeometry | None = None  # of models that come without a folder: `streamgen.memory` estimates by it

    def __post_init__(self) -> None:
        for name in self.presets:
            preset_path(name)


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
    """Where a model's pipeline lies; one on the Hub is fetched into the local cache.

    Args:
        model: an embedded model's name, a diffusers folder, or `owner/name[@revision]`, with or without `hf://`.
    Raises: InputError, one line, for anything else.
    """
    known = embedded_models()
    folder = assets_root() / model if model in known else Path(model)
    name = None if folder.exists() else hub_name(model)
    if name is not None and not name.path:
        return snapshot(name.repo_id, name.revision, needs=("model_index.json",))
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"no model at {model!r}{suggest(model, known)}: give an embedded model ({', '.join(known) or 'none'}), "
            "a diffusers folder that holds model_index.json, or hf://owner/name for one on the Hub"
        )
    return folder


def model_settings(model: str) -> ModelConfig:
    """The settings that go with a model: its folder says which."""
    return model_config(model_name_of(model_folder(model)))


def model_name_of(folder: Path) -> str | None:
    """Which of `configs/models` a folder holds: what it says itself, else the one with transformers of its shape."""
    index = read_json(folder / "model_index.json")
    if index.get("model_name"):
        return index["model_name"]
    shape, experts = _shape(folder), 2 if (folder / "transformer_2").is_dir() else 1
    for name in available("models"):
        known = model_config(name).geometry
        if known is not None and shape == {key: getattr(known.transformer, key) for key in shape}:
            if known.experts == experts:
                return name
    return None


def _shape(folder: Path) -> dict[str, Any]:
    """What tells the known transformers apart."""
    path = folder / "transformer" / "config.json"
    config = read_json(path) if path.is_file() else {}
    keys = ("num_attention_heads", "num_layers", "ffn_dim", "in_channels", "out_channels", "image_dim")
    return {key: config.get(key) for key in keys}


def load(
    model: str = "sprites",
    checkpoint: str | None = None,
    preset: str | None = None,
    device: str = "auto",
    dtype=None,
    overrides: Sequence[str] = (),
    *,
    loras: Sequence[tuple[str, float]] = (),
    loras_2: Sequence[tuple[str, float]] = (),
    codec: str | None = None,
    tile: int | None = None,
    offload: str = "none",
):
    """A pipeline, ready to stream.

    Args:
        model: an embedded model's name, a diffusers folder, or `owner/name[@revision]` on the Hub.
        checkpoint: a .pt or .safetensors whose transformer replaces the folder's; a path here or on the Hub.
        preset: None = the model's own default.
        device: auto (cuda > mps > cpu), or a torch device.
        dtype: "bf16", "fp16" or "fp32"; None = bfloat16 where it is fast, else float32 (see `default_dtype`).
        overrides: dotlist over the configuration, e.g. ["cache.window=9"].
        loras: (file, scale) of LoRAs to merge into the transformer.
        loras_2: the same for the second transformer of a model that has two.
        codec: a file in TAEHV's layout that replaces the VAE: a twentieth of the work, a little less sharp.
        tile: latents per side beyond which frames are decoded in tiles.
        offload: none | text (the text encoder stays on the CPU) | group (the transformer too, layer by layer).
    Raises: InputError in one line for anything that is not there or does not fit.
    """
    from streamgen.pipelines.streaming import StreamingVideoPipeline

    target = resolve_device(device)
    check_choice("offload", offload, ("none", "text", "group"))
    if offload != "none" and target.type == "cpu":
        raise InputError(f"offload={offload} frees the memory of an accelerator, and this stream runs on the CPU")
    number = resolve_dtype(dtype) or default_dtype(target)
    folder = model_folder(model)
    level = logging.DEBUG if model in embedded_models() else logging.INFO  # ours is said in the README
    log.log(level, "%s: licence %s", model, licence_of(folder) or "not stated")
    settings = model_settings(str(folder))
    config = stream_config(preset or settings.preset, settings, overrides)  # before weights: typos fail at once
    given = {} if checkpoint is None else {"transformer": _checkpoint(checkpoint, folder, number)}
    pipe = StreamingVideoPipeline.from_pretrained(folder, **given, **dtype_argument(number))
    pipe.stream_config = config
    for part, files in (("transformer", loras), ("transformer_2", loras_2)):
        for file, scale in files:
            _merge(pipe, part, file, scale)
    _replace_codec(pipe, codec, tile, number)
    return _place(pipe, target, offload)


def _checkpoint(checkpoint: str, folder: Path, dtype):
    """A transformer in place of the folder's, which then need not be read; it is built like that one."""
    from streamgen.models.loading import load_transformer

    own = folder / "transformer" / "config.json"
    return load_transformer(
        resolve_checkpoint(checkpoint), read_json(own) if own.is_file() else None, dtype=dtype
    )


def _merge(pipe, part: str, file: str, scale: float) -> None:
    from streamgen.models.lora import merge_lora, read_lora

    if getattr(pipe, part) is None:
        raise InputError(f"{file} is meant for a second transformer, and this model has one")
    merge_lora(getattr(pipe, part), read_lora(resolve_checkpoint(file), part), scale)


def _replace_codec(pipe, codec: str | None, tile: int | None, dtype) -> None:
    from streamgen.models.codecs import TiledCodec, TinyCodec

    if codec is not None:
        pipe.register_modules(vae=TinyCodec.from_file(resolve_checkpoint(codec)).to(dtype).eval())
    if tile is not None:
        pipe.codec = TiledCodec(pipe.codec, tile, max(1, tile // 4))


def _place(pipe, device, offload: str):
    """Move what belongs on the device there; what is offloaded stays, or comes only while it computes."""
    names = {"none": (), "text": ("text_encoder",), "group": ("text_encoder", "transformer", "transformer_2")}[offload]
    kept = {name: getattr(pipe, name) for name in names if getattr(pipe, name) is not None}
    for name, module in kept.items():
        if name != "text_encoder":
            module.enable_group_offload(device, offload_type="leaf_level")
        setattr(pipe, name, None)
    pipe.to(device)
    pipe.register_modules(**kept)
    return pipe


def dtype_argument(dtype) -> dict:
    """The keyword of `from_pretrained`: `dtype` in new releases of diffusers, `torch_dtype` in older ones."""
    from diffusers.pipelines import pipeline_utils

    return {"dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype": dtype}


def stream_config(preset: str, settings: ModelConfig, overrides: Sequence[str] = ()) -> StreamConfig:
    """defaults < preset < the model's overrides < those it has for this preset < dotlist."""
    return load_preset(preset, overrides, settings.stream, settings.presets.get(preset, {}))
