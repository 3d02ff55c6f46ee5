"""How much memory a stream takes, told before anything is loaded.

    estimate(geometry, load_preset("self-forcing", ["cache.window=12"]), 480, 832).peak   # bytes

Weights, cache and streaming state are counted exactly; what comes and goes inside a call follows the formulas below.
Not counted: workspaces inside kernels (convolutions above all), allocator fragmentation, prompts' embeddings, and the
few tables that stay in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamgen.building import build_policy, call_frames
from streamgen.cache.positions import OWN_NUMBERS
from streamgen.cache.store import ROTATED_AT_ONCE, Geometry, KVStore
from streamgen.config import StreamConfig, available, check_choice, suggest
from streamgen.device import resolve_dtype
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.hub import ModelConfig, assets_root, embedded_models, model_config, model_name_of
from streamgen.models.codecs.base import LATENTS_PER_CALL
from streamgen.models.codecs.tiled import spans
from streamgen.models.geometry import CodecGeometry, ModelGeometry, TransformerGeometry, read_geometry
from streamgen.models.rope import RotaryEmbedding
from streamgen.schedules import lanes

__all__ = ["CODECS", "Estimate", "Way", "describe_model", "device_memory", "estimate", "ways_to_fit"]

CODECS = ("wan", "tiny")
TILE = 32  # latents per side, where tiles are proposed
CLIP_FRAMES = 21  # latent frames of the usual 81-frame clip: the length assumed where every frame is kept
# The interpreter, torch and diffusers (0.4 GiB measured); on a GPU its context and handles (not verified here).
RUNTIME = {"cpu": 2**29, "cuda": 3 * 2**28, "mps": 2**29}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on the device. The first group stays; the second comes and goes, one at a time."""

    transformers: int
    text_encoder: int
    image_encoder: int
    codec: int
    cache: int  # keys, rotated keys and values of every branch and expert
    text_keys: int  # cross-attention, with the picture's
    tables: int  # rotary angles that are kept
    codec_state: int
    runtime: int

    encoding: int  # one pass of the text encoder
    forward: int  # one pass of the transformer
    rotation: int  # turning cached keys to new positions
    decoding: int

    frames_in_cache: int
    tokens_per_frame: int

    @property
    def weights(self) -> int:
        return self.transformers + self.text_encoder + self.image_encoder + self.codec

    @property
    def stream(self) -> int:
        """What a stream keeps beside the weights."""
        return self.cache + self.text_keys + self.tables + self.codec_state

    @property
    def peak(self) -> int:
        """Everything stays on the device."""
        streaming = max(self.forward, self.rotation, self.decoding)
        return self.runtime + self.weights + max(self.encoding, self.stream + streaming)

    @property
    def peak_offloaded(self) -> int:
        """The text and image encoders live elsewhere: a GPU's in RAM."""
        return replace(self, text_encoder=0, image_encoder=0, encoding=0).peak

    @property
    def peak_released(self) -> int:
        """All is loaded, the prompt is encoded, the text and image encoders are dropped, then the stream begins."""
        return max(self.runtime + self.weights + self.encoding, self.peak_offloaded)

    def parts(self) -> dict[str, int]:
        """Every part that takes bytes, by name."""
        counts = ("frames_in_cache", "tokens_per_frame")
        return {name: value for name, value in asdict(self).items() if name not in counts}


def describe_model(model: str) -> tuple[ModelConfig, ModelGeometry]:
    """Settings and shapes of an embedded model, a pipeline folder, a name in `configs/models` or its hub id.

    Reads YAML and JSON alone. Raises InputError with the nearest name.
    """
    folder = assets_root() / model if model in embedded_models() else Path(model)
    if (folder / "model_index.json").is_file():
        geometry = read_geometry(folder)
        return model_config(model_name_of(folder)), geometry
    known = {name: model_config(name) for name in available("models")}
    for name, settings in known.items():
        if settings.geometry and model in (name, settings.geometry.hub):
            return settings, settings.geometry
    names = sorted({*embedded_models(), *(name for name, settings in known.items() if settings.geometry)})
    raise InputError(
        f"unknown model {model!r}{suggest(model, names)}: give one of {', '.join(names)}, or a diffusers folder that "
        "holds model_index.json"
    )


def estimate(
    geometry: ModelGeometry,
    config: StreamConfig,
    height: int,
    width: int,
    *,
    batch: int = 1,
    dtype: str | torch.dtype = "bf16",
    codec: str = "wan",
    device: str = "cpu",
    latent_frames: int | None = None,
    weights: str | None = None,
    tile: int | None = None,
) -> Estimate:
    """What one stream of this model needs.

    Switches of another mode than `switch.mode` are not in it: the first re-encoding ("recache") where that is not the
    mode makes room for up to `cache.window` frames more in every cache.

    Args:
        height, width: of the picture, on the model's grid.
        batch: samples of the stream, side by side.
        dtype: of weights, cache and codec.
        codec: "wan" = the decoder the model was trained with, "tiny" = TAEHV in its place.
        device: its kind: cpu, cuda or mps.
        latent_frames: length of a stream that keeps every frame (cache.window=-1); by default that of an 81-frame clip.
        weights: "fp8" stores the transformers' matrices in one byte per value; None = in `dtype`.
        tile: latents per side beyond which frames are decoded in tiles, as `streamgen.load` takes it.
    Raises: InputError for sizes off the grid, an unknown codec, or a configuration that cannot run.
    """
    size, decoder = resolve_dtype(dtype).itemsize, _decoder(geometry, codec)
    latents = geometry.latent_size(height, width)
    rows, columns = (spans(side, tile, max(1, tile // 4)) if tile else [range(side)] for side in latents)
    positions = batch * sum(map(len, rows)) * sum(map(len, columns))  # of all tiles: every one is a stream
    at_once = batch * max(map(len, rows)) * max(map(len, columns))
    net, tokens = geometry.transformer, geometry.tokens_per_frame(height, width)
    sequences = batch * (1 if config.guidance.scale == 1 else 2)
    total = config.chunk.whole(latent_frames or CLIP_FRAMES)
    cache = _cache(net, config, latents, sequences, resolve_dtype(dtype), total)
    read = (net.text_len or geometry.text_encoder.max_length) + _picture_tokens(geometry)
    state = decoder.state_values * positions * size
    pages, call = cache.store.pages, cache.store.flight
    queries, keys = cache.lanes * sequences * call * tokens, sequences * max(pages, call) * tokens
    return Estimate(
        transformers=geometry.experts * _transformer_bytes(net, size, weights),
        text_encoder=geometry.text_encoder.parameters * size,
        image_encoder=geometry.image_encoder.parameters * size if geometry.image_encoder else 0,
        codec=decoder.parameters * size,
        cache=geometry.experts * cache.lanes * cache.store.nbytes,
        text_keys=geometry.experts * 2 * sequences * read * net.dim * net.num_layers * size,
        tables=geometry.experts * cache.tables * tokens * net.attention_head_dim * 4,
        codec_state=state,
        runtime=RUNTIME.get(device, RUNTIME["cpu"]),
        encoding=_encoding_bytes(geometry, size),
        forward=_forward_bytes(net, queries, keys, size, device),
        rotation=_rotation_bytes(cache.turned, net.num_layers, size),
        decoding=_decoding_bytes(decoder, at_once, batch * latents[0] * latents[1], config.chunk.largest, size) + state,
        frames_in_cache=cache.lanes * (pages + call),
        tokens_per_frame=tokens,
    )


@dataclass(frozen=True)
class _Cache:
    """Of one expert: what engine and policy would make for a stream."""

    lanes: int  # rows of a call, a cache each
    store: KVStore  # of one lane
    tables: int  # frames whose rotary angles are kept
    turned: int  # bytes of keys that get new positions at once, of one lane


def _cache(
    net: TransformerGeometry, config: StreamConfig, latents: Sequence[int], sequences: int, dtype: torch.dtype,
    total: int,
) -> _Cache:  # fmt: skip
    """`total`: latent frames of the stream."""
    engine, chunk = Engine(None, config), config.chunk.largest
    flight = engine.flight_frames
    policy = build_policy(config, flight, total)
    pages = policy.pages
    store = _store(net, latents, sequences, pages, call_frames(config, policy, flight, total), dtype, policy.aside)
    endless = config.cache.window != -1
    counting = config.positions.rule in OWN_NUMBERS
    seen = (2**62 if endless else total) if counting else pages + chunk  # frames of different positions, as queries
    stays = config.positions.rule == "absolute" and config.switch.mode != "recache"  # a key is turned once
    return _Cache(
        lanes=len(lanes(engine.schedule, engine.steps, config.chunk.count(total))),
        store=store,
        tables=min(seen // chunk, RotaryEmbedding.CACHE_SIZE) * flight,
        turned=(min(pages, chunk) if stays else pages) * store.keys.nbytes // (pages + store.flight),
    )


def _decoder(geometry: ModelGeometry, codec: str) -> CodecGeometry:
    """The decoder that is used. Raises InputError where there is no tiny one."""
    check_choice("codec", codec, CODECS)
    own = geometry.codec
    if codec == "wan":
        return own
    if own.kind != "wan":
        raise InputError(f"codec=tiny stands in for Wan's decoders; this model has one of kind {own.kind!r}")
    return replace(own, kind="tiny")


def _store(
    net: TransformerGeometry, latents: Sequence[int], sequences: int, pages: int, flight: int, dtype: torch.dtype,
    aside: Mapping[str, int | None] | None = None,
) -> KVStore:
    """The cache of a stream, without its bytes."""
    height, width = (side // patch for side, patch in zip(latents, net.patch_size[1:], strict=True))
    grid = Geometry(net.num_layers, sequences, height, width, net.num_attention_heads, net.attention_head_dim)
    return KVStore(grid, pages, flight, dtype, torch.device("meta"), aside)


def _picture_tokens(geometry: ModelGeometry) -> int:
    """Rows of CLIP tokens that cross-attention reads."""
    if not geometry.transformer.image_dim:
        return 0
    return geometry.transformer.pos_embed_seq_len or (geometry.image_encoder.tokens if geometry.image_encoder else 0)


def _transformer_bytes(net: TransformerGeometry, size: int, weights: str | None) -> int:
    if weights is None:
        return net.parameters * size
    check_choice("weights", weights, ("fp8",))
    narrow = net.num_layers * net.block_products  # what diffusers' layerwise casting does not leave out
    return narrow + (net.parameters - narrow) * size


# ---------------------------------------------------------------------------------------------- what comes and goes
# n tokens of a call, D width, s bytes per value; `wide` is what a computation in float32 adds to narrower values.
def _forward_bytes(net: TransformerGeometry, tokens: int, keys: int, size: int, device: str) -> int:
    """The most that one forward holds beside the weights; the largest of three moments inside a block.

    - keys are rotated: residual stream 4nD, input, q, k, v and rotated q 5s·nD, complex product 4nD; in 16 bit also the
      float32 copy and the result (4 + s)·nD
    - attention: stream 4nD, the five, rotated k and the output 7s·nD; keys and values of `keys` tokens gathered side by
      side, 2s·D each, which happens until the window is full
    - feed-forward: stream 4nD, two inputs 2s·nD, and of the hidden width F: 2s·nF, on a CPU in 16 bit 8nF more
    """
    half, stream = size < 4, size if net.precision == "strict" else 4
    per_token = net.dim * (stream + 5 * size + 4 + (4 + size) * half)
    attention = tokens * net.dim * (stream + 7 * size) + 2 * size * keys * net.dim
    hidden = 2 * size + (8 if half and device == "cpu" else 0)
    feed_forward = tokens * (net.dim * (stream + 2 * size) + net.ffn_dim * hidden)
    return max(tokens * per_token, attention, feed_forward)


def _rotation_bytes(keys: int, layers: int, size: int) -> int:
    """Keys that get new positions, `keys` bytes in all layers: a copy, its float32 form, the product, the result."""
    keys = min(keys, max(ROTATED_AT_ONCE, keys // layers))
    return keys * (2 * size + 8) // size if size < 4 else 2 * keys


def _encoding_bytes(geometry: ModelGeometry, size: int) -> int:
    """The text encoder on one prompt: scores and their float32 softmax of every head, hidden rows of one layer."""
    text = geometry.text_encoder
    rows = geometry.transformer.text_len or text.max_length
    scores = text.num_heads * rows * (3 * size + 4)
    return rows * (scores + (3 * text.ffn_dim + 8 * text.dim) * size)


def _decoding_bytes(codec: CodecGeometry, tile: int, picture: int, chunk: int, size: int) -> int:
    """A chunk through the decoder, `tile` of `picture` positions at once: its hungriest layer, or the pixels it leaves.

    Per value of a layer's input, s bytes each. A normed convolution (Wan): the block's input, its shortcut or what the
    first convolution made (as much as the output), the norm's float32 copies, 10 bytes in 16 bit and 12 in float32;
    s more where a block keeps its input to the end. An enlarging one (Wan): input twice, the picture in float32 and its
    copy, 7 bytes and 6. Others hold their inputs and outputs, memory blocks the joined frames as well.
    """
    half, most = size < 4, 0
    for conv in codec.decoder():
        places = conv.scale**2 * conv.rate
        if codec.kind == "wan":
            norm = size + (10 if half else 12) + size * codec.is_residual
            enlarging = conv.kernel == (1, 3, 3)
            per_input = norm if conv.normed else (7 if half else 6) if enlarging else size
            need = conv.inputs * per_input + size * conv.outputs * (not enlarging)
        elif conv.memory:
            need = size * (3 * conv.inputs + conv.outputs)
        else:  # a streaming block adds to its input, its enlarging layers shuffle their output
            need = size * (conv.inputs + conv.outputs * (2 if codec.kind == "streaming" else 1))
        most = max(most, places * need)
    whole = picture * chunk * 3 * codec.spatial_ratio**2 * codec.temporal_ratio * 4  # float32 pixels
    layer = tile * min(chunk, LATENTS_PER_CALL) * most
    return max(layer + whole * (tile < picture), 3 * whole)  # three times on their way out


# ---------------------------------------------------------------------------------------------- what would fit
@dataclass(frozen=True)
class Way:
    """Changes that together bring the peak to `peak` bytes."""

    changes: tuple[str, ...]
    peak: int


def ways_to_fit(
    capacity: int, geometry: ModelGeometry, config: StreamConfig, height: int, width: int, **options
) -> list[Way]:
    """Changes after which a stream fits `capacity` bytes, those that cost least first; [] if nothing helps.

    Every single change that is enough, and before it what cheaper ones reach together. Arguments as in `estimate`.
    """
    setting: dict[str, Any] = dict(geometry=geometry, config=config, height=height, width=width, **options)
    together, names, ways = dict(setting), (), []
    for variants in filter(None, _changes(setting)):
        alone = _first_that_fits(capacity, setting, (), variants)
        summed = None if alone or ways else _first_that_fits(capacity, together, names, variants)
        ways += [way for way in (alone, summed) if way]
        names, together = (*names, variants[-1][0]), {**together, **variants[-1][1]}
    return ways


def _first_that_fits(capacity: int, setting: dict, names: tuple[str, ...], variants: list) -> Way | None:
    for name, change in variants:
        peak = _peak({**setting, **change})
        if peak <= capacity:
            return Way((*names, name), peak)
    return None


def _peak(setting: dict[str, Any]) -> int:
    setting = dict(setting)
    text_encoder = setting.pop("text_encoder", "peak")
    return getattr(estimate(**setting), text_encoder)


def _changes(setting: dict[str, Any]) -> Iterator[list[tuple[str, dict]]]:
    """Kinds of change from the least costly on, variants of each from the mildest on: (what to do, what it changes)."""
    geometry, config = setting["geometry"], setting["config"]
    if setting.get("device", "cpu") == "cpu":
        yield [("release the text encoder once the prompt is encoded", {"text_encoder": "peak_released"})]
    else:
        yield [("offload=text: the text encoder stays in RAM", {"text_encoder": "peak_offloaded"})]
    if setting.get("tile") is None and max(geometry.latent_size(setting["height"], setting["width"])) > TILE:
        yield [(f"tile={TILE}: decode in tiles", {"tile": TILE})]
    if geometry.codec.kind == "wan" and setting.get("codec", "wan") == "wan":
        yield [("tiny decoder (codec=taew2_1.pth): a little less sharp", {"codec": "tiny"})]
    yield list(_smaller_windows(config))
    if setting.get("weights") is None:
        note = "fp8 weights: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn), slower"
        yield [(note, {"weights": "fp8"})]
    yield list(_smaller_pictures(geometry, setting["height"], setting["width"]))


def _smaller_windows(config: StreamConfig) -> Iterator[tuple[str, dict]]:
    window, roomy = config.cache.window, config.cache.sink + 2 * Engine(None, config).flight_frames
    for size in (15, 12, 9):
        if config.cache.policy == "window" and size >= roomy and (window == -1 or size < window):
            smaller = replace(config, cache=replace(config.cache, window=size))
            yield f"cache.window={size}: less of the past", {"config": smaller}


def _smaller_pictures(geometry: ModelGeometry, height: int, width: int) -> Iterator[tuple[str, dict]]:
    grid = [geometry.codec.spatial_ratio * patch for patch in geometry.transformer.patch_size[1:]]
    for share in (0.75, 0.5):
        size = [max(g, int(side * share / g) * g) for side, g in zip((height, width), grid)]
        if size != [height, width]:
            yield f"--height {size[0]} --width {size[1]}", {"height": size[0], "width": size[1]}


# ---------------------------------------------------------------------------------------------- what there is
def device_memory(device: torch.device) -> tuple[int, int]:
    """(bytes in all, bytes free now) of a device; RAM for CPU and MPS, within the limit of a container."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _number("/proc/meminfo", "MemAvailable:") * 1024 or total
    limit = _number("/sys/fs/cgroup/memory.max")
    if limit:
        total, free = min(total, limit), min(free, limit - _number("/sys/fs/cgroup/memory.current"))
    return total, free


def _number(path: str, key: str = "") -> int:
    """The number after `key` in a file of the kernel's; 0 where there is none."""
    try:
        word = Path(path).read_text().partition(key)[2] if key else Path(path).read_text()
        return int(word.split()[0])
    except (OSError, ValueError, IndexError):
        return 0
