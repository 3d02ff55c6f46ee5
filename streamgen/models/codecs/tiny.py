"""A tiny stand-in for a Wan VAE, in the layout of TAEHV's `taew2_1` (github.com/madebyollin/taehv).

    codec = TinyCodec.from_file("taew2_1.pth").to("cuda", torch.bfloat16)

Plain 2-D convolutions; the memory blocks see their own input of the frame before, which is the whole state of a
stream. It reads and writes the latents that the transformer works on: no mean or standard deviation in between.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.errors import InputError
from streamgen.models.codecs.base import LATENTS_PER_CALL, check_frames, run_parts, split_time
from streamgen.models.reading import read_state_dict, some

State = dict[int, Tensor]  # index of a memory block -> its input of the last frame seen, [B, C, H, W]

TIME = 4  # pixel frames per latent


def _conv(channels: int, out_channels: int, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, **options)


class SoftClamp(nn.Module):
    """Keep latents within ±3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Memory(nn.Module):
    """relu(x + three convolutions of x and the frame before)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * channels, channels), nn.ReLU(), _conv(channels, channels), nn.ReLU(), _conv(channels, channels)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(x + self.conv(torch.cat([x, before], 1)))


class Pool(nn.Module):
    """Merge `stride` consecutive frames of [B·T, C, H, W] into one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(0, (-1, self.stride)).flatten(1, 2))


class Grow(nn.Module):
    """Make `stride` consecutive frames out of each of [B·T, C, H, W]."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class TinyCodec(nn.Module):
    """A `Codec` of 11 M weights (9.8 M decode); names of weights are those of `taew2_1.pth`.

    The network makes four frames out of every latent; those that the first latent would have before frame 0 are
    dropped. Encoding repeats the first frame three times in front, so that 1 + 4k frames give 1 + k latents and a chunk
    needs no frame beyond it. TAEHV instead groups frames from the first one on and reads three frames ahead: here what
    a latent shows is three frames older than with the Wan VAE, after a start that stands still.

    Args:
        widths: channels of the decoder's four stages; the last is its output stage.
        patch: pixels per side folded into channels (the variant for Wan2.2's 48 channels has 2).
    """

    def __init__(
        self,
        latent_channels: int = 16,
        widths: Sequence[int] = (256, 128, 64, 64),
        encoder_width: int = 64,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.latent_channels, self.patch = latent_channels, patch
        self.spatial_ratio, self.temporal_ratio = 8 * patch, TIME
        pixels, width = 3 * patch * patch, encoder_width
        down: list[nn.Module] = [_conv(pixels, width), nn.ReLU()]
        for stride in (2, 2, 1):
            down += [Pool(width, stride), _conv(width, width, stride=2, bias=False), *_memories(width)]
        self.encoder = nn.Sequential(*down, _conv(width, latent_channels))
        up: list[nn.Module] = [SoftClamp(), _conv(latent_channels, widths[0]), nn.ReLU()]
        for width, after, stride in zip(widths[:3], widths[1:], (1, 2, 2)):
            up += [*_memories(width), nn.Upsample(scale_factor=2), Grow(width, stride), _conv(width, after, bias=False)]
        self.decoder = nn.Sequential(*up, nn.ReLU(), _conv(widths[3], pixels))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> TinyCodec:
        """Load `.pth` or `.safetensors`; sizes follow from shapes, weights keep their dtype; eval mode, on the CPU.

        Raises: InputError, one line, if the file is not of this layout.
        """
        state = read_state_dict(path)
        with torch.device("meta"):
            codec = cls(**_sizes(state, path))
        expected = codec.state_dict()
        for name, module in codec.named_modules():
            if isinstance(module, Grow):  # older files grow by 2 everywhere: the newest frames are the ones to keep
                key = f"{name}.conv.weight"
                if key in state:
                    state[key] = state[key][-expected[key].shape[0] :]
        _check(state, expected, path)
        codec.load_state_dict(state, assign=True)
        return codec.eval()

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As in `Codec`; F = 4f - 3 at the start of a stream, else 4f."""
        parts = split_time(self._cast(latents), 0, LATENTS_PER_CALL)
        x, new = run_parts(lambda part, last: self._run(self.decoder, part, last), parts, state)
        pixels = F.pixel_shuffle(x.transpose(1, 2), self.patch).transpose(1, 2)  # [B, 3, 4f, H, W]
        if state is None:
            pixels = pixels[:, :, TIME - 1 :]
        return pixels.float().clamp(0, 1) * 2 - 1, new

    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As in `Codec`; the class tells what a latent shows. Raises InputError for frames off the grid."""
        check_frames(self, frames, state is None)
        if state is None:
            frames = torch.cat([frames[:, :, :1].expand(-1, -1, TIME - 1, -1, -1), frames], 2)
        x = self._cast((frames.float() + 1) / 2)
        x = F.pixel_unshuffle(x.transpose(1, 2), self.patch).transpose(1, 2)
        parts = split_time(x, 0, TIME * LATENTS_PER_CALL)
        latents, new = run_parts(lambda part, last: self._run(self.encoder, part, last), parts, state)
        return latents.float(), new

    def _cast(self, x: Tensor) -> Tensor:
        weight = self.decoder[1].weight
        return x.to(weight.device, weight.dtype)

    def _run(self, layers: nn.Sequential, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """[B, C, T, H, W] through all layers, frames side by side."""
        batch, new = x.shape[0], {}
        x = x.transpose(1, 2).flatten(0, 1)  # [B·T, C, H, W]
        for index, layer in enumerate(layers):
            if isinstance(layer, Memory):
                frames = x.unflatten(0, (batch, -1))
                first = torch.zeros_like(frames[:, :1]) if state is None else state[index].to(x)[:, None]
                new[index] = frames[:, -1].clone()  # a view would keep the whole chunk, in memory and in a saved state
                x = layer(x, torch.cat([first, frames[:, :-1]], 1).flatten(0, 1))
            else:
                x = layer(x)
        return x.unflatten(0, (batch, -1)).transpose(1, 2), new


def _memories(channels: int) -> list[Memory]:
    return [Memory(channels) for _ in range(3)]


def _sizes(state: Mapping[str, Tensor], path) -> dict:
    """Constructor arguments out of shapes."""
    names = [f"decoder.{index}.weight" for index in (1, 8, 14, 20, 22)] + ["encoder.0.weight"]
    lacking = [name for name in names if name not in state or state[name].dim() != 4]
    if lacking:
        raise InputError(f"{path} is not a tiny codec like taew2_1: it has no convolution {', '.join(lacking)}")
    *stages, pixels, first = (state[name].shape for name in names)
    return {
        "latent_channels": stages[0][1],
        "widths": [stage[0] for stage in stages],
        "encoder_width": first[0],
        "patch": max(1, math.isqrt(pixels[0] // 3)),
    }


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path) -> None:
    """Raises InputError unless names and shapes are the same."""
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing, unexpected = [n for n in expected if n not in state], [n for n in state if n not in expected]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    problems = [f"{len(found)} {kind}: {some(found)}" for kind, found in kinds if found]
    if problems:
        raise InputError(f"{path} is not a tiny codec like taew2_1: {'; '.join(problems)}")
