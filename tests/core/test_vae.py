"""The embedded codec's law: chunk by chunk equals the whole clip, in both directions."""

import pytest
import torch

from streamgen.models.vae import StreamingVAE


@pytest.fixture(scope="module")
def vae() -> StreamingVAE:
    torch.manual_seed(0)
    model = StreamingVAE(latent_channels=4, widths=(8, 12, 8), latents_mean=[0.1] * 4, latents_std=[0.7] * 4).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "conv2.weight" in name:  # zero at birth: give the residual branches something to say
                weight.normal_(std=0.2)
    return model


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1, 1], [3, 3], [2, 4], [6]])
@torch.no_grad()
def test_streamed_decode_equals_whole_decode(vae, sizes):
    latents = torch.randn(2, 4, 6, 4, 3, generator=torch.Generator().manual_seed(1))
    whole, _ = vae.decode(latents)
    assert whole.shape == (2, 3, 21, 64, 48)
    parts, state = [], None
    for part in latents.split(sizes, 2):
        frames, state = vae.decode(part, state)
        parts.append(frames)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4, 4], [9, 12], [21]])
@torch.no_grad()
def test_streamed_encode_equals_whole_encode(vae, sizes):
    frames = torch.rand(1, 3, 21, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    whole, _ = vae.encode(frames)
    assert whole.shape == (1, 4, 6, 2, 3)
    parts, state = [], None
    for part in frames.split(sizes, 2):
        latents, state = vae.encode(part, state)
        parts.append(latents)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_past_matters_and_the_future_does_not(vae):
    frames = torch.rand(1, 3, 17, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    before, _ = vae.encode(frames)
    frames[:, :, 9:] = 0
    after, _ = vae.encode(frames)
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and not torch.equal(before[:, :, 3:], after[:, :, 3:])
    frames[:, :, :1] = 0
    assert not torch.allclose(vae.encode(frames)[0][:, :, 1], after[:, :, 1])


def test_a_frame_count_off_the_grid_is_refused(vae):
    with pytest.raises(ValueError, match="6 frames"):
        vae.encode(torch.zeros(1, 3, 3, 32, 32))
