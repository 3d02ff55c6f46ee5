"""Who may see whom, frame by frame: masks for training forwards without a cache.

Masks are bool, rows = query frames, columns = key frames, True = may attend. At inference the cache decides instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FrameGroups", "block_causal_mask", "frame_groups", "teacher_forcing_mask"]

FrameGroups = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (query frames, the key frames they all see), …


def frame_groups(frame_mask: Tensor) -> FrameGroups:
    """A mask [F, F] as groups of queries with equal rows: attention group by group needs no mask and wastes nothing.

    A teacher-forcing mask of seven chunks is 29 % ones: a third of the scores, where shapes may be many and small.

    >>> frame_groups(block_causal_mask(4, 2))
    (((0, 1), (0, 1)), ((2, 3), (0, 1, 2, 3)))
    """
    rows: dict[tuple[bool, ...], list[int]] = {}
    for query, row in enumerate(frame_mask.tolist()):
        rows.setdefault(tuple(row), []).append(query)
    return tuple((tuple(queries), tuple(k for k, seen in enumerate(row) if seen)) for row, queries in rows.items())


def block_causal_mask(
    num_frames: int, chunk_frames: int, window: int | None = None, sink: int = 0, first_chunk: int | None = None
) -> Tensor:
    """A frame sees its own chunk and what came before it, as far back as the window reaches.

    Args:
        num_frames: frames of the clip; the last chunk may be cut short.
        chunk_frames: frames per chunk.
        window: frames a chunk sees at most = sink + recent + itself; None = everything before it.
        sink: the clip's first frames, which stay visible.
        first_chunk: frames of the first chunk if it differs (1 for image-to-video).
    Returns: [F, F].

    >>> block_causal_mask(4, 2).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 1],
            [1, 1, 1, 1]], dtype=torch.int32)
    >>> block_causal_mask(15, 3, window=9, sink=3)[14].nonzero().flatten().tolist()
    [0, 1, 2, 9, 10, 11, 12, 13, 14]
    >>> block_causal_mask(5, 2, first_chunk=1).sum(dim=1).tolist()
    [1, 3, 3, 5, 5]
    """
    _, ends = _chunk_bounds(num_frames, chunk_frames, first_chunk)
    frames = torch.arange(num_frames)
    return (frames < ends[:, None]) & _in_window(frames, ends, chunk_frames, window, sink)


def teacher_forcing_mask(
    num_frames: int, chunk_frames: int, window: int | None = None, sink: int = 0, first_chunk: int | None = None
) -> Tensor:
    """The mask over [clean | noisy] copies of one clip: every noisy chunk sees itself and the clean chunks before it.

    So one forward computes what streaming computes chunk by chunk with clean context. Clean frames are block-causal
    among themselves and never see noisy ones. Arguments as in `block_causal_mask`; both copies share their positions.
    Returns: [2F, 2F].

    >>> teacher_forcing_mask(2, 1).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    starts, ends = _chunk_bounds(num_frames, chunk_frames, first_chunk)
    frames = torch.arange(num_frames)
    reach = _in_window(frames, ends, chunk_frames, window, sink)
    clean = (frames < ends[:, None]) & reach
    history = (frames < starts[:, None]) & reach
    itself = starts[:, None] == starts
    return torch.cat((torch.cat((clean, torch.zeros_like(clean)), 1), torch.cat((history, itself), 1)))


def _chunk_bounds(num_frames: int, chunk_frames: int, first_chunk: int | None) -> tuple[Tensor, Tensor]:
    """Per frame, the first frame of its chunk and the frame after its last."""
    first = chunk_frames if first_chunk is None else first_chunk
    if min(num_frames, chunk_frames, first) < 1:
        given = f"num_frames {num_frames}, chunk_frames {chunk_frames} and first_chunk {first}"
        raise ValueError(f"{given} must each be at least 1")
    frames = torch.arange(num_frames)
    later = first + (frames - first).div(chunk_frames, rounding_mode="floor") * chunk_frames
    starts = torch.where(frames < first, 0, later)
    ends = torch.where(frames < first, first, later + chunk_frames)
    return starts, ends.clamp(max=num_frames)


def _in_window(frames: Tensor, ends: Tensor, chunk_frames: int, window: int | None, sink: int) -> Tensor:
    """[F, F]: the key frame is a sink frame or recent enough."""
    if sink < 0:
        raise ValueError(f"sink {sink} cannot be negative")
    if window is None:
        return torch.ones(len(frames), len(frames), dtype=torch.bool)
    if window < sink + chunk_frames:
        raise ValueError(f"window {window} cannot hold the sink ({sink}) and the chunk itself ({chunk_frames})")
    return (frames < sink) | (frames >= ends[:, None] - (window - sink))
