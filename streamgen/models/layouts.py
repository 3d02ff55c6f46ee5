"""Names: the same weights and settings as diffusers, the original Wan code and the Self-Forcing family call them.

One table translates both ways. Inside streamgen the names are diffusers'.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from streamgen.errors import InputError

logger = logging.getLogger(__name__)

__all__ = [
    "LAYOUTS", "clean_name", "config_from", "original_config", "sniff_layout", "to_diffusers_name", "to_original_name",
]  # fmt: skip

LAYOUTS = ("diffusers", "wan", "self-forcing")  # that weights are written in

# (diffusers, original) module paths; {} stands for the block's number. norm2 and norm3 swap: the original counts the
# FFN's norm, which has no weights, before the cross-attention's.
NAMES = (
    ("patch_embedding", "patch_embedding"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("blocks.{}.scale_shift_table", "blocks.{}.modulation"),
    *(
        (f"blocks.{{}}.{ours}.{name}", f"blocks.{{}}.{theirs}.{original}")
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for name, original in (
            ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    ),
    ("blocks.{}.attn2.add_k_proj", "blocks.{}.cross_attn.k_img"),
    ("blocks.{}.attn2.add_v_proj", "blocks.{}.cross_attn.v_img"),
    ("blocks.{}.attn2.norm_added_k", "blocks.{}.cross_attn.norm_k_img"),
    ("blocks.{}.norm2", "blocks.{}.norm3"),
    ("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"),
    ("blocks.{}.ffn.net.2", "blocks.{}.ffn.2"),
    ("proj_out", "head.head"),
    ("scale_shift_table", "head.modulation"),
)
_TO_ORIGINAL = dict(NAMES)
_TO_DIFFUSERS = {original: ours for ours, original in NAMES}

# What wrappers leave in parameter names, anywhere in the path.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}
_PREFIXES = {"model", "diffusion_model"}

# Configuration keys with the same meaning under two names; `dim` and `num_heads` are handled apart.
_ORIGINAL_KEYS = {"in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads"}
_SHARED_KEYS = (
    "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim",
    "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps", "image_dim", "added_kv_proj_dim", "rope_max_seq_len",
    "pos_embed_seq_len", "text_len", "precision",
)  # fmt: skip
# Keys of original configs and their forks that say how to sample, not what the network is.
_IGNORED_KEYS = {
    "model_type", "window_size", "local_attn_size", "sink_size", "num_frame_per_block", "num_chunks", "global_sink",
    "shift", "timestep_shift", "denoising_step_list", "warp_denoising_step", "independent_first_frame", "context_noise",
    "bank_size", "record_interval", "SMA", "num_kv_cache", "num_sink_frames", "switch_frame_indices", "source",
    "method", "substitutions",
}  # fmt: skip


def clean_name(name: str) -> str:
    """Drop what FSDP, checkpointing, compilation and wrapper classes add.

    >>> clean_name("model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.norm3.bias")
    'blocks.0.norm3.bias'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] in _PREFIXES:
        parts = parts[1:]
    return ".".join(parts)


def sniff_layout(names: Iterable[str]) -> str | None:
    """"diffusers", "wan", or None if these (clean) names are not a Wan transformer's."""
    names = list(names)
    if any(name.startswith("condition_embedder.") or ".attn1." in name for name in names):
        return "diffusers"
    if any(name.startswith(("text_embedding.", "time_embedding.")) or ".self_attn." in name for name in names):
        return "wan"
    return None


def to_original_name(name: str) -> str:
    """diffusers -> original; a name that is not in the table stays.

    >>> to_original_name("blocks.7.ffn.net.0.proj.weight")
    'blocks.7.ffn.0.weight'
    """
    return translate(name, _TO_ORIGINAL)


def to_diffusers_name(name: str) -> str:
    """Original -> diffusers; a name that is not in the table stays.

    >>> to_diffusers_name("blocks.7.norm3.weight"), to_diffusers_name("head.modulation")
    ('blocks.7.norm2.weight', 'scale_shift_table')
    """
    return translate(name, _TO_DIFFUSERS)


def translate(name: str, table: Mapping[str, str]) -> str:
    """By a table of module or parameter paths in which {} stands for the block's number; other names stay."""
    block = re.match(r"(?:encoder\.block|blocks)\.(\d+)\.", name)
    general = f"{name[: block.start(1)]}{{}}{name[block.end(1) :]}" if block else name
    stem, dot, leaf = general.rpartition(".")
    if dot and leaf in ("weight", "bias") and stem in table:
        found = f"{table[stem]}.{leaf}"
    else:
        found = table.get(general)
    if found is None:
        return name
    return found.format(block.group(1)) if block else found


def config_from(config: Mapping[str, Any], dim: int | None) -> dict[str, Any]:
    """Constructor arguments from a configuration in diffusers' or the original's key names.

    Args:
        config: what the user or a config.json says; sampling keys of original configs are ignored.
        dim: model width as read from the weights, to split into heads.
    Raises: InputError for an unknown key, with a suggestion.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in _ORIGINAL_KEYS or key in _SHARED_KEYS:
            result[_ORIGINAL_KEYS.get(key, key)] = value
        elif key != "dim" and key not in _IGNORED_KEYS and not key.startswith("_"):
            _refuse_unknown(key, complete={"dim", "num_heads"} <= config.keys())
    if isinstance(result.get("qk_norm"), bool):  # the original says yes or no, diffusers says which
        result["qk_norm"] = "rms_norm_across_heads" if result["qk_norm"] else None
    if "patch_size" in result:
        result["patch_size"] = tuple(result["patch_size"])
    width = config.get("dim") or dim
    _split_heads(result, width)
    return result


def check_types(config: Mapping[str, Any]) -> None:
    """Refuse what would fail in arithmetic before the network is built, which checks the rest."""
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0
    for key in ("num_heads", "num_attention_heads", "attention_head_dim", "dim"):
        if config.get(key) is not None and not whole(config[key]):
            raise InputError(f"model configuration: {key} = {config[key]!r} is no whole number above 0")
    patch = config.get("patch_size")
    if patch is not None and not (isinstance(patch, (list, tuple)) and len(patch) == 3 and all(map(whole, patch))):
        raise InputError(f"model configuration: patch_size = {patch!r} is no list of three sizes, as [1, 2, 2]")
    for key in config:
        if not isinstance(key, str):
            raise InputError(f"model configuration: {key!r} is no key: keys are words such as num_heads")


def _refuse_unknown(key: str, complete: bool) -> None:
    """An unknown key is an error; in a complete original configuration, only if it looks misspelt.

    Forks write their sampling settings into the same file under names of their own; the network loses nothing.
    """
    known = [*_SHARED_KEYS, *_ORIGINAL_KEYS, "dim"]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.85 if complete else 0.6)
    if complete and not close:
        logger.warning("model configuration key %r is not about the network and is ignored", key)
        return
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    raise InputError(f"unknown model configuration key {key!r}; {hint}")


def _split_heads(config: dict[str, Any], dim: int | None) -> None:
    """Complete number and size of the heads from either one and the width."""
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    if dim is None or (heads and size):
        return
    given = heads or size
    if given and dim % given:
        key = "num_heads" if heads else "attention_head_dim"
        raise InputError(f"{key} = {given} does not divide the width {dim}")
    if not given and dim % 128:
        raise InputError(
            f"the number of attention heads cannot be read from weights of width {dim}: pass config={{'num_heads': N}}"
        )
    size = size or (dim // heads if heads else 128)  # every released Wan model has heads of 128
    config["num_attention_heads"], config["attention_head_dim"] = dim // size, size


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the original layout, from diffusers' key names."""
    result = {"_class_name": "WanModel", "model_type": _original_type(config)}
    result["dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    result["num_heads"], result["in_dim"] = config["num_attention_heads"], config["in_channels"]
    result["out_dim"] = config["out_channels"] or config["in_channels"]
    shared = ("patch_size", "ffn_dim", "freq_dim", "text_dim", "text_len", "num_layers", "cross_attn_norm", "eps")
    result.update({key: config[key] for key in (*shared, "precision")})
    result["qk_norm"] = config["qk_norm"] is not None
    return result


def _original_type(config: Mapping[str, Any]) -> str:
    """The original's name for what a model reads: text, a picture too, or a first and a last one."""
    if config.get("pos_embed_seq_len") is not None:
        return "flf2v"
    pictures = config.get("image_dim") is not None or config["in_channels"] > (config["out_channels"] or 0) > 0
    return "i2v" if pictures else "t2v"
