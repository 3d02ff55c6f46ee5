"""Load a transformer from whatever people share, and save it in the layout others read.

    transformer = load_transformer("self_forcing_dmd.pt")
    save_transformer(transformer, "my-model", layout="diffusers")

Strict: every key is accounted for, and what does not fit is one line that lists it. Pickled code is never run.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamgen.errors import InputError
from streamgen.models.layouts import (
    clean_name,
    config_from,
    original_config,
    sniff_layout,
    to_diffusers_name,
    to_original_name,
)
from streamgen.models.transformer import CausalWanTransformer3DModel

logger = logging.getLogger(__name__)

__all__ = ["LAYOUTS", "load_transformer", "read_state_dict", "save_transformer"]

LAYOUTS = ("diffusers", "wan", "self-forcing")
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # the original Wan folders use diffusers' file name as well
ORIGINAL_TEXT_LEN = 512
WRAPPER_KEYS = ("generator_ema", "generator", "model", "state_dict")  # in order of preference
LISTED_KEYS = 8

State = dict[str, Tensor]


def load_transformer(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> CausalWanTransformer3DModel:
    """Build the causal transformer from weights in any known layout.

    Args:
        path_or_state_dict: a folder (config.json + safetensors, sharded or not; or a pipeline with `transformer/`), a
            `.safetensors`, `.pt` or `.pth` file, or a state dict. Names may be diffusers', the original's or
            Self-Forcing's (`generator_ema` is preferred to `generator` and `model`).
        config: what shapes cannot tell (num_heads, eps, text_len …), in diffusers' or the original's key names; it
            overrides a config.json. Original names default to text_len 512.
    Returns: the model in eval mode, on the CPU, in the dtypes of the file.
    Raises: InputError (a ValueError), one line.
    """
    own_config: dict[str, Any] = {}
    if isinstance(path_or_state_dict, Mapping):
        source, raw = "the state dict", _unwrap(path_or_state_dict, "the state dict")
        raw = {name: tensor.detach().clone() for name, tensor in raw.items()}  # the caller keeps theirs
    else:
        source = str(path_or_state_dict)
        raw, own_config = _read(Path(path_or_state_dict))
    names = {name: clean_name(name) for name in raw}
    layout = sniff_layout(names.values())
    if layout is None:
        raise InputError(f"{source} is not a Wan transformer: its keys are {_some(raw)}")
    to_ours = to_diffusers_name if layout == "wan" else str
    state = _rename(raw, lambda name: to_ours(names[name]), source)
    arguments = _complete_config({**own_config, **(config or {})}, state, layout)
    return _build(arguments, state, source)


def save_transformer(
    transformer: CausalWanTransformer3DModel, path: str | os.PathLike, layout: str = "diffusers"
) -> Path:
    """Write weights in one of `LAYOUTS`; each file appears complete or not at all.

    Args:
        path: a folder for "diffusers" and "wan" (the same with original names), a file for "self-forcing"
            (one `.pt` with `generator_ema`; it carries no configuration).
    Returns: the path.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; choose from {', '.join(LAYOUTS)}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in transformer.state_dict().items()}
    if any(".lora_" in name or ".base_layer." in name for name in state):
        raise InputError("the transformer has LoRA layers; fuse and unload them, or delete the adapters, before saving")
    path = Path(path)
    if layout == "self-forcing":
        state = {f"model.{to_original_name(name)}": tensor for name, tensor in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, lambda temporary: torch.save({"generator_ema": state}, temporary))
        return path
    text = transformer.to_json_string()
    if layout == "wan":
        state = {to_original_name(name): tensor for name, tensor in state.items()}
        text = json.dumps(original_config(transformer.config), indent=2, sort_keys=True) + "\n"
    if path.is_file():
        raise InputError(f"{path} is a file; layout {layout!r} writes a folder")
    path.mkdir(parents=True, exist_ok=True)
    _replace(path / WEIGHTS_NAME, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))
    _replace(path / "config.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    (path / f"{WEIGHTS_NAME}.index.json").unlink(missing_ok=True)  # of an earlier, sharded model: readers prefer it
    return path


def read_state_dict(path: str | os.PathLike) -> State:
    """Tensors of one `.safetensors`, `.pt` or `.pth` file under their own names, taken out of `generator_ema` etc."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as failure:
            raise InputError(f"{path} is truncated or not a safetensors file ({_first_line(failure)})") from failure
    return _unwrap(_torch_load(path), str(path))


# --- reading


def _read(path: Path) -> tuple[State, dict[str, Any]]:
    """Raw tensors and the configuration beside them."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file():
        return read_state_dict(path), {}
    if (path / "transformer").is_dir():
        path = path / "transformer"
    config: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = _read_json(path / "config.json")
    return _read_folder(path), config


def _read_folder(folder: Path) -> State:
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise InputError(f"{folder} lacks {_some(missing)} named in {index.name}; download the folder again")
        files = [folder / shard for shard in shards]
    else:
        files = [folder / WEIGHTS_NAME] if (folder / WEIGHTS_NAME).is_file() else sorted(folder.glob("*.safetensors"))
        if len(files) > 1:
            raise InputError(f"{folder} has several safetensors files and no {index.name}; name the one to load")
    if not files:
        raise InputError(f"{folder} has no safetensors weights; expected {WEIGHTS_NAME}, sharded or not")
    state: State = {}
    for file in files:
        state.update(read_state_dict(file))
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise InputError(f"{path} is not valid JSON ({_first_line(failure)})") from failure
    if not isinstance(content, dict):
        raise InputError(f"{path} should hold a JSON object")
    return content


def _torch_load(path: Path) -> Any:
    try:
        # memory-mapped where the format allows: a checkpoint with critic and optimiser is read only as far as needed
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as failure:  # torch's own text advises to switch the protection off: not passed on
        with open(path, "rb") as file:
            pickled = file.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
        if pickled:
            name = re.search(r"GLOBAL ([\w.]+)", str(failure))
            what = f"pickled code ({name.group(1)})" if name else "pickled code or objects"
            raise InputError(f"{path} contains {what}, which is never run; save its tensors alone first") from failure
        raise InputError(f"{path} is not a checkpoint") from failure
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as failure:
        raise InputError(f"{path} is truncated or not a checkpoint") from failure


def _unwrap(content: Any, source: str) -> State:
    """Follow generator_ema, generator, model down to the dict of tensors."""
    while isinstance(content, Mapping):
        nested = [key for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)]
        if not nested:
            break
        content = content[nested[0]]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{source} is not a checkpoint: it holds no dict of tensors but {type(content).__name__}")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(f"{source} is not a state dict: {_some(others)} are no tensors")
    return dict(content)


def _rename(raw: State, rename: Callable[[str], str], source: str) -> State:
    state: State = {}
    for name, tensor in raw.items():
        ours = rename(name)
        if ours in state:
            raise InputError(f"{source} holds {ours} twice, once as {name}; is it two models in one dict?")
        state[ours] = tensor
    return state


# --- building


def _complete_config(config: dict[str, Any], state: State, layout: str) -> dict[str, Any]:
    """Constructor arguments: what the configuration says, else what shapes tell, else the layout's default."""
    shapes = _config_from_shapes(state, config.get("patch_size"))
    arguments = config_from(config, shapes.pop("dim", None))
    if layout == "wan":
        arguments.setdefault("text_len", ORIGINAL_TEXT_LEN)
    return {**shapes, **arguments}


def _config_from_shapes(state: State, patch_size) -> dict[str, Any]:
    """What the shapes tell; a key that is missing tells nothing here and is reported by `_build`."""
    result: dict[str, Any] = {"cross_attn_norm": "blocks.0.norm2.weight" in state}
    patch = _shape(state, "patch_embedding.weight", 5)
    if patch:
        result.update(dim=patch[0], in_channels=patch[1], patch_size=tuple(patch[2:]))
    elif patch_size:
        result["patch_size"] = tuple(patch_size)
    for key, name in (
        ("text_dim", "condition_embedder.text_embedder.linear_1.weight"),
        ("freq_dim", "condition_embedder.time_embedder.linear_1.weight"),
    ):
        if shape := _shape(state, name, 2):
            result[key] = shape[1]
            result.setdefault("dim", shape[0])
    if shape := _shape(state, "blocks.0.ffn.net.0.proj.weight", 2):
        result["ffn_dim"] = shape[0]
    if shape := _shape(state, "proj_out.weight", 2):
        pixels = torch.Size(result.get("patch_size", (1, 2, 2))).numel()
        result["out_channels"] = max(shape[0] // pixels, 1)
    blocks = [int(match.group(1)) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    result["num_layers"] = max(blocks, default=-1) + 1
    return result


def _shape(state: State, name: str, dims: int) -> tuple[int, ...] | None:
    tensor = state.get(name)
    return tuple(tensor.shape) if tensor is not None and tensor.dim() == dims else None


def _build(arguments: dict[str, Any], state: State, source: str) -> CausalWanTransformer3DModel:
    if any(".add_k_proj." in name or ".image_embedder." in name for name in state):
        raise InputError(f"{source} is an image-to-video model with a CLIP branch, which is not supported yet")
    try:
        with torch.device("meta"):
            model = CausalWanTransformer3DModel(**arguments)
    except (ValueError, TypeError) as failure:
        raise InputError(f"{source} cannot be built: {_first_line(failure)}") from failure
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    problems = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]
    if problems:
        raise InputError(f"{source} does not fit a {_describe(arguments)}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=True, assign=True)
    logger.info("loaded %s: a %s", source, _describe(arguments))
    return model.eval()


def _describe(arguments: Mapping[str, Any]) -> str:
    config = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, **arguments}
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    return f"Wan transformer of {config['num_layers']} blocks, width {heads * size}, {heads} heads"


# --- small things


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename over it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _some(names) -> str:
    names = list(names)
    rest = len(names) - LISTED_KEYS
    return ", ".join(names[:LISTED_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {str(failure).strip()}".partition("\n")[0][:200]
