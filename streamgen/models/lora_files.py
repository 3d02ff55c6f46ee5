"""What LoRA files hold, whoever wrote them: changes to parameters that are named as in the model."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from streamgen.errors import InputError
from streamgen.models.layouts import NAMES, clean_name, to_diffusers_name
from streamgen.models.reading import WRAPPER_KEYS, State, read_json, read_state_dict, some, unwrap

__all__ = ["Lora", "Pair", "Report", "module_of", "own_parameters", "read_lora"]

# What a key says after the name of its module; the last pattern is for magnitudes, third factors, other algebras.
_PAIR = re.compile(r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.([^.]+))?\.(weight|bias)")
_DOWN = ("lora_A", "lora_down", "lora.down")
_FULL = re.compile(r"(.+)\.(diff|diff_b|w_norm|b_norm)")
_ALPHA = re.compile(r"(.+)\.alpha")
_UNKNOWN = re.compile(r"(.+?)\.(?:lora_|lora\.|dora_|hada_|lokr_|oft_|alpha).*")
_BIASES = ("diff_b", "b_norm")
_TABLES = ("scale_shift_table", "pos_embed")  # parameters without a module of their own

_PREFIXES = {
    "base_model", "model", "diffusion_model", "transformer", "transformer_2", "generator", "pipe", "dit", "unet",
}  # fmt: skip
_FLAT_PREFIX = re.compile(r"(?:lora_(?:unet|transformer)|lycoris)_+")
_FLAT = {path.replace(".", "_"): ours for ours, original in NAMES for path in (ours, original)}
_EXPERT = re.compile(r"(?:base_model\.model\.)?(transformer|transformer_2)\.")

_WRAPPERS = ("generator_lora", "lora", *WRAPPER_KEYS)
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
_SETTINGS = "adapter_config.json"  # PEFT's; diffusers puts the same into the file's metadata
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Pair:
    """A change of low rank: scale · up @ down."""

    down: Tensor  # [r, in], in = everything one output reads
    up: Tensor  # [out, r]
    scale: float

    def delta(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[out, in]."""
        return self.scale * (self.up.to(device, dtype) @ self.down.to(device, dtype))


@dataclass(frozen=True)
class Report:
    """What of a LoRA fits a model."""

    name: str
    matched: tuple[str, ...]  # parameters of the model
    unmatched: tuple[str, ...]  # keys of the file
    wrong_shape: tuple[str, ...]  # "parameter (shape) instead of (shape)"
    modules: tuple[int, int]  # that match, of all

    def __str__(self) -> str:
        return f"{self.name}: {self.modules[0]} of {self.modules[1]} modules matched"


@dataclass(frozen=True)
class Lora:
    """Changes to parameters of the transformer, which are named as in the model."""

    name: str
    pairs: Mapping[str, tuple[Pair, ...]]
    deltas: Mapping[str, Tensor]
    keys: Mapping[str, tuple[str, ...]]  # of the file, behind each parameter
    strays: Mapping[str, tuple[str, ...]]  # keys that cannot be used, by their module in the file

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the parameter this was made for; that of a pair is flattened to [out, in]."""
        if name in self.deltas:
            return tuple(self.deltas[name].shape)
        pair = self.pairs[name][0]
        return len(pair.up), pair.down.shape[1]

    def delta(self, name: str, like: Tensor) -> Tensor:
        """The whole change of one parameter, in the shape and on the device of `like`, in float32 or wider."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        total = torch.zeros(like.shape, dtype=dtype, device=like.device)
        if name in self.deltas:
            total += self.deltas[name].to(like.device, dtype)
        for pair in self.pairs.get(name, ()):
            total += pair.delta(like.device, dtype).view_as(total)
        return total

    def report(self, transformer: nn.Module) -> Report:
        """Compare with a model, which may carry LoRA layers already."""
        shapes = {name: tuple(parameter.shape) for name, parameter in own_parameters(transformer).items()}
        matched, wrong, unmatched, failed = [], [], [], set()
        for name in self.keys:
            if name not in shapes:
                unmatched += self.keys[name]
            elif not self._fits(name, shapes[name]):
                wrong.append(f"{name} {self.shape(name)} instead of {shapes[name]}")
            else:
                matched.append(name)
                continue
            failed.add(module_of(name))
        unmatched = list(dict.fromkeys(unmatched)) + [key for keys in self.strays.values() for key in keys]
        good = {module_of(name) for name in matched} - failed
        count = len(good), len(good | failed) + len(self.strays)
        return Report(self.name, tuple(matched), tuple(unmatched), tuple(wrong), count)

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self.deltas and tuple(self.deltas[name].shape) != shape:
            return False
        matrix = (shape[0], math.prod(shape[1:]))
        return all((len(pair.up), pair.down.shape[1]) == matrix for pair in self.pairs.get(name, ()))


# --- reading


def read_lora(source: str | os.PathLike | Mapping[str, Tensor], subfolder: str = "transformer") -> Lora:
    """A LoRA in any naming: PEFT's, diffusers', kohya's and musubi's, the original Wan's, ComfyUI's full differences.

    Args:
        source: a `.safetensors` or `.pt` file, a folder as PEFT or diffusers saves it, or a state dict.
        subfolder: which of a pipeline's transformers it is for, where the file holds changes to several.
    Returns: scales are alpha / rank, alpha from the file's own keys, else from PEFT's settings, else the rank.
    Raises: InputError if that is no LoRA. What it is for shows in `Lora.report`.
    """
    if isinstance(source, Mapping):
        name, state, settings = "the LoRA", unwrap(source, "the LoRA", _WRAPPERS), {}
    else:
        path = _file(Path(source))
        name, state, settings = path.name, read_state_dict(path, _WRAPPERS), _settings(path, subfolder)
    state = _of_expert(state, subfolder, name)
    lora = _resolve(name, _group(state), settings)
    if not lora.keys:
        raise InputError(
            f"{name} holds no LoRA that can be used: none of its {len(state)} keys is one of a lora_A/lora_B or "
            f"lora_down/lora_up pair without further factors, or a diff; they are {some(state)}"
        )
    return lora


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if not found:
        raise InputError(f"{path} has no LoRA: expected {', '.join(_FILES)}")
    if found[0].name not in _FILES and len(found) > 1:
        raise InputError(f"{path} has several safetensors files; name the one to read")
    return found[0]


def _settings(path: Path, subfolder: str) -> dict[str, Any]:
    """PEFT's configuration, where it was saved with the weights."""
    if path.name.startswith("adapter_model.") and (path.parent / _SETTINGS).is_file():
        return read_json(path.parent / _SETTINGS)
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    try:
        content = json.loads(text or "{}")
    except ValueError as failure:
        raise InputError(f"the metadata {_METADATA} of {path} is not valid JSON") from failure
    for prefix in (f"{subfolder}.", "transformer."):  # one file may serve either expert
        if any(key.startswith(prefix) for key in content):
            return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    return content


def _of_expert(state: State, subfolder: str, name: str) -> State:
    """Keys without a prefix are for any transformer; those of another one are left out if there are ours."""
    owners = {key: match.group(1) if (match := _EXPERT.match(key)) else None for key in state}
    others = {owner for owner in owners.values() if owner is not None}
    if others == {"transformer_2"} and subfolder == "transformer":
        raise InputError(f"{name} is for the second expert alone; read it with subfolder 'transformer_2'")
    if len(others) < 2:
        return state
    return {key: tensor for key, tensor in state.items() if owners[key] in (None, subfolder)}


@dataclass
class _Module:
    """What a file says about one module."""

    keys: list[str] = field(default_factory=list)
    down: dict[str | None, Tensor] = field(default_factory=dict)  # by PEFT's adapter name
    up: dict[str | None, Tensor] = field(default_factory=dict)
    up_bias: dict[str | None, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)  # by weight, bias
    alpha: float | None = None
    usable: bool = True


def _group(state: State) -> dict[str, _Module]:
    """By the name of the module in the file."""
    modules: dict[str, _Module] = defaultdict(_Module)
    for key, tensor in state.items():
        if match := _PAIR.fullmatch(key):
            path, side, adapter, leaf = match.groups()
            down = side in _DOWN
            if leaf == "weight":
                (modules[path].down if down else modules[path].up)[adapter] = tensor
            elif not down:
                modules[path].up_bias[adapter] = tensor
            else:
                modules[path].usable = False
        elif match := _FULL.fullmatch(key):
            path = match[1]
            modules[path].deltas["bias" if match[2] in _BIASES else "weight"] = tensor
        elif (match := _ALPHA.fullmatch(key)) and tensor.numel() == 1:
            path = match[1]
            modules[path].alpha = float(tensor)
        else:
            path = match[1] if (match := _UNKNOWN.fullmatch(key)) else key
            modules[path].usable = False
        modules[path].keys.append(key)
    return modules


def _resolve(name: str, modules: dict[str, _Module], settings: dict[str, Any]) -> Lora:
    """From modules of the file to parameters of the model."""
    pairs: dict[str, tuple[Pair, ...]] = {}
    deltas: dict[str, Tensor] = {}
    keys: dict[str, tuple[str, ...]] = {}
    strays: dict[str, tuple[str, ...]] = {}
    for path, module in modules.items():
        target, found = _target(path), _pairs(module, path, settings)
        if target is None or found is None or not (found or module.deltas):
            strays[path] = tuple(module.keys)
            continue
        weight = target if target.endswith(_TABLES) else f"{target}.weight"
        bias = _bias(module, found)
        of_bias = tuple(key for key in module.keys if key.endswith((".bias", *_BIASES)))
        of_weight = tuple(key for key in module.keys if key not in of_bias)
        changed = {weight: of_weight} if found or "weight" in module.deltas else {}
        if bias is not None:
            changed[f"{target}.bias"] = of_bias
        if keys.keys() & changed.keys():
            raise InputError(f"{name} changes {target} twice, once as {path}; is it two LoRAs in one dict?")
        if found:
            pairs[weight] = tuple(found.values())
        if "weight" in module.deltas:
            deltas[weight] = module.deltas["weight"]
        if bias is not None:
            deltas[f"{target}.bias"] = bias
        keys.update(changed)
    return Lora(name, pairs, deltas, keys, strays)


def _pairs(module: _Module, path: str, settings: dict[str, Any]) -> dict[str | None, Pair] | None:
    """Every adapter's pair; None if the module holds anything that is not understood, and would come out wrong."""
    if not module.usable or not module.down.keys() == module.up.keys() >= module.up_bias.keys():
        return None
    result = {}
    for adapter, down in module.down.items():
        up = module.up[adapter]
        if min(up.dim(), down.dim()) < 2:
            return None
        down, up = down.flatten(1), up.flatten(1)
        if len(down) != up.shape[1]:
            return None
        result[adapter] = Pair(down, up, _scale(module.alpha, path, len(down), settings))
    return result


def _scale(alpha: float | None, path: str, rank: int, settings: dict[str, Any]) -> float:
    if alpha is None:
        patterns = settings.get("alpha_pattern") or {}
        special = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", _bare(path))]
        alpha = special[0] if special else settings.get("lora_alpha", rank)
        if settings.get("use_rslora"):
            return alpha / math.sqrt(rank)
    return alpha / rank


def _bias(module: _Module, pairs: Mapping[str | None, Pair]) -> Tensor | None:
    """A full difference counts as it is; the bias of `up` is scaled like its pair."""
    parts = [pairs[adapter].scale * bias.float() for adapter, bias in module.up_bias.items()]
    if "bias" in module.deltas:
        parts.append(module.deltas["bias"].float())
    return sum(parts[1:], parts[0]) if parts else None


def _target(path: str) -> str | None:
    """The model's name of a module; None for a flat name that no Wan transformer has."""
    if flat := _FLAT_PREFIX.match(path):
        general = path[flat.end() :]
        block = re.match(r"blocks_(\d+)_", general)
        if block is None:
            return _FLAT.get(general)
        ours = _FLAT.get(f"blocks_{{}}_{general[block.end():]}")
        return ours and ours.format(block.group(1))
    return to_diffusers_name(_bare(path))


def _bare(path: str) -> str:
    """Without what wrappers, trainers and pipelines put in front."""
    parts = clean_name(path).split(".")
    while parts[0] in _PREFIXES and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


# --- the model's side


def own_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own, under their own names also where LoRA layers wrap them."""
    named = transformer.named_parameters()
    return {name.replace(".base_layer.", "."): parameter for name, parameter in named if ".lora_" not in name}


def module_of(parameter: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", parameter)
