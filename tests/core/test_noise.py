"""Noise is a function of its address: whatever the batch split, the order of calls or the chunk split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamgen.noise import PURPOSES, SeededNoise, TensorNoise

FRAME = (2, 4, 3)  # channels, height, width
seeds = st.integers(-(2**70), 2**70)
purposes = st.sampled_from(sorted(PURPOSES))


def draw(noise, frames: range, batch: int = 1, purpose: str = "initial", step: int = 0) -> torch.Tensor:
    return noise.frames(purpose, frames, step, (batch, *FRAME))


@given(seeds, purposes, st.integers(0, 50), st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_frame_has_one_noise_whatever_the_chunk_split(seed, purpose, step, first, sizes):
    noise, stop = SeededNoise(seed), first + sum(sizes)
    whole = draw(noise, range(first, stop), 1, purpose, step)
    cuts = [first + sum(sizes[:i]) for i in range(len(sizes) + 1)]
    parts = [draw(SeededNoise(seed), range(a, b), 1, purpose, step) for a, b in zip(cuts[:-1], cuts[1:])]
    assert torch.equal(torch.cat(parts, 2), whole)
    last = draw(noise, range(stop - 1, stop), 1, purpose, step)  # out of order, alone
    assert torch.equal(last, whole[:, :, -1:])


@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_a_sample_has_one_noise_whatever_the_batch_split(seed, batch, more):
    small, large = (draw(SeededNoise(seed), range(2), n) for n in (batch, batch + more))
    assert torch.equal(small, large[:batch])


@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=4))
def test_a_list_of_seeds_is_each_seed_alone(seeds):
    together = draw(SeededNoise(seeds), range(3), len(seeds))
    assert torch.equal(together, torch.cat([draw(SeededNoise(seed), range(3)) for seed in seeds]))


def test_every_part_of_the_address_matters():
    first = torch.cat([draw(SeededNoise(seed), range(3), 2) for seed in (0, 1)])
    tables = [first.transpose(1, 2).reshape(12, -1)]
    for candidate in (0, 1):
        noise = SeededNoise(0, candidate)
        for purpose in PURPOSES:
            for step in (0, 1):
                if (candidate, purpose, step) != (0, "initial", 0):
                    tables.append(draw(noise, range(3), 2, purpose, step).transpose(1, 2).reshape(6, -1))
    rows = torch.cat(tables)
    assert len(rows) == 12 + 15 * 6
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_noise_is_standard_normal():
    noise = SeededNoise(3).frames("renoise", range(5), 2, (2, 4, 32, 32))
    assert noise.shape == (2, 4, 5, 32, 32) and noise.dtype == torch.float32
    count = noise.numel()  # 40,960: five standard errors of mean and variance
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    rows = noise.transpose(1, 2).reshape(10, -1)
    correlation = torch.corrcoef(rows) - torch.eye(10)
    assert correlation.abs().max() < 5 / rows.shape[1] ** 0.5


def test_noise_does_not_touch_the_global_generators():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(SeededNoise(1), range(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_large_and_negative_seeds_are_seeds_of_their_own():
    seeds = [0, 1, -1, -2, 2**63, 2**63 + 1, 2**64 - 1025]
    noises = [draw(SeededNoise(seed), range(1)) for seed in seeds]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(seeds)


def test_wrong_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        draw(SeededNoise([1, 2]), range(1), 3)


def test_tensor_noise_hands_out_what_it_was_given():
    initial, renoise, context = (torch.randn(*steps, 1, 2, 6, 4, 3) for steps in ((), (3,), (1,)))
    noise = TensorNoise(initial, renoise, context=context)
    assert (noise.batch, noise.num_latent_frames, noise.latent_size) == (1, 6, (4, 3))
    assert torch.equal(draw(noise, range(3, 6)), initial[:, :, 3:])
    assert torch.equal(draw(noise, range(0, 3), purpose="renoise", step=2), renoise[2][:, :, :3])
    assert torch.equal(draw(noise, range(6), purpose="context"), context[0])


@pytest.mark.parametrize(
    "purpose, frames, step, batch, words",
    [
        ("renoise", range(1), 0, 1, ["renoise", "TensorNoise("]),
        ("initial", range(4, 7), 0, 1, ["initial", "6 frames", "4-6"]),
        ("initial", range(3), 1, 1, ["1 steps", "step 1"]),
        ("initial", range(3), 0, 2, ["(1, 2, 3, 4, 3)", "(2, 2, 3, 4, 3)"]),
    ],
)
def test_tensor_noise_says_what_is_missing(purpose, frames, step, batch, words):
    noise = TensorNoise(torch.randn(1, 2, 6, 4, 3))
    with pytest.raises(ValueError) as caught:
        draw(noise, frames, batch, purpose, step)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
