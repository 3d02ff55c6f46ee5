"""Building blocks of the causal Wan transformer, with the parameter names of `diffusers.WanTransformer3DModel`.

Two numeric dialects. "mixed": matrix products in the compute dtype; norms, modulation, gates and the residual stream
in float32. "strict": every step rounds to the weights' dtype, as Self-Forcing's bf16 run does. At streaming sizes (50
to 100 tokens) the number of operations costs as much as the arithmetic, hence the few fused ones here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.kernels.attention import attend
from streamgen.models.context import AttentionContext

__all__ = [
    "CausalWanTransformerBlock", "ConditionEmbedder", "PatchEmbedding", "TextKeys", "collapse_padding", "gelu",
    "modulate", "widen",
]  # fmt: skip

# of one block's cross-attention, keys normalised; third, if it is there, what is added to the logits, [B, L]
KeyValue = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class TextKeys:
    """Every block's cross-attention keys (normalised) and values, once per prompt: [B, P, L, H, D] per layer.

    Those of the picture, where the model reads one, belong to the sample whatever its prompts: [B, L', H, D] per layer.
    `bias`, [B, P, L], is added to the logits of every layer: ln n for a key that stands for n, -inf for none.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    image_keys: tuple[Tensor, ...] = ()
    image_values: tuple[Tensor, ...] = ()
    bias: Tensor | None = None

    @property
    def num_prompts(self) -> int:
        return self.keys[0].shape[1]

    @classmethod
    def join(cls, parts: Sequence[TextKeys]) -> TextKeys:
        """The prompts of several beside each other; all for the same samples, hence with the same picture."""
        parts = cls._alike(parts)
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts], 1)
        keys = (torch.cat(layer, 1) for layer in zip(*(part.keys for part in parts), strict=True))
        values = (torch.cat(layer, 1) for layer in zip(*(part.values for part in parts), strict=True))
        return cls(tuple(keys), tuple(values), parts[0].image_keys, parts[0].image_values, bias)

    @staticmethod
    def _alike(parts: Sequence[TextKeys]) -> Sequence[TextKeys]:
        """All with a bias and as many rows, where one of them has a bias."""
        if all(part.bias is None for part in parts):
            return parts
        longest = max(part.keys[0].shape[2] for part in parts)
        return [part._padded(longest) for part in parts]

    def _padded(self, length: int) -> TextKeys:
        """With rows that nothing is read of."""
        batch, prompts, rows = self.keys[0].shape[:3]
        bias = self.keys[0].new_zeros(batch, prompts, rows) if self.bias is None else self.bias
        pad = lambda layers: tuple(F.pad(layer, (0, 0, 0, 0, 0, length - rows)) for layer in layers)
        bias = F.pad(bias, (0, length - rows), value=float("-inf"))
        return replace(self, keys=pad(self.keys), values=pad(self.values), bias=bias)

    @classmethod
    def stack(cls, parts: Sequence[TextKeys]) -> TextKeys:
        """The prompts of several samples below each other, as many and as long each."""
        parts = cls._alike(parts)
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        below = lambda name: tuple(map(torch.cat, zip(*(getattr(part, name) for part in parts), strict=True)))
        return cls(*map(below, ("keys", "values", "image_keys", "image_values")), bias)

    def layer(self, index: int) -> KeyValue:
        """One block's keys and values, prompts folded into the batch: [B·P, L, H, D]."""
        pair = self.keys[index].flatten(0, 1), self.values[index].flatten(0, 1)
        return pair if self.bias is None else (*pair, self.bias.flatten(0, 1))

    def image_layer(self, index: int) -> KeyValue:
        """One block's keys and values of the picture, [B, L', H, D]."""
        return self.image_keys[index], self.image_values[index]


def collapse_padding(keys: TextKeys, prompt_embeds: Tensor) -> TextKeys:
    """Rows of zeros behind the prompts as one key with the logarithm of their number as bias: the same attention.

    Their keys and values are equal, so that many weights e^s sum to e^(s + ln n) (AnnCA's exact part in FAST-AR,
    arXiv:2602.01801). How many there are is read from the device, once per prompt.

    Args:
        prompt_embeds: [B, L, D] or [B, P, L, D], what `keys` were made of, before the model padded it.
    """
    written = prompt_embeds.ne(0).any(-1).flatten(0, -2).any(0).nonzero()
    rows, total = int(written.max()) + 1 if len(written) else 0, keys.keys[0].shape[2]
    if total - rows < 2:
        return keys
    cut = lambda layers: tuple(layer[:, :, : rows + 1].clone() for layer in layers)
    bias = keys.keys[0].new_zeros(*keys.keys[0].shape[:2], rows + 1)
    bias[..., rows] = math.log(total - rows)
    return replace(keys, keys=cut(keys.keys), values=cut(keys.values), bias=bias)


class RMSNorm(nn.Module):
    """x / rms(x) over all heads together, times a weight."""

    def __init__(self, dim: int, eps: float, strict: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps, self.strict = eps, strict

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.strict:  # the original rounds to the input's dtype before it multiplies
            return F.rms_norm(x, weight.shape, None, self.eps) * weight.to(x.dtype)
        if x.dtype == weight.dtype:  # one kernel; its statistics are float32 in any dtype
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Affine layer norm in the dtype of its input, which is float32 unless strict."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def widen(x: Tensor) -> Tensor:
    """At least float32: float64 models stay what they are."""
    return x if x.dtype == torch.float64 else x.float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, strict: bool = False) -> Tensor:
    """norm(x)·scale + shift, where `scale` already holds its "1 +".

    Args:
        x: [B, F, T, D].
        shift, scale: [B or 1, F or 1, 1, D].
    """
    dim = x.shape[-1:]
    if strict:
        return F.layer_norm(x, dim, eps=eps) * scale + shift
    if scale.numel() == dim[0]:  # one level for all frames: it is the affine part of the norm, no second pass over x
        return F.layer_norm(x, dim, scale.reshape(dim), shift.reshape(dim), eps)
    return torch.addcmul(shift, F.layer_norm(x, dim, eps=eps), scale)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, strict: bool = False) -> Tensor:
    """x + y·gate; in float32 for any dtype of `y` unless strict."""
    return x + y * gate if strict else torch.addcmul(x, y, gate)


class Attention(nn.Module):
    """Projections and query-key norms of one attention; who attends to whom is the caller's business."""

    def __init__(self, dim: int, heads: int, eps: float, strict: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.norm_q, self.norm_k = RMSNorm(dim, eps, strict), RMSNorm(dim, eps, strict)
        self.heads = heads
        self.fuse = False
        self._fused: tuple[tuple, Tensor, Tensor] | None = None  # what it was made of, weight, bias

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> queries and keys (normalised) and values, [B, L, H, d] each."""
        fused = None
        if self.fuse and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            fused = self._fused_weights(x.dtype)
        if fused is None:
            return self.query(x), *self.key_value(x)
        heads = (self.heads, -1)
        query, key, value = F.linear(x, *fused).chunk(3, dim=-1)
        query, key = self.norm_q(query).unflatten(-1, heads), self.norm_k(key).unflatten(-1, heads)
        return query, key, value.unflatten(-1, heads)

    def _fused_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """One matrix for three, rebuilt when a parameter was moved, cast or written; None beside LoRA or a cast."""
        layers = (self.to_q, self.to_k, self.to_v)
        if any(type(layer) is not nn.Linear or layer.weight.dtype != dtype for layer in layers):
            return None
        parameters = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        made_of = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)
        if self._fused is None or self._fused[0] != made_of:
            weight = torch.cat([layer.weight.detach() for layer in layers])
            self._fused = (made_of, weight, torch.cat([layer.bias.detach() for layer in layers]))
        return self._fused[1:]

    def query(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, H, d]."""
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] -> keys (normalised) and values, [B, L, H, d] each."""
        heads = (self.heads, -1)
        return self.norm_k(self.to_k(x)).unflatten(-1, heads), self.to_v(x).unflatten(-1, heads)

    def project(self, x: Tensor) -> Tensor:
        """[B, L, H, d] -> [B, L, D]."""
        return self.to_out[0](x.flatten(2))


class CrossAttention(Attention):
    """Attention to the text and, in models with an image branch, to a picture's tokens beside it."""

    def __init__(self, dim: int, heads: int, eps: float, strict: bool, image_branch: bool) -> None:
        super().__init__(dim, heads, eps, strict)
        if image_branch:
            self.add_k_proj, self.add_v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_added_k = RMSNorm(dim, eps, strict)

    def image_key_value(self, x: Tensor) -> KeyValue:
        """An embedded picture [B, L', D] -> keys (normalised) and values, [B, L', H, d] each."""
        heads = (self.heads, -1)
        return self.norm_added_k(self.add_k_proj(x)).unflatten(-1, heads), self.add_v_proj(x).unflatten(-1, heads)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear; the odd nesting is diffusers' naming (`net.0.proj`, `net.2`)."""

    def __init__(self, dim: int, ffn_dim: int, out_dim: int | None = None) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, ffn_dim)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(ffn_dim, out_dim or dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](gelu(self.net[0].proj(x)))


def gelu(x: Tensor) -> Tensor:
    """Tanh-GELU. Without gradients on a CPU by way of the sigmoid, 2x faster there: 1 + tanh(u) = 2·sigmoid(2u)."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    wide = widen(x)  # bf16 intermediates would lose what the kernel keeps
    slope = 2 * math.sqrt(2 / math.pi)
    return (wide * wide).mul_(slope * 0.044715).add_(slope).mul_(wide).sigmoid_().mul_(wide).to(x.dtype)


class CausalWanTransformerBlock(nn.Module):
    """Self-attention through a context, cross-attention to text (and picture), feed-forward; modulated per frame."""

    def __init__(
        self, dim: int, ffn_dim: int, heads: int, cross_attn_norm: bool, eps: float, strict: bool,
        image_branch: bool = False,
    ) -> None:
        super().__init__()
        self.attn1 = Attention(dim, heads, eps, strict)
        self.attn2 = CrossAttention(dim, heads, eps, strict, image_branch)
        self.norm2 = LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.eps, self.strict = eps, strict
        self.attention_backend = "native"

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        layer: int,
        context: AttentionContext,
        text: Tensor | KeyValue,
        prompts: Tensor | None,
        dtype: torch.dtype,
        stage_only: bool = False,
        image: Tensor | KeyValue | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: [B, F, T, D], the residual stream.
            time: [B or 1, F or 1, 6, D], see `ConditionEmbedder.time`.
            text: [B·P, L, D] embedded text, or this block's (keys, values), [B·P, L, H, d] each.
            prompts: [B·F], the row of `text` that each frame reads; None = one prompt for all frames.
            dtype: of matrix products and attention.
            stage_only: hand keys and values to the context and stop: nothing reads the rest.
            image: [B or 1, L', D] the embedded picture, or this block's (keys, values) of it; None = text alone.
        Returns: [B, F, T, D].
        """
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = self._levels(time)
        h = modulate(x, shift, scale, self.eps, self.strict).to(dtype).flatten(1, 2)  # [B, L, D]
        if stage_only:
            context.stage(layer, *self.attn1.key_value(h))
            return x
        h = self.attn1.project(context.attend(layer, *self.attn1.query_key_value(h)))
        x = add_gated(x, h.view(x.shape), gate, self.strict)
        x = x + self._read_text(self.norm2(x).to(dtype), text, prompts, image)
        h = self.ffn(modulate(x, shift_ffn, scale_ffn, self.eps, self.strict).to(dtype))
        return add_gated(x, h, gate_ffn, self.strict)

    def _levels(self, time: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of self-attention, then of the feed-forward; [B or 1, F or 1, 1, D] each."""
        if not self.strict:  # float32 whatever the table's dtype: `time` is, and already holds the "1 +" of both scales
            return (self.scale_shift_table + time).split(1, dim=2)
        levels = list((self.scale_shift_table.to(time.dtype) + time).split(1, dim=2))
        levels[1], levels[4] = 1 + levels[1], 1 + levels[4]
        return tuple(levels)

    def _read_text(
        self, x: Tensor, text: Tensor | KeyValue, prompts: Tensor | None, image: Tensor | KeyValue | None
    ) -> Tensor:
        """Cross-attention: [B, F, T, D] -> the same."""
        key, value, *bias = self.attn2.key_value(text) if isinstance(text, Tensor) else text
        if prompts is None:
            query = self.attn2.query(x.flatten(1, 2))
            if key.shape[0] != query.shape[0]:  # one text for the whole batch
                key, value = key.expand(len(query), -1, -1, -1), value.expand(len(query), -1, -1, -1)
        else:
            query = self.attn2.query(x.flatten(0, 1))  # frames as a batch, each with its own text
            key, value = key.index_select(0, prompts), value.index_select(0, prompts)
        if bias:
            added = bias[0] if prompts is None else bias[0].index_select(0, prompts)
            mask = added.to(query.dtype)[:, None, None]  # the only back-end that takes one
            out = attend(query, key.to(query.dtype), value.to(query.dtype), mask=mask)
        else:
            out = attend(query, key.to(query.dtype), value.to(query.dtype), backend=self.attention_backend)
        if image is not None:
            out = out + self._read_image(query, image, len(x)).reshape(out.shape)
        return self.attn2.project(out).view(x.shape)

    def _read_image(self, query: Tensor, image: Tensor | KeyValue, batch: int) -> Tensor:
        """The picture has a softmax of its own: every query of a sample reads it, whichever prompt its frame has."""
        key, value = self.attn2.image_key_value(image) if isinstance(image, Tensor) else image
        if key.shape[0] != batch:  # one picture for the whole batch
            key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
        query = query.reshape(batch, -1, *query.shape[2:])  # frames were the batch where prompts differ
        return attend(query, key.to(query.dtype), value.to(query.dtype), backend=self.attention_backend)


class PatchEmbedding(nn.Conv3d):
    """The patch convolution as one matrix product: stride equals kernel, so patches do not overlap."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, D, f, h, w], a view whose memory is [B, f, h, w, D]."""
        batch, channels, frames, height, width = x.shape
        pt, ph, pw = self.kernel_size
        grid = (frames // pt, height // ph, width // pw)
        patches = x.reshape(batch, channels, grid[0], pt, grid[1], ph, grid[2], pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        tokens = F.linear(patches.flatten(4), self.weight.flatten(1), self.bias)
        return tokens.permute(0, 4, 1, 2, 3)


class _Mlp(nn.Module):
    def __init__(self, in_dim: int, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_dim, dim), nn.Linear(dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ImageEmbedding(nn.Module):
    """A picture's CLIP tokens to rows the blocks read; with `positions` two pictures, told apart by a learnt offset."""

    def __init__(self, image_dim: int, dim: int, positions: int | None, strict: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(image_dim, 1e-5), LayerNorm(dim, 1e-5)
        self.ff = FeedForward(image_dim, image_dim, dim)
        self.pos_embed = None if positions is None else nn.Parameter(torch.zeros(1, positions, image_dim))
        self.image_dim, self.strict = image_dim, strict

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, tokens, image_dim] -> [B, L', D]; with positions also [2B, positions / 2, image_dim], pairs adjacent."""
        x = self._placed(tokens.to(dtype))
        x = self.norm1(x if self.strict else widen(x)).to(dtype)
        x = self.ff.net[2](F.gelu(self.ff.net[0].proj(x)))  # the exact GELU here, unlike in the blocks
        return self.norm2(x if self.strict else widen(x)).to(dtype)

    def _placed(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.image_dim:
            raise ValueError(f"encoder_hidden_states_image {tuple(x.shape)} should be [B, tokens, {self.image_dim}]")
        if self.pos_embed is None:
            return x
        positions = self.pos_embed.shape[1]
        if x.shape[1] * 2 != positions and x.shape[1] != positions or x.shape[0] * x.shape[1] % positions:
            raise ValueError(
                f"encoder_hidden_states_image {tuple(x.shape)}: this model reads two pictures per sample, "
                f"[2·B, {positions // 2}, {self.image_dim}] or [B, {positions}, {self.image_dim}]"
            )
        return x.reshape(-1, positions, self.image_dim) + self.pos_embed.to(x.dtype)


class ConditionEmbedder(nn.Module):
    """Timesteps, text and picture to what the blocks read."""

    def __init__(
        self, dim: int, freq_dim: int, text_dim: int, strict: bool, image_dim: int | None = None,
        image_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.time_embedder = _Mlp(freq_dim, dim, nn.SiLU())
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = _Mlp(text_dim, dim, nn.GELU(approximate="tanh"))
        self.image_embedder = None if image_dim is None else ImageEmbedding(image_dim, dim, image_positions, strict)
        self.freq_dim, self.strict = freq_dim, strict

    def time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embed [B, F] timesteps.

        Returns: [B, F, 1, D] for the head and [B, F, 6, D] for the blocks. Unless strict both are float32 and the
        scales among the six rows (1 and 4) come with "1 +" added, once here rather than in every block.
        """
        waves = sinusoid(timestep, self.freq_dim)
        first = self.time_embedder.linear_1.weight.dtype
        if self.strict:
            embedded = self.time_embedder(waves.to(dtype).to(first)).to(dtype)
            levels = self.time_proj(F.silu(embedded).to(self.time_proj.weight.dtype)).to(dtype)
            return embedded.unsqueeze(2), levels.unflatten(-1, (6, -1))
        with torch.autocast(timestep.device.type, enabled=False):  # a few rows: full precision costs nothing
            embedded = widen(self.time_embedder(waves.to(first)))
            levels = widen(self.time_proj(F.silu(embedded).to(self.time_proj.weight.dtype)))
        levels = levels.unflatten(-1, (6, -1))
        levels[:, :, 1::3] += 1  # a slice, not a constant tensor: no copy from the host, so CUDA graphs can capture it
        return embedded.unsqueeze(2), levels

    def text(self, prompt_embeds: Tensor, text_len: int | None, dtype: torch.dtype) -> Tensor:
        """[B, P, L, text_dim] -> [B·P, L, D]; `text_len` adds rows of zeros first, attended to as trained."""
        rows = prompt_embeds.flatten(0, 1).to(dtype)
        if text_len is not None:
            if rows.shape[1] > text_len:
                raise ValueError(f"the text has {rows.shape[1]} rows, this model takes at most text_len = {text_len}")
            rows = F.pad(rows, (0, 0, 0, text_len - rows.shape[1]))
        return self.text_embedder(rows)


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[B, F] -> [B, F, dim] float32, cosines first; float64 inside, where 1000·ω keeps all its digits."""
    precise = torch.float64 if timestep.device.type != "mps" else torch.float32
    ladder = torch.arange(dim // 2, dtype=precise, device=timestep.device).mul(-math.log(10000.0) / (dim // 2)).exp()
    angles = timestep.to(precise).unsqueeze(-1) * ladder
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()
