"""The causal Wan transformer: Wan2.1's network with timesteps and prompts per frame and a replaceable context.

Weights and configuration are those of `diffusers.WanTransformer3DModel`; called alike, it returns the same numbers:

    model = CausalWanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    velocity = model(latents, timestep, prompt_embeds).sample
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from streamgen.kernels.attention import require
from streamgen.models.blocks import (
    CausalWanTransformerBlock,
    ConditionEmbedder,
    PatchEmbedding,
    TextKeys,
    modulate,
    widen,
)
from streamgen.models.context import AttentionContext, DenseContext, token_mask
from streamgen.models.masks import FrameGroups
from streamgen.models.rope import RotaryEmbedding

__all__ = ["CausalWanTransformer3DModel", "TextKeys"]


class CausalWanTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin):
    """Velocity of noisy latents, frame by frame, given text and whatever history the context holds.

    Args beyond those of `diffusers.WanTransformer3DModel`:
        text_len: None attends to the text rows it is given; a number zero-pads them to that many before the text MLP,
            as the original layouts (512) were trained.
        precision: "mixed" runs matrix products in the weights' dtype (or autocast's) and norms, modulation, gates and
            the residual stream in float32; "strict" rounds every step to the weights' dtype, like Self-Forcing in bf16.

    Image-to-video models read a picture in two ways: as more input channels (`in_channels` > `out_channels`), and some
    through CLIP tokens (`image_dim` and `added_kv_proj_dim`; `pos_embed_seq_len` where there is a last picture too).
    `rope_max_seq_len` is kept for compatibility: positions have no end here.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CausalWanTransformerBlock"]
    _repeated_blocks = ["CausalWanTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm"]
    _keep_in_fp32_modules = ["time_embedder", "scale_shift_table", "norm1", "norm2"]
    _keys_to_ignore_on_load_unexpected = ["norm_added_q"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        text_len: int | None = None,
        precision: str = "mixed",
    ) -> None:
        super().__init__()
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm {qk_norm!r} is not supported; every Wan2.1 model uses 'rms_norm_across_heads'")
        if precision not in ("mixed", "strict"):
            raise ValueError(f"precision {precision!r} is unknown; choose 'mixed' or 'strict'")
        dim = num_attention_heads * attention_head_dim
        _check_image_branch(dim, image_dim, added_kv_proj_dim, pos_embed_seq_len)
        strict = precision == "strict"
        patch_size = tuple(patch_size)
        self.rope = RotaryEmbedding(attention_head_dim)
        self.patch_embedding = PatchEmbedding(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, strict, image_dim, pos_embed_seq_len)
        self.blocks = nn.ModuleList(
            CausalWanTransformerBlock(
                dim, ffn_dim, num_attention_heads, cross_attn_norm, eps, strict, image_dim is not None
            )
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        # Plain attributes: reading `config` costs microseconds per access, which shows at small sizes.
        self.patch_size, self.text_len, self.eps, self.strict = patch_size, text_len, eps, strict
        self.attention_backend = "native"
        self.gradient_checkpointing = False

    def reset_parameters(self) -> None:
        """Initialise for training from scratch: Xavier matrices, small text and time MLPs, a zero head."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch convolution is a matrix too
                nn.init.zeros_(module.bias)
        embedder = self.condition_embedder
        for mlp in (embedder.text_embedder, embedder.time_embedder):
            nn.init.normal_(mlp.linear_1.weight, std=0.02)
            nn.init.normal_(mlp.linear_2.weight, std=0.02)
        for table in (self.scale_shift_table, *(block.scale_shift_table for block in self.blocks)):
            nn.init.normal_(table, std=table.shape[-1] ** -0.5)
        nn.init.zeros_(self.proj_out.weight)

    def set_attention_backend(self, backend: str) -> None:
        """Choose by name how attention is computed; raises at once if that cannot run here."""
        require(backend)
        self.attention_backend = backend
        for block in self.blocks:
            block.attention_backend = backend

    def fuse_qkv(self, enabled: bool = True) -> None:
        """Run self-attention's three projections as one product in forwards without gradients.

        Worth it where overhead per product counts: 1.5x on the projections in bf16 on a CPU at dim 256, nothing in
        float32 there. Names and parameters stay; a fused copy is built at first use and again after weights change.
        What writes through `.data` is not seen: call this again then.
        """
        for block in self.blocks:
            block.attn1.fuse, block.attn1._fused = enabled, None

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict, config=None, torch_dtype=None, dtype=None, **_):
        """Load one checkpoint file or state dict in any known layout (diffusers' entry point to `load_transformer`)."""
        from streamgen.models.loading import load_transformer

        model = load_transformer(pretrained_model_link_or_path_or_dict, config)
        chosen = dtype or torch_dtype
        return model if chosen is None else model.to(chosen)

    def text_keys(self, encoder_hidden_states: Tensor, encoder_hidden_states_image: Tensor | None = None) -> TextKeys:
        """Text MLP and every block's cross-attention keys and values, once per prompt; the picture's with them.

        Args:
            encoder_hidden_states: [B, L, D] or [B, P, L, D]; B may be 1 for any batch.
            encoder_hidden_states_image: [B', tokens, image_dim] for models with an image branch; B' may be 1 as well.
        """
        prompts, dtype = _with_prompt_axis(encoder_hidden_states), self._compute_dtype()
        image = self._embed_image(encoder_hidden_states_image, dtype)
        text = self.condition_embedder.text(prompts, self.text_len, dtype)
        pairs = [block.attn2.key_value(text) for block in self.blocks]
        seen = [] if image is None else [block.attn2.image_key_value(image) for block in self.blocks]
        split = (-1, prompts.shape[1])
        return TextKeys(
            keys=tuple(key.unflatten(0, split) for key, _ in pairs),
            values=tuple(value.unflatten(0, split) for _, value in pairs),
            image_keys=tuple(key for key, _ in seen),
            image_values=tuple(value for _, value in seen),
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        prompt_index: Tensor | None = None,
        frame_positions: Sequence[float] | Tensor | None = None,
        frame_mask: Tensor | FrameGroups | None = None,
        context: AttentionContext | None = None,
        text_keys: TextKeys | None = None,
        commit_only: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor] | None:
        """One forward over F frames (patch rows in time; one latent frame each in every Wan model).

        Args:
            hidden_states: [B, C, F, H, W] noisy latents, any size the patch divides.
            timestep: model time 0 to 1000: one number, [B], or [B, F]; [B, 1] = one for all frames, the fastest form.
            encoder_hidden_states: text, [B, L, D] or [B, P, L, D] for P prompts; None if `text_keys` is given.
            encoder_hidden_states_image: CLIP tokens, [B or 1, tokens, image_dim], for models with an image branch; a
                sample's frames share them. None if `text_keys` is given.
            attention_kwargs: {"scale": s} scales LoRA layers during this call.
            prompt_index: [B, F], the prompt of each frame; needed when P > 1.
            frame_positions: [F] or [B, F], temporal positions; default 0 … F-1.
            frame_mask: bool [F, F] or [B, F, F]; True = the row's frame may attend to the column's. None = all. Groups
                of frames (`frame_groups`) are the same for all rows of a batch and faster.
            context: self-attention with a memory; it owns positions and visibility, so neither may be given with it.
            text_keys: what `self.text_keys` returned for these prompts.
            commit_only: give the context every layer's keys and values, skip what nothing reads, return None.
        Returns: the flow velocity [B, C, F, H, W] in the weights' dtype, as `.sample` or a 1-tuple.
        """
        with _lora_scale(self, attention_kwargs):
            output = self._forward(
                hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, prompt_index,
                frame_positions, frame_mask, context, text_keys, commit_only,
            )
        if output is None:
            return None
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _forward(
        self, hidden_states, timestep, prompt_embeds, image_embeds, prompt_index, frame_positions, frame_mask, context,
        text_keys, commit_only: bool,
    ) -> Tensor | None:
        dtype = self._compute_dtype()
        grid = self._grid(hidden_states)
        x = self.patch_embedding(hidden_states.to(self.patch_embedding.weight.dtype))
        x = x.permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, F, T, D]
        x = x if self.strict else widen(x)
        head_time, time = self.condition_embedder.time(_per_frame(timestep, x), dtype)
        text, prompts = self._text(prompt_embeds, text_keys, prompt_index, x, dtype)
        image = self._image(image_embeds, text_keys, x.shape[0], dtype)
        if context is None:
            context = self._dense_context(grid, x.device, frame_positions, frame_mask)
        elif frame_positions is not None or frame_mask is not None:
            raise ValueError("frame_positions and frame_mask belong to the context when one is given")
        x = self._run_blocks(x, time, context, text, prompts, image, dtype, commit_only)
        return None if commit_only else self._head(x, head_time, grid, dtype)

    def _compute_dtype(self) -> torch.dtype:
        weight = self.patch_embedding.weight
        if not self.strict and torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def _grid(self, hidden_states: Tensor) -> tuple[int, int, int]:
        """Patches along time, height and width."""
        sizes, channels = hidden_states.shape[2:], self.patch_embedding.in_channels
        if hidden_states.dim() != 5 or hidden_states.shape[1] != channels:
            raise ValueError(f"hidden_states {tuple(hidden_states.shape)} should be [B, {channels}, F, H, W]")
        if any(size % patch for size, patch in zip(sizes, self.patch_size)):
            raise ValueError(f"latent size {tuple(sizes)} is not a multiple of the patch {self.patch_size}")
        return tuple(size // patch for size, patch in zip(sizes, self.patch_size))

    def _dense_context(self, grid, device, frame_positions, frame_mask) -> DenseContext:
        frames, height, width = grid
        positions = range(frames) if frame_positions is None else frame_positions
        cos, sin = self.rope.angles(positions, height, width, device=device)
        if isinstance(frame_mask, tuple):
            return DenseContext(cos, sin, None, self.attention_backend, frame_mask, frames)
        mask = None if frame_mask is None else token_mask(frame_mask.to(device), height * width)
        return DenseContext(cos, sin, mask, self.attention_backend)

    def _text(self, prompt_embeds, text_keys, prompt_index, x, dtype) -> tuple[Tensor | TextKeys, Tensor | None]:
        """What blocks read, and each frame's row in it (None = the same for all frames of a batch row)."""
        if (prompt_embeds is None) == (text_keys is None):
            raise ValueError("give either encoder_hidden_states or text_keys")
        if text_keys is not None:
            text, (texts, num_prompts) = text_keys, text_keys.keys[0].shape[:2]
        else:
            prompt_embeds = _with_prompt_axis(prompt_embeds)
            texts, num_prompts = prompt_embeds.shape[:2]
            text = self.condition_embedder.text(prompt_embeds, self.text_len, dtype)
        batch, frames = x.shape[:2]
        if texts not in (1, batch):
            raise ValueError(f"text for a batch of {texts} does not fit latents for a batch of {batch}")
        if num_prompts == 1:
            return text, None
        if prompt_index is None:
            raise ValueError(f"{num_prompts} prompts need prompt_index [B, F], the prompt of each frame")
        if prompt_index.shape != (batch, frames):
            raise ValueError(f"prompt_index {tuple(prompt_index.shape)} should be [B, F] = {(batch, frames)}")
        rows = prompt_index.to(x.device)
        if texts > 1:
            rows = rows + torch.arange(batch, device=x.device).unsqueeze(1) * num_prompts
        return text, rows.flatten()

    def _image(self, image_embeds, text_keys, batch: int, dtype) -> Tensor | TextKeys | None:
        """What blocks read of the picture; None where the model reads text alone."""
        if text_keys is None:
            image = self._embed_image(image_embeds, dtype)
            images = batch if image is None else image.shape[0]
        elif image_embeds is not None:
            raise ValueError("text_keys hold the picture already: give no encoder_hidden_states_image with them")
        else:
            image = text_keys if text_keys.image_keys else None
            images = batch if image is None else text_keys.image_keys[0].shape[0]
        if images not in (1, batch):
            raise ValueError(f"pictures for a batch of {images} do not fit latents for a batch of {batch}")
        return image

    def _embed_image(self, image_embeds: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """[B, tokens, image_dim] -> [B, L', D]; a picture and an image branch need each other."""
        embedder = self.condition_embedder.image_embedder
        if (embedder is None) != (image_embeds is None):
            raise ValueError(
                "encoder_hidden_states_image is for models with an image branch; this one has none (image_dim is None)"
                if embedder is None
                else "this model reads a picture beside the text: give encoder_hidden_states_image"
            )
        return None if embedder is None else embedder(image_embeds, dtype)

    def _run_blocks(self, x, time, context, text, prompts, image, dtype, commit_only: bool) -> Tensor:
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            own = text.layer(layer) if isinstance(text, TextKeys) else text
            seen = image.image_layer(layer) if isinstance(image, TextKeys) else image
            args = (x, time, layer, context, own, prompts, dtype, commit_only and layer == last, seen)
            x = self._gradient_checkpointing_func(block, *args) if checkpointing else block(*args)
        return x

    def _head(self, x: Tensor, time: Tensor, grid: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        shift, scale = (self.scale_shift_table.to(time.dtype) + time).split(1, dim=2)
        x = self.proj_out(modulate(x, shift, 1 + scale, self.eps, self.strict).to(dtype))
        x = x.to(self.patch_embedding.weight.dtype)
        # [B, F, T, pt·ph·pw·C], channels fastest -> [B, C, F·pt, h·ph, w·pw]
        x = x.reshape(x.shape[0], *grid, *self.patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _check_image_branch(
    dim: int, image_dim: int | None, added_kv_proj_dim: int | None, pos_embed_seq_len: int | None
) -> None:
    """diffusers' three settings of the image branch, as far as they depend on each other."""
    if (image_dim is None) != (added_kv_proj_dim is None):
        raise ValueError("image_dim and added_kv_proj_dim make the image branch together: give both or neither")
    if added_kv_proj_dim not in (None, dim):
        raise ValueError(f"added_kv_proj_dim {added_kv_proj_dim} should be the width {dim}, as in every Wan model")
    if pos_embed_seq_len is not None and image_dim is None:
        raise ValueError("pos_embed_seq_len belongs to the image branch: give image_dim and added_kv_proj_dim with it")


def _with_prompt_axis(prompt_embeds: Tensor) -> Tensor:
    if prompt_embeds.dim() not in (3, 4):
        raise ValueError(f"text {tuple(prompt_embeds.shape)} should be [B, L, D] or [B, P, L, D]")
    return prompt_embeds.unsqueeze(1) if prompt_embeds.dim() == 3 else prompt_embeds


def _per_frame(timestep: Tensor | float, x: Tensor) -> Tensor:
    """Any accepted form of timestep as [B or 1, F or 1], never rounded below float32."""
    time = torch.as_tensor(timestep, device=x.device)
    time = time.reshape(-1, 1) if time.dim() < 2 else time
    batch, frames = x.shape[:2]
    if time.dim() != 2 or time.shape[0] not in (1, batch) or time.shape[1] not in (1, frames):
        raise ValueError(f"timestep {tuple(time.shape)} should be one number, [B] or [B, F], here {(batch, frames)}")
    return time


@contextmanager
def _lora_scale(model: nn.Module, attention_kwargs: dict[str, Any] | None):
    """Scale LoRA layers for the duration of a forward, as diffusers' models do."""
    scale = (attention_kwargs or {}).get("scale", 1.0)
    if scale == 1.0:
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)
