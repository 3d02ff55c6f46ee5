"""Load a transformer from whatever people share, and save it in the layout others read.

    transformer = load_transformer("self_forcing_dmd.pt")
    save_transformer(transformer, "my-model", layout="diffusers")

Strict: every key is accounted for, and what does not fit is one line that lists it. Pickled code is never run.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from streamgen.device import resolve_dtype
from streamgen.errors import InputError
from streamgen.models.layouts import check_types, clean_name, config_from, sniff_layout, to_diffusers_name
from streamgen.models.quantised import dequantise, is_quantised
from streamgen.models.reading import State, first_line, read_source, read_state_dict, some, unwrap
from streamgen.models.saving import LAYOUTS, save_transformer
from streamgen.models.transformer import CausalWanTransformer3DModel

logger = logging.getLogger(__name__)

__all__ = ["LAYOUTS", "cast_weights", "describe", "load_transformer", "read_state_dict", "save_transformer"]

ORIGINAL_TEXT_LEN = 512
QUANTISED_DTYPE = torch.bfloat16  # what quantised weights become unless told


def load_transformer(
    path_or_state_dict: str | os.PathLike | Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    subfolder: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> CausalWanTransformer3DModel:
    """Build the causal transformer from weights in any known layout.

    Args:
        path_or_state_dict: a folder (config.json + safetensors, sharded or not; or a pipeline with `transformer/`), a
            `.safetensors`, `.pt`, `.pth` or `.gguf` file, or a state dict. Names may be diffusers', the original's or
            Self-Forcing's (`generator_ema` is preferred to `generator` and `model`). Weights in fp8, with scales or
            without, and in GGUF's formats are dequantised.
        config: what shapes cannot tell (num_heads, eps, text_len …), in diffusers' or the original's key names; it
            overrides a config.json. Original names default to text_len 512.
        subfolder: which of a pipeline's transformers, e.g. "transformer_2"; None = "transformer", if there is one.
        dtype: see `cast_weights`. None = the file's own dtypes, and bfloat16 for quantised files.
    Returns: the model in eval mode, on the CPU.
    Raises: InputError (a ValueError), one line; UnavailableError if a GGUF file lacks its reader.
    """
    dtype = resolve_dtype(dtype)
    own_config: dict[str, Any] = {}
    if isinstance(path_or_state_dict, Mapping):
        source, raw = "the state dict", unwrap(path_or_state_dict, "the state dict")
        raw = {name: tensor.detach().clone() for name, tensor in raw.items()}  # the caller keeps theirs
    else:
        source = str(path_or_state_dict)
        raw, own_config = read_source(Path(path_or_state_dict), subfolder)
    names = {name: clean_name(name) for name in raw}
    layout = sniff_layout(names.values())
    if layout is None:
        raise InputError(f"{source} is not a Wan transformer: its keys are {some(raw)}")
    if dtype is None and (source.endswith(".gguf") or is_quantised(raw)):
        dtype = QUANTISED_DTYPE  # for all of it: such files mix dtypes that cannot be multiplied with each other
    to_ours = to_diffusers_name if layout == "wan" else str
    state = dequantise(raw, dtype or QUANTISED_DTYPE, source)
    state = _rename(state, lambda name: to_ours(names[name]), source)
    arguments = _complete_config({**own_config, **(config or {})}, state, layout)
    return _build(arguments, state if dtype is None else _cast(state, dtype), source)


def cast_weights(transformer: CausalWanTransformer3DModel, dtype: torch.dtype | str) -> CausalWanTransformer3DModel:
    """Change the weights' dtype in place as diffusers' `from_pretrained` would.

    What is small and sensitive (time embedder, modulation, affine norms) keeps float32 if it has it.
    """
    transformer.load_state_dict(_cast(transformer.state_dict(), resolve_dtype(dtype)), assign=True)
    return transformer


def _cast(state: State, dtype: torch.dtype) -> State:
    wide = set(CausalWanTransformer3DModel._keep_in_fp32_modules)
    kept = {name for name, tensor in state.items() if tensor.dtype == torch.float32 and wide & set(name.split("."))}
    return {name: tensor if name in kept else tensor.to(dtype) for name, tensor in state.items()}


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
    check_types(config)
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
    for key, name, axis, dims in (
        ("image_dim", "condition_embedder.image_embedder.norm1.weight", 0, 1),
        ("added_kv_proj_dim", "blocks.0.attn2.add_k_proj.weight", 1, 2),
        ("pos_embed_seq_len", "condition_embedder.image_embedder.pos_embed", 1, 3),
    ):
        if shape := _shape(state, name, dims):
            result[key] = shape[axis]
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
    state = {name: tensor for name, tensor in state.items() if ".norm_added_q." not in name}  # nothing reads it
    try:
        with torch.device("meta"):
            model = CausalWanTransformer3DModel(**arguments)
    except (ValueError, TypeError) as failure:
        raise InputError(f"{source} cannot be built: {first_line(failure)}") from failure
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    problems = [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds if names]
    if problems:
        raise InputError(f"{source} does not fit a {describe(arguments)}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=True, assign=True)
    logger.info("loaded %s: a %s", source, describe(arguments))
    return model.eval()


def describe(arguments: Mapping[str, Any]) -> str:
    """The size of a model in words, from its configuration."""
    config = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, **arguments}
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    return f"Wan transformer of {config['num_layers']} blocks, width {heads * size}, {heads} heads"
