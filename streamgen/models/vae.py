"""A small causal video VAE that streams: space 16×, time 4×, only 2-D convolutions with a memory of one frame.

Every latent frame stands for four pixel frames. The first one stands for one (a stream has 1 + 4k frames): encoding
repeats the first frame three times in front, decoding drops three. A temporal block sees its own input of the frame
before, as in TAEHV (github.com/madebyollin/taehv), so the state of a stream is one tensor per block and decoding
chunk by chunk equals decoding the whole clip. Time grows out of channels: repeated frames could not place motion
inside a latent frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

State = dict[int, Tensor]  # index of a temporal block -> its input of the last frame seen, [B, C, H, W]

TIME, PATCH = 4, 4  # pixel frames per latent frame; pixels per side of the first space-to-depth


class ResBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); a temporal block's first convolution also reads the frame before."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.conv1 = nn.Conv2d(channels * (2 if temporal else 1), channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, batch: int, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x: [B·T, C, H, W]; last: [B, C, H, W], the frame before, or None at the start of a stream."""
        y, new = x, None
        if self.temporal:
            frames = x.unflatten(0, (batch, -1))  # [B, T, C, H, W]
            first = torch.zeros_like(frames[:, 0]) if last is None else last
            new = frames[:, -1].clone()  # a view would keep the whole chunk alive, and in saved states
            before = torch.cat([first[:, None], frames[:, :-1]], 1).flatten(0, 1)
            y = torch.cat([x, before], 1)
        return x + self.conv2(F.silu(self.conv1(F.silu(y)))), new


class Down(nn.Module):
    """Halve height, width and frame rate into channels."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8 * channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, 2)
        return self.conv(x.unflatten(0, (-1, 2)).flatten(1, 2))


class Up(nn.Module):
    """Double height, width and frame rate out of channels."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8 * out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.pixel_shuffle(x.unflatten(1, (2, -1)).flatten(0, 1), 2)


class StreamingVAE(ModelMixin, ConfigMixin):
    """Causal VAE with explicit streaming state; pixels in [-1, 1], latents normalised to unit variance per channel."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 24,
        widths: Sequence[int] = (64, 96, 128),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        fine, middle, coarse = widths
        pixels = 3 * PATCH * PATCH
        self.encoder = nn.ModuleList(
            [
                nn.Conv2d(pixels, fine, 3, padding=1),
                ResBlock(fine, temporal=False),
                Down(fine, middle),
                ResBlock(middle, temporal=True),
                Down(middle, coarse),
                ResBlock(coarse, temporal=True),
                ResBlock(coarse, temporal=True),
                nn.Conv2d(coarse, 2 * latent_channels, 1),
            ]
        )
        self.decoder = nn.ModuleList(
            [
                nn.Conv2d(latent_channels, coarse, 3, padding=1),
                ResBlock(coarse, temporal=True),
                ResBlock(coarse, temporal=True),
                Up(coarse, middle),
                ResBlock(middle, temporal=True),
                ResBlock(middle, temporal=True),
                Up(middle, fine),
                ResBlock(fine, temporal=False),
                ResBlock(fine, temporal=False),
                nn.Conv2d(fine, pixels, 3, padding=1),
            ]
        )
        with torch.no_grad():
            self.encoder[-1].bias[latent_channels:] = -5.0  # start almost deterministic
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> StreamingVAE:
        """As in diffusers; loading forgets the memory format, which is worth a fifth of the decoding time."""
        return super().from_pretrained(*args, **kwargs).to(memory_format=torch.channels_last)

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent, per side."""
        return 4 * PATCH

    @property
    def temporal_ratio(self) -> int:
        """Pixel frames per latent frame."""
        return TIME

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def _run(self, layers: nn.ModuleList, x: Tensor, batch: int, state: State | None) -> tuple[Tensor, State]:
        new: State = {}
        x = x.contiguous(memory_format=torch.channels_last)
        for index, layer in enumerate(layers):
            if isinstance(layer, ResBlock):
                x, last = layer(x, batch, (state or {}).get(index))
                if last is not None:
                    new[index] = last
            else:
                x = layer(x)
        return x, new

    def moments(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, Tensor, State]:
        """Posterior mean and log-variance before normalisation, each [B, C, f, h, w], and the new state.

        Args:
            frames: [B, 3, F, H, W] in [-1, 1]; F = 1 + 4k at the start of a stream, 4k after it.
            state: what the last call returned; None at the start of a stream.
        """
        batch = frames.shape[0]
        if state is None:
            frames = torch.cat([frames[:, :, :1].expand(-1, -1, TIME - 1, -1, -1), frames], 2)
        if frames.shape[2] % TIME:
            raise ValueError(f"{frames.shape[2]} frames: a stream is 1 + {TIME}k frames, later chunks {TIME}k")
        x = F.pixel_unshuffle(frames.transpose(1, 2).flatten(0, 1), PATCH)
        x, state = self._run(self.encoder, x, batch, state)
        x = x.unflatten(0, (batch, -1)).transpose(1, 2)  # [B, 2C, f, h, w]
        mean, log_variance = x.chunk(2, 1)
        return mean, log_variance, state

    def reconstruct(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Pixels of raw latents: [B, C, f, h, w] -> [B, 3, F, H, W], F = 4f - 3 at the start of a stream, else 4f."""
        batch = latents.shape[0]
        x, new = self._run(self.decoder, latents.transpose(1, 2).flatten(0, 1), batch, state)
        x = F.pixel_shuffle(x, PATCH).unflatten(0, (batch, -1)).transpose(1, 2)
        return (x[:, :, TIME - 1 :] if state is None else x), new

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.config.latent_channels
        mean = torch.tensor(self.config.latents_mean or [0.0] * channels, device=like.device, dtype=torch.float32)
        std = torch.tensor(self.config.latents_std or [1.0] * channels, device=like.device, dtype=torch.float32)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    @apply_forward_hook
    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Frames in [-1, 1] -> normalised latents (the posterior mean) and the new state; shapes as in `moments`."""
        mean, _, state = self.moments(frames.to(self.dtype), state)
        shift, scale = self._scale(mean)
        return (mean.float() - shift) / scale, state

    @apply_forward_hook
    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Normalised latents -> frames in [-1, 1] and the new state; shapes as in `reconstruct`."""
        shift, scale = self._scale(latents)
        frames, state = self.reconstruct((latents.float() * scale + shift).to(self.dtype), state)
        return frames.float().clamp(-1, 1), state
