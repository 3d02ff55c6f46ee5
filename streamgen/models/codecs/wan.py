"""diffusers' Wan VAE as a stream, of Wan2.1 (space 8×, 16 channels) and of Wan2.2 TI2V-5B (space 16×, 48 channels).

diffusers keeps the frames that its causal convolutions remember inside the module and forgets them at every public
call. Here they are a list of the caller's: an entry per convolution, each None, the last input frames, or "Rep" where
an upsampler in time has seen its first frame. The modules write into the list they are given, so they get a copy.
After the first frame several latents go through at once, with the same result as one by one.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn

from streamgen.errors import InputError
from streamgen.models.codecs.base import LATENTS_PER_CALL, check_frames, run_parts, split_time

State = list[Tensor | str | None]


class WanCodec:
    """A `Codec` over an `AutoencoderKLWan`; equals its whole-clip `decode`, and `encode(…).latent_dist.mode()`.

    Latents are normalised with `latents_mean` and `latents_std` of the configuration, in float32; encoding takes the
    posterior mean. The network runs in the dtype and on the device of its weights; its own tiling and slicing are not
    used (see `TiledCodec`). Raises InputError if the configuration has statistics of another number of channels.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        config = vae.config
        self.vae = vae
        self.patch = config.patch_size or 1  # pixels per side that Wan2.2 folds into channels
        # from the structure: a configuration may lack scale_factor_*, whose defaults are those of Wan2.1
        self.spatial_ratio: int = self.patch * 2 ** (len(config.dim_mult) - 1)
        self.temporal_ratio: int = 2 ** sum(config.temperal_downsample)
        self.latent_channels: int = config.z_dim
        for name in ("latents_mean", "latents_std"):
            if len(config[name]) != config.z_dim:
                raise InputError(f"the VAE's {name} has {len(config[name])} values for {config.z_dim} channels")
        self._mean = torch.tensor(config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config.latents_std, dtype=torch.float32).view(1, -1, 1, 1, 1)

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As in `Codec`; F = 4f - 3 at the start of a stream, else 4f."""
        self._load()
        x = latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)
        parts = split_time(x.to(self.vae.device, self.vae.dtype), int(state is None), LATENTS_PER_CALL)
        pixels, state = run_parts(self._decode_part, parts, state)
        return unpatchify(pixels, self.patch).float().clamp(-1, 1), state

    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As in `Codec`. Raises InputError for a number or a size of frames off the grid."""
        check_frames(self, frames, state is None)
        self._load()
        x = patchify(frames.to(self.vae.device, self.vae.dtype), self.patch)
        parts = split_time(x, int(state is None), self.temporal_ratio * LATENTS_PER_CALL)
        mean, state = run_parts(self._encode_part, parts, state)
        return (mean.float() - self._mean.to(mean.device)) / self._std.to(mean.device), state

    def _decode_part(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        cache, vae = self._cache(self.vae.decoder, state), self.vae
        x = vae.post_quant_conv(latents)
        return vae.decoder(x, feat_cache=cache, feat_idx=[0], first_chunk=state is None), cache

    def _encode_part(self, frames: Tensor, state: State | None) -> tuple[Tensor, State]:
        cache, vae = self._cache(self.vae.encoder, state), self.vae
        moments = vae.quant_conv(vae.encoder(frames, feat_cache=cache, feat_idx=[0]))
        return moments.chunk(2, 1)[0], cache

    def _cache(self, network: nn.Module, state: State | None) -> State:
        """A list for a network to write into."""
        if state is None:
            return [None] * sum(isinstance(module, WanCausalConv3d) for module in network.modules())
        return [x.to(self.vae.device, self.vae.dtype) if isinstance(x, Tensor) else x for x in state]

    def _load(self) -> None:
        """Under model offload, fetch the weights as the public methods of diffusers do, which are not called here."""
        hook = getattr(self.vae, "_hf_hook", None)
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(self.vae)
