"""Frame masks: worked tables and their laws."""

import doctest

import pytest
import torch

from streamgen.models import masks
from streamgen.models.masks import block_causal_mask, teacher_forcing_mask


def visible(mask: torch.Tensor, frame: int) -> list[int]:
    return mask[frame].nonzero().flatten().tolist()


def test_worked_examples():
    assert doctest.testmod(masks).failed == 0


def test_window_counts_sink_and_current_chunk():
    mask = block_causal_mask(15, 3, window=9, sink=3)
    assert visible(mask, 5) == [0, 1, 2, 3, 4, 5]
    assert visible(mask, 11) == [0, 1, 2, *range(6, 12)]
    assert visible(mask, 12) == [0, 1, 2, *range(9, 15)]
    assert visible(block_causal_mask(9, 3, window=6, sink=1), 8) == [0, 4, 5, 6, 7, 8]
    assert visible(block_causal_mask(9, 3, window=7), 6) == [2, 3, 4, 5, 6, 7, 8]


def test_one_chunk_sees_all_of_itself():
    assert block_causal_mask(4, 4).all()
    assert block_causal_mask(4, 7).all()  # cut short


def test_first_chunk_of_its_own_length():
    mask = block_causal_mask(7, 3, first_chunk=1)
    assert [len(visible(mask, frame)) for frame in range(7)] == [1, 4, 4, 4, 7, 7, 7]


@pytest.mark.parametrize("window, sink", [(None, 0), (4, 0), (5, 1)])
def test_teacher_forcing_noisy_rows_are_causal_rows_with_clean_history(window, sink):
    frames = 8
    causal = block_causal_mask(frames, 2, window, sink)
    mask = teacher_forcing_mask(frames, 2, window, sink)
    assert torch.equal(mask[:frames, :frames], causal)
    assert not mask[:frames, frames:].any()
    history, own = mask[frames:, :frames], mask[frames:, frames:]
    assert not (history & own).any()
    assert torch.equal(history | own, causal)
    assert visible(own, 5) == [4, 5]


@pytest.mark.parametrize(
    "arguments", [dict(chunk_frames=0), dict(chunk_frames=3, window=2), dict(chunk_frames=3, window=5, sink=3)]
)
def test_impossible_masks_are_refused(arguments):
    with pytest.raises(ValueError):
        block_causal_mask(6, **arguments)
