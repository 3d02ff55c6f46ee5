"""The shapes of a model without the model: what `configs/models/NAME.yaml` and a folder's config.json files describe.

    geometry = read_geometry(Path("folder"))        # reads JSON alone
    geometry.transformer.parameters                 # 1418996800 for Wan2.1 1.3B

Everything is counted here, nothing is built; `streamgen.memory` turns counts into bytes. Defaults are Wan2.1's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from streamgen.errors import InputError

__all__ = ["CodecGeometry", "Conv", "ImageEncoderGeometry", "ModelGeometry", "TextEncoderGeometry",
           "TransformerGeometry", "read_geometry"]  # fmt: skip


@dataclass
class TransformerGeometry:
    """One transformer, in the words of `CausalWanTransformer3DModel`."""

    num_attention_heads: int = 12
    attention_head_dim: int = 128
    num_layers: int = 30
    ffn_dim: int = 8960
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int | None = 512
    freq_dim: int = 256
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    cross_attn_norm: bool = True
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None
    precision: str = "mixed"

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def parameters(self) -> int:
        """Weights of the whole network."""
        dim, pixels = self.dim, math.prod(self.patch_size)
        ends = _linear(self.in_channels * pixels, dim) + _linear(dim, self.out_channels * pixels) + 2 * dim
        time = _linear(self.freq_dim, dim) + _linear(dim, dim) + _linear(dim, 6 * dim)
        text = _linear(self.text_dim, dim) + _linear(dim, dim)
        block = self.block_products + 4 * dim + 2 * dim * self.cross_attn_norm + 6 * dim
        block += dim if self.image_dim else 0
        return ends + time + text + self._image_parameters + self.num_layers * block

    @property
    def block_products(self) -> int:
        """Weights and biases of one block's matrix products: what a narrower storage type applies to."""
        dim, products = self.dim, 8 * _linear(self.dim, self.dim)
        if self.image_dim:
            products += 2 * _linear(self.added_kv_proj_dim or dim, dim)
        return products + _linear(dim, self.ffn_dim) + _linear(self.ffn_dim, dim)

    @property
    def _image_parameters(self) -> int:
        if not self.image_dim:
            return 0
        width = self.image_dim
        mlp = 2 * width + _linear(width, width) + _linear(width, self.dim) + 2 * self.dim
        return mlp + (self.pos_embed_seq_len or 0) * width

    def arguments(self) -> dict[str, Any]:
        """What `CausalWanTransformer3DModel` is built with."""
        return {**asdict(self), "patch_size": tuple(self.patch_size)}


@dataclass(frozen=True)
class Conv:
    """One convolution of a decoder or encoder.

    `scale`: positions of its input per latent, along a side; `rate`: frames of its input per latent frame. `memory`:
    values the stream keeps per position of its input. `normed`: a norm with one weight per channel stands before it.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int, int] = (1, 3, 3)
    scale: int = 1
    rate: int = 1
    memory: int = 0
    normed: bool = False
    bias: bool = True

    @property
    def parameters(self) -> int:
        own = self.inputs * self.outputs * math.prod(self.kernel) + self.outputs * self.bias
        return own + self.inputs * self.normed


CUBE, DOT = (3, 3, 3), (1, 1, 1)
STREAMING_PATCH = 4  # pixels per side that `StreamingVAE` folds into channels at its outer end


@dataclass
class CodecGeometry:
    """A video codec. `kind`: wan (AutoencoderKLWan), tiny (TAEHV for the same latents), streaming (`StreamingVAE`).

    `widths` belongs to the streaming kind, the other sizes to the wan kind; `patch_size` folds pixels into channels at
    its outer end.
    """

    kind: str = "wan"
    latent_channels: int = 16
    base_dim: int = 96
    decoder_base_dim: int | None = None
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    temporal_downsample: list[bool] = field(default_factory=lambda: [False, True, True])
    is_residual: bool = False
    patch_size: int = 1
    widths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in DECODERS:
            raise InputError(f"codec kind {self.kind!r} is unknown: use {', '.join(DECODERS)}")

    @property
    def spatial_ratio(self) -> int:
        """Pixels per latent, per side."""
        return 4 * STREAMING_PATCH if self.kind == "streaming" else self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_ratio(self) -> int:
        """Pixel frames per latent frame, the first one apart."""
        return 4 if self.kind == "streaming" else 2 ** sum(self.temporal_downsample)

    @property
    def parameters(self) -> int:
        """Weights of encoder and decoder."""
        return sum(conv.parameters for conv in (*self.decoder(), *ENCODERS[self.kind](self)))

    def decoder(self) -> list[Conv]:
        """Its convolutions in order."""
        return list(DECODERS[self.kind](self))

    @property
    def state_values(self) -> int:
        """Values a decoding stream keeps per latent position."""
        return sum(conv.memory * conv.scale**2 for conv in self.decoder())


def _wan_resnet(inputs: int, outputs: int, scale: int, rate: int) -> Iterator[Conv]:
    # a causal convolution of three frames keeps the last two of its input
    yield Conv(inputs, outputs, CUBE, scale, rate, 2 * inputs, normed=True)
    yield Conv(outputs, outputs, CUBE, scale, rate, 2 * outputs, normed=True)
    if inputs != outputs:
        yield Conv(inputs, outputs, DOT, scale, rate)


def _wan_middle(width: int, scale: int = 1, rate: int = 1) -> Iterator[Conv]:
    yield from _wan_resnet(width, width, scale, rate)
    yield Conv(width, 3 * width, DOT, scale, rate, normed=True)
    yield Conv(width, width, DOT, scale, rate)
    yield from _wan_resnet(width, width, scale, rate)


def _wan_decoder(codec: CodecGeometry) -> Iterator[Conv]:
    base, latents = codec.decoder_base_dim or codec.base_dim, codec.latent_channels
    widths = [base * factor for factor in (codec.dim_mult[-1], *reversed(codec.dim_mult))]
    yield Conv(latents, latents, DOT)
    yield Conv(latents, widths[0], CUBE, memory=2 * latents)
    yield from _wan_middle(widths[0])
    scale = rate = 1
    grows = [*reversed(codec.temporal_downsample), None]  # the last stage enlarges nothing
    for stage, ((inputs, outputs), grow) in enumerate(zip(pairwise(widths), grows)):
        inputs = inputs // 2 if stage and not codec.is_residual else inputs
        for block in range(codec.num_res_blocks + 1):
            yield from _wan_resnet(outputs if block else inputs, outputs, scale, rate)
        if grow is None:
            break
        if grow:
            yield Conv(outputs, 2 * outputs, (3, 1, 1), scale, rate, 2 * outputs)
            rate *= 2
        scale *= 2
        yield Conv(outputs, outputs if codec.is_residual else outputs // 2, (1, 3, 3), scale, rate)
    yield Conv(outputs, 3 * codec.patch_size**2, CUBE, scale, rate, 2 * outputs, normed=True)


def _wan_encoder(codec: CodecGeometry) -> Iterator[Conv]:
    widths = [codec.base_dim * factor for factor in (1, *codec.dim_mult)]
    yield Conv(3 * codec.patch_size**2, widths[0], CUBE)
    shrinks = [*codec.temporal_downsample, None]
    for (inputs, outputs), shrink in zip(pairwise(widths), shrinks):
        for block in range(codec.num_res_blocks):
            yield from _wan_resnet(outputs if block else inputs, outputs, 1, 1)
        if shrink is not None:
            yield Conv(outputs, outputs)
        if shrink:
            yield Conv(outputs, outputs, (3, 1, 1))
    yield from _wan_middle(outputs)
    yield Conv(outputs, 2 * codec.latent_channels, CUBE, normed=True)
    yield Conv(2 * codec.latent_channels, 2 * codec.latent_channels, DOT)


def _memory_block(width: int, scale: int = 1, rate: int = 1) -> Iterator[Conv]:
    """TAEHV's: the frame and the one before it, three convolutions."""
    yield Conv(2 * width, width, scale=scale, rate=rate, memory=width)
    yield Conv(width, width, scale=scale, rate=rate)
    yield Conv(width, width, scale=scale, rate=rate)


def _tiny_decoder(codec: CodecGeometry) -> Iterator[Conv]:
    yield Conv(codec.latent_channels, 256)
    scale = rate = 1
    for width, after, grow in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
        for _ in range(3):
            yield from _memory_block(width, scale, rate)
        scale *= 2
        yield Conv(width, width * grow, DOT, scale, rate, bias=False)
        rate *= grow
        yield Conv(width, after, scale=scale, rate=rate, bias=False)
    yield Conv(64, 3 * codec.patch_size**2, scale=scale, rate=rate)


def _tiny_encoder(codec: CodecGeometry) -> Iterator[Conv]:
    yield Conv(3 * codec.patch_size**2, 64)
    for pool in (2, 2, 1):
        yield Conv(64 * pool, 64, DOT, bias=False)
        yield Conv(64, 64, bias=False)
        for _ in range(3):
            yield from _memory_block(64)
    yield Conv(64, codec.latent_channels)


def _streaming_block(width: int, temporal: bool, scale: int = 1, rate: int = 1) -> Iterator[Conv]:
    yield Conv(width * (1 + temporal), width, scale=scale, rate=rate, memory=width * temporal)
    yield Conv(width, width, scale=scale, rate=rate)


def _streaming_decoder(codec: CodecGeometry) -> Iterator[Conv]:
    fine, middle, coarse = codec.widths
    yield Conv(codec.latent_channels, coarse)
    for scale, width, finer in ((1, coarse, middle), (2, middle, fine)):
        for _ in range(2):
            yield from _streaming_block(width, True, scale, scale)
        yield Conv(width, 8 * finer, DOT, scale, scale)
    for _ in range(2):
        yield from _streaming_block(fine, False, 4, 4)
    yield Conv(fine, 3 * STREAMING_PATCH**2, scale=4, rate=4)


def _streaming_encoder(codec: CodecGeometry) -> Iterator[Conv]:
    fine, middle, coarse = codec.widths
    yield Conv(3 * STREAMING_PATCH**2, fine)
    yield from _streaming_block(fine, False)
    yield Conv(8 * fine, middle, DOT)
    yield from _streaming_block(middle, True)
    yield Conv(8 * middle, coarse, DOT)
    yield from _streaming_block(coarse, True)
    yield from _streaming_block(coarse, True)
    yield Conv(coarse, 2 * codec.latent_channels, DOT)


DECODERS = {"wan": _wan_decoder, "tiny": _tiny_decoder, "streaming": _streaming_decoder}
ENCODERS = {"wan": _wan_encoder, "tiny": _tiny_encoder, "streaming": _streaming_encoder}


@dataclass
class TextEncoderGeometry:
    """`kind`: umt5 (the encoder half of a UMT5; the default is umt5-xxl) or small (`streamgen.models.text`)."""

    kind: str = "umt5"
    vocab_size: int = 256384
    dim: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    max_length: int = 512

    @property
    def parameters(self) -> int:
        dim, inner = self.dim, self.num_heads * self.head_dim
        if self.kind == "small":
            layer = 4 * _linear(dim, dim) + _linear(dim, 4 * dim) + _linear(4 * dim, dim) + 4 * dim
            return (self.vocab_size + self.max_length) * dim + self.num_layers * layer + 2 * dim
        # 32 buckets of relative position, a table per layer; gated feed-forward, no biases
        layer = 4 * dim * inner + 3 * dim * self.ffn_dim + 2 * dim + 32 * self.num_heads
        return self.vocab_size * dim + self.num_layers * layer + dim


@dataclass
class ImageEncoderGeometry:
    """The vision half of a CLIP; the default is ViT-H/14, which Wan2.1's image-to-video models read."""

    dim: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    ffn_dim: int = 5120
    image_size: int = 224
    patch_size: int = 14

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def parameters(self) -> int:
        dim = self.dim
        layer = 4 * _linear(dim, dim) + _linear(dim, self.ffn_dim) + _linear(self.ffn_dim, dim) + 4 * dim
        patches = 3 * self.patch_size**2 * dim
        return patches + (self.tokens + 1) * dim + 4 * dim + self.num_layers * layer


@dataclass
class SamplingGeometry:
    """How the undistilled weights are sampled: uniform `steps`, `shift`ed; guidance per expert."""

    steps: int = 50
    shift: float = 5.0
    guidance: list[float] = field(default_factory=lambda: [5.0])


@dataclass
class ModelGeometry:
    """A model's parts. `hub`: its id on the Hugging Face hub; `licence` of the weights.

    `experts`: transformers of one shape; the second one takes over below timestep `boundary` (0-1000).
    """

    hub: str | None = None
    licence: str | None = None
    transformer: TransformerGeometry = field(default_factory=TransformerGeometry)
    codec: CodecGeometry = field(default_factory=CodecGeometry)
    text_encoder: TextEncoderGeometry = field(default_factory=TextEncoderGeometry)
    image_encoder: ImageEncoderGeometry | None = None
    sampling: SamplingGeometry = field(default_factory=SamplingGeometry)
    experts: int = 1
    boundary: float | None = None

    def __post_init__(self) -> None:
        if self.experts not in (1, 2) or (self.experts == 2) != (self.boundary is not None):
            raise InputError(f"geometry.experts={self.experts} with boundary={self.boundary}: two experts need one, "
                             "a single transformer has none")  # fmt: skip

    def model_for(self, timestep: float) -> int:
        """The expert at a timestep: 0 at and above the boundary, 1 below it."""
        return int(self.boundary is not None and timestep < self.boundary)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent (h, w) of a picture. Raises InputError that names the nearest size on the grid."""
        grid = [self.codec.spatial_ratio * patch for patch in self.transformer.patch_size[1:]]
        fits = [max(g, round(size / g) * g) for size, g in zip((height, width), grid)]
        if fits != [height, width]:
            raise InputError(f"{height}x{width} is off the grid of {grid[0]}x{grid[1]}: use {fits[0]}x{fits[1]}")
        return height // self.codec.spatial_ratio, width // self.codec.spatial_ratio

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of a picture of this size."""
        return math.prod(self.latent_size(height, width)) // math.prod(self.transformer.patch_size)


def _linear(inputs: int, outputs: int) -> int:
    """Weights and biases of a matrix product."""
    return inputs * outputs + outputs


# ---------------------------------------------------------------------------------------------- from a folder
def read_geometry(folder: Path) -> ModelGeometry:
    """The geometry of a diffusers pipeline folder, from its JSON files alone. Raises InputError for what is unknown."""
    index = _read(folder / "model_index.json")
    second = index.get("transformer_2") or [None]
    experts = 2 if second[0] and (folder / "transformer_2").is_dir() else 1
    transformer = _part(folder / "transformer", _transformer)
    image = _part(folder / "image_encoder", _image_encoder) if (folder / "image_encoder").is_dir() else None
    ratio = index.get("boundary_ratio")
    if experts == 2 and ratio is None:
        raise InputError(f"{folder / 'model_index.json'} names two transformers but no boundary_ratio")
    return ModelGeometry(
        transformer=transformer,
        codec=_part(folder / "vae", _codec),
        text_encoder=_part(folder / "text_encoder", _text_encoder),
        image_encoder=image,
        experts=experts,
        boundary=1000 * ratio if experts == 2 else None,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise InputError(f"{path} cannot be read as JSON: {str(failure).partition(chr(10))[0]}") from None


def _part(folder: Path, convert):
    config = _read(folder / "config.json")
    try:
        return convert(config)
    except (KeyError, TypeError) as failure:
        raise InputError(f"{folder / 'config.json'} lacks what its kind of part has: {failure}") from None


def _known(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(cls)}
    return {key: value for key, value in config.items() if key in names}


def _transformer(config: dict[str, Any]) -> TransformerGeometry:
    given = _known(TransformerGeometry, config)
    given["out_channels"] = config.get("out_channels") or config["in_channels"]
    # diffusers' own folders do not say text_len: what the pipeline pads prompts to counts then
    given.setdefault("text_len", None)
    return TransformerGeometry(**given)


def _codec(config: dict[str, Any]) -> CodecGeometry:
    if config.get("_class_name") == "StreamingVAE":
        return CodecGeometry("streaming", config["latent_channels"], widths=list(config["widths"]))
    if config.get("_class_name") != "AutoencoderKLWan":
        raise InputError(f"unknown codec class {config.get('_class_name')!r}: use AutoencoderKLWan or StreamingVAE")
    given = _known(CodecGeometry, config)
    given["patch_size"] = config.get("patch_size") or 1
    return CodecGeometry(
        **given,
        latent_channels=config["z_dim"],
        temporal_downsample=list(config["temperal_downsample"]),
    )


def _text_encoder(config: dict[str, Any]) -> TextEncoderGeometry:
    if config.get("_class_name") == "TextEncoder":
        return TextEncoderGeometry(
            "small", config["vocab_size"], config["dim"], config["num_layers"], config["num_heads"],
            config["dim"] // config["num_heads"], 4 * config["dim"], config["max_length"],
        )  # fmt: skip
    return TextEncoderGeometry(
        "umt5", config["vocab_size"], config["d_model"], config["num_layers"], config["num_heads"], config["d_kv"],
        config["d_ff"],
    )


def _image_encoder(config: dict[str, Any]) -> ImageEncoderGeometry:
    return ImageEncoderGeometry(
        config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"],
        config["intermediate_size"], config["image_size"], config["patch_size"],
    )  # fmt: skip
