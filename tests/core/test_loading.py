"""Checkpoints in every layout, and one readable line for those that do not fit."""

import argparse
import doctest
import json
import pickle
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from streamgen.errors import InputError, UnavailableError
from streamgen.models import layouts
from streamgen.models.layouts import to_diffusers_name, to_original_name
from streamgen.models.loading import LAYOUTS, cast_weights, load_transformer, save_transformer
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


def refusal(source, config=None, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_transformer(source, config, **arguments)
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


def test_either_expert_of_a_pipeline(model, tmp_path):
    for name, expert in (("transformer", CausalWanTransformer3DModel(**TINY)), ("transformer_2", model)):
        save_transformer(expert, tmp_path / name)
    assert_same(load_transformer(tmp_path, subfolder="transformer_2"), model)
    assert not torch.equal(load_transformer(tmp_path).proj_out.weight, model.proj_out.weight)
    assert "no folder 'transformer_3'; it has transformer, tra" in refusal(tmp_path, subfolder="transformer_3")
    save_transformer(model, tmp_path / "m.pt", "self-forcing")
    assert "is a file" in refusal(tmp_path / "m.pt", UNSEEN, subfolder="transformer_2")


@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_saving_in_shards(model, tmp_path, layout):
    shards = lambda: sorted(file.name for file in tmp_path.glob("*.safetensors"))
    save_transformer(model, tmp_path, layout, max_shard_size="100KB")
    assert len(shards()) > 2 and all(name.startswith("diffusion_pytorch_model-0000") for name in shards())
    assert max(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 110_000
    assert_same(load_transformer(tmp_path), model)
    if layout == "diffusers":
        theirs = WanTransformer3DModel.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
    save_transformer(model, tmp_path, layout, max_shard_size=200_000)  # fewer: nothing of before stays
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards())
    save_transformer(model, tmp_path, layout)
    assert shards() == ["diffusion_pytorch_model.safetensors"] and len(list(tmp_path.iterdir())) == 2
    assert_same(load_transformer(tmp_path), model)
    with pytest.raises(InputError, match="'huge' is no size"):
        save_transformer(model, tmp_path, layout, max_shard_size="huge")


def test_saving_after_adapters_were_deleted(model, tmp_path):
    peft = pytest.importorskip("peft")
    twin = load_transformer(model.state_dict(), TINY)
    twin.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(InputError, match="LoRA layers"):
        save_transformer(twin, tmp_path)
    twin.delete_adapters("style")
    assert_same(load_transformer(save_transformer(twin, tmp_path)), model)


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
    wrapped = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in original.items()}
    assert_same(load_transformer({"generator_ema": wrapped}, UNSEEN), model)  # all that some trainers keep


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


def test_a_bad_shard_is_named(model, tmp_path):
    save_transformer(model, tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    assert f"{shard} is truncated" in refusal(tmp_path)
    save_file({}, shard)
    assert "missing: " in refusal(tmp_path)
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(tmp_path)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
        assert "index.json has no weight_map" in refusal(tmp_path)


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


# --- quantised weights

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def linear(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def in_fp8(original, kind, scale="scale_weight", rows=False) -> tuple[dict, dict]:
    """A checkpoint whose blocks are in fp8, and the numbers it stands for."""
    state, expected = {}, {}
    for name, tensor in original.items():
        state[name] = expected[name] = tensor
        if linear(name):
            factor = tensor.abs().amax(1, keepdim=True) / 300 if rows else tensor.abs().max() / 300
            state[name] = (tensor / factor).to(kind)
            state[name.replace("weight", scale)] = factor
            state[name.replace("weight", "scale_input")] = torch.tensor(7.0)  # for kernels that multiply in fp8
            expected[name] = state[name].float() * factor
    return state, expected


def assert_dequantised(loaded, expected, dtype) -> None:
    state, changed = loaded.state_dict(), 0
    for name, tensor in expected.items():
        ours = to_diffusers_name(name)
        keeps = any(part in ours.split(".") for part in ("time_embedder", "scale_shift_table", "norm2"))
        assert torch.equal(state[ours], tensor if keeps else tensor.to(dtype)), ours
        changed += not keeps
    assert changed and len(state) == len(expected)
    with torch.no_grad():
        out = loaded(torch.zeros(1, 4, 1, 4, 4), 500.0, torch.zeros(1, 3, 20)).sample
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize(("scale", "rows"), [("scale_weight", False), ("weight_scale", True)])
def test_scaled_fp8(original, tmp_path, kind, scale, rows):
    state, expected = in_fp8(original, kind, scale, rows)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    save_file({**state, "model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=kind)}, tmp_path / "m.safetensors")
    assert_dequantised(load_transformer(tmp_path / "m.safetensors", UNSEEN), expected, torch.bfloat16)
    assert_dequantised(load_transformer(tmp_path / "m.safetensors", UNSEEN, dtype="fp16"), expected, torch.float16)
    assert_dequantised(load_transformer(state, UNSEEN, dtype=torch.float32), expected, torch.float32)


@pytest.mark.parametrize("kind", FP8)
def test_plain_fp8(original, kind):
    state = {name: tensor.to(kind) if linear(name) else tensor for name, tensor in original.items()}
    expected = {name: tensor.float() for name, tensor in state.items()}
    assert_dequantised(load_transformer(state, UNSEEN), expected, torch.bfloat16)


def test_other_quantisations_are_refused(original):
    name = "blocks.0.self_attn.q.weight"
    assert f"{name} as int8" in refusal({**original, name: torch.zeros(48, 48, dtype=torch.int8)}, UNSEEN)
    state, _ = in_fp8(original, FP8[0])
    scale = "blocks.0.self_attn.q.scale_weight"
    assert "by (3,)" in refusal({**state, scale: torch.ones(3)}, UNSEEN)
    assert "unexpected: blocks.9.x.scale_weight" in refusal({**state, "blocks.9.x.scale_weight": torch.ones(1)}, UNSEEN)
    assert f"unexpected: {scale}" in refusal({**original, scale: torch.ones(1)}, UNSEEN)  # nothing here is quantised


def test_casting_as_diffusers_does(model, tmp_path):
    save_transformer(model, tmp_path)
    theirs = CausalWanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).state_dict()
    for ours in (load_transformer(tmp_path, dtype="bf16"), cast_weights(load_transformer(tmp_path), torch.bfloat16)):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
        assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16, torch.float32}
    again = load_transformer(theirs, TINY)
    assert all(tensor.dtype == theirs[name].dtype for name, tensor in again.state_dict().items())


WIDE = {**TINY, "attention_head_dim": 32, "text_dim": 32, "freq_dim": 32}  # GGUF packs rows of 32


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0", "F16"])
@pytest.mark.parametrize("folded", [False, True])
def test_gguf(tmp_path, kind, folded):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(**WIDE)
    kind, expected = gguf.GGMLQuantizationType[kind], {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    for name, tensor in model.state_dict().items():
        name, array = to_original_name(name), tensor.numpy()
        expected[name] = tensor
        if linear(name):
            packed = gguf.quants.quantize(array, kind)
            expected[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
            writer.add_tensor(name, packed, raw_dtype=None if kind.name == "F16" else kind)
            continue
        if folded and tensor.dim() == 5:  # some writers store no more than four dimensions
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in array.shape])
            array = array.reshape(array.shape[0], -1)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_transformer(tmp_path / "m.gguf", UNSEEN)
    state = loaded.state_dict()
    for name, tensor in expected.items():
        ours = to_diffusers_name(name)
        assert torch.equal(state[ours], tensor.to(state[ours].dtype)), name
    assert state["patch_embedding.weight"].dtype == state["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    content = (tmp_path / "m.gguf").read_bytes()
    for part in (3, 2000, len(content) // 2):
        (tmp_path / "cut.gguf").write_bytes(content[:part])
        assert "truncated or not a GGUF file" in refusal(tmp_path / "cut.gguf", UNSEEN)


def test_gguf_without_its_reader(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnavailableError, match="pip install gguf"):
        load_transformer(tmp_path / "m.gguf")
