"""Folders as diffusers lays out downloaded Wan models, at tiny width: loaded, steered, rendered like the real ones."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

import streamgen
from streamgen.cli import main
from streamgen.errors import InputError
from streamgen.models.text import build_tokenizer

WORDS = "a red blue cat dog running sleeping on the beach".split()
FAST = ["ladder.timesteps=[1000,500]", "cache.window=9", "cache.sink=3", "switch.mode=recache"]
SIZES = dict(num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2)


def transformer(seed: int = 0, **changes) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**{**SIZES, "in_channels": 16, "out_channels": 16, **changes})


def save_folder(folder, index: dict, **parts) -> str:
    """A pipeline folder with tiny text encoder and codec; `parts` are further components."""
    torch.manual_seed(1)
    parts["tokenizer"] = build_tokenizer(WORDS, 512)
    parts["text_encoder"] = UMT5EncoderModel(
        UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    parts["vae"] = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    parts["scheduler"] = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = type(part).__module__.split(".")[0]
        index[name] = [library, type(part).__name__]
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps({"_diffusers_version": "0.35.0", **index}))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Like Wan2.1-T2V-1.3B-Diffusers."""
    path = tmp_path_factory.mktemp("wan") / "Wan2.1-T2V-tiny-Diffusers"
    path.mkdir()
    return save_folder(path, {"_class_name": "WanPipeline"}, transformer=transformer())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, folder) -> str:
    """Like self_forcing_dmd.pt: another transformer in the original's names."""
    path = tmp_path_factory.mktemp("weights")
    transformer(seed=5).save_pretrained(path / "other")
    other = streamgen.load_transformer(path / "other")
    return str(streamgen.save_transformer(other, path / "self_forcing_dmd.pt", layout="self-forcing"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = streamgen.load(folder, preset="longlive", device="cpu", dtype="fp32", overrides=FAST)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_downloaded_folder_streams_and_the_call_drains_it(pipe):
    frames = pipe("a red cat running", height=32, width=48, num_frames=21, seed=3).frames
    assert frames.shape == (21, 32, 48, 3) and frames.std() > 0
    with pipe.stream("a red cat running", height=32, width=48, num_frames=21, seed=3) as stream:
        streamed = np.concatenate([chunk.frames for chunk in stream])
    assert np.abs(streamed / 255 - frames).max() <= 0.5 / 255 + 1e-6


def test_streamed_frames_are_those_of_the_whole_clip_decoded_at_once(pipe):
    latents = pipe("a blue dog", height=32, width=32, num_frames=33, output_type="latent").frames
    frames = pipe("a blue dog", height=32, width=32, num_frames=33, output_type="pt").frames
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        whole = pipe.vae.decode(latents * std + mean).sample
    torch.testing.assert_close(frames.transpose(1, 2), (whole.clamp(-1, 1) + 1) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("height, width, shape", [(64, 32, (64, 32)), (32, 80, (32, 80)), (48, 48, (48, 48)),
                                                  (41, 60, (48, 64))])  # fmt: skip
def test_any_size_and_off_grid_ones_are_snapped(pipe, height, width, shape):
    assert pipe("a cat", height=height, width=width, num_frames=9).frames.shape == (9, *shape, 3)


def test_a_size_must_be_given_where_the_model_has_none(pipe):
    with pytest.raises(InputError, match="give height"):
        pipe("a cat", num_frames=9)


def test_a_batch_is_its_samples(pipe):
    prompts = ["a red cat", "a blue dog sleeping"]
    both = pipe(prompts, height=32, width=32, num_frames=21, output_type="latent").frames
    assert both.shape[0] == 2 and (both[0] - both[1]).abs().max() > 0.1
    first = pipe(prompts[0], height=32, width=32, num_frames=21, output_type="latent").frames
    torch.testing.assert_close(both[:1], first, atol=1e-4, rtol=1e-3)


def test_the_text_encoder_can_be_let_go(folder):
    pipe = streamgen.load(folder, preset="self-forcing", device="cpu", dtype="fp32", overrides=FAST)
    wanted = pipe.encode_prompt("a red cat")
    assert wanted.shape == (1, 512, 16) and not wanted[0, 5:].any() and wanted[0, 0].any()
    pipe.release_text_encoder()
    assert pipe.text_encoder is None
    frames = pipe(prompt_embeds=wanted, height=32, width=32, num_frames=9).frames
    assert np.isfinite(frames).all()
    with pytest.raises(InputError, match="released"):
        pipe("a blue dog", height=32, width=32, num_frames=9)


def test_the_commands_of_the_readme(folder, checkpoint, tmp_path, capsys):
    timeline = tmp_path / "story.yaml"
    timeline.write_text("- {at: 0, prompt: a red cat running}\n- {at: 0.5, prompt: a blue cat sleeping}\n")
    target = tmp_path / "story.mp4"
    command = ["render", "--model", folder, "--checkpoint", checkpoint, "--preset", "longlive",
               "--timeline", str(timeline), "--height", "32", "--width", "48", "--num-frames", "33",
               "--dtype", "fp32", "-o", str(target)]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    assert target.stat().st_size > 500


def test_embeddings_are_kept_between_runs_if_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["render", "--model", folder, "--preset", "longlive", *FAST, "--prompt", "a red cat", "--height", "32",
               "--width", "32", "--num-frames", "9", "--dtype", "fp32", "--prompt-cache"]  # fmt: skip
    assert main([*command, "-o", str(tmp_path / "one.gif")]) == 0
    (kept,) = (tmp_path / "streamgen" / "prompts").glob("*.safetensors")
    monkeypatch.setattr(UMT5EncoderModel, "forward", None)
    assert main([*command, "-o", str(tmp_path / "two.gif")]) == 0
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()


def test_a_checkpoint_replaces_the_transformer(folder, checkpoint):
    plain = streamgen.load(folder, preset="self-forcing", device="cpu", dtype="fp32")
    other = streamgen.load(folder, checkpoint, preset="self-forcing", device="cpu", dtype="fp32")
    assert not torch.equal(plain.transformer.proj_out.weight, other.transformer.proj_out.weight)
    assert torch.equal(other.transformer.proj_out.weight, streamgen.load_transformer(checkpoint, SIZES).proj_out.weight)


def test_two_experts_come_with_their_boundary(tmp_path):
    parts = dict(transformer=transformer(0), transformer_2=transformer(9))
    folder = save_folder(tmp_path, {"_class_name": "WanPipeline", "boundary_ratio": 0.7}, **parts)
    pipe = streamgen.load(folder, preset="self-forcing", device="cpu", dtype="fp32", overrides=FAST)
    calls = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, args[1].item(), kwargs["commit_only"])),
            with_kwargs=True,
        )
    pipe("a cat", height=32, width=32, num_frames=21)
    first = [("transformer", 1000.0, False)] + [("transformer_2", pytest.approx(500, abs=400), False)]
    assert calls[0] == first[0] and {name for name, *_ in calls} == {"transformer", "transformer_2"}
    assert all((level >= 700) == (name == "transformer") for name, level, commit in calls if not commit)


def test_image_to_video_begins_with_its_picture_and_resumes(tmp_path):
    torch.manual_seed(2)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=28, patch_size=14)  # fmt: skip
    size = {"height": 28, "width": 28}
    parts = dict(
        transformer=transformer(3, in_channels=36, image_dim=16, added_kv_proj_dim=24),
        image_encoder=CLIPVisionModel(vision),
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
    )
    folder = save_folder(tmp_path, {"_class_name": "WanImageToVideoPipeline"}, **parts)
    pipe = streamgen.load(folder, preset="self-forcing", device="cpu", dtype="fp32", overrides=FAST)
    picture = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    look = dict(height=32, width=32, num_frames=45, seed=1)
    with pipe.stream("a cat", image=picture, **look) as stream:
        chunks = [stream.next()]
        state = stream.state_dict()
        stream.set_prompt("a dog")
        chunks += list(stream)
    with pipe.resume(state) as again:
        again.set_prompt("a dog")
        rest = list(again)
    assert len(rest) == 3 and all(torch.equal(a.pixels, b.pixels) for a, b in zip(chunks[1:], rest, strict=True))
    with pipe.stream("a cat", image=255 - picture, **look) as stream:
        assert (stream.next().pixels - chunks[0].pixels).abs().max() > 1e-3
    with pytest.raises(InputError, match="give it an image"):
        pipe.stream("a cat", **look)


def test_weights_that_are_offloaded_layer_by_layer_give_the_same_clip(folder, pipe):
    """Where they compute is the CPU here as well; what is tested is that every path finds its weights."""
    look = dict(height=32, width=32, num_frames=21, output_type="latent")
    wanted = pipe("a red cat", **look).frames
    other = streamgen.load(folder, preset="longlive", device="cpu", dtype="fp32", overrides=FAST)
    other.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(other("a red cat", **look).frames, wanted)
    with pytest.raises(InputError, match="offload=group frees the memory of an accelerator"):
        streamgen.load(folder, device="cpu", offload="group")


def test_what_is_kept_off_the_device_is_still_part_of_the_pipeline(folder, tmp_path, monkeypatch):
    """The device is a stand-in: nothing moves, but what would have moved is seen."""
    from streamgen import hub
    from streamgen.pipelines import StreamingVideoPipeline

    pipe, moved = streamgen.load(folder, device="cpu", dtype="fp32", overrides=FAST), []
    monkeypatch.setattr(StreamingVideoPipeline, "to", lambda self, *_: moved.append(dict(self.components)) or self)
    hub._place(pipe, torch.device("cpu"), "text")
    assert moved[0]["text_encoder"] is None and moved[0]["transformer"] is not None
    assert pipe.text_encoder is not None and pipe.config.text_encoder == ("transformers", "UMT5EncoderModel")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "text_encoder" / "config.json").is_file()
