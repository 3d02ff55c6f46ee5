"""Checkpoints in every layout, and one readable line for those that do not fit."""

import argparse
import doctest
import json
import pickle

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from streamgen.errors import InputError
from streamgen.models import layouts
from streamgen.models.layouts import to_diffusers_name, to_original_name
from streamgen.models.loading import LAYOUTS, load_transformer, save_transformer
from streamgen.models.transformer import CausalWanTransformer3DModel

TINY = dict(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=6, text_dim=20, freq_dim=16, ffn_dim=64,
    num_layers=2, eps=1e-5, text_len=9,
)  # fmt: skip
UNSEEN = {"num_heads": 2, "eps": 1e-5, "text_len": 9}  # what shapes cannot tell


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**TINY).eval()


@pytest.fixture
def original(model) -> dict[str, torch.Tensor]:
    return {to_original_name(name): tensor for name, tensor in model.state_dict().items()}


def assert_same(loaded: CausalWanTransformer3DModel, model: CausalWanTransformer3DModel) -> None:
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert {key: loaded.config[key] for key in TINY} == TINY
    assert all(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


def refusal(source, config=None) -> str:
    with pytest.raises(InputError) as caught:
        load_transformer(source, config)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- layouts


def test_names_translate_both_ways(model):
    assert doctest.testmod(layouts).failed == 0
    for name in model.state_dict():
        original = to_original_name(name)
        assert to_diffusers_name(original) == name
        assert name.startswith("patch_embedding") or original != name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_then_load_gives_equal_tensors(model, tmp_path, layout):
    path = save_transformer(model, tmp_path / ("m.pt" if layout == "self-forcing" else "m"), layout)
    assert_same(load_transformer(path, UNSEEN if layout == "self-forcing" else None), model)
    assert not list(tmp_path.rglob("*.tmp"))


def test_layouts_are_what_others_read(model, tmp_path):
    WanTransformer3DModel.from_pretrained(save_transformer(model, tmp_path / "d"))
    folder = save_transformer(model, tmp_path / "w", "wan")
    config = json.loads((folder / "config.json").read_text())
    assert (config["dim"], config["num_heads"], config["out_dim"], config["text_len"]) == (48, 2, 6, 9)
    assert "blocks.1.cross_attn.norm_k.weight" in load_file(folder / "diffusion_pytorch_model.safetensors")
    content = torch.load(save_transformer(model, tmp_path / "s.pt", "self-forcing"), weights_only=True)
    assert list(content) == ["generator_ema"] and "model.head.modulation" in content["generator_ema"]


def test_saving_replaces_what_was_there(model, tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    save_transformer(model, tmp_path)
    save_transformer(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    with pytest.raises(InputError, match="choose from diffusers, wan, self-forcing"):
        save_transformer(model, tmp_path, "original")


def test_sharded_and_pipeline_folders(model, tmp_path):
    model.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 1
    assert_same(load_transformer(tmp_path / "pipe"), model)


def test_bare_safetensors_file(model, original, tmp_path):
    save_file(original, tmp_path / "wan.safetensors")
    assert_same(load_transformer(tmp_path / "wan.safetensors", UNSEEN), model)


@pytest.mark.parametrize(
    "prefix", ["model.", "model._fsdp_wrapped_module.", "module.model.", "_orig_mod.model._fsdp_wrapped_module.", ""]
)
def test_wrapper_prefixes_are_removed(model, original, prefix):
    assert_same(load_transformer({prefix + name: tensor for name, tensor in original.items()}, UNSEEN), model)


def test_wrapper_infixes_are_removed(model, original):
    inner = "blocks.{}._fsdp_wrapped_module._checkpoint_wrapped_module."
    state = {name.replace("blocks.1.", inner.format(1)): tensor for name, tensor in original.items()}
    checkpoint = {"generator": {f"model.{name}": tensor for name, tensor in state.items()}}
    assert_same(load_transformer(checkpoint, UNSEEN), model)


def test_the_average_is_preferred(model, original):
    other = {name: torch.zeros_like(tensor) for name, tensor in original.items()}
    checkpoint = {"critic": other, "model": other, "generator": other, "generator_ema": original, "step": 3}
    assert_same(load_transformer(checkpoint, UNSEEN), model)
    del checkpoint["generator_ema"]
    assert not load_transformer(checkpoint, UNSEEN).proj_out.weight.any()


# --- configuration


def test_configuration_in_either_naming(model, original):
    full = dict(
        dim=48, num_heads=2, in_dim=4, out_dim=6, ffn_dim=64, freq_dim=16, text_dim=20, num_layers=2, eps=1e-5,
        text_len=9, patch_size=[1, 2, 2], qk_norm=True, cross_attn_norm=True, model_type="t2v", local_attn_size=-1,
        forks_own_switch=3,
    )  # fmt: skip
    assert_same(load_transformer(original, full), model)
    assert_same(load_transformer(model.state_dict(), TINY), model)
    assert_same(load_transformer(model.state_dict(), {"attention_head_dim": 24, "eps": 1e-5, "text_len": 9}), model)


def test_defaults_of_the_layouts(model, original):
    assert load_transformer(original, {"num_heads": 2}).config.text_len == 512
    assert load_transformer(model.state_dict(), {"num_heads": 2}).config.text_len is None


def test_width_of_128s_needs_no_head_count():
    wide = CausalWanTransformer3DModel(**{**TINY, "num_attention_heads": 1, "attention_head_dim": 128})
    assert load_transformer(wide.state_dict()).config.num_attention_heads == 1


def test_head_count_is_asked_for(original):
    assert "num_heads" in refusal(original)
    assert "does not divide the width 48" in refusal(original, {"num_heads": 5})


def test_unknown_keys_get_a_suggestion(original):
    assert "did you mean 'num_heads'?" in refusal(original, {"num_head": 2})
    assert "did you mean 'num_layers'?" in refusal(original, {"dim": 48, "num_heads": 2, "num_layer": 2})
    assert "known are" in refusal(original, {"num_heads": 2, "colour": "red"})


def test_the_callers_tensors_stay_theirs(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        load_transformer(state, UNSEEN).proj_out.weight.zero_()
    assert state["proj_out.weight"].any()


# --- refusals


def test_missing_and_unexpected_keys_are_listed(original):
    del original["blocks.1.self_attn.q.weight"]
    original["blocks.0.extra"] = torch.zeros(1)
    message = refusal(original, UNSEEN)
    assert "1 missing: blocks.1.attn1.to_q.weight" in message and "1 unexpected: blocks.0.extra" in message


def test_long_lists_are_cut(original):
    message = refusal({name: tensor for name, tensor in original.items() if "cross_attn" not in name}, UNSEEN)
    assert "20 missing" in message and "and 12 more" in message


def test_missing_anchor_key_is_still_reported(original):
    del original["patch_embedding.weight"]
    assert "1 missing: patch_embedding.weight" in refusal(original, {**UNSEEN, "in_dim": 4})


def test_wrong_width_is_named(original):
    original["blocks.0.ffn.2.weight"] = torch.zeros(48, 65)
    assert "1 wrong shape: blocks.0.ffn.net.2.weight (48, 65) instead of (48, 64)" in refusal(original, UNSEEN)
    assert "wrong shape" in refusal(original, {**UNSEEN, "ffn_dim": 32})
    assert "missing" in refusal(original, {**UNSEEN, "num_layers": 3})


def test_not_a_wan_transformer():
    assert "not a Wan transformer" in refusal({"conv.weight": torch.zeros(1)})
    assert "no tensors" in refusal({"step": 3})
    assert "not a checkpoint" in refusal({})


def test_image_models_are_refused(original):
    original["img_emb.proj.1.weight"] = torch.zeros(1)
    assert "CLIP branch" in refusal(original, UNSEEN)


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_never_run(tmp_path):
    torch.save({"generator": Payload()}, tmp_path / "bad.pt")
    assert "pickled code" in refusal(tmp_path / "bad.pt")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload()))
    assert "pickled code" in refusal(tmp_path / "raw.pth")
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pt")
    assert "argparse.Namespace" in refusal(tmp_path / "args.pt")
    assert not Payload.ran


def test_truncated_files(model, tmp_path):
    for layout, name in (("self-forcing", "m.pt"), ("diffusers", "m")):
        path = save_transformer(model, tmp_path / name, layout)
        file = path if path.is_file() else path / "diffusion_pytorch_model.safetensors"
        content = file.read_bytes()
        for part in (0, 100, len(content) // 2):
            file.write_bytes(content[:part])
            assert "truncated or not" in refusal(path)


def test_files_that_are_no_checkpoints(tmp_path):
    for content in (b"hello, this is not a checkpoint", bytes(range(256))):
        (tmp_path / "text.pt").write_bytes(content)
        assert "not a checkpoint" in refusal(tmp_path / "text.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "not a checkpoint" in refusal(tmp_path / "tensor.pt")
    assert "does not exist" in refusal(tmp_path / "nowhere.pt")
    assert "no safetensors" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "JSON" in refusal(tmp_path)
