"""`streamgen convert`: the same tensors in every layout, whole or not at all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from streamgen.cli import main
from streamgen.cli.loading import lora_option
from streamgen.models import saving
from streamgen.models.loading import LAYOUTS, load_transformer, save_transformer
from streamgen.models.lora import merge_lora, read_lora

CONFIG = {"num_heads": 2, "text_len": 6}  # what shapes cannot tell


@pytest.fixture
def model(tiny):
    return tiny.model()


@pytest.fixture
def convert(tmp_path, capsys, monkeypatch):
    """Run `convert` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("num_heads: 2\ntext_len: 6\n")

    def run(*argv: object) -> tuple[int, str, str]:
        code = main(["convert", *map(str, argv)])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(convert):
    """Run `convert`; it must refuse with `code` and one line holding all of `words`, and change nothing."""

    def run(*argv: object, words: tuple[str, ...], code: int = 2) -> None:
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
        got, out, err = convert("-q", *argv)
        assert (got, out, err.count("\n")) == (code, "", 1), err
        assert all(word in err for word in words), err
        assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before

    return run


def place(name: str, layout: str) -> str:
    return f"{name}.pt" if layout == "self-forcing" else name


def assert_equal(path, model, **arguments) -> None:
    state, expected = load_transformer(path, CONFIG, **arguments).state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def lora_file(path: str) -> None:
    draw = torch.Generator().manual_seed(3)
    pair = {"down": torch.randn(2, 24, generator=draw), "up": torch.randn(24, 2, generator=draw)}
    save_file({f"lora_unet_blocks_1_cross_attn_o.lora_{side}.weight": part for side, part in pair.items()}, path)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_any_layout_to_any_other_and_back(convert, model, first, second):
    save_transformer(model, place("a", first), first)
    for source, target, layout in (("a", "b", second), ("b", "c", first)):
        source = place(source, second if source == "b" else first)
        target = place(target, layout)
        code, out, err = convert(source, target, "--layout", layout, "--config", "config.yaml")
        assert (code, out) == (0, f"{target}\n") and f"tensors in float32, 0.00 GB, layout {layout}" in err
        assert_equal(target, model)
    assert not list(Path().glob(".*"))
    folder = place("b", second)
    if second == "diffusers":
        WanTransformer3DModel.from_pretrained(folder)
    assert Path(folder).is_file() == (second == "self-forcing")


def test_configuration_from_each_place(convert, model):
    save_transformer(model, "source.pt", "self-forcing")
    Path("config.json").write_text(json.dumps({"num_attention_heads": 2, "text_len": 6}))
    save_transformer(model, "folder/transformer")
    for index, config in enumerate(("config.yaml", "config.json", "folder", "folder/transformer")):
        assert convert("source.pt", f"t{index}", "--layout", "diffusers", "--config", config)[0] == 0
        assert load_transformer(f"t{index}").config.num_attention_heads == 2


def test_dtype_and_what_keeps_float32(convert, model):
    save_transformer(model, "source")
    assert "bfloat16 and float32" in convert("source", "target", "--layout", "wan", "--dtype", "bf16")[2]
    state = load_transformer("target").state_dict()
    for name, tensor in model.state_dict().items():
        small = "time_embedder" in name or "scale_shift_table" in name or "norm2" in name
        assert torch.equal(state[name], tensor if small else tensor.bfloat16()), name
    reference = type(model).from_pretrained("source", torch_dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in reference.state_dict().items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }


def test_loras_are_merged_before_rounding(convert, model):
    save_transformer(model, "source")
    lora_file("a:b.safetensors")  # a colon of its own
    lora_file("c.safetensors")
    argv = ("--lora", "a:b.safetensors", "--lora", "c.safetensors:-0.25", "--dtype", "fp16")
    code, _, err = convert("source", "target", "--layout", "diffusers", *argv)
    assert code == 0 and "c.safetensors: 1 of 1 modules matched" in err
    merge_lora(model, read_lora("c.safetensors"), 1.0)
    merge_lora(model, read_lora("c.safetensors"), -0.25)
    got = load_transformer("target").blocks[1].attn2.to_out[0].weight
    assert torch.equal(got, model.blocks[1].attn2.to_out[0].weight.half())


def test_the_second_expert(convert, model, tiny):
    other = tiny.model(seed=1)
    save_transformer(model, "pipe/transformer")
    save_transformer(other, "pipe/transformer_2")
    assert convert("pipe", "two", "--layout", "wan", "--subfolder", "transformer_2")[0] == 0
    assert_equal("two", other)
    assert convert("pipe", "one", "--layout", "wan")[0] == 0
    assert_equal("one", model)


def test_an_embedded_model_by_its_name(convert, model, monkeypatch):
    save_transformer(model, "models/own/transformer")
    Path("models/own/model_index.json").write_text("{}")
    monkeypatch.setattr("streamgen.hub.assets_root", lambda: Path("models"))
    assert convert("own", "target", "--layout", "wan")[0] == 0
    assert_equal("target", model)


def test_lora_options():
    assert [lora_option(text) for text in ("a.pt", "a.pt:0.5", "hf://o/n/a.pt", "hf://o/n/a.pt:-1")] == [
        ("a.pt", 1.0), ("a.pt", 0.5), ("hf://o/n/a.pt", 1.0), ("hf://o/n/a.pt", -1.0),
    ]  # fmt: skip


def test_force_replaces_the_whole_model(convert, refused, model, tiny):
    save_transformer(tiny.model(seed=1), "target", max_shard_size="20KB")
    save_transformer(model, "source")
    Path("empty").mkdir()
    refused("source", "target", "--layout", "wan", words=("target exists", "--force"))
    assert convert("source", "empty", "--layout", "wan")[0] == 0  # nothing to lose
    assert convert("source", "target", "--layout", "wan", "--force")[0] == 0
    assert_equal("target", model)
    assert sorted(path.name for path in Path("target").iterdir()) == ["config.json", saving.WEIGHTS_NAME]
    assert convert("target", "target", "--layout", "diffusers", "--force")[0] == 0  # in place
    assert_equal("target", model)
    save_transformer(tiny.model(seed=1), "m.pt", "self-forcing")
    refused("source", "m.pt", "--layout", "self-forcing", words=("m.pt exists",))
    assert convert("source", "m.pt", "--layout", "self-forcing", "--force")[0] == 0
    assert_equal("m.pt", model)
    (Path("target") / "style.safetensors").write_bytes(b"a LoRA")
    refused("source", "target", "--layout", "wan", "--force", words=("more than a transformer", "style.safetensors"))
    (Path("target") / "style.safetensors").unlink()
    (Path("target") / "notes.txt").write_text("mine")
    refused("source", "target", "--layout", "wan", "--force", words=("more than a transformer", "notes.txt"))
    assert not list(Path().glob(".*"))


def test_a_full_disk_leaves_what_was_there(refused, model, monkeypatch):
    save_transformer(model, "source")
    save_transformer(model, "target")

    def full(state, path, metadata):
        path.write_bytes(b"half")
        raise saving.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    for target, *force in (["fresh"], ["target", "--force"]):
        refused("source", target, "--layout", "wan", *force, words=("No space left",), code=1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["source", "target"], ("--layout",)),
        (["source", "--layout", "wan"], ("TARGET",)),
        (["source", "target", "--layout", "comfy"], ("comfy", "self-forcing")),
        (["source", "target", "--layout", "self-forcing"], ("target", ".pt")),
        (["source", "target.safetensors", "--layout", "wan"], ("target.safetensors", "folder")),
        (["source", "target", "--layout", "wan", "--dtype", "int8"], ("int8", "bf16")),
        (["absent", "target", "--layout", "wan"], ("absent", "does not exist")),
        (["source", "target", "--layout", "wan", "--subfolder", "transformer_2"], ("'transformer_2'",)),
        (["source", "target", "--layout", "wan", "--lora", "absent.safetensors"], ("absent.safetensors",)),
        (["source", "target", "--layout", "wan", "--lora", "absent:much"], ("'much'", "FILE:SCALE")),
        (["source", "target", "--layout", "wan", "--lora", "source:nan"], ("'nan'",)),
        (["source", "target", "--layout", "wan", "--config", "absent.yaml"], ("absent.yaml",)),
        (["source", "target", "--layout", "wan", "--config", "list.yaml"], ("list.yaml", "num_heads")),
        (["source", "target", "--layout", "wan", "--config", "broken.yaml"], ("broken.yaml", "YAML")),
        (["source", "target", "--layout", "wan", "--config", "typo.yaml"], ("did you mean 'num_heads'",)),
        (["source", "target", "--layout", "wan", "--config", "word.yaml"], ("num_heads = 'two'", "whole number")),
        (["source", "target", "--layout", "wan", "--config", "flat.yaml"], ("patch_size = 2", "[1, 2, 2]")),
        (["source", "target", "--layout", "wan", "--config", "keyless.yaml"], ("1 is no key",)),
        (["empty", "target", "--layout", "wan"], ("empty", "no safetensors")),
        (["source", "target", "--layout", "wan", "--forse"], ("did you mean '--force'",)),
    ],
)
def test_bad_input_is_one_line_that_names_the_culprit(refused, model, argv, words):
    save_transformer(model, "source")
    Path("empty").mkdir()
    wrong = {"word": "num_heads: two", "flat": "patch_size: 2", "keyless": "1: 2"}
    for name, text in {"list": "[1]", "broken": "a: [", "typo": "num_head: 2", **wrong}.items():
        Path(f"{name}.yaml").write_text(text)
    refused(*argv, words=words)
