"""Ladders: the worked numbers, V1, and what a step does."""

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamgen import ladder as module
from streamgen.errors import InputError
from streamgen.ladder import Ladder, build_ladder, sigma_table, uniform_timesteps, warp_timesteps

lists = st.lists(st.integers(1, 1000), min_size=1, max_size=12, unique=True).map(lambda t: sorted(t, reverse=True))
shifts = st.floats(0.5, 12.0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_examples():
    assert doctest.testmod(module).failed == 0


def test_warped_steps_of_self_forcing():
    ladder = build_ladder([1000, 750, 500, 250], shift=5.0, warp=True)
    assert ladder.timesteps == pytest.approx((1000, 937.5, 2500 / 3, 625))
    assert ladder.sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625, 0))


@pytest.mark.parametrize("shift, last", [(5.0, 4.98008), (8.0, 7.94439)])
def test_last_entry_of_the_sigma_table(shift, last):
    table = sigma_table(shift)
    assert len(table) == 1000 and table[0] == 1
    assert 1000 * table[-1].item() == pytest.approx(last, abs=1e-5)
    assert (table.diff() < 0).all()


def test_table_looks_up_the_nearest_level_and_exact_divides():
    exact = build_ladder([1000, 933], shift=5.0)
    table = build_ladder([1000, 933], shift=5.0, sigma="table")
    assert exact.timesteps == table.timesteps == (1000, 933)  # what the network is fed does not change
    assert exact.sigmas[1] == pytest.approx(0.933, abs=1e-7)
    assert table.sigmas[1] != pytest.approx(0.933, abs=1e-5)  # 933 has no entry of its own
    entries = sigma_table(5.0)
    assert (entries - 0.933).abs().min() == abs(table.sigmas[1] - torch.tensor(0.933))


@given(lists, shifts, st.booleans(), st.sampled_from(["exact", "table"]))
def test_v1_levels_fall_strictly_from_at_most_one_to_zero(timesteps, shift, warp, sigma):
    try:
        ladder = build_ladder(timesteps, shift=shift, warp=warp, sigma=sigma)
    except InputError:  # neighbours that share a table entry are no ladder
        assert sigma == "table"
        return
    assert len(ladder) == len(timesteps) == len(ladder.sigmas) - 1
    assert ladder.sigmas[0] <= 1 and ladder.sigmas[-1] == 0
    assert all(a > b for a, b in zip(ladder.sigmas, ladder.sigmas[1:]))


@given(lists, shifts, st.booleans())
def test_euler_on_a_straight_path_lands_on_x0_whatever_the_steps(timesteps, shift, warp):
    ladder = build_ladder(timesteps, shift=shift, warp=warp, solver="euler")
    x0, noise = draw(2, 3), draw(2, 3, seed=1)
    x = (1 - ladder.sigmas[0]) * x0 + ladder.sigmas[0] * noise
    for p in range(len(ladder)):
        x = ladder.step(x, noise - x0, p, noise=None)  # no fresh noise is asked for
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)  # a dozen float32 additions


@given(lists)
def test_renoise_takes_the_clean_estimate_to_the_next_level(timesteps):
    ladder = build_ladder(timesteps)
    x, velocity, fresh = draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
    for p, sigma in enumerate(ladder.sigmas[:-1]):
        target, clean = ladder.sigmas[p + 1], x - sigma * velocity
        torch.testing.assert_close(ladder.denoised(x, velocity, p), clean)
        stepped = ladder.step(x, velocity, p, lambda: fresh)
        torch.testing.assert_close(stepped, (1 - target) * clean + target * fresh)


def test_the_last_step_asks_for_no_noise():
    ladder = build_ladder([1000, 500])

    def refuse():
        raise AssertionError("noise of the last step is never used")

    x = ladder.step(draw(3), draw(3, seed=1), 1, refuse)
    torch.testing.assert_close(x, draw(3) - 0.5 * draw(3, seed=1))


def test_a_trailing_zero_is_dropped():
    assert build_ladder([1000, 500, 0]) == build_ladder([1000, 500])


@given(st.integers(1, 50))
def test_uniform_timesteps_make_a_ladder(steps):
    assert len(build_ladder(uniform_timesteps(steps), warp=True, shift=3.0)) == steps


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(timesteps=[]), "empty"),
        (dict(timesteps=[0]), "empty"),
        (dict(timesteps=[500, 1000]), "fall strictly"),
        (dict(timesteps=[1000, 1000]), "fall strictly"),
        (dict(timesteps=[1001]), "1000"),
        (dict(timesteps=[500, -1]), "above 0"),
        (dict(timesteps=[1000, 999.9], sigma="table", shift=5.0), "fall strictly"),
        (dict(timesteps=[1000], shift=0), "shift"),
        (dict(timesteps=[1000], sigma="tabel"), "exact or table"),
        (dict(timesteps=[1000], solver="heun"), "renoise or euler"),
    ],
)
def test_bad_ladders_are_refused_in_one_line(arguments, word):
    with pytest.raises(InputError) as caught:
        build_ladder(**arguments)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_warp_refuses_a_shift_that_is_not_positive():
    with pytest.raises(ValueError, match="positive"):
        warp_timesteps(torch.tensor([1000.0]), 0.0)


def test_a_ladder_knows_its_length():
    assert len(Ladder((1000.0, 500.0), (1.0, 0.5, 0.0))) == 2
