"""The causal transformer: the same numbers as diffusers' Wan, and the laws of its per-frame extensions."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from streamgen.models.blocks import gelu
from streamgen.models.loading import load_transformer
from streamgen.models.masks import block_causal_mask, frame_groups, teacher_forcing_mask
from streamgen.models.rope import RotaryEmbedding
from streamgen.models.transformer import CausalWanTransformer3DModel

TINY = dict(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=20, freq_dim=16, ffn_dim=64,
    num_layers=2,
)  # fmt: skip
FP32 = dict(atol=1e-5, rtol=1e-4)  # a few hundred float32 roundings of values around 1
GOLDEN = Path(__file__).parents[1] / "golden"


def make(seed: int = 0, **changes) -> CausalWanTransformer3DModel:
    torch.manual_seed(seed)
    return CausalWanTransformer3DModel(**{**TINY, **changes}).eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 1, frames: int = 4, height: int = 4, width: int = 6) -> tuple[torch.Tensor, ...]:
    timestep = 1000 * torch.rand(batch, frames, generator=torch.Generator().manual_seed(2))
    return draw(batch, 4, frames, height, width), timestep, draw(batch, 7, 20, seed=3)


@pytest.fixture(autouse=True)
def no_grad_by_default():
    with torch.no_grad():
        yield


# --- diffusers


@pytest.mark.parametrize("changes", [{}, {"out_channels": 6}, {"cross_attn_norm": False}, {"patch_size": (2, 2, 2)}])
def test_diffusers_folder_loads_here_with_equal_outputs(tmp_path, changes):
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(**{**TINY, **changes}).eval()
    theirs.save_pretrained(tmp_path)
    ours = CausalWanTransformer3DModel.from_pretrained(tmp_path).eval()
    for batch, frames, height, width in ((1, 4, 4, 6), (2, 2, 10, 2)):
        latents, _, text = inputs(batch, frames, height, width)
        timestep = torch.tensor([937.5, 20.0][:batch])
        arguments = dict(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)
        torch.testing.assert_close(ours(**arguments)[0], theirs(**arguments)[0], **FP32)


def test_our_folder_loads_in_diffusers_with_equal_outputs(tmp_path):
    ours = make()
    ours.save_pretrained(tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path).eval()
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    latents, _, text = inputs(2)
    timestep = torch.tensor([1000, 3])
    torch.testing.assert_close(ours(latents, timestep, text).sample, theirs(latents, timestep, text).sample, **FP32)


def test_first_chunk_equals_self_forcing():
    with safe_open(GOLDEN / "self_forcing_full.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        noise, text, velocity = (file.get_tensor(f"io.{name}") for name in ("noise", "context", "first_velocity"))
    state = load_file(GOLDEN / "self_forcing_weights.safetensors")
    model = load_transformer(state, config=config)
    out = model(noise[:, :3].transpose(1, 2), torch.full((1, 3), 1000.0), text).sample
    # golden files are frames-first; 2e-5 is their tolerance: it catches a wrong norm epsilon
    torch.testing.assert_close(out.transpose(1, 2), velocity[:, :3], atol=2e-5, rtol=0)


# --- per frame


@pytest.mark.parametrize("batch", [1, 2])
def test_equal_frame_timesteps_equal_one_timestep(batch):
    model, (latents, _, text) = make(), inputs(batch)
    once = model(latents, torch.full((batch,), 625.0), text).sample
    per_frame = model(latents, torch.full((batch, 4), 625.0), text).sample
    torch.testing.assert_close(per_frame, once, **FP32)
    torch.testing.assert_close(model(latents, torch.tensor(625), text).sample, once, **FP32)
    torch.testing.assert_close(model(latents, 625.0, text).sample, once, **FP32)


def test_batch_rows_are_independent():
    model, (latents, timestep, text) = make(), inputs(2)
    both = model(latents, timestep, text).sample
    for row in range(2):
        alone = model(latents[row : row + 1], timestep[row : row + 1], text[row : row + 1]).sample
        torch.testing.assert_close(both[row : row + 1], alone, **FP32)


def test_frames_read_the_prompt_they_are_given():
    model, (latents, timestep, _) = make(), inputs(2)
    text = draw(2, 2, 7, 20)  # [B, P, L, D]
    index = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]])
    apart = torch.eye(4, dtype=torch.bool)  # so that a frame's output depends on its own prompt alone
    mixed = model(latents, timestep, text, prompt_index=index, frame_mask=apart).sample
    for prompt in range(2):
        pure = model(latents, timestep, text[:, prompt], frame_mask=apart).sample
        chosen = (index == prompt)[:, None, :, None, None].expand_as(mixed)
        torch.testing.assert_close(mixed[chosen], pure[chosen], **FP32)


def test_one_text_serves_the_whole_batch():
    model, (latents, timestep, _) = make(), inputs(2)
    for shape, index in (((1, 7, 20), None), ((1, 2, 7, 20), torch.tensor([[0, 0, 1, 1]] * 2))):
        text = draw(*shape)
        repeated = text.expand(2, *shape[1:])
        one = model(latents, timestep, text, prompt_index=index).sample
        torch.testing.assert_close(one, model(latents, timestep, repeated, prompt_index=index).sample, **FP32)


def test_text_keys_replace_text():
    model, (latents, timestep, _) = make(text_len=9), inputs(2)
    text, index = draw(2, 2, 7, 20), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    keys = model.text_keys(text)
    assert (keys.num_prompts, len(keys.keys), keys.values[1].shape) == (2, 2, (2, 2, 9, 2, 24))
    direct = model(latents, timestep, text, prompt_index=index).sample
    torch.testing.assert_close(model(latents, timestep, text_keys=keys, prompt_index=index).sample, direct)


def test_text_len_pads_with_zero_rows_that_are_attended_to():
    plain, padded = make(), make(text_len=12)
    latents, timestep, text = inputs()
    zeros = torch.nn.functional.pad(text, (0, 0, 0, 5))
    torch.testing.assert_close(padded(latents, timestep, text).sample, plain(latents, timestep, zeros).sample)
    with pytest.raises(ValueError, match="at most text_len = 12"):
        padded(latents, timestep, draw(1, 13, 20))


# --- positions and masks


def test_shifted_positions_change_nothing():
    model, (latents, timestep, text) = make(), inputs()
    base = model(latents, timestep, text).sample
    for positions in ([1000, 1001, 1002, 1003], torch.arange(4) - 7.5, torch.tensor([[50000, 50001, 50002, 50003]])):
        moved = model(latents, timestep, text, frame_positions=positions).sample
        torch.testing.assert_close(moved, base, atol=1e-5, rtol=0)
    other = model(latents, timestep, text, frame_positions=[0, 2, 4, 6]).sample
    assert (other - base).abs().max() > 1e-4


def test_phase_is_an_added_temporal_angle():
    rope = RotaryEmbedding(24)
    assert rope.pairs == (4, 4, 4)
    assert RotaryEmbedding(128).pairs == (22, 21, 21)
    cos, sin = rope.angles([3, 4], 2, 3, phase=[0.25, 0.0])
    assert cos.shape == sin.shape == (12, 1, 12)
    time = 3 * 10000 ** (-torch.arange(4, dtype=torch.float64) / 4) + 0.25
    torch.testing.assert_close(cos[0, 0, :4], time.cos().float())
    plain = rope.angles([3, 4], 2, 3)
    assert torch.equal(plain[0][6:], cos[6:]) and torch.equal(plain[0][..., 4:], cos[..., 4:])
    # token (h, w) = (1, 2) of a frame: index 5
    assert math.isclose(plain[1][5, 0, 4].item(), math.sin(1.0), rel_tol=1e-6)
    assert math.isclose(plain[1][5, 0, 8].item(), math.sin(2.0), rel_tol=1e-6)
    assert rope.angles(torch.zeros(2, 3), 2, 2)[0].shape == (2, 12, 1, 12)


def test_later_chunks_do_not_influence_earlier_ones():
    model, (latents, timestep, text) = make(), inputs()
    mask = block_causal_mask(4, 2)
    base = model(latents, timestep, text, frame_mask=mask).sample
    changed = latents.clone()
    changed[:, :, 2:] += 1
    out = model(changed, timestep, text, frame_mask=mask).sample
    torch.testing.assert_close(out[:, :, :2], base[:, :, :2])
    assert (out[:, :, 2:] - base[:, :, 2:]).abs().max() > 1e-3
    alone = model(latents[:, :, :2], timestep[:, :2], text).sample
    torch.testing.assert_close(base[:, :, :2], alone, **FP32)


def test_masks_per_batch_row():
    model, (latents, timestep, text) = make(), inputs(2)
    masks = torch.stack((block_causal_mask(4, 2), torch.ones(4, 4, dtype=torch.bool)))
    out = model(latents, timestep, text, frame_mask=masks).sample
    for row in range(2):
        part = slice(row, row + 1)
        alone = model(latents[part], timestep[part], text[part], frame_mask=masks[row]).sample
        torch.testing.assert_close(out[part], alone, **FP32)


def test_teacher_forcing_equals_each_chunk_after_its_clean_prefix():
    model, (clean, timestep, text) = make(), inputs(frames=6)
    noisy, chunk = draw(*clean.shape, seed=9), 2
    both = model(
        torch.cat((clean, noisy), 2),
        torch.cat((torch.zeros_like(timestep), timestep), 1),
        text,
        frame_positions=[*range(6), *range(6)],
        frame_mask=teacher_forcing_mask(6, chunk),
    ).sample[:, :, 6:]
    for start in range(0, 6, chunk):
        end = start + chunk
        level = timestep[:, :end].clone()
        level[:, :start] = 0
        sequence = torch.cat((clean[:, :, :start], noisy[:, :, start:end]), 2)
        streamed = model(sequence, level, text, frame_mask=block_causal_mask(end, chunk)).sample
        torch.testing.assert_close(both[:, :, start:end], streamed[:, :, start:], **FP32)


# --- the context protocol


class Recorder:
    """Attends to nothing but the values; remembers what it was handed."""

    def __init__(self) -> None:
        self.attended, self.staged = [], []

    def attend(self, layer, query, key, value):
        self.attended.append((layer, key.clone(), value.clone()))
        return value

    def stage(self, layer, key, value):
        self.staged.append((layer, key.clone(), value.clone()))


def test_commit_hands_over_every_layer_and_skips_the_rest():
    model, (latents, timestep, text) = make(num_layers=3), inputs()
    full, commit = Recorder(), Recorder()
    assert model(latents, timestep, text, context=full).sample.shape == latents.shape
    assert model(latents, timestep, text, context=commit, commit_only=True) is None
    assert [layer for layer, *_ in commit.attended] == [0, 1] and [layer for layer, *_ in commit.staged] == [2]
    for (_, *expected), (_, *given) in zip(full.attended, commit.attended + commit.staged):
        assert given[0].shape == (1, 4 * 6, 2, 24)
        torch.testing.assert_close(given, expected)


def test_a_context_owns_positions_and_visibility():
    model, (latents, timestep, text) = make(), inputs()
    with pytest.raises(ValueError, match="belong to the context"):
        model(latents, timestep, text, context=Recorder(), frame_positions=[0, 1, 2, 3])
    with pytest.raises(NotImplementedError, match="keeps nothing"):
        model(latents, timestep, text, commit_only=True)


# --- faster paths


def test_fused_projections_follow_the_weights():
    model, arguments = make(), inputs()
    expected = model(*arguments).sample
    model.fuse_qkv()
    torch.testing.assert_close(model(*arguments).sample, expected, **FP32)
    assert list(model.state_dict()) == list(make().state_dict())
    model.blocks[0].attn1.to_k.weight.add_(0.1)
    changed = model(*arguments).sample
    assert (changed - expected).abs().max() > 1e-3
    model.fuse_qkv(False)
    torch.testing.assert_close(model(*arguments).sample, changed, **FP32)
    model.fuse_qkv()
    model(*arguments)
    torch.testing.assert_close(model.to(torch.bfloat16)(*arguments).sample.float(), changed, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_without_gradients_is_the_same_function(dtype):
    x = torch.linspace(-30, 30, 999).to(dtype)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(gelu(x).double(), exact, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 4e-3)


# --- precision and training


@pytest.mark.parametrize("precision, tolerance", [("mixed", 0.02), ("strict", 0.05)])
def test_bf16_is_close_to_fp32(precision, tolerance):
    latents, timestep, text = inputs(2)
    exact = make()(latents, timestep, text).sample
    half = make(precision=precision).to(torch.bfloat16)
    out = half(latents, timestep, text.bfloat16()).sample
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() / exact.norm() < tolerance  # bf16 keeps 8 bits: 0.4 % per rounding


@pytest.mark.parametrize("precision", ["mixed", "strict"])
def test_from_pretrained_in_bf16_keeps_small_weights_in_float32(tmp_path, precision):
    make(precision=precision).save_pretrained(tmp_path)
    model = CausalWanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.scale_shift_table.dtype == model.blocks[0].norm2.weight.dtype == torch.float32
    latents, timestep, text = inputs()
    exact = make()(latents, timestep, text).sample
    out = model(latents, timestep, text).sample
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() / exact.norm() < 0.05


def test_strict_in_fp32_equals_mixed():
    latents, timestep, text = inputs()
    expected = make()(latents, timestep, text).sample
    torch.testing.assert_close(make(precision="strict")(latents, timestep, text).sample, expected, **FP32)


def test_float64_is_kept_and_close_to_fp32():
    latents, timestep, text = inputs()
    exact = make().double()(latents.double(), timestep, text.double()).sample
    assert exact.dtype == torch.float64
    torch.testing.assert_close(make()(latents, timestep, text).sample, exact.float(), **FP32)


def test_timesteps_are_not_rounded_to_the_weights_dtype():
    model, (latents, _, text) = make().to(torch.bfloat16), inputs()
    seen = []
    model.condition_embedder.time_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
    for timestep in (937.5, 936.0):  # one number in bf16
        model(latents, torch.tensor([timestep]), text)
    assert (seen[0] - seen[1]).abs().max() > 0.1


def train_step(model: CausalWanTransformer3DModel) -> dict[str, torch.Tensor]:
    latents, timestep, text = inputs(2)
    with torch.enable_grad():
        out = model(latents, timestep, text, frame_mask=block_causal_mask(4, 2)).sample
        out.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient():
    plain, saving = train_step(make()), make()
    saving.enable_gradient_checkpointing()
    torch.testing.assert_close(train_step(saving), plain)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in plain.values())


def test_autocast_trains_in_float32_weights():
    model = make().train()
    reference = train_step(make())
    with torch.autocast("cpu", torch.bfloat16):
        gradients = train_step(model)
        out = model(*inputs(2)).sample
    assert out.dtype == torch.float32
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - reference[name]).norm() < 0.1 * reference[name].norm() + 1e-4, name


def test_tables_made_in_inference_mode_can_be_trained_with_later():
    model = make()
    with torch.inference_mode():
        model(*inputs(2))
    train_step(model)


def test_reset_parameters_starts_from_zero_velocity():
    model = make()
    model.reset_parameters()
    assert not model(*inputs()).sample.any()
    assert abs(model.condition_embedder.time_embedder.linear_1.weight.std().item() - 0.02) < 0.004
    assert not model.blocks[0].attn1.to_q.bias.any() and model.blocks[0].attn1.to_q.weight.std() > 0.1


def test_lora_layers_scale_per_call():
    peft = pytest.importorskip("peft")
    model, arguments = make(), inputs()
    base = model(*arguments).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "ffn.net.2"], init_lora_weights=False))
    changed = model(*arguments).sample
    assert (changed - base).abs().max() > 1e-3
    torch.testing.assert_close(model(*arguments, attention_kwargs={"scale": 0.0}).sample, base, **FP32)
    torch.testing.assert_close(model(*arguments).sample, changed)


# --- clear refusals


@pytest.mark.parametrize(
    "changes", [{"image_dim": 8}, {"added_kv_proj_dim": 8}, {"precision": "exact"}, {"qk_norm": None}]
)
def test_unsupported_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make(**changes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(hidden_states=draw(1, 4, 4, 5, 6)), "not a multiple of the patch"),
        (dict(hidden_states=draw(1, 3, 4, 4, 6)), r"\[B, 4, F, H, W\]"),
        (dict(timestep=torch.zeros(1, 3)), "timestep"),
        (dict(encoder_hidden_states=draw(1, 2, 7, 20)), "prompt_index"),
        (dict(encoder_hidden_states=draw(3, 7, 20)), "batch"),
        (dict(encoder_hidden_states=None), "text_keys"),
        (dict(encoder_hidden_states_image=draw(1, 1, 8)), "image_dim is None"),
    ],
)
def test_wrong_inputs_are_named(arguments, message):
    latents, timestep, text = inputs()
    with pytest.raises(ValueError, match=message):
        make()(**{**dict(hidden_states=latents, timestep=timestep, encoder_hidden_states=text), **arguments})


@pytest.mark.parametrize("mask", [
    block_causal_mask(7, 3, first_chunk=1),
    teacher_forcing_mask(3, 2),
    block_causal_mask(6, 2).roll(1, 0),  # groups that are not in order, keys that are not side by side
    torch.eye(5, dtype=torch.bool).logical_or(torch.eye(5).roll(2, 1) > 0),
])  # fmt: skip
def test_groups_of_frames_are_a_mask(mask):
    model, (latents, timestep, text) = make(), inputs(2, len(mask))
    expected = model(latents, timestep, text, frame_mask=mask).sample
    out = model(latents, timestep, text, frame_mask=frame_groups(mask)).sample
    torch.testing.assert_close(out, expected, **FP32)
