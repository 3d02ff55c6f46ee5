"""Attention back-ends and rotation against plain formulas."""

import math

import pytest
import torch

from streamgen.kernels.attention import BACKENDS, attend, available
from streamgen.kernels.rope import _rotate_real, rotate


def heads(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(query, key, value, mask=None, scale=None):
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * (scale or 1 / math.sqrt(query.shape[-1]))
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_native_is_softmax_attention(masked, scale):
    query, key, value = heads(2, 5, 3, 8), heads(2, 7, 3, 8, seed=1), heads(2, 7, 3, 8, seed=2)
    mask = None
    if masked:
        mask = heads(2, 1, 5, 7, seed=3) > 0
        mask[..., 0] = True
    out = attend(query, key, value, mask=mask, scale=scale)
    torch.testing.assert_close(out, by_hand(query, key, value, mask, scale), atol=1e-6, rtol=1e-5)


def test_unknown_backend_lists_the_choices():
    x = heads(1, 2, 1, 8)
    with pytest.raises(ValueError, match="native, math, xformers, flex"):
        attend(x, x, x, backend="nativ")


def test_available_says_why_not_in_one_line():
    answers = available()
    assert list(answers) == list(BACKENDS)
    assert answers["native"] is None
    assert all(reason is None or (reason and "\n" not in reason) for reason in answers.values())


@pytest.mark.parametrize("masked", [False, True])
def test_scores_in_memory_match_the_reference_gradients_too(masked):
    mask = torch.ones(37, 37, dtype=torch.bool).tril() if masked else None
    results = []
    for name in ("native", "math"):
        query, key, value = (heads(2, 37, 3, 8, seed=seed).requires_grad_() for seed in range(3))
        out = attend(query, key, value, mask=mask, scale=0.3, backend=name)
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["xformers", "flex"])
def test_cuda_backends_are_refused_without_cuda(name):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    x = heads(1, 2, 1, 8)
    with pytest.raises(RuntimeError, match="CUDA.*use 'native'"):
        attend(x, x, x, backend=name)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("native", "math")])
@pytest.mark.parametrize("masked", [False, True])
def test_backend_matches_reference(name, masked):
    reason = available()[name]
    if reason:
        pytest.skip(reason)
    x = heads(2, 37, 3, 64).cuda().half()
    mask = torch.ones(37, 37, dtype=torch.bool, device="cuda").tril() if masked else None
    expected = attend(x, x, x, mask=mask)
    torch.testing.assert_close(attend(x, x, x, mask=mask, backend=name), expected, atol=2e-3, rtol=2e-3)


def test_rotation_turns_interleaved_pairs():
    x, angle = heads(2, 3, 2, 6), heads(3, 1, 3, seed=1)
    out = rotate(x, angle.cos(), angle.sin())
    turned = torch.view_as_complex(x.reshape(2, 3, 2, 3, 2)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(out, torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_paths_agree_gradients_too(dtype):
    angle = heads(2, 5, 1, 4, seed=1)
    results = []
    for function in (rotate, _rotate_real):
        x = heads(2, 5, 3, 8).to(dtype).requires_grad_()
        out = function(x, angle.cos(), angle.sin())
        assert out.dtype == dtype
        (out.float() * heads(2, 5, 3, 8, seed=2)).sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


def test_rotation_keeps_angles_between_positions():
    query, key = heads(1, 1, 1, 8), heads(1, 1, 1, 8, seed=1)
    turn = lambda x, angle: rotate(x, torch.full((1, 1, 4), angle).cos(), torch.full((1, 1, 4), angle).sin())
    near = (turn(query, 0.5) * turn(key, 0.2)).sum()
    far = (turn(query, 1.5) * turn(key, 1.2)).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-5)
