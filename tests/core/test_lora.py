"""LoRA: every naming means the same change, merged equals live, and what does not fit is said in one line."""

from __future__ import annotations

import copy
import json
import logging
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import save_file

from streamgen.errors import InputError, UnavailableError
from streamgen.models.layouts import to_original_name
from streamgen.models.lora import attach_lora, merge_lora, read_lora, set_lora_scale

EXACT = dict(atol=1e-6, rtol=1e-6)  # float32 products in another order
RANK = 2


@pytest.fixture
def model(tiny):
    return tiny.model()


def linears(model) -> list[str]:
    names = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name in names if name.startswith("blocks.")]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(model, modules=None, rank: int = RANK, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module: (down, up)}."""
    result = {}
    for index, name in enumerate(modules or linears(model)):
        weight = model.get_submodule(name).weight.flatten(1)
        down, up = draw(rank, weight.shape[1], seed=seed + index), draw(len(weight), rank, seed=seed + index + 500)
        result[name] = (0.3 * down, 0.3 * up)
    return result


def original(module: str) -> str:
    return to_original_name(f"{module}.weight").removesuffix(".weight")


def file_of(parts, name="{}", down="lora_A", up="lora_B", alpha=None, rename=str) -> dict[str, torch.Tensor]:
    """A LoRA as a program would write it: `name` and `rename` make its name of a module."""
    state = {}
    for module, (first, second) in parts.items():
        path = name.format(rename(module))
        state[f"{path}.{down}.weight"], state[f"{path}.{up}.weight"] = first.clone(), second.clone()
        if alpha is not None:
            state[f"{path}.alpha"] = torch.tensor(float(alpha))
    return state


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_changed(before, model, parts, scale: float = 1.0) -> None:
    for name, tensor in model.state_dict().items():
        down, up = parts.get(name.removesuffix(".weight"), (None, None))
        expected = before[name]
        if name.endswith(".weight") and down is not None:
            expected = expected + scale * (up @ down).view_as(expected)
        torch.testing.assert_close(tensor, expected, **EXACT)


def run(model) -> torch.Tensor:
    latents, text = draw(1, 4, 2, 4, 4, seed=7), draw(1, 3, 8, seed=8)
    with torch.no_grad():
        return model(latents, torch.full((1, 2), 500.0), text).sample


# --- namings

flat = lambda module: original(module).replace(".", "_")
kohya = dict(down="lora_down", up="lora_up", alpha=1)
NAMINGS = {
    "peft": dict(name="base_model.model.{}"),
    "peft, live names": dict(name="base_model.model.{}", down="lora_A.default", up="lora_B.default"),
    "peft, original": dict(name="base_model.model.model.{}", rename=original),
    "peft, fsdp": dict(name="base_model.model._fsdp_wrapped_module.{}", rename=original),
    "diffusers": dict(name="transformer.{}"),
    "diffusers, old": dict(name="transformer.{}", down="lora.down", up="lora.up"),
    "second expert": dict(name="transformer_2.{}"),
    "kohya": dict(name="lora_unet_{}", rename=flat, **kohya),
    "kohya, two underscores": dict(name="lora_unet__{}", rename=flat, **kohya),
    "kohya, diffusers names": dict(name="lora_transformer_{}", rename=lambda m: m.replace(".", "_"), **kohya),
    "wan": dict(name="diffusion_model.{}", rename=original),
    "wan, down and up": dict(name="diffusion_model.{}", rename=original, **kohya),
    "diffsynth": dict(name="pipe.dit.{}", rename=original, down="lora_A.default", up="lora_B.default"),
    "bare": dict(rename=original),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_means_the_same_change(model, naming):
    parts, before = factors(model), state_of(model)
    state = file_of(parts, **NAMINGS[naming])
    lora = read_lora(state, "transformer_2" if naming == "second expert" else "transformer")
    report = merge_lora(model, lora)
    assert report.modules == (20, 20) and not report.unmatched and not report.wrong_shape
    assert set(report.matched) == {f"{name}.weight" for name in parts}
    assert_changed(before, model, parts, NAMINGS[naming].get("alpha", RANK) / RANK)


def test_modules_outside_the_blocks(model):
    names = ["proj_out", "condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1", "patch_embedding"]
    parts, before = factors(model, names), state_of(model)
    state = file_of(parts, "lora_unet_{}", rename=flat, **kohya)
    for side, shape in (("down", (RANK, 4, 1, 2, 2)), ("up", (-1, RANK, 1, 1, 1))):  # as convolutions are stored
        key = f"lora_unet_patch_embedding.lora_{side}.weight"
        state[key] = state[key].view(shape)
    merge_lora(model, read_lora(state))
    assert_changed(before, model, parts, 1 / RANK)


def test_each_expert_reads_its_own(model):
    parts = [factors(model, seed=seed) for seed in (0, 50)]
    state = {**file_of(parts[0], "transformer.{}"), **file_of(parts[1], "transformer_2.{}")}
    for own, subfolder in zip(parts, ("transformer", "transformer_2")):
        twin = copy.deepcopy(model)
        merge_lora(twin, read_lora(state, subfolder))
        assert_changed(state_of(model), twin, own)
    with pytest.raises(InputError, match="second expert alone"):
        read_lora(file_of(parts[1], "transformer_2.{}"))
    merge_lora(model, read_lora(file_of(parts[0], "transformer.{}"), "transformer_2"))  # the file has no other


# --- alpha


def test_alpha_of_each_module_counts(model):
    parts, before = factors(model), state_of(model)
    state = file_of(parts, "lora_unet_{}", rename=flat, down="lora_down", up="lora_up")
    state["lora_unet_blocks_1_ffn_2.alpha"] = torch.tensor(0.5)
    merge_lora(model, read_lora(state))
    scaled = {name: (down, up * (0.25 if name == "blocks.1.ffn.net.2" else 1)) for name, (down, up) in parts.items()}
    assert_changed(before, model, scaled)


def test_settings_of_peft_beside_the_weights(model, tmp_path):
    parts, before = factors(model), state_of(model)
    save_file(file_of(parts, "base_model.model.{}"), tmp_path / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": 8, "alpha_pattern": {"blocks.0.attn1.to_q": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    merge_lora(model, read_lora(tmp_path), 0.25)
    scaled = {name: (down, up * (0.5 if name == "blocks.0.attn1.to_q" else 1)) for name, (down, up) in parts.items()}
    assert_changed(before, model, scaled)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "use_rslora": True}))
    pairs = read_lora(tmp_path / "adapter_model.safetensors").pairs
    assert pairs["blocks.0.attn1.to_q.weight"][0].scale == pytest.approx(8 / RANK**0.5)


def test_what_diffusers_saved(model, tmp_path):
    peft = pytest.importorskip("peft")
    live = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "ffn.net.2"], rank_pattern={"to_q": 3}, init_lora_weights=False
    )
    torch.manual_seed(0)
    live.add_adapter(config)
    live.save_lora_adapter(tmp_path)
    assert (run(live) - run(model)).abs().max() > 1e-2
    merge_lora(model, read_lora(tmp_path))
    torch.testing.assert_close(run(model), run(live), atol=1e-5, rtol=1e-5)


# --- full differences


def test_full_differences(model):
    before = state_of(model)
    shapes = {
        "blocks.1.self_attn.q.diff": "blocks.1.attn1.to_q.weight",
        "blocks.1.self_attn.q.diff_b": "blocks.1.attn1.to_q.bias",
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.0.cross_attn.norm_k.diff": "blocks.0.attn2.norm_k.weight",
        "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "head.modulation.diff": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "time_embedding.0.w_norm": "condition_embedder.time_embedder.linear_1.weight",
    }
    deltas = {ours: draw(*before[ours].shape, seed=index) for index, ours in enumerate(shapes.values())}
    state = {f"diffusion_model.{theirs}": deltas[ours] for theirs, ours in shapes.items()}
    parts = factors(model, ["blocks.0.ffn.net.2"])
    state.update(file_of(parts, "diffusion_model.{}", rename=original))
    state["diffusion_model.blocks.0.ffn.2.diff_b"] = bias = draw(24, seed=90)  # beside a pair
    report = merge_lora(model, read_lora(state), 0.5)
    assert set(report.matched) == {*deltas, "blocks.0.ffn.net.2.weight", "blocks.0.ffn.net.2.bias"}
    expected = {name: tensor + 0.5 * deltas.get(name, 0) for name, tensor in before.items()}
    expected["blocks.0.ffn.net.2.bias"] = before["blocks.0.ffn.net.2.bias"] + 0.5 * bias
    assert_changed(expected, model, parts, 0.5)


def test_the_bias_of_a_pair_is_scaled_like_it(model):
    before = state_of(model)
    state = file_of(factors(model, ["proj_out"]), "transformer.{}", alpha=6)
    state["transformer.proj_out.lora_B.bias"] = bias = draw(16, seed=3)
    merge_lora(model, read_lora(state))
    torch.testing.assert_close(model.proj_out.bias, before["proj_out.bias"] + 3 * bias, **EXACT)


# --- merged and live


def test_merged_in_float32_and_rounded_once(model):
    model.to(torch.bfloat16)
    parts, before = factors(model), state_of(model)
    merge_lora(model, read_lora(file_of(parts)), 0.7)
    for name, (down, up) in parts.items():
        exact = before[f"{name}.weight"].float() + 0.7 * (up @ down)
        got = model.get_submodule(name).weight
        assert got.dtype == torch.bfloat16
        assert (got.float() - exact).abs().max() <= exact.abs().max() * 2**-8
        assert (got != exact.bfloat16()).float().mean() < 0.01  # ties of the last float32 digit


def test_what_was_merged_comes_out_again(model):
    before, lora = state_of(model), read_lora(file_of(factors(model)))
    merge_lora(model, lora, 0.7)
    assert any((model.state_dict()[name] - tensor).abs().max() > 0.1 for name, tensor in before.items())
    merge_lora(model, lora, -0.7)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], **EXACT)


def test_merged_equals_live(model):
    pytest.importorskip("peft")
    first = file_of(factors(model), alpha=3)  # and two modules of another rank and alpha
    first.update(file_of(factors(model, ["proj_out", "blocks.0.ffn.net.2"], rank=5, seed=9), alpha=1))
    second = file_of(factors(model, ["blocks.0.attn1.to_q", "blocks.1.attn2.to_k"], rank=1, seed=30))
    loras, scales, base = [read_lora(first), read_lora(second)], (0.6, -0.8), run(model)
    live = copy.deepcopy(model)
    for name, lora, scale in zip(("first", "second"), loras, scales):
        attach_lora(live, lora, name, scale)
        merge_lora(model, lora, scale)
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(live), run(model), **close)
    assert (run(live) - base).abs().max() > 1e-2

    set_lora_scale(live, "first", 0.0)  # the other one stays
    merge_lora(model, loras[0], -scales[0])
    torch.testing.assert_close(run(live), run(model), **close)
    set_lora_scale(live, "second", 0)
    torch.testing.assert_close(run(live), base, **close)
    merge_lora(live, loras[1], scales[1])  # into the weights below the layers
    torch.testing.assert_close(run(live), run(model), **close)
    live.delete_adapters("first")
    with pytest.raises(InputError, match="no LoRA 'first' is attached; there is second"):
        set_lora_scale(live, "first", 1)


def test_two_adapters_in_one_file(model):
    pytest.importorskip("peft")
    parts, live, state = [factors(model, seed=0), factors(model, rank=3, seed=70)], copy.deepcopy(model), {}
    for name, part in zip(("a", "b"), parts):
        state.update(file_of(part, down=f"lora_A.{name}", up=f"lora_B.{name}"))
    attach_lora(live, read_lora(state), "both")
    merge_lora(model, read_lora(file_of(parts[0])))
    merge_lora(model, read_lora(file_of(parts[1])))
    torch.testing.assert_close(run(live), run(model), atol=1e-5, rtol=1e-5)


def test_attaching_leaves_the_rest_as_it_was(model):
    pytest.importorskip("peft")
    model.proj_out.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = state_of(model)
    attach_lora(model, read_lora(file_of(factors(model, ["blocks.0.attn1.to_q"]))), "style")
    for name, parameter in model.named_parameters():
        own = name.replace(".base_layer.", ".")
        assert parameter.requires_grad == flags.get(own, False) and not parameter.is_meta
        assert ".lora_" in name or torch.equal(parameter, state[own])
    assert not any(module.training for module in model.modules())
    with pytest.raises(InputError, match="'style' is taken"):
        attach_lora(model, read_lora(file_of(factors(model))), "style")


def test_live_refuses_what_peft_cannot_express(model):
    pytest.importorskip("peft")
    state = file_of(factors(model))
    state["diffusion_model.blocks.0.norm3.diff"] = torch.zeros(24)  # never moved: changes nothing
    twin = copy.deepcopy(model)
    attach_lora(twin, read_lora(state), "style")
    state["diffusion_model.blocks.0.norm3.diff"] = torch.ones(24)
    convolution = file_of(factors(model, ["patch_embedding"]))
    for extra, name in ((state, "blocks.0.norm2.weight"), (convolution, "patch_embedding")):
        with pytest.raises(InputError, match=f"changes {name}.* merge it instead") as caught:
            attach_lora(model, read_lora(extra), "style")
        assert "\n" not in str(caught.value)
    assert not hasattr(model, "peft_config")


def test_live_without_peft_says_how(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnavailableError, match="pip install peft, or merge it"):
        attach_lora(model, read_lora(file_of(factors(model))), "style")


# --- what does not fit


def test_what_is_used_is_said(model, caplog):
    caplog.set_level(logging.INFO, "streamgen")
    save = file_of(factors(model))
    merge_lora(model, read_lora(save))
    assert caplog.messages == ["the LoRA: 20 of 20 modules matched"]


STRAYS = {
    "dora": ("blocks.0.attn1.to_q", "dora_scale"),
    "peft's dora": ("blocks.0.attn1.to_q", "lora_magnitude_vector.default.weight"),
    "tucker": ("blocks.0.attn1.to_q", "lora_mid.weight"),
    "lokr": ("blocks.9.attn1.to_q", "lokr_w1", "alpha"),
    "half a pair": ("blocks.9.attn1.to_q", "lora_A.weight"),
    "another block": ("blocks.9.attn1.to_q", "lora_A.weight", "lora_B.weight"),
    "text encoder": ("lora_te_text_model_q", "lora_down.weight", "lora_up.weight"),
    "flat and unknown": ("lora_unet_blocks_0_odd", "lora_down.weight", "lora_up.weight"),
    "neither": ("something", "else"),
}


@pytest.mark.parametrize("what", STRAYS)
def test_keys_that_cannot_be_used_are_listed(model, caplog, what):
    module, *leaves = STRAYS[what]
    parts, before = factors(model), state_of(model)
    state = file_of(parts)
    state.update({f"{module}.{leaf}": torch.ones(() if leaf == "alpha" else (2, 2)) for leaf in leaves})
    report = merge_lora(model, read_lora(state))
    lost = {key for key in state if key.startswith(f"{module}.")}  # its pair would come out wrong
    assert set(report.unmatched) == lost
    assert f"{len(lost)} keys are not used" in caplog.text and f"{module}.{leaves[0]}" in caplog.text
    rest = {name: part for name, part in parts.items() if name != module}
    assert report.modules == (len(rest), len({*parts, module}))
    assert_changed(before, model, rest)


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_lora_for_another_model_is_refused(model, tiny):
    before = state_of(model)
    wide = read_lora(file_of(factors(tiny.model(num_attention_heads=4)), "diffusion_model.{}", rename=original))
    text = refusal(merge_lora, model, wide)
    assert "0 of 20 modules matched" in text and "20 shapes differ" in text and "and 12 more" in text
    assert "blocks.0.attn1.to_q.weight (48, 48) instead of (24, 24)" in text
    foreign = {f"unet.down_blocks.{i}.lora_{side}.weight": torch.ones(2, 2) for i in range(20) for side in "AB"}
    other = read_lora(foreign)
    text = refusal(attach_lora, model, other, "style")
    assert "0 of 20 modules matched" in text and "unet.down_blocks.0.lora_A.weight" in text
    mixed = read_lora({**file_of(factors(model)), "head.head.diff": torch.ones(2, 2)})
    assert "20 of 21 modules" in refusal(merge_lora, model, mixed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_that_are_no_lora(model, tmp_path):
    assert "no LoRA that can be used" in refusal(read_lora, model.state_dict())
    assert "lokr_w1" in refusal(read_lora, {"blocks.0.attn1.to_q.lokr_w1": torch.ones(2, 2)})
    assert "twice" in refusal(read_lora, {**file_of(factors(model)), **file_of(factors(model), "transformer.{}")})
    assert "does not exist" in refusal(read_lora, tmp_path / "absent.safetensors")
    assert "expected adapter_model.safetensors" in refusal(read_lora, tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    assert "truncated" in refusal(read_lora, tmp_path / "cut.safetensors")
    assert "finite" in refusal(merge_lora, model, read_lora(file_of(factors(model))), float("nan"))


def test_checkpoints_of_trainers(model, tmp_path):
    parts, before = factors(model), state_of(model)
    content = {"generator_lora": file_of(parts, "base_model.model.{}", rename=original), "critic_lora": {}, "step": 3}
    torch.save(content, tmp_path / "lora.pt")
    merge_lora(model, read_lora(tmp_path / "lora.pt"))
    assert_changed(before, model, parts)


# --- diffusers' own way


class Pipe(DiffusionPipeline, WanLoraLoaderMixin):
    _lora_loadable_modules = ["transformer"]

    def __init__(self, transformer) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


@pytest.mark.parametrize("naming", ["diffusers", "kohya", "wan, down and up"])
def test_diffusers_loads_what_we_load_to_the_same_end(model, naming):
    pytest.importorskip("peft")
    state, base = file_of(factors(model), **NAMINGS[naming]), run(model)
    pipe = Pipe(copy.deepcopy(model))
    theirs = {key: tensor.clone() for key, tensor in state.items()}  # diffusers scales them in place
    pipe.load_lora_weights(theirs, adapter_name="style")
    merge_lora(model, read_lora(state))
    torch.testing.assert_close(run(pipe.transformer), run(model), atol=1e-5, rtol=1e-5)
    set_lora_scale(pipe.transformer, "style", 0)  # ours turns theirs
    torch.testing.assert_close(run(pipe.transformer), base, atol=1e-5, rtol=1e-5)
    pipe.unload_lora_weights()
    assert list(pipe.transformer.state_dict()) == list(model.state_dict())
