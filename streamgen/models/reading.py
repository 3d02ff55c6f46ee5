"""Tensors and settings out of the files that people share. Pickled code is never run; nothing is built here."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from streamgen.errors import InputError
from streamgen.models.quantised import Packed, read_gguf

__all__ = ["WEIGHTS_NAME", "State", "first_line", "read_json", "read_source", "read_state_dict", "some", "unwrap"]

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # the original Wan folders use diffusers' file name as well
WRAPPER_KEYS = ("generator_ema", "generator", "model", "state_dict")  # in order of preference
LISTED_KEYS = 8

State = dict[str, Tensor]


def read_state_dict(path: str | os.PathLike, wrappers: Sequence[str] = WRAPPER_KEYS) -> State:
    """Tensors of one `.safetensors`, `.pt` or `.pth` file under their own names, taken out of `generator_ema` etc."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as failure:
            raise InputError(f"{path} is truncated or not a safetensors file ({first_line(failure)})") from failure
    return unwrap(_torch_load(path), str(path), wrappers)


def read_source(path: Path, subfolder: str | None = None) -> tuple[dict[str, Tensor | Packed], dict[str, Any]]:
    """Raw tensors of a file or folder, and the configuration beside them.

    Args:
        subfolder: of a pipeline; None = `transformer` if there is one, else the folder itself.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file():
        if subfolder is not None:
            raise InputError(f"{path} is a file: subfolder {subfolder!r} is for folders")
        return read_gguf(path) if path.suffix == ".gguf" else read_state_dict(path), {}
    path = _inner(path, subfolder)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    return _read_folder(path), config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise InputError(f"{path} is not valid JSON ({first_line(failure)})") from failure
    if not isinstance(content, dict):
        raise InputError(f"{path} should hold a JSON object")
    return content


def _inner(folder: Path, subfolder: str | None) -> Path:
    if subfolder is None:
        return folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (folder / subfolder).is_dir():
        here = sorted(child.name for child in folder.iterdir() if child.is_dir())
        raise InputError(f"{folder} has no folder {subfolder!r}; it has {some(here) or 'none'}")
    return folder / subfolder


def _read_folder(folder: Path) -> State:
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        shards = _shards(index)
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise InputError(f"{folder} lacks {some(missing)} named in {index.name}; download the folder again")
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


def _shards(index: Path) -> list[str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index} has no weight_map from tensors to files; download the folder again")
    return sorted(set(places.values()))


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


def unwrap(content: Any, source: str, wrappers: Sequence[str] = WRAPPER_KEYS) -> State:
    """Follow generator_ema, generator, model down to the dict of tensors."""
    while isinstance(content, Mapping):
        nested = [key for key in wrappers if isinstance(content.get(key), Mapping)]
        if not nested:
            break
        content = content[nested[0]]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{source} is not a checkpoint: it holds no dict of tensors but {type(content).__name__}")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(f"{source} is not a state dict: {some(others)} are no tensors")
    return dict(content)


def some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    rest = len(names) - LISTED_KEYS
    return ", ".join(names[:LISTED_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def first_line(failure: BaseException) -> str:
    """What a library's exception says, in one line."""
    return f"{type(failure).__name__}: {str(failure).strip()}".partition("\n")[0][:200]
