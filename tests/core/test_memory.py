"""Memory told in advance: every count against what is really allocated, at small size; full sizes against the spec."""

from __future__ import annotations

import importlib.util
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from streamgen import Engine
from streamgen.config import load_preset
from streamgen.errors import InputError
from streamgen.hub import assets_root, embedded_models, model_config
from streamgen.memory import describe_model, estimate, ways_to_fit
from streamgen.models.geometry import (
    CodecGeometry,
    ImageEncoderGeometry,
    ModelGeometry,
    TextEncoderGeometry,
    TransformerGeometry,
    read_geometry,
)
from streamgen.models.transformer import CausalWanTransformer3DModel
from streamgen.noise import SeededNoise

ROOT = Path(__file__).resolve().parents[2]
WAN = ["wan-1.3b", "wan-14b", "wan-14b-i2v", "wan2.2-5b", "wan2.2-a14b", "wan2.2-a14b-i2v"]
NET = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=64, in_channels=4, out_channels=4,
           text_dim=8, text_len=6, freq_dim=16)  # fmt: skip
HEIGHT, WIDTH = 64, 96  # latents 8×12, 24 tokens per frame


class Live(TorchDispatchMode):
    """Bytes of tensors that were born inside and are still alive; `peak` is their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tree_map_only(torch.Tensor, lambda t: self.note(t, 0), (args, kwargs or {}))  # they were there before
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda t: self.note(t, t.untyped_storage().nbytes()), out)
        return out

    def note(self, tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known[storage] = True
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int) -> None:
        self.now -= size


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def held(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def near(measured: float, share: float = 0.1):
    return pytest.approx(measured, rel=share)


def small(codec: dict | None = None, **changes) -> ModelGeometry:
    codec = CodecGeometry(**{"latent_channels": 4, "base_dim": 4, **(codec or {})})
    return ModelGeometry(transformer=TransformerGeometry(**{**NET, **changes}), codec=codec)


def start(geometry: ModelGeometry, config, dtype=torch.float32, batch: int = 1, frames: int | None = None):
    """A roll-out of random transformers of this geometry."""
    torch.manual_seed(0)
    net, size = geometry.transformer, geometry.latent_size(HEIGHT, WIDTH)
    models = [CausalWanTransformer3DModel(**net.arguments()).to(dtype).eval() for _ in range(geometry.experts)]
    text = torch.randn(1, 5, net.text_dim)
    with torch.no_grad():
        engine = Engine(models[0], config, None, *models[1:])
        return engine.start(text, SeededNoise(0), latent_size=size, num_latent_frames=frames, negative_embeds=text,
                            batch=batch)  # fmt: skip


# ---------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("name", WAN)
def test_the_named_models_have_the_weights_they_are_built_with(name):
    geometry = model_config(name).geometry
    net = replace(geometry.transformer, num_layers=3)
    with torch.device("meta"):
        assert count(CausalWanTransformer3DModel(**net.arguments())) == net.parameters
    assert geometry.licence == "Apache-2.0" and geometry.hub.startswith("Wan-AI/Wan2.")


def test_full_sizes_are_those_of_the_spec():
    parameters = {name: model_config(name).geometry.transformer.parameters for name in WAN[:2]}
    assert parameters == {"wan-1.3b": 1_418_996_800, "wan-14b": 14_288_491_584}
    geometry = model_config("wan-1.3b").geometry
    assert geometry.tokens_per_frame(480, 832) == 1560
    assert geometry.text_encoder.parameters * 2 == near(11.4e9, 0.01)
    found = estimate(geometry, load_preset("self-forcing", ["cache.window=12"]), 480, 832)
    assert found.codec_state == near(1.8 * 2**30, 0.03)  # 32 slots of two frames
    assert found.text_keys == near(90 * 2**20, 0.01)
    per_frame = 2 * 30 * 1560 * 1536 * 2  # keys and values
    assert per_frame == near(274 * 2**20, 0.01) and found.cache % (per_frame // 2) == 0
    tiny = [conv.parameters for conv in CodecGeometry("tiny").decoder()]
    assert sum(tiny) == near(9.84e6, 0.001)


def test_codecs_have_the_weights_they_are_built_with():
    from diffusers import AutoencoderKLWan

    from streamgen.models.codecs import TinyCodec
    from streamgen.models.vae import StreamingVAE

    wan22 = model_config("wan2.2-5b").geometry.codec
    assert (wan22.spatial_ratio, wan22.temporal_ratio, CodecGeometry().spatial_ratio) == (16, 4, 8)
    with torch.device("meta"):
        assert count(AutoencoderKLWan()) == CodecGeometry().parameters
        model = AutoencoderKLWan(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2,
                                 in_channels=12, out_channels=12)  # fmt: skip
        assert count(model) == wan22.parameters
        assert count(TinyCodec()) == CodecGeometry("tiny").parameters
        assert count(TinyCodec(48, patch=2)) == replace(wan22, kind="tiny").parameters
    streaming = CodecGeometry("streaming", 4, widths=[8, 12, 16])
    model = StreamingVAE(4, (8, 12, 16))
    assert count(model) == streaming.parameters
    assert (model.spatial_ratio, model.temporal_ratio) == (streaming.spatial_ratio, streaming.temporal_ratio)


def test_encoders_have_the_weights_they_are_built_with():
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    from streamgen.models.text import TextEncoder

    text = TextEncoderGeometry("umt5", 50, 16, 2, 3, 8, 24)
    image = ImageEncoderGeometry(16, 2, 2, 24, 28, 14)
    with torch.device("meta"):
        config = UMT5Config(vocab_size=50, d_model=16, d_kv=8, num_heads=3, d_ff=24, num_layers=2)
        assert count(UMT5EncoderModel(config)) == text.parameters
        config = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                  image_size=28, patch_size=14)  # fmt: skip
        assert count(CLIPVisionModel(config)) == image.parameters
        assert count(TextEncoder(50, 16, 2, 2, 8)) == TextEncoderGeometry("small", 50, 16, 2, 2, 8, 64, 8).parameters
    assert image.tokens == 5 and ImageEncoderGeometry().tokens == 257


def test_fp8_weights_are_one_byte_per_matrix_entry():
    geometry = small()
    model = CausalWanTransformer3DModel(**geometry.transformer.arguments()).to(torch.bfloat16)
    config = load_preset("self-forcing", ["cache.window=9"])
    assert estimate(geometry, config, HEIGHT, WIDTH).transformers == held(model.parameters())
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert estimate(geometry, config, HEIGHT, WIDTH, weights="fp8").transformers == held(model.parameters())


# ---------------------------------------------------------------------------------------------- cache
@pytest.mark.parametrize(
    ("preset", "overrides", "frames", "batch"),
    [
        ("self-forcing", [], 12, 1),  # keeps everything, re-encodes nothing
        ("self-forcing", ["switch.mode=recache"], 12, 1),
        ("self-forcing", ["cache.window=9", "switch.mode=recache"], None, 1),
        ("rolling-forcing", [], None, 1),
        ("krea", [], None, 1),  # makes its context anew
        ("streamdit", [], None, 1),  # publishes nothing
        ("self-forcing", ["cache.window=9", "chunk.latent_frames=1"], None, 2),
        ("default", ["cache.window=12", "guidance.scale=3"], None, 2),
    ],
)
def test_cache_and_text_keys_are_the_bytes_that_are_allocated(preset, overrides, frames, batch):
    geometry, config = small(), load_preset(preset, overrides)
    rollout = start(geometry, config, torch.bfloat16, batch, frames)
    found = estimate(geometry, config, HEIGHT, WIDTH, batch=batch, latent_frames=frames)
    assert found.cache == held((rollout.store.keys, rollout.store.values, rollout.store.rotated))
    (keys,) = rollout.text.keys
    assert found.text_keys == held({t.untyped_storage().data_ptr(): t for t in (*keys.keys, *keys.values)}.values())
    assert found.frames_in_cache == rollout.store.keys.shape[2]


@pytest.mark.parametrize("name", ["streamdit", "ar-diffusion", "skyreels-df"])
def test_what_publishes_nothing_keeps_nothing(name):
    config = load_preset(name)
    assert estimate(small(), config, HEIGHT, WIDTH).frames_in_cache == Engine(None, config).flight_frames


def test_every_expert_has_a_cache():
    geometry = replace(small(), experts=2, boundary=875.0)
    config = load_preset("self-forcing", ["cache.window=9", "experts.boundary=875"])
    rollout = start(geometry, config)
    found = estimate(geometry, config, HEIGHT, WIDTH, dtype="fp32")
    one = estimate(small(), config, HEIGHT, WIDTH, dtype="fp32")
    assert found.cache == sum(store.nbytes for store in rollout.stores) == 2 * one.cache
    assert found.transformers == 2 * one.transformers
    for timestep in (1000.0, 875.0, 874.9, 0.0):
        assert geometry.model_for(timestep) == rollout.engine.expert_for(timestep)
    assert model_config("wan2.2-a14b").stream == {"experts": {"boundary": 875}}
    assert model_config("wan2.2-a14b-i2v").geometry.model_for(899) == 1


def test_the_picture_has_keys_too():
    geometry = small(in_channels=9, image_dim=10, added_kv_proj_dim=24)
    geometry = replace(geometry, image_encoder=ImageEncoderGeometry(10, 1, 1, 20, 28, 14))
    model = CausalWanTransformer3DModel(**geometry.transformer.arguments())
    keys = model.text_keys(torch.zeros(1, 6, 8), torch.zeros(1, geometry.image_encoder.tokens, 10))
    found = estimate(geometry, load_preset("self-forcing", ["cache.window=9"]), HEIGHT, WIDTH, dtype="fp32")
    parts = (*keys.keys, *keys.values, *keys.image_keys, *keys.image_values)
    assert found.text_keys == sum(t.numel() * 4 for t in parts)


# ---------------------------------------------------------------------------------------------- what comes and goes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [dict(ffn_dim=256), dict(ffn_dim=16)], ids=["feed-forward", "attention"])
def test_a_forward_takes_what_is_told(dtype, sizes):
    geometry = small(num_layers=1, attention_head_dim=32, **sizes)
    config = load_preset("self-forcing", ["cache.window=9", "ladder.timesteps=[1000]"])
    rollout, peaks = start(geometry, config, dtype), []
    with torch.no_grad():
        for _ in range(5):  # until the window is full and beyond
            with Live() as live:
                rollout.advance()
            peaks.append(live.peak)
    assert estimate(geometry, config, HEIGHT, WIDTH, dtype=dtype).forward == near(max(peaks), 0.15)


def _next_call(rollout):
    """What the schedule does next, as a cache binds it."""
    tick = next(rollout.engine.schedule.ticks(rollout.engine.steps, None, rollout.next_chunk))
    (call,) = tick.calls
    frames = range(rollout.next_frame, rollout.next_frame + 3)
    return call, call.rows[0], (frames,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["absolute", "packed"])
def test_turning_keys_takes_what_is_told(dtype, rule):
    geometry = small(num_layers=12)
    config = load_preset("self-forcing", ["cache.window=12", "ladder.timesteps=[1000]", f"positions.rule={rule}"])
    rollout = start(geometry, config, dtype)
    with torch.no_grad():
        for _ in range(6):
            rollout.advance()
        rollout.commit()
        with Live() as live:
            (cache,) = rollout.caches.values()
            cache.bind(*_next_call(rollout), 0, rollout.engine.transformer.rope)
    assert estimate(geometry, config, HEIGHT, WIDTH, dtype=dtype).rotation == near(live.peak)


def wan_codec(codec: CodecGeometry, dtype):
    from diffusers import AutoencoderKLWan

    from streamgen.models.codecs import WanCodec

    torch.manual_seed(0)
    pixels = 3 * codec.patch_size**2
    model = AutoencoderKLWan(base_dim=codec.base_dim, decoder_base_dim=codec.decoder_base_dim, dim_mult=codec.dim_mult,
                             z_dim=codec.latent_channels, is_residual=codec.is_residual, patch_size=codec.patch_size,
                             in_channels=pixels, out_channels=pixels, latents_mean=[0.0] * codec.latent_channels,
                             latents_std=[1.0] * codec.latent_channels)  # fmt: skip
    return WanCodec(model.to(dtype).eval())


def tiny_codec(codec: CodecGeometry, dtype):
    from streamgen.models.codecs import TinyCodec

    return TinyCodec(codec.latent_channels, patch=codec.patch_size).to(dtype).eval()


def streaming_codec(codec: CodecGeometry, dtype):
    from streamgen.models.vae import StreamingVAE

    return StreamingVAE(codec.latent_channels, codec.widths).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "build"),
    [
        (dict(base_dim=8), wan_codec),
        (dict(base_dim=4, decoder_base_dim=8, is_residual=True, patch_size=2), wan_codec),
        (dict(kind="tiny"), tiny_codec),
        (dict(kind="streaming", widths=[8, 12, 16]), streaming_codec),
    ],
    ids=["wan2.1", "wan2.2", "tiny", "streaming"],
)
def test_a_decoder_keeps_and_takes_what_is_told(sizes, build, dtype):
    geometry = small(sizes)
    codec = build(geometry.codec, dtype)
    ratio = geometry.codec.spatial_ratio
    latents = torch.randn(2, 4, 7, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, state = codec.decode(latents[:, :, :4])
        with Live() as live:
            pixels, new = codec.decode(latents[:, :, 4:], state)
            pixels = (pixels + 1) / 2  # as a session does
    config = load_preset("self-forcing", ["cache.window=9"])
    found = estimate(geometry, config, 8 * ratio, 8 * ratio, batch=2, dtype=dtype)
    kept = new.values() if isinstance(new, dict) else [x for x in new if isinstance(x, torch.Tensor)]
    assert found.codec_state == sum(x.numel() * x.element_size() for x in kept)
    assert pixels.shape[2:] == (12, 8 * ratio, 8 * ratio)
    assert found.decoding == near(live.peak, 0.25 if geometry.codec.is_residual else 0.1)


def test_tiles_trade_memory_of_the_decoder_for_state():
    from streamgen.models.codecs import TiledCodec

    geometry, config = small(dict(base_dim=8)), load_preset("self-forcing", ["cache.window=9"])
    codec = TiledCodec(wan_codec(geometry.codec, torch.float32), 12, 3)
    latents = torch.randn(1, 4, 6, 16, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, state = codec.decode(latents[:, :, :3])
        with Live() as live:
            pixels, new = codec.decode(latents[:, :, 3:], state)
            pixels = (pixels + 1) / 2
    found = estimate(geometry, config, 128, 160, dtype="fp32", tile=12)
    assert found.codec_state == sum(x.numel() * 4 for part in new for x in part if isinstance(x, torch.Tensor))
    assert found.decoding == near(live.peak, 0.15)
    whole = estimate(geometry, config, 128, 160, dtype="fp32")
    assert found.decoding < whole.decoding and found.codec_state > whole.codec_state


# ---------------------------------------------------------------------------------------------- the whole
def test_peaks_are_sums_of_what_is_there_at_a_time():
    config = load_preset("self-forcing", ["cache.window=12"])
    found = estimate(model_config("wan-1.3b").geometry, config, 480, 832, device="cuda")
    assert found.peak == found.runtime + found.weights + found.stream + max(found.forward, found.decoding)
    assert found.peak - found.peak_offloaded == found.text_encoder
    assert found.peak_offloaded <= found.peak_released <= found.peak
    assert found.peak_released >= found.weights
    larger = load_preset("self-forcing", ["cache.window=21"])
    assert estimate(model_config("wan-1.3b").geometry, larger, 480, 832).cache > found.cache


def test_ways_to_fit_are_true_and_the_least_costly_comes_first():
    geometry, config = model_config("wan-1.3b").geometry, load_preset("self-forcing", ["cache.window=12"])
    setting = dict(geometry=geometry, config=config, height=480, width=832, device="cuda")
    found = estimate(**setting)
    (first, *rest) = ways_to_fit(found.peak_offloaded, **setting)
    assert first.changes == ("offload=text: the text encoder stays in RAM",) and first.peak == found.peak_offloaded
    assert all(way.peak <= found.peak_offloaded for way in rest)
    (together, *_) = ways_to_fit(found.peak_offloaded - 1, **setting)
    assert together.changes == (*first.changes, "tile=32: decode in tiles")
    assert together.peak == estimate(**setting, tile=32).peak_offloaded
    assert ways_to_fit(2**20, **setting) == []


def test_what_cannot_be_is_refused_in_one_line():
    geometry, config = small(), load_preset("self-forcing", ["cache.window=9"])
    for words, options in (
        (("65x96", "64x96"), dict(height=65)),
        (("codec", "'tini'", "did you mean 'tiny'"), dict(codec="tini")),
        (("weights", "'int4'"), dict(weights="int4")),
        (("unknown dtype", "'bf61'"), dict(dtype="bf61")),
    ):
        with pytest.raises(InputError) as error:
            estimate(geometry, config, **{"height": HEIGHT, "width": WIDTH, **options})
        assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(InputError, match="two experts need one"):
        ModelGeometry(experts=2)
    with pytest.raises(InputError, match="'warn'"):
        CodecGeometry(kind="warn")


# ---------------------------------------------------------------------------------------------- folders
def test_the_embedded_model_is_read_from_its_folder():
    from safetensors import safe_open

    (name,) = embedded_models()
    settings, geometry = describe_model(name)
    assert settings == model_config(name)
    counts = {"transformer": geometry.transformer, "vae": geometry.codec, "text_encoder": geometry.text_encoder}
    for part, shapes in counts.items():
        with safe_open(assets_root() / name / part / "diffusion_pytorch_model.safetensors", "pt") as file:
            sizes = [torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys()]
        assert shapes.parameters == sum(sizes), part


def folder(tmp_path: Path, **index) -> Path:
    """What diffusers writes for a Wan pipeline, without weights."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    sizes = {key: value for key, value in NET.items() if key != "text_len"}
    parts = {"transformer": WanTransformer3DModel(**sizes), "transformer_2": WanTransformer3DModel(**sizes)}
    for name, model in parts.items():
        if name == "transformer" or "boundary_ratio" in index:
            model.save_config(tmp_path / name)
    AutoencoderKLWan(base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_config(tmp_path / "vae")
    text = dict(vocab_size=50, d_model=8, d_kv=4, num_heads=2, d_ff=16, num_layers=1, model_type="umt5")
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(text))
    second = {"transformer_2": ["diffusers", "WanTransformer3DModel"]} if index else {"transformer_2": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps({**second, **index}))
    return tmp_path


def test_a_diffusers_folder_is_read_without_weights(tmp_path):
    geometry = read_geometry(folder(tmp_path))
    expected = replace(small(text_len=None), text_encoder=TextEncoderGeometry("umt5", 50, 8, 1, 2, 4, 16))
    assert geometry == expected and geometry.model_for(0) == 0
    with pytest.raises(InputError, match="vae.config.json"):
        (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
        read_geometry(tmp_path)


def test_two_transformers_and_their_boundary_are_read(tmp_path):
    geometry = read_geometry(folder(tmp_path, boundary_ratio=0.9))
    assert (geometry.experts, geometry.boundary, geometry.model_for(899.9)) == (2, 900.0, 1)


@pytest.mark.parametrize("model", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan-1.3b"])
def test_models_are_known_by_name_and_hub_id(model):
    settings, geometry = describe_model(model)
    assert (settings.height, settings.width, settings.fps, geometry.transformer.dim) == (480, 832, 16, 1536)


# ---------------------------------------------------------------------------------------------- the benchmark
def test_the_geometry_benchmark_runs_at_small_size(capsys):
    path = ROOT / "benchmarks" / "wan_geometry.py"
    spec = importlib.util.spec_from_file_location("wan_geometry", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--scale", "small", "--threads", str(torch.get_num_threads())])
    report = json.loads(capsys.readouterr().out)
    stages = report["stages"]
    assert list(stages) == ["build", "start", "denoise", "commit", "build_codec", "decode_first", "decode"]
    assert all(stage["seconds"] >= 0 and stage["peak_bytes"] > 2**20 for stage in stages.values())
    assert all(stage["estimated_peak_bytes"] > 2**20 for stage in stages.values())
    assert stages["denoise"]["history_frames"] == 6 and stages["decode"]["frames"] == 4
    assert report["stream"]["extrapolated"] is True and report["stream"]["steps"] == 4
