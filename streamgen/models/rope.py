"""Rotary angles of video tokens: one ladder of frequencies each for time, height and width.

Positions are data, not table rows: they may be fractional, negative, repeated or as large as a stream is long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RotaryEmbedding"]

Angles = tuple[Tensor, Tensor]


class RotaryEmbedding:
    """Cosines and sines for tokens (f, h, w), pairs laid out [time | height | width].

    Of the d/2 pairs of a head, height and width get d // 6 each and time the rest; pair j of an axis with n pairs turns
    by theta^(-j/n) per position. Angles are formed in float64: in float32 a position of 10⁵ would be off by 10⁻².

    Not a module: it owns no weights and follows the device it is asked for.
    """

    CACHE_SIZE = 64  # results kept per table; a stream in steady state asks for a handful

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} is odd: rotary pairs need an even head size")
        spatial = head_dim // 6
        self.pairs = (head_dim // 2 - 2 * spatial, spatial, spatial)  # time, height, width
        self.theta = theta
        self._grids: dict[tuple, Angles] = {}
        self._angles: dict[tuple, Angles] = {}

    def frequencies(self, axis: int, device: torch.device | str | None = None) -> Tensor:
        """[pairs of that axis], float64: radians per position. Axis 0 = time, 1 = height, 2 = width."""
        count = self.pairs[axis]
        exponents = torch.arange(count, dtype=torch.float64, device=device) / max(count, 1)
        return self.theta**-exponents

    def angles(
        self,
        positions: Sequence[float] | Tensor,
        height: int,
        width: int,
        phase: float | Sequence[float] | Tensor = 0.0,
        device: torch.device | str | None = None,
    ) -> Angles:
        """Tables for `rotate`, tokens ordered f slowest, then h, then w.

        Args:
            positions: [F] or [B, F], temporal positions, one per frame; any real numbers.
            height, width: patch grid of a frame.
            phase: radians added to every temporal pair; one number or one per frame, like `positions`.
            device: where the tables go; by default where `positions` is.
        Returns: (cos, sin), float32, [F·T, 1, D/2] or [B, F·T, 1, D/2] with T = height·width. Shared: read only.
        """
        device = torch.device(device) if device is not None else getattr(positions, "device", torch.device("cpu"))
        host = not isinstance(positions, Tensor) and isinstance(phase, (int, float))
        if not host or torch.compiler.is_compiling():
            return self._build(positions, height, width, phase, device)
        key = (_frozen(positions), height, width, phase, device)
        return _remember(self._angles, key, lambda: self._build(positions, height, width, phase, device))

    def _build(self, positions, height, width, phase, device: torch.device) -> Angles:
        work = device if device.type != "mps" else torch.device("cpu")  # MPS has no float64
        turns = torch.as_tensor(positions, dtype=torch.float64, device=work)[..., None] * self.frequencies(0, work)
        if isinstance(phase, (Sequence, Tensor)):
            turns = turns + torch.as_tensor(phase, dtype=torch.float64, device=work)[..., None]
        elif phase:
            turns = turns + phase
        shape = (*turns.shape[:-1], height * width, -1)
        tables = []
        for frames, grid in zip(_tables(turns, device), self._grid(height, width, device), strict=True):
            table = torch.cat((frames.unsqueeze(-2).expand(shape), grid.expand(*shape[:-1], -1)), dim=-1)
            tables.append(table.flatten(-3, -2).unsqueeze(-2))
        return tables[0], tables[1]

    def _grid(self, height: int, width: int, device: torch.device) -> Angles:
        """Spatial halves of the tables, [T, pairs of height + width]."""
        if torch.compiler.is_compiling():
            return self._build_grid(height, width, device)
        return _remember(self._grids, (height, width, device), lambda: self._build_grid(height, width, device))

    def _build_grid(self, height: int, width: int, device: torch.device) -> Angles:
        rows = torch.arange(height, dtype=torch.float64)[:, None] * self.frequencies(1, "cpu")
        columns = torch.arange(width, dtype=torch.float64)[:, None] * self.frequencies(2, "cpu")
        turns = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1)
        return _tables(turns.flatten(0, 1), device)


def _tables(turns: Tensor, device: torch.device) -> Angles:
    return turns.cos().to(device, torch.float32), turns.sin().to(device, torch.float32)


def _frozen(positions) -> tuple:
    return tuple(tuple(row) if isinstance(row, Sequence) else row for row in positions)


def _remember(cache: dict[tuple, Angles], key: tuple, build) -> Angles:
    """Look up or build; a full cache drops its oldest entry."""
    found = cache.get(key)
    if found is None:
        with torch.inference_mode(False):  # a table born in inference mode could never be used in training again
            found = build()
        while len(cache) >= RotaryEmbedding.CACHE_SIZE:
            cache.pop(next(iter(cache)), None)
        cache[key] = found
    return found
