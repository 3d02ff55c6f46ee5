"""Laws of every codec: chunk by chunk equals the whole clip, and a stream's state is the caller's alone."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from streamgen.errors import InputError
from streamgen.models.codecs import Codec, TiledCodec, TinyCodec, WanCodec, codec_for
from streamgen.models.codecs.tiled import spans, weights
from streamgen.models.vae import StreamingVAE

LATENT_SIZE = (4, 5)
# convolutions over other numbers of frames may add up in another order, and the norms of narrow networks magnify that
CLOSE = dict(atol=1e-4, rtol=1e-4)
WAN22 = dict(patch_size=2, is_residual=True, in_channels=12, out_channels=12, scale_factor_spatial=16)


def wan(**changes) -> AutoencoderKLWan:
    torch.manual_seed(0)
    channels = changes.get("z_dim", 4)
    mean = torch.linspace(-0.5, 0.7, channels).tolist()
    std = torch.linspace(0.6, 1.8, channels).tolist()
    sizes = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, latents_mean=mean, latents_std=std)
    return AutoencoderKLWan(**{**sizes, **changes}).eval()


def tiny(patch: int = 1) -> TinyCodec:
    torch.manual_seed(1)
    codec = TinyCodec(latent_channels=4, widths=(12, 10, 8, 6), encoder_width=8, patch=patch).eval()
    with torch.no_grad():
        for name, weight in codec.named_parameters():
            weight.mul_(2 if name.endswith("weight") else 1)  # born quiet: what memory adds would drown in rounding
        codec.decoder[-1].weight.mul_(0.2)
        codec.decoder[-1].bias.fill_(0.5)  # grey: born around black, half of the values would be cut off
    return codec


def embedded() -> StreamingVAE:
    torch.manual_seed(2)
    vae = StreamingVAE(latent_channels=4, widths=(8, 8, 8)).eval()
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if "conv2.weight" in name:  # zero at birth
                weight.normal_(std=0.2)
    return vae


KINDS = {
    "wan2.1": lambda: codec_for(wan()),
    "wan2.2": lambda: codec_for(wan(z_dim=6, **WAN22)),
    "tiny": tiny,
    "embedded": embedded,
    "wan2.1, tiled": lambda: TiledCodec(WanCodec(wan()), tile=4, overlap=2),
    "tiny, tiled": lambda: TiledCodec(tiny(), tile=3, overlap=1),
}


@pytest.fixture(scope="module", params=KINDS)
def codec(request) -> Codec:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def clip(codec) -> SimpleNamespace:
    """Latents and frames of a stream, and what one call makes of them."""
    latents, frames = latents_for(codec), frames_for(codec)
    with torch.no_grad():
        return SimpleNamespace(
            latents=latents, frames=frames, decoded=codec.decode(latents)[0], encoded=codec.encode(frames)[0]
        )


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents_for(codec: Codec, frames: int = 6, seed: int = 3, batch: int = 1) -> Tensor:
    return draw(batch, codec.latent_channels, frames, *LATENT_SIZE, seed=seed)


def frames_for(codec: Codec, count: int = 21, seed: int = 4, batch: int = 1) -> Tensor:
    height, width = (side * codec.spatial_ratio for side in LATENT_SIZE)
    return draw(batch, 3, count, height, width, seed=seed).mul(0.5).clamp(-1, 1)


def in_chunks(call, x: Tensor, sizes: list[int], state=None) -> tuple[Tensor, object]:
    out = []
    for part in x.split(sizes, 2):
        y, state = call(part, state)
        out.append(y)
    return torch.cat(out, 2), state


def through_file(state):
    """What `torch.load(weights_only=True)` makes of a saved state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------- all codecs


@pytest.mark.parametrize("sizes", [[1] * 6, [3, 3], [1, 2, 3], [2, 1, 3]], ids=str)
def test_streamed_decode_equals_whole_decode(codec, clip, sizes):
    torch.testing.assert_close(in_chunks(codec.decode, clip.latents, sizes)[0], clip.decoded, **CLOSE)


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4, 4], [9, 12], [5, 8, 8]], ids=str)
def test_streamed_encode_equals_whole_encode(codec, clip, sizes):
    torch.testing.assert_close(in_chunks(codec.encode, clip.frames, sizes)[0], clip.encoded, **CLOSE)


def test_one_latent_stands_for_one_frame_and_then_for_four(codec, clip):
    assert clip.decoded.shape == (1, 3, 21, *(side * codec.spatial_ratio for side in LATENT_SIZE))
    assert clip.encoded.shape == (1, codec.latent_channels, 6, *LATENT_SIZE)
    assert clip.decoded.dtype == clip.encoded.dtype == torch.float32 and clip.decoded.abs().max() <= 1


def test_the_past_shows(codec, clip):
    """Else the laws above would hold for any state; and clamping everything would make anything equal."""
    assert (clip.decoded.abs() < 0.999).float().mean() > 0.5
    again, _ = codec.decode(clip.latents[:, :, 3:])
    assert (again[:, :, -8:] - clip.decoded[:, :, -8:]).abs().max() > 1e-3
    again, _ = codec.encode(clip.frames[:, :, 8:])
    assert (again[:, :, 1:] - clip.encoded[:, :, 3:]).abs().max() > 1e-3


def test_a_saved_state_goes_on_where_the_stream_was(codec, clip):
    for call, x, at, end in ((codec.decode, clip.latents, 1, 3), (codec.encode, clip.frames, 5, 9)):
        state = call(x[:, :, :at])[1]
        expected, _ = call(x[:, :, at:end], state)
        assert torch.equal(call(x[:, :, at:end], through_file(state))[0], expected)


def test_streams_do_not_disturb_each_other(codec, clip):
    """Two that decode and one that encodes take turns."""
    others = latents_for(codec, seed=8)
    streams = [
        (codec.decode, clip.latents.split([1, 2, 3], 2)),
        (codec.decode, others.split([1, 2, 3], 2)),
        (codec.encode, clip.frames.split([1, 8, 12], 2)),
    ]
    apart = [in_chunks(call, torch.cat(parts, 2), [x.shape[2] for x in parts])[0] for call, parts in streams]
    states, got = [None] * 3, [[], [], []]
    for turn in range(3):
        for i, (call, parts) in enumerate(streams):
            y, states[i] = call(parts[turn], states[i])
            got[i].append(y)
    assert all(torch.equal(torch.cat(parts, 2), expected) for parts, expected in zip(got, apart))


def test_a_state_is_never_changed_in_place(codec, clip):
    """So that two sessions may go on from one."""
    for call, x, at, end in ((codec.decode, clip.latents, 1, 3), (codec.encode, clip.frames, 5, 9)):
        state = call(x[:, :, :at])[1]
        copy = through_file(state)
        first, _ = call(x[:, :, at:end], state)
        assert same(state, copy)
        assert torch.equal(call(x[:, :, at:end], state)[0], first)


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_batch_is_its_samples(codec):
    for call, x, sizes in (
        (codec.decode, latents_for(codec, 3, batch=2), [1, 2]),
        (codec.encode, frames_for(codec, 9, batch=2), [5, 4]),
    ):
        apart = torch.cat([in_chunks(call, sample, sizes)[0] for sample in x.split(1)])
        torch.testing.assert_close(in_chunks(call, x, sizes)[0], apart, **CLOSE)


def test_codec_for_knows_the_family(codec):
    assert isinstance(codec, Codec) and codec_for(codec) is codec
    with pytest.raises(InputError, match="Linear does not stream: give a StreamingVAE") as failure:
        codec_for(torch.nn.Linear(1, 1))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("kind", ["wan2.1", "tiny", "tiny, tiled"])
def test_frames_off_the_grid_are_refused(kind):
    codec = KINDS[kind]()
    frames = frames_for(codec, 5)
    _, state = codec.encode(frames)
    for bad, after, message in (
        (frames[:, :, :4], None, r"4 frames: a stream starts with 1 \+ 4k"),
        (frames, state, "5 frames: a stream goes on with 4k"),
        (frames[:, :, :0], state, "0 frames"),
        (frames[..., :-1], None, "32×39: resize both sides to multiples of 8"),
    ):
        with pytest.raises(InputError, match=message):
            codec.encode(bad, after)


# ------------------------------------------------------------------------------------------- Wan


@pytest.mark.parametrize("changes", [{}, dict(z_dim=6, **WAN22)], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wan_equals_diffusers(changes, dtype):
    vae = wan(**changes).to(dtype)
    codec = WanCodec(vae)
    assert codec.spatial_ratio == vae.config.scale_factor_spatial and codec.temporal_ratio == 4
    latents, frames = latents_for(codec), frames_for(codec)
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    # bfloat16: sums over other numbers of frames may round to the neighbour, 2^-8 of the value
    close = CLOSE if dtype == torch.float32 else dict(atol=3e-2, rtol=2e-2)
    whole = vae.decode((latents * std + mean).to(dtype)).sample.float()
    pixels, state = codec.decode(latents[:, :, :3])
    vae.decode(latents.to(dtype))  # its own calls clear the cache inside the module, which is not ours
    more, _ = codec.decode(latents[:, :, 3:], state)
    torch.testing.assert_close(torch.cat([pixels, more], 2), whole, **close)
    codes, _ = in_chunks(codec.encode, frames, [9, 12])
    expected = (vae.encode(frames.to(dtype)).latent_dist.mode().float() - mean) / std
    torch.testing.assert_close(codes, expected, **close)
    assert codes.dtype == pixels.dtype == torch.float32


def test_wan_decodes_a_later_chunk_in_one_call():
    vae = wan()
    codec, calls = WanCodec(vae), []
    vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[2]))
    in_chunks(codec.decode, latents_for(codec), [3, 3])
    assert calls == [1, 2, 3]


def test_wan_fetches_offloaded_weights():
    vae, calls = wan(), []
    vae._hf_hook = SimpleNamespace(pre_forward=lambda module: calls.append(module))
    codec = WanCodec(vae)
    codec.decode(latents_for(codec, 1))
    codec.encode(frames_for(codec, 1))
    assert calls == [vae, vae]


def test_wan_refuses_statistics_of_other_channels():
    with pytest.raises(InputError, match="latents_mean has 16 values for 4 channels"):
        WanCodec(wan(latents_mean=[0.0] * 16))


# ------------------------------------------------------------------------------------------- tiles


class Pointwise:
    """A codec without neighbourhood: what tiles make of it must be what it makes of the frame."""

    spatial_ratio, temporal_ratio, latent_channels = 2, 4, 3

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def decode(self, latents, state=None):
        self.calls.append(tuple(latents.shape[3:]))
        frames = latents.repeat_interleave(4, 2)[:, :, 0 if state else 3 :]
        return frames.repeat_interleave(2, 3).repeat_interleave(2, 4), [True]

    def encode(self, frames, state=None):
        self.calls.append(tuple(frames.shape[3:]))
        return frames[:, :, :: self.temporal_ratio, ::2, ::2], [True]


@pytest.mark.parametrize("size", [(5, 7), (4, 13), (9, 4), (11, 16)], ids=str)
@pytest.mark.parametrize("tile, overlap", [(4, 2), (4, 1), (6, 3)])
def test_tiles_add_up_to_the_frame(size, tile, overlap):
    codec = TiledCodec(Pointwise(), tile, overlap)
    latents = draw(2, 3, 3, *size)
    torch.testing.assert_close(in_chunks(codec.decode, latents, [1, 2])[0], Pointwise().decode(latents)[0])
    assert len(codec.codec.calls) > 2 and max(max(call) for call in codec.codec.calls) <= tile
    frames = draw(2, 3, 5, *(2 * side for side in size))
    torch.testing.assert_close(codec.encode(frames)[0], Pointwise().encode(frames)[0])


@pytest.mark.parametrize("length", range(5, 40))
def test_spans_cover_a_side_and_share_the_overlap(length):
    for tile, overlap in ((4, 1), (4, 2), (8, 3), (16, 8)):
        parts = spans(length, tile, overlap)
        assert parts[0].start == 0 and parts[-1].stop == length
        assert all(overlap < len(part) <= tile or len(parts) == 1 for part in parts)
        assert all(before.stop - after.start == overlap for before, after in zip(parts, parts[1:]))
        total = torch.zeros(3 * length)
        for part, share in zip(parts, weights(parts, overlap, 3)):
            assert (share > 0).all()
            total[3 * part.start : 3 * part.stop] += share
        torch.testing.assert_close(total, torch.ones(3 * length))


def test_blending_is_linear():
    left, right = weights([range(0, 5), range(3, 8)], overlap=2, scale=2)
    torch.testing.assert_close(left, torch.tensor([1, 1, 1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]))
    torch.testing.assert_close(right, left.flip(0))


def test_a_frame_of_one_tile_is_not_tiled():
    inner = WanCodec(wan())
    codec, latents = TiledCodec(inner, tile=5, overlap=2), latents_for(inner, 2)
    (pixels, state), (expected, after) = codec.decode(latents), inner.decode(latents)
    assert torch.equal(pixels, expected) and same(state, after)
    smaller, _ = TiledCodec(inner, tile=4, overlap=2).decode(latents)
    assert not torch.allclose(smaller, expected, atol=1e-3)


@pytest.mark.parametrize("tile, overlap", [(8, 0), (8, 5), (1, 1)])
def test_a_wrong_overlap_is_refused(tile, overlap):
    with pytest.raises(InputError, match="overlap goes from 1 to half"):
        TiledCodec(Pointwise(), tile, overlap)


# ------------------------------------------------------------------------------------------- TAEHV's layout

# index by index, from the description of taew2_1
DECODER = "clamp conv relu mem mem mem up grow1 conv mem mem mem up grow2 conv mem mem mem up grow2 conv relu conv"
ENCODER = "conv relu pool2 down mem mem mem pool2 down mem mem mem pool1 down mem mem mem conv"


def taehv(weights: dict[str, Tensor], plan: str, frames: list[Tensor]) -> list[Tensor]:
    """The network written out from its description, one frame [B, C, H, W] at a time."""
    side = "decoder" if plan == DECODER else "encoder"

    def conv(x: Tensor, name: str, **options) -> Tensor:
        weight, bias = weights[f"{side}.{name}.weight"], weights.get(f"{side}.{name}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, **options)

    for i, kind in enumerate(plan.split()):
        name, stride = kind.rstrip("12"), int(kind[-1]) if kind[-1].isdigit() else 1
        if name == "clamp":
            frames = [3 * torch.tanh(x / 3) for x in frames]
        elif name in ("conv", "down"):
            frames = [conv(x, str(i), stride=2 if name == "down" else 1) for x in frames]
        elif name == "relu":
            frames = [x.relu() for x in frames]
        elif name == "up":
            frames = [F.interpolate(x, scale_factor=2, mode="nearest") for x in frames]
        elif name == "grow":
            frames = [part for x in frames for part in conv(x, f"{i}.conv").chunk(stride, 1)]
        elif name == "pool":
            groups = [frames[at : at + stride] for at in range(0, len(frames), stride)]
            frames = [conv(torch.cat(group, 1), f"{i}.conv") for group in groups]
        else:
            out = []
            for x, before in zip(frames, [torch.zeros_like(frames[0]), *frames]):
                y = torch.cat([x, before], 1)
                for step in (0, 2, 4):
                    y = conv(y if step == 0 else y.relu(), f"{i}.conv.{step}")
                out.append((y + x).relu())
            frames = out
    return frames


@pytest.mark.parametrize("patch", [1, 2])
def test_tiny_is_the_network_described(patch):
    codec = tiny(patch)
    assert codec.spatial_ratio == 8 * patch
    latents, frames = latents_for(codec, 3) * 2, frames_for(codec, 5)
    raw = taehv(codec.state_dict(), DECODER, list(latents.unbind(2)))
    assert len(raw) == 12  # four frames per latent, of which the first three of a stream go
    expected = torch.stack([F.pixel_shuffle(x, patch) for x in raw[3:]], 2).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(codec.decode(latents)[0], expected, **CLOSE)
    video = [F.pixel_unshuffle((x + 1) / 2, patch) for x in [*[frames[:, :, 0]] * 3, *frames.unbind(2)]]
    raw = taehv(codec.state_dict(), ENCODER, video)
    torch.testing.assert_close(codec.encode(frames)[0], torch.stack(raw, 2), **CLOSE)


def test_tiny_has_the_published_size():
    with torch.device("meta"):
        codec = TinyCodec()
    count = lambda part: sum(weight.numel() for weight in part.parameters())
    assert (count(codec.decoder), count(codec.encoder)) == (9_844_611, 1_470_928)
    assert codec.spatial_ratio == 8 and codec.latent_channels == 16


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
@pytest.mark.parametrize("patch", [1, 2])
def test_tiny_loads_a_file(tmp_path, name, patch):
    codec, path = tiny(patch), tmp_path / name
    save = torch.save if name.endswith("pth") else save_file
    save(codec.state_dict(), path)
    loaded, latents = TinyCodec.from_file(path), latents_for(codec)
    assert not loaded.training
    assert torch.equal(loaded.decode(latents)[0], codec.decode(latents)[0])
    assert torch.equal(loaded.encode(frames_for(codec, 5))[0], codec.encode(frames_for(codec, 5))[0])


def test_tiny_keeps_the_dtype_of_its_file(tmp_path):
    torch.save(tiny().to(torch.bfloat16).state_dict(), tmp_path / "half.pth")
    loaded = TinyCodec.from_file(tmp_path / "half.pth")
    pixels, state = loaded.decode(latents_for(loaded, 2))
    assert pixels.dtype == torch.float32 and {x.dtype for x in state.values()} == {torch.bfloat16}
    expected, _ = tiny().decode(latents_for(loaded, 2))
    torch.testing.assert_close(pixels, expected, atol=6e-2, rtol=0)  # 2^-8 per step, over twenty layers


def test_tiny_takes_older_files_that_grow_more(tmp_path):
    codec = tiny()
    state = codec.state_dict()
    kernel = state["decoder.7.conv.weight"]
    state["decoder.7.conv.weight"] = torch.cat([torch.full_like(kernel, 9.0), kernel])
    torch.save(state, tmp_path / "old.pth")
    latents = latents_for(codec)
    assert torch.equal(TinyCodec.from_file(tmp_path / "old.pth").decode(latents)[0], codec.decode(latents)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("decoder.1.weight"), "has no convolution decoder.1.weight"),
        (lambda state: state.pop("decoder.4.conv.2.bias"), "1 missing: decoder.4.conv.2.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (
            lambda state: state.update({"encoder.12.conv.weight": torch.zeros(8, 16, 1, 1)}),  # it pools time once more
            r"1 wrong shape: encoder.12.conv.weight \(8, 16, 1, 1\) instead of \(8, 8, 1, 1\)",
        ),
        (lambda state: state.update({"decoder.22.weight": torch.zeros(7, 6, 3, 3)}), "2 wrong shape|1 wrong shape"),
    ],
)
def test_tiny_refuses_another_file(tmp_path, change, message):
    state, path = dict(tiny().state_dict()), tmp_path / "wrong.pth"
    change(state)
    torch.save(state, path)
    with pytest.raises(InputError, match=message) as failure:
        TinyCodec.from_file(path)
    assert str(failure.value).startswith(f"{path} is not a tiny codec like taew2_1") and "\n" not in str(failure.value)
