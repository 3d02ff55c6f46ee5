"""Prompts to embeddings: any encoder, padding that is exactly zero, a cache on disk, an encoder that can be let go.

    encode = PromptEncoder(tokenizer, load_umt5("models_t5_umt5-xxl-enc-bf16.pth"), 512, cache=EmbeddingCache())
    prompt_embeds = encode(["a red circle bouncing on a navy background"], device="cuda")  # [1, 512, 4096]
    encode.release()  # 11 GB less; the prompts above are still served

Every prompt is encoded alone and without padding, so its embedding depends on nothing but its text and the weights:
not on the batch it came in, nor on whether it was read from the cache.
"""

from __future__ import annotations

import gc
import hashlib
import html
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streamgen.config import suggest
from streamgen.errors import InputError
from streamgen.models.layouts import translate
from streamgen.models.reading import first_line, read_state_dict, some
from streamgen.models.saving import replace_file
from streamgen.models.text import TextEncoder

log = logging.getLogger(__name__)

__all__ = ["EmbeddingCache", "PromptEncoder", "clean_text", "load_umt5", "to_original_umt5_name", "to_umt5_name"]

KEY_VERSION = 1  # part of every key: raise it when the same inputs come to give other embeddings
SAMPLES = 64  # values of each weight that enter a fingerprint: 242 small copies for UMT5-XXL, not 11 GB
# Configuration entries that say where a model came from or how it is stored, not what it computes.
_PROVENANCE = {"architectures", "transformers_version", "dtype", "torch_dtype"}


def clean_text(text: str) -> str:
    """What the Wan family does to a prompt: mend encodings (where `ftfy` is installed), HTML entities, whitespace.

    >>> clean_text("  a cat &amp;amp; \\n a dog ")
    'a cat & a dog'
    """
    try:
        from ftfy import fix_text
    except ImportError:
        fix_text = str
    text = html.unescape(html.unescape(fix_text(text)))  # twice: prompts scraped from the web are often escaped twice
    return re.sub(r"\s+", " ", text).strip()


class PromptEncoder:
    """Prompts -> prompt_embeds, through the embedded `TextEncoder` or a transformers encoder such as UMT5."""

    def __init__(
        self,
        tokenizer,
        encoder: nn.Module | None,
        max_tokens: int,
        cache: EmbeddingCache | None = None,
        *,
        reload: Callable[[], nn.Module] | None = None,
    ) -> None:
        """
        Args:
            encoder: called with `input_ids=, attention_mask=`; returns [B, L, D] or an output that begins with it.
                None = there is none (yet), see `reload`.
            max_tokens: rows of an embedding; a longer prompt is cut there.
            cache: where embeddings are kept between runs; None = nowhere.
            reload: makes the encoder again when a prompt needs it after `release`.
        """
        self.tokenizer, self.encoder, self.max_tokens = tokenizer, encoder, max_tokens
        self.cache, self.reload = cache, reload
        # the embedded tokenizer normalises by itself and was trained on text as it is
        self.clean = str if isinstance(encoder, TextEncoder) else clean_text
        self._fingerprint: str | None = None  # of an encoder that was let go
        self._tokenizer_identity: str | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], device: torch.device | str | None = None) -> Tensor:
        """Prompts -> prompt_embeds [B, L, D], L = max_tokens; rows of padding are zero.

        Each distinct prompt is encoded once. A prompt over the limit is cut, and said so.
        Args:
            device: where the result goes; None = where the encoder is, the CPU if it was released.
        Raises: InputError if a prompt needs an encoder that was released and cannot be made again.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not prompts:
            raise InputError("there is no prompt to encode: give at least one, '' for none")
        texts = [self.clean(prompt) for prompt in prompts]
        keys = self._keys(list(dict.fromkeys(texts)))
        rows = {text: self._rows(text, key) for text, key in keys.items()}
        target = device if device is not None else self.device
        padded = {text: self._pad(found.to(target)) for text, found in rows.items()}
        return torch.stack([padded[text] for text in texts])

    @property
    def device(self) -> torch.device:
        """Where the encoder's weights are; the CPU once it was released, or while a hook keeps them elsewhere."""
        parameter = None if self.encoder is None else next(self.encoder.parameters(), None)
        return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device

    def offload(self, device: torch.device | str = "cpu") -> None:
        """Move the encoder; embeddings go where `__call__` is told, so it may live apart from the transformer."""
        if self.encoder is not None:
            self.encoder.to(device)

    def release(self) -> None:
        """Let go of the encoder: its memory is free if nobody else holds it. Cached prompts are still served."""
        if self.encoder is None:
            return
        if self.cache is not None:
            self._fingerprint = fingerprint(self.encoder)
        self.encoder = None
        gc.collect()  # hooks make cycles, which would keep gigabytes until the collector happens to run
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _keys(self, texts: list[str]) -> dict[str, str | None]:
        """Text -> where the cache keeps it. Weights may change under us, so they are looked at in every call."""
        if self.cache is None:
            return dict.fromkeys(texts)
        weights = self._fingerprint if self.encoder is None else fingerprint(self.encoder)
        if weights is None:  # released before the cache was given
            return dict.fromkeys(texts)
        if self._tokenizer_identity is None:
            self._tokenizer_identity = tokenizer_identity(self.tokenizer)
        parts = (KEY_VERSION, weights, self._tokenizer_identity, self.max_tokens)
        return {text: _digest(json.dumps([*parts, text])) for text in texts}

    def _rows(self, text: str, key: str | None) -> Tensor:
        """One prompt -> [n, D], n = its tokens."""
        count = len(self.tokenizer(text)["input_ids"])
        if count > self.max_tokens:
            log.warning("the prompt has %d tokens, the model reads the first %d", count, self.max_tokens)
        rows = self.cache.get(key) if key else None
        if rows is None:
            rows = self._encode(text)
            if key:
                self.cache.put(key, rows)
        return rows

    def _encode(self, text: str) -> Tensor:
        encoder = self._loaded()
        tokens = self.tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt").to(self.device)
        out = encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        rows = (out if isinstance(out, Tensor) else out[0])[0]  # [n, D]
        if not torch.isfinite(rows).all():  # T5 overflows in float16
            raise InputError(f"the text encoder gives NaN or infinity in {rows.dtype}: load it in bfloat16 or float32")
        return rows

    def _loaded(self) -> nn.Module:
        if self.encoder is None:
            if self.reload is None:
                raise InputError(
                    "the text encoder was released or never loaded, and this prompt is not in the cache: "
                    "encode it before release(), or give PromptEncoder a reload="
                )
            encoder = self.reload()
            if self._fingerprint is not None and fingerprint(encoder) != self._fingerprint:
                raise InputError("reload= made another text encoder than the one released: load the same weights")
            self.encoder = encoder
        return self.encoder

    def _pad(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(self.max_tokens, rows.shape[1])
        padded[: len(rows)] = rows
        return padded


class EmbeddingCache:
    """Embeddings on disk, one safetensors file per prompt, without their rows of padding."""

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        """`folder`: None = `$XDG_CACHE_HOME/streamgen/prompts`. Made when the first prompt is kept."""
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = Path(folder) if folder is not None else Path(root) / "streamgen" / "prompts"

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> Tensor | None:
        """[n, D] on the CPU; None for what is not there or cannot be read, which is said."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            rows = load_file(path)["prompt_embeds"]
            if rows.dim() != 2 or not len(rows):
                raise ValueError(f"shape {tuple(rows.shape)}")
        except (SafetensorError, OSError, KeyError, ValueError) as failure:
            log.warning("%s is damaged (%s): the prompt is encoded again", path, first_line(failure))
            return None
        return rows

    def put(self, key: str, rows: Tensor) -> None:
        """Keep [n, D]; the file appears complete or not at all. A folder that cannot be written costs a warning."""
        rows = rows.detach().cpu().contiguous()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.path(key), lambda temporary: save_file({"prompt_embeds": rows}, temporary))
        except (SafetensorError, OSError) as failure:
            log.warning("cannot keep an embedding in %s (%s)", self.folder, first_line(failure))


# --- identities


def fingerprint(encoder: nn.Module) -> str:
    """A hash of an encoder: its class, configuration, and of each weight the name, shape, dtype and some values."""
    config = encoder.config.to_dict() if hasattr(encoder.config, "to_dict") else dict(encoder.config)
    config = {key: value for key, value in config.items() if not key.startswith("_") and key not in _PROVENANCE}
    digest = hashlib.sha256(json.dumps([type(encoder).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if tensor.is_meta:
            raise InputError(
                "the text encoder's weights are offloaded out of reach, so its cached embeddings cannot be told apart: "
                "turn sequential offload or the cache off"
            )
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, len(values) // SAMPLES)][:SAMPLES].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_identity(tokenizer) -> str:
    """A hash of vocabulary and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)]
    else:
        content = json.loads(backend.to_str())
        content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}  # of last call
    return _digest(json.dumps(content, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- UMT5 in the original layout

# (transformers, original) module paths; {} stands for the block's number
UMT5_NAMES = (
    ("shared", "token_embedding"),
    *((f"encoder.block.{{}}.layer.0.SelfAttention.{name}", f"blocks.{{}}.attn.{name}") for name in "qkvo"),
    ("encoder.block.{}.layer.0.SelfAttention.relative_attention_bias", "blocks.{}.pos_embedding.embedding"),
    ("encoder.block.{}.layer.0.layer_norm", "blocks.{}.norm1"),
    ("encoder.block.{}.layer.1.layer_norm", "blocks.{}.norm2"),
    ("encoder.block.{}.layer.1.DenseReluDense.wi_0", "blocks.{}.ffn.gate.0"),
    ("encoder.block.{}.layer.1.DenseReluDense.wi_1", "blocks.{}.ffn.fc1"),
    ("encoder.block.{}.layer.1.DenseReluDense.wo", "blocks.{}.ffn.fc2"),
    ("encoder.final_layer_norm", "norm"),
)
_TO_ORIGINAL = dict(UMT5_NAMES)
_TO_UMT5 = {original: ours for ours, original in UMT5_NAMES}
_SHARED, _EMBED = "shared.weight", "encoder.embed_tokens.weight"  # one tensor under two names


def to_original_umt5_name(name: str) -> str:
    """transformers -> original; a name that is not in the table stays.

    >>> to_original_umt5_name("encoder.block.7.layer.1.DenseReluDense.wi_0.weight")
    'blocks.7.ffn.gate.0.weight'
    """
    return translate(name, _TO_ORIGINAL)


def to_umt5_name(name: str) -> str:
    """Original -> transformers; a name that is not in the table stays.

    >>> to_umt5_name("blocks.7.ffn.fc1.weight"), to_umt5_name("norm.weight")
    ('encoder.block.7.layer.1.DenseReluDense.wi_1.weight', 'encoder.final_layer_norm.weight')
    """
    return translate(name, _TO_UMT5)


def load_umt5(path: str | os.PathLike, config: Mapping[str, Any] | None = None):
    """transformers' UMT5EncoderModel from one file in the original layout; sizes are read from the weights.

    Args:
        path: `models_t5_umt5-xxl-enc-bf16.pth` or the like, `.safetensors` too; transformers' names are understood.
        config: keys of UMT5Config for what shapes cannot tell (layer_norm_epsilon, relative_attention_max_distance …).
    Returns: the model in eval mode, on the CPU, in the dtypes of the file.
    Raises: InputError, one line.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    state = {to_umt5_name(name): tensor for name, tensor in read_state_dict(path).items()}
    if _EMBED in state:
        state.setdefault(_SHARED, state[_EMBED])
    if not any(name == _SHARED or name.startswith("encoder.block.") for name in state):
        raise InputError(f"{path} is not a UMT5 encoder: its keys are {some(state)}")
    known = UMT5Config().to_dict()
    for key in config or {}:
        if key not in known:
            raise InputError(f"unknown UMT5 configuration key {key!r}{suggest(key, list(known))}")
    try:
        with torch.device("meta"):
            model = UMT5EncoderModel(UMT5Config(**{**_umt5_sizes(state), **(config or {})}))
    except Exception as failure:  # transformers' own checks raise classes of several libraries
        raise InputError(f"{path} cannot be built: {first_line(failure)}") from failure
    if _SHARED in state:
        state[_EMBED] = state[_SHARED]
    _check_fit(model.state_dict(), state, str(path))
    model.load_state_dict(state, strict=True, assign=True)
    model.set_input_embeddings(model.shared)  # two parameters over one tensor become one again
    log.info("loaded %s: UMT5 encoder of %d blocks, width %d", path, model.config.num_layers, model.config.d_model)
    return model.eval()


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, int] | None:
    tensor = state.get(name)
    return tuple(tensor.shape) if tensor is not None and tensor.dim() == 2 else None


def _umt5_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What the shapes tell; a key that is missing tells nothing here and is reported by `_check_fit`."""
    blocks = [int(match.group(1)) for name in state if (match := re.match(r"encoder\.block\.(\d+)\.", name))]
    sizes = {"num_layers": max(blocks, default=-1) + 1}
    first = "encoder.block.0.layer"
    if shape := _shape(state, _SHARED):
        sizes.update(vocab_size=shape[0], d_model=shape[1])
    if shape := _shape(state, f"{first}.1.DenseReluDense.wi_0.weight"):
        sizes["d_ff"] = shape[0]
    if shape := _shape(state, f"{first}.0.SelfAttention.relative_attention_bias.weight"):
        sizes.update(relative_attention_num_buckets=shape[0], num_heads=shape[1])
        if inner := _shape(state, f"{first}.0.SelfAttention.q.weight"):
            sizes["d_kv"] = inner[0] // shape[1]
    return sizes


def _check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Names first: while one is missing, sizes are guesses and wrong shapes would be noise."""
    kinds = (
        ("missing", [name for name in expected if name not in state and name != _EMBED]),
        ("unexpected", [name for name in state if name not in expected]),
    )
    problems = [f"{len(found)} {kind}: {some(map(to_original_umt5_name, found))}" for kind, found in kinds if found]
    if not problems:
        wrong = [
            f"{to_original_umt5_name(name)} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if state[name].shape != tensor.shape
        ]
        problems = [f"{len(wrong)} wrong shape: {some(wrong)}"] if wrong else []
    if problems:
        raise InputError(f"{source} does not fit a UMT5 encoder: {'; '.join(problems)}")
