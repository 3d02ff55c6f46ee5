"""Write the causal transformer in the layouts that others read."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from streamgen.errors import InputError
from streamgen.models.layouts import LAYOUTS, original_config, to_original_name
from streamgen.models.reading import WEIGHTS_NAME, State, first_line
from streamgen.models.transformer import CausalWanTransformer3DModel

__all__ = ["LAYOUTS", "replace_file", "save_transformer"]


def save_transformer(
    transformer: CausalWanTransformer3DModel,
    path: str | os.PathLike,
    layout: str = "diffusers",
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write weights in one of `LAYOUTS`; each file appears complete or not at all.

    Args:
        path: a folder for "diffusers" and "wan" (the same with original names), a file for "self-forcing"
            (one `.pt` with `generator_ema`; it carries no configuration).
        max_shard_size: bytes, or "5GB" (powers of ten); folders with more weights hold several files and their index.
    Returns: the path.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    state = _plain_state(transformer)
    path = Path(path)
    if layout == "self-forcing":
        state = {f"model.{to_original_name(name)}": tensor for name, tensor in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: torch.save({"generator_ema": state}, temporary))
        return path
    text = transformer.to_json_string()
    if layout == "wan":
        state = {to_original_name(name): tensor for name, tensor in state.items()}
        text = json.dumps(original_config(transformer.config), indent=2, sort_keys=True) + "\n"
    if path.is_file():
        raise InputError(f"{path} is a file; layout {layout!r} writes a folder")
    path.mkdir(parents=True, exist_ok=True)
    _write_shards(state, path, max_shard_size)
    replace_file(path / "config.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _plain_state(transformer: CausalWanTransformer3DModel) -> State:
    """The model's own tensors on the CPU."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in transformer.state_dict().items()}
    if any(".lora_" in name for name in state):
        raise InputError("the transformer has LoRA layers; fuse and unload them, or delete the adapters, before saving")
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}  # deleting leaves the shells


def _write_shards(state: State, folder: Path, max_shard_size: int | str) -> None:
    """One file or several with an index; then what an earlier model left goes, because readers would prefer it."""
    stem, suffix = os.path.splitext(WEIGHTS_NAME)
    try:
        split = split_torch_state_dict_into_shards(
            state, filename_pattern=f"{stem}{{suffix}}{suffix}", max_shard_size=max_shard_size
        )
    except ValueError as failure:
        raise InputError(f"max_shard_size {max_shard_size!r} is no size: give bytes, or text like '5GB'") from failure
    for file, names in split.filename_to_tensors.items():
        shard = {name: state[name] for name in names}
        replace_file(folder / file, lambda temporary, shard=shard: save_file(shard, temporary, {"format": "pt"}))
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        replace_file(index, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    else:
        index.unlink(missing_ok=True)
    for file in [folder / WEIGHTS_NAME, *folder.glob(f"{stem}-*-of-*{suffix}")]:
        if file.name not in split.filename_to_tensors:
            file.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename over it. Raises OSError if that fails on the way."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (SafetensorError, RuntimeError) as failure:  # how the writers say that the disk is full
        raise OSError(errno.EIO, f"cannot be written ({first_line(failure)})", str(path)) from failure
    finally:
        temporary.unlink(missing_ok=True)
