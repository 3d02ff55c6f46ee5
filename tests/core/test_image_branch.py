"""Image-to-video: the transformer's image branch against diffusers, its files, and the picture as a stream."""

import itertools
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn

from streamgen.errors import InputError
from streamgen.models.image import KEPT_CHUNKS, ConditionStream, ImageConditioner, fit_picture
from streamgen.models.loading import LAYOUTS, load_transformer, save_transformer
from streamgen.models.transformer import CausalWanTransformer3DModel
from streamgen.models.vae import StreamingVAE

WIDTH, TOKENS, IMAGE_DIM = 24, 5, 10
TINY = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=9, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32,
    num_layers=2,
)  # fmt: skip
BRANCH = dict(image_dim=IMAGE_DIM, added_kv_proj_dim=WIDTH)
TWO_PICTURES = dict(BRANCH, pos_embed_seq_len=2 * TOKENS)
CLOSE = dict(atol=1e-4, rtol=1e-4)  # float32, sums of a few hundred terms around 1


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random everywhere: norms that are 1 and offsets that are 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(**changes) -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    return shaken(CausalWanTransformer3DModel(**{**TINY, **BRANCH, **changes}))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 1, rows: int = 7) -> dict[str, Tensor]:
    return dict(
        hidden_states=draw(batch, 9, 3, 4, 6),
        timestep=torch.tensor([937.5, 20.0][:batch]),
        encoder_hidden_states=draw(batch, rows, 8, seed=3),
        encoder_hidden_states_image=draw(batch, TOKENS, IMAGE_DIM, seed=4),
    )


@pytest.fixture(autouse=True)
def no_grad_by_default():
    with torch.no_grad():
        yield


# --- the transformer


@pytest.mark.parametrize("changes", [{}, {"cross_attn_norm": False}, {"pos_embed_seq_len": 2 * TOKENS}])
def test_equals_diffusers(tmp_path, changes):
    torch.manual_seed(0)
    theirs = shaken(WanTransformer3DModel(**{**TINY, **BRANCH, **changes}))
    theirs.save_pretrained(tmp_path)
    ours = CausalWanTransformer3DModel.from_pretrained(tmp_path).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for batch in (1, 2):
        arguments = inputs(batch, rows=512)  # diffusers takes the picture for what precedes the last 512 rows
        if changes.get("pos_embed_seq_len"):
            arguments["encoder_hidden_states_image"] = draw(2 * batch, TOKENS, IMAGE_DIM, seed=4)
        torch.testing.assert_close(ours(**arguments).sample, theirs(**arguments).sample, **CLOSE)


def test_our_folder_loads_in_diffusers(tmp_path):
    ours = make(**TWO_PICTURES)
    ours.save_pretrained(tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path).eval()
    arguments = dict(inputs(1, rows=512), encoder_hidden_states_image=draw(2, TOKENS, IMAGE_DIM))
    torch.testing.assert_close(ours(**arguments).sample, theirs(**arguments).sample, **CLOSE)


@pytest.mark.parametrize("precision", ["mixed", "strict"])
def test_keys_kept_per_prompt_equal_the_picture_itself(precision):
    model, arguments = make(precision=precision), inputs(2)
    text, image = arguments.pop("encoder_hidden_states"), arguments.pop("encoder_hidden_states_image")
    keys = model.text_keys(text, image)
    assert (len(keys.image_keys), keys.image_values[1].shape) == (2, (2, TOKENS, 2, 12))
    direct = model(**arguments, encoder_hidden_states=text, encoder_hidden_states_image=image).sample
    torch.testing.assert_close(model(**arguments, text_keys=keys).sample, direct)
    one = model.text_keys(text, image[:1])  # one picture for the whole batch
    torch.testing.assert_close(model(**arguments, text_keys=one).sample[:1], direct[:1])
    other = model(**arguments, encoder_hidden_states=text, encoder_hidden_states_image=image[:1]).sample
    assert (other[1] - direct[1]).abs().max() > 1e-3
    torch.testing.assert_close(other, model(**arguments, text_keys=one).sample)


def test_frames_with_their_own_prompts_share_the_samples_picture():
    model, arguments = make(), inputs(2)
    text, image = draw(2, 2, 7, 8), arguments.pop("encoder_hidden_states_image")  # [B, P, L, D]
    index = torch.tensor([[0, 0, 1], [1, 0, 1]])
    arguments.update(frame_mask=torch.eye(3, dtype=torch.bool))  # a frame's output depends on its own prompt alone
    del arguments["encoder_hidden_states"]
    keys = model.text_keys(text, image)
    mixed = model(**arguments, text_keys=keys, prompt_index=index).sample
    direct = model(
        **arguments, encoder_hidden_states=text, encoder_hidden_states_image=image, prompt_index=index
    ).sample
    torch.testing.assert_close(direct, mixed)
    for prompt in range(2):
        pure = model(**arguments, encoder_hidden_states=text[:, prompt], encoder_hidden_states_image=image).sample
        chosen = (index == prompt)[:, None, :, None, None].expand_as(mixed)
        torch.testing.assert_close(mixed[chosen], pure[chosen], **CLOSE)


def test_a_picture_of_silent_values_changes_nothing():
    model, arguments = make(), inputs()
    for block in model.blocks:
        block.attn2.add_v_proj.weight.zero_()
        block.attn2.add_v_proj.bias.zero_()
    plain = CausalWanTransformer3DModel(**TINY).eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    expected = plain(**{**arguments, "encoder_hidden_states_image": None}).sample
    torch.testing.assert_close(model(**arguments).sample, expected)


def test_two_pictures_come_as_rows_or_side_by_side():
    model, arguments = make(**TWO_PICTURES), inputs(2)
    pairs = draw(4, TOKENS, IMAGE_DIM)
    apart = model(**{**arguments, "encoder_hidden_states_image": pairs}).sample
    beside = model(**{**arguments, "encoder_hidden_states_image": pairs.reshape(2, 2 * TOKENS, -1)}).sample
    assert torch.equal(apart, beside)
    swapped = pairs.unflatten(0, (2, 2)).flip(1).flatten(0, 1)  # the offset tells first from last
    assert (model(**{**arguments, "encoder_hidden_states_image": swapped}).sample - apart).abs().max() > 1e-3


def test_bfloat16_stays_near_float32():
    arguments = inputs()
    exact = make()(**arguments).sample
    for precision in ("mixed", "strict"):
        out = make(precision=precision).bfloat16()(**arguments).sample
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() < 0.05 * exact.norm()  # bf16 keeps 8 bits: 0.4 % per step


@torch.enable_grad()
def test_gradients_reach_the_branch_with_and_without_checkpointing():
    results = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs()).sample.square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name in ("image_embedder.norm1.weight", "image_embedder.ff.net.2.bias"):
        assert results[0][f"condition_embedder.{name}"].abs().max() > 0
    assert results[0]["blocks.1.attn2.norm_added_k.weight"].abs().max() > 0
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"added_kv_proj_dim": None}, "both or neither"),
        ({"image_dim": None}, "both or neither"),
        ({"added_kv_proj_dim": 8}, "should be the width 24"),
        ({"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": 4}, "pos_embed_seq_len"),
    ],
)
def test_incomplete_branches_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_wrong_pictures_are_named():
    model, plain, arguments = make(), make(image_dim=None, added_kv_proj_dim=None), inputs(2)
    with pytest.raises(ValueError, match="image_dim is None"):
        plain(**arguments)
    keys = model.text_keys(arguments["encoder_hidden_states"], arguments["encoder_hidden_states_image"])
    for image, message in (
        (None, "reads a picture"),
        (draw(1, TOKENS, 8), r"\[B, tokens, 10\]"),
        (draw(3, TOKENS, IMAGE_DIM), "batch of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**arguments, "encoder_hidden_states_image": image})
    with pytest.raises(ValueError, match="hold the picture already"):
        model(**{**arguments, "encoder_hidden_states": None}, text_keys=keys)
    with pytest.raises(ValueError, match="batch of 2"):
        model(draw(1, 9, 3, 4, 6), 5.0, text_keys=model.text_keys(draw(1, 7, 8), draw(2, TOKENS, IMAGE_DIM)))
    with pytest.raises(ValueError, match="two pictures"):
        make(**TWO_PICTURES)(**{**arguments, "encoder_hidden_states_image": draw(3, TOKENS, IMAGE_DIM)})


# --- files


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("branch, kind", [(BRANCH, "i2v"), (TWO_PICTURES, "flf2v"), ({}, "i2v")])
def test_files_come_back_in_every_layout(tmp_path, layout, branch, kind):
    model = shaken(CausalWanTransformer3DModel(**TINY, **branch))
    path = save_transformer(model, tmp_path / ("m.pt" if layout == "self-forcing" else "m"), layout)
    loaded = load_transformer(path, {"num_heads": 2} if layout == "self-forcing" else None)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    chosen = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "in_channels", "out_channels")
    assert {key: loaded.config[key] for key in chosen} == {key: model.config[key] for key in chosen}
    if layout == "wan":
        assert json.loads((path / "config.json").read_text())["model_type"] == kind


def test_early_diffusers_files_hold_a_norm_that_nothing_reads():
    state = make().state_dict()
    state["blocks.0.attn2.norm_added_q.weight"] = torch.ones(WIDTH)
    assert load_transformer(state, {"num_heads": 2}).config.image_dim == IMAGE_DIM


def test_missing_parts_of_the_branch_are_listed():
    state = make().state_dict()
    del state["blocks.1.attn2.add_v_proj.bias"]
    with pytest.raises(InputError, match=r"1 missing: blocks\.1\.attn2\.add_v_proj\.bias"):
        load_transformer(state, {"num_heads": 2})


# --- the picture's channels


@pytest.fixture(scope="module")
def codec() -> StreamingVAE:
    torch.manual_seed(0)
    return shaken(StreamingVAE(latent_channels=3, widths=(8, 8, 8)))


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(7))


class Counting:
    """A codec that says how often it was asked; it may write into the state it was given, as some do."""

    spatial_ratio, temporal_ratio = 16, 4

    def __init__(self, inner: StreamingVAE, writes: str | None = None) -> None:
        self.inner, self.writes, self.calls = inner, writes, 0

    def encode(self, frames, state):
        self.calls += 1
        latents, new = self.inner.encode(frames, state)
        if self.writes == "dict" and state is not None:
            state.update(new)
            return latents, state
        if self.writes == "tensors" and state is not None:
            return latents, {index: state[index].copy_(tensor) for index, tensor in new.items()}
        return latents, new


def plain_chunks(codec, picture: Tensor, size: int, chunks: int) -> list[Tensor]:
    """Latents by the definition: the picture, then gray, chunk by chunk without any shortcut."""
    state, found = None, []
    for index in range(chunks):
        video = torch.zeros(len(picture), 3, 4 * size - 3 * (index == 0), *picture.shape[2:])
        if index == 0:
            video[:, :, 0] = picture
        latents, state = codec.encode(video, state)
        found.append(latents)
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_the_stream_equals_diffusers_whole_clip(codec, picture, size):
    class Whole(nn.Module):  # what diffusers' pipeline asks of a VAE
        dtype, device = torch.float32, torch.device("cpu")
        config = SimpleNamespace(latents_mean=[0.0] * 3, latents_std=[1.0] * 3, z_dim=3)

        def encode(self, video):
            return SimpleNamespace(latents=codec.encode(video)[0])

    frames = 4 * size
    pipe = SimpleNamespace(
        vae=Whole(), vae_scale_factor_temporal=4, vae_scale_factor_spatial=16,
        config=SimpleNamespace(expand_timesteps=False),
    )  # fmt: skip
    image = fit_picture(picture, 32, 48)
    _, whole = WanImageToVideoPipeline.prepare_latents(
        pipe, image, 1, 3, 32, 48, 4 * frames - 3, torch.float32, torch.device("cpu"), torch.Generator()
    )
    stream = ImageConditioner().condition_chunks(picture, codec, 32, 48, size)
    chunks = list(itertools.islice(stream, 4))
    assert all(chunk.shape == (1, 7, size, 2, 3) for chunk in chunks)
    torch.testing.assert_close(torch.cat(chunks, 2), whole, atol=1e-5, rtol=1e-4)
    assert chunks[0][:, :4, 0].min() == 1 and not chunks[0][:, :4, 1:].any() and not chunks[1][:, :4].any()


def test_settled_chunks_are_reused_and_exact(codec, picture):
    counting, two = Counting(codec), [picture, picture.flip(2)]
    stream = ImageConditioner().condition_chunks(two, counting, 32, 48, 2)
    chunks = list(itertools.islice(stream, 30))
    assert 2 <= counting.calls <= 6  # a memory of a few latent frames: the picture is forgotten soon
    for chunk, latents in zip(chunks, plain_chunks(codec, fit_picture(two, 32, 48), 2, 30)):
        assert torch.equal(chunk[:, 4:], latents)


@pytest.mark.parametrize("writes", ["dict", "tensors"])
def test_a_state_written_in_place_is_never_taken_for_settled(codec, picture, writes):
    counting = Counting(codec, writes)
    stream = ImageConditioner().condition_chunks(picture, counting, 32, 48, 1)
    chunks = list(itertools.islice(stream, KEPT_CHUNKS + 4))
    assert counting.calls == KEPT_CHUNKS + 4
    assert torch.equal(stream.frames(range(0, 1)), chunks[0])  # forgotten, and encoded again
    assert counting.calls == KEPT_CHUNKS + 5


def test_frames_of_any_range_and_order(codec, picture):
    stream = ImageConditioner().condition_chunks(picture, codec, 32, 48, 3)
    whole = torch.cat(list(itertools.islice(stream, 6)), 2)
    fresh = ImageConditioner().condition_chunks(picture, codec, 32, 48, 3)
    for part in (range(7, 9), range(2, 11), range(0, 1), range(17, 18), range(3, 6)):
        assert torch.equal(fresh.frames(part), whole[:, :, part.start : part.stop])
    assert torch.equal(fresh.frames(range(3000, 3003)), whole[:, :, 15:])


def test_forks_and_saved_streams_give_the_same_bits(codec, picture):
    counting = Counting(codec)
    stream = ImageConditioner().condition_chunks(picture, counting, 32, 48, 3)
    first = stream.frames(range(0, 3))
    other = stream.fork()
    saved = stream.state_dict()
    rest = stream.frames(range(3, 9))
    assert torch.equal(other.frames(range(0, 3)), first) and torch.equal(other.frames(range(3, 9)), rest)
    assert counting.calls == 1 + 2 + 2  # what was encoded before the fork is shared, the rest is not
    restored = ConditionStream(codec, torch.zeros(1, 3, 32, 48), 1)
    restored.frames(range(0, 2))
    restored.load_state_dict(saved)
    assert torch.equal(restored.frames(range(3, 9)), rest)


# --- pictures


def test_every_form_of_a_picture_gives_the_same_numbers():
    array = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
    floats = array.astype(np.float32) / 255
    for form in (
        Image.fromarray(array), array, torch.from_numpy(array), floats, torch.from_numpy(floats).movedim(-1, 0),
        array[None], [array],
    ):  # fmt: skip
        torch.testing.assert_close(fit_picture(form, 16, 32), expected, atol=1e-6, rtol=0)
    assert torch.equal(fit_picture([array, array[::-1]], 16, 32)[1], fit_picture(array[::-1], 16, 32)[0])


def test_other_shapes_are_cut_in_the_middle_and_said(caplog):
    caplog.set_level(logging.INFO, "streamgen.models.image")
    bars = np.zeros((20, 60, 3), np.uint8)
    bars[:, 20:40] = 200  # the middle third survives a square crop
    square = fit_picture(bars, 10, 10)
    assert square.shape == (1, 3, 10, 10)
    torch.testing.assert_close(square, torch.full_like(square, 200 / 127.5 - 1))
    assert "20x60" in caplog.text and "20x20" in caplog.text
    caplog.clear()
    large = fit_picture(bars, 40, 120)
    assert large.shape == (1, 3, 40, 120) and large.abs().max() <= 1 and not caplog.text


@pytest.mark.parametrize(
    "image, message",
    [
        ("cat.png", "path"),
        (None, "NoneType"),
        ([], "empty"),
        (np.zeros((4, 5), np.uint8), "shape"),
        (np.zeros((4, 5, 4), np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "shape"),
        (np.zeros((4, 5, 3), np.int64), "int64"),
        (torch.full((3, 4, 5), -1.0), r"\[0, 1\]"),
        (torch.full((3, 4, 5), float("nan")), r"\[0, 1\]"),
        (255 * torch.ones(3, 4, 5), r"\[0, 1\]"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(image, message):
    with pytest.raises(InputError, match=message) as caught:
        fit_picture(image, 16, 16)
    assert "\n" not in str(caught.value)


def test_wrong_sizes_and_codecs_are_refused(codec, picture):
    conditioner = ImageConditioner()
    for arguments, message in (
        ((codec, 30, 48, 3), "multiples of 16"),
        ((codec, 32, 0, 3), "multiples of 16"),
        ((codec, 32, 48, 0), "latent_frames"),
        ((object(), 32, 48, 3), "cannot encode"),
    ):
        with pytest.raises(InputError, match=message):
            conditioner.condition_chunks(picture, *arguments)


# --- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    (folder / "image_processor").mkdir()
    processor = {  # the keys of the published file
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 28}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
    }  # fmt: skip
    (folder / "image_processor" / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_clip_embeds_are_the_layer_before_the_last(clip_folder):
    conditioner = ImageConditioner.from_pretrained(clip_folder)
    array = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)  # neither resized nor cut
    embeds = conditioner.clip_embeds(Image.fromarray(array))
    assert embeds.shape == (1, 1 + 4, 16)
    pixels = (torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25
    encoder = conditioner.image_encoder
    tower = getattr(encoder, "vision_model", encoder)  # transformers 4 nests it
    short = tower.encoder.layers[:2]
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in short:
        out = layer(hidden, attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(embeds, hidden, **CLOSE)
    both = conditioner.clip_embeds([torch.from_numpy(array), array[::-1]])
    torch.testing.assert_close(both[:1], embeds)
    assert both.shape[0] == 2 and (both[1] - both[0]).abs().max() > 1e-3


def test_folders_without_clip_and_broken_ones(clip_folder, tmp_path, picture):
    with pytest.raises(InputError, match="no image_encoder"):
        ImageConditioner.from_pretrained(tmp_path).clip_embeds(picture)
    with pytest.raises(InputError, match="both or neither"):
        ImageConditioner(image_encoder=object())
    (tmp_path / "image_encoder").mkdir()
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        ImageConditioner.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
