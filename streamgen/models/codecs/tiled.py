"""Large frames in overlapping tiles, with any codec: memory follows the tile, and every tile is a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from streamgen.errors import InputError
from streamgen.models.codecs.base import Codec, check_frames


class TiledCodec:
    """A `Codec` that runs another one tile by tile and blends linearly where tiles overlap.

    A frame that one tile covers goes to the codec as it is. A larger one is cut into tiles of nearly equal size; its
    result differs from the untiled one by what the codec would have seen beyond the edges.

    Args:
        tile: latents per side, at most.
        overlap: latents that neighbours share; the wider, the smoother the seams and the more work.
    Raises: InputError unless 1 <= overlap <= tile / 2.
    """

    def __init__(self, codec: Codec, tile: int = 32, overlap: int = 8) -> None:
        if not 1 <= overlap <= tile // 2:
            raise InputError(f"tile={tile}, overlap={overlap}: overlap goes from 1 to half of the tile")
        self.codec, self.tile, self.overlap = codec, tile, overlap
        self.spatial_ratio: int = codec.spatial_ratio
        self.temporal_ratio: int = codec.temporal_ratio
        self.latent_channels: int = codec.latent_channels

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As in `Codec`."""
        return self._run(self.codec.decode, latents, state, 1, self.spatial_ratio)

    def encode(self, frames: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As in `Codec`. Raises InputError for a number or a size of frames off the grid."""
        check_frames(self, frames, state is None)
        return self._run(self.codec.encode, frames, state, self.spatial_ratio, 1)

    def _run(self, call: Callable, x: Tensor, state: list | None, unit: int, scale: int) -> tuple[Tensor, Any]:
        """`unit`, `scale`: samples per latent and side of the input and of the output."""
        height, width = x.shape[3] // unit, x.shape[4] // unit
        rows, columns = spans(height, self.tile, self.overlap), spans(width, self.tile, self.overlap)
        if len(rows) * len(columns) == 1:
            return call(x, state)
        states = [None] * (len(rows) * len(columns)) if state is None else state
        down, across = weights(rows, self.overlap, scale), weights(columns, self.overlap, scale)
        out, after = None, []
        for index, (i, j) in enumerate(product(range(len(rows)), range(len(columns)))):
            tile, new = call(x[..., _box(rows[i], unit), _box(columns[j], unit)], states[index])
            after.append(new)
            if out is None:
                out = tile.new_zeros(*tile.shape[:3], height * scale, width * scale)
            weight = (down[i][:, None] * across[j]).to(tile.device)
            out[..., _box(rows[i], scale), _box(columns[j], scale)] += tile * weight
        return out, after


def spans(length: int, tile: int, overlap: int) -> list[range]:
    """Cut a side of `length` latents: neighbours share `overlap` of them, none is longer than `tile`."""
    if length <= tile:
        return [range(length)]
    count = -(-(length - overlap) // (tile - overlap))
    stride = -(-(length - overlap) // count)
    return [range(i * stride, min((i + 1) * stride + overlap, length)) for i in range(count)]


def weights(parts: list[range], overlap: int, scale: int) -> list[Tensor]:
    """Per part, its share in every sample along a side: linear over an overlap; the shares of a sample add up to 1."""
    end, edge = parts[-1].stop, overlap * scale
    total, ramps = torch.zeros(end * scale), []
    for part in parts:
        size = len(part) * scale
        position = torch.arange(size) + 0.5
        rise = position / edge if part.start > 0 else torch.ones(size)
        fall = (size - position) / edge if part.stop < end else torch.ones(size)
        ramps.append(torch.minimum(rise, fall).clamp(max=1))
        total[_box(part, scale)] += ramps[-1]
    return [ramp / total[_box(part, scale)] for ramp, part in zip(ramps, parts)]


def _box(part: range, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)
