"""StreamingVideoPipeline: a diffusers pipeline whose `__call__` drains a session.

    pipe = streamgen.load("sprites")
    frames = pipe("a red circle bouncing on a navy background", num_frames=81).frames
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import BaseOutput
from omegaconf import OmegaConf
from torch import Tensor

from streamgen.config import StreamConfig
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.hub import model_config, model_folder, model_name_of, stream_config
from streamgen.ladder import uniform_timesteps
from streamgen.models.codecs import Codec, codec_for
from streamgen.models.codecs.base import form_of
from streamgen.models.image import ConditionStream, ImageConditioner
from streamgen.models.loading import ORIGINAL_TEXT_LEN, load_transformer
from streamgen.models.prompts import PromptEncoder
from streamgen.models.text import TextEncoder
from streamgen.models.transformer import CausalWanTransformer3DModel
from streamgen.models.vae import StreamingVAE
from streamgen.noise import SeededNoise, TensorNoise
from streamgen.session import STATE_VERSION, Chunk, Spec, StreamSession

log = logging.getLogger(__name__)


@dataclass
class StreamingVideoPipelineOutput(BaseOutput):
    """`frames`: [F, H, W, 3] or [B, F, H, W, 3] floats in [0, 1] ("np"), [B, F, C, H, W] ("pt"), PIL, or latents."""

    frames: np.ndarray | Tensor | list


class GivenLatents:
    """Initial noise from the caller, everything after it from a seed."""

    def __init__(self, latents: Tensor, seeded: SeededNoise) -> None:
        self.given, self.seeded = TensorNoise(latents), seeded

    def frames(self, purpose: str, frames: range, step: int, shape: tuple[int, ...]) -> Tensor:
        return (self.given if purpose == "initial" else self.seeded).frames(purpose, frames, step, shape)

    def state_dict(self) -> dict:
        return {**self.seeded.state_dict(), "latents": self.given.initial}


def noise_from_state(state: dict):
    """The inverse of a noise's `state_dict`."""
    seeded = SeededNoise(state["seed"], state["candidate"])
    return GivenLatents(state["latents"], seeded) if "latents" in state else seeded


# diffusers finds the embedded model's classes among modules that are imported already
EMBEDDED_CLASSES = (TextEncoder, StreamingVAE, CausalWanTransformer3DModel)


class StreamingVideoPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Text (or a picture and text) to endless video. `stream` gives a session; `__call__` drains one."""

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->transformer_2->vae"
    _optional_components = ["text_encoder", "transformer_2", "image_encoder", "image_processor"]
    _lora_loadable_modules = ["transformer", "transformer_2"]

    def __init__(
        self,
        tokenizer,
        text_encoder,
        transformer,
        vae,
        transformer_2=None,
        image_encoder=None,
        image_processor=None,
        model_name: str | None = None,
        boundary_ratio: float | None = None,
    ) -> None:
        """Components as in diffusers' Wan pipelines.

        Args:
            vae: AutoencoderKLWan, or any codec of `streamgen.models.codecs`.
            transformer_2: the expert for levels below `boundary_ratio` (Wan2.2-A14B).
            image_encoder, image_processor: CLIP, of Wan2.1's image-to-video models.
            model_name: of the file in `configs/models` that goes with these weights.
        """
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae,
            transformer_2=transformer_2, image_encoder=image_encoder, image_processor=image_processor,
        )  # fmt: skip
        self.register_to_config(model_name=model_name, boundary_ratio=boundary_ratio)
        self.settings = model_config(model_name)
        self.stream_config: StreamConfig = stream_config(self.settings.preset, self.settings)
        self._codec: Codec | None = None
        self._prompts: PromptEncoder | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> StreamingVideoPipeline:
        """As in diffusers; folders and ids of its own Wan pipelines load too, their transformers as causal ones."""
        folder = Path(model_folder(str(pretrained_model_name_or_path)))
        index = json.loads((folder / "model_index.json").read_text())
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        for name in ("transformer", "transformer_2"):
            if name not in kwargs and (index.get(name) or [None, None])[1] == "WanTransformer3DModel":
                kwargs[name] = load_transformer(folder / name, dtype=dtype)
        kwargs.setdefault("model_name", model_name_of(folder))
        return super().from_pretrained(folder, **kwargs)

    @property
    def codec(self) -> Codec:
        """What turns latents into pixels: the VAE with streaming state. Assign one to wrap or replace it."""
        if self._codec is None:
            self._codec = codec_for(self.vae)
        return self._codec

    @codec.setter
    def codec(self, codec: Codec) -> None:
        self._codec = codec

    # ------------------------------------------------------------------------------------------- text
    @property
    def max_tokens(self) -> int:
        """Rows of prompt_embeds; a longer prompt is cut there."""
        return min(self.transformer.config.text_len or ORIGINAL_TEXT_LEN, self.tokenizer.model_max_length)

    @property
    def prompts(self) -> PromptEncoder:
        """The text side: `prompts.release()` lets go of the encoder, `prompts.cache` keeps embeddings on disk."""
        if self._prompts is None:
            self._prompts = PromptEncoder(self.tokenizer, self.text_encoder, self.max_tokens)
        return self._prompts

    def encode_prompt(self, prompt: str | Sequence[str]) -> Tensor:
        """Prompts -> prompt_embeds [B, L, D]; rows of padding are zero. A prompt over the limit is cut, and said so."""
        return self.prompts([prompt] if isinstance(prompt, str) else list(prompt), device=self.transformer.device)

    def release_text_encoder(self) -> None:
        """Free the text encoder (11 GB of a Wan model); prompts that come later need `prompts.reload` or its cache."""
        self.prompts.release()
        self.text_encoder = None

    # ------------------------------------------------------------------------------------------- sessions
    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Latent (h, w) of a picture size; sizes off the grid are snapped, and said so."""
        ratio, (_, ph, pw) = self.codec.spatial_ratio, self.transformer.config.patch_size
        out = []
        for name, value, patch in (
            ("height", height or self.settings.height, ph),
            ("width", width or self.settings.width, pw),
        ):
            grid = ratio * patch
            if value is None:
                raise InputError(f"this model has no size of its own: give {name}")
            if value < 1:
                raise InputError(f"{name} must be positive, got {value}")
            snapped = max(grid, round(value / grid) * grid)
            if snapped != value:
                log.warning("%s %d is not a multiple of %d: using %d", name, value, grid, snapped)
            out.append(snapped // ratio)
        return out[0], out[1]

    def configured(self, num_inference_steps: int | None, guidance_scale: float | None) -> StreamConfig:
        """The pipeline's configuration with what a call changes."""
        config = self.stream_config
        if num_inference_steps is not None:
            if num_inference_steps < 1:
                raise InputError(f"num_inference_steps must be positive, got {num_inference_steps}")
            ladder = replace(config.ladder, timesteps=uniform_timesteps(num_inference_steps), warp=True)
            config = replace(config, ladder=ladder)
        if config.experts.boundary is None and self.config.boundary_ratio is not None:
            config = replace(config, experts=replace(config.experts, boundary=1000 * self.config.boundary_ratio))
        if guidance_scale is not None:
            config = replace(config, guidance=replace(config.guidance, scale=guidance_scale))
        return config

    def stream(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image=None,
        video=None,
        conditions=None,
    ) -> StreamSession:
        """A session, endless unless `num_frames` is given. Arguments as in `__call__`."""
        for name, value in (("video", video), ("conditions", conditions)):
            if value is not None:
                raise InputError(f"{name}: this model is not steered by it")
        prompt = self._check_prompt(prompt, prompt_embeds)
        if num_frames is not None and num_frames < 1:
            raise InputError(f"num_frames must be positive, got {num_frames}")
        spec = Spec(
            prompt=prompt,
            negative_prompt=negative_prompt or "",
            seed=_seed(seed, generator),
            num_frames=num_frames,
            latent_size=self.latent_size(height, width),
            extra={"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds},
        )
        noise = None if latents is None else GivenLatents(latents.float().cpu(), SeededNoise(spec.seed))
        engine = self._engine(self.configured(num_inference_steps, guidance_scale))
        channels = self._look(image, spec, engine.config.chunk.latent_frames)
        return StreamSession(engine, self.codec, self.encode_prompt, spec, noise, channels)

    def _engine(self, config: StreamConfig) -> Engine:
        return Engine(self.transformer, config, self.codec, self.transformer_2)

    @torch.no_grad()
    def _look(self, image, spec: Spec, latent_frames: int) -> ConditionStream | None:
        """What image-to-video reads beside the latents; the embedded picture goes into `spec`."""
        config = self.transformer.config
        reads = config.in_channels != (config.out_channels or config.in_channels)
        if image is None:
            if reads:
                raise InputError("this is an image-to-video model: give it an image")
            return None
        if not reads:
            raise InputError("image: this model is steered by text alone")
        look = ImageConditioner(self.image_encoder, self.image_processor)
        if config.image_dim is not None:
            spec.extra["image_embeds"] = look.clip_embeds(image)
        height, width = (self.codec.spatial_ratio * side for side in spec.latent_size)
        return look.condition_chunks(image, self.codec, height, width, latent_frames)

    def _check_prompt(self, prompt, prompt_embeds) -> str | list[str]:
        if (prompt is None) == (prompt_embeds is None):
            raise InputError("give either a prompt or prompt_embeds")
        if prompt is None:
            return "" if prompt_embeds.shape[0] == 1 else [""] * prompt_embeds.shape[0]
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError("the prompt is empty: say what to show, e.g. 'a red circle bouncing on a navy background'")
        return prompt

    def resume(self, state: dict) -> StreamSession:
        """A session that goes on bit by bit where `state_dict` was taken. Raises InputError if it does not fit."""
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise InputError(f"not a stream state of version {STATE_VERSION}: save it with stream.state_dict()")
        base = OmegaConf.structured(StreamConfig)
        config = OmegaConf.to_object(OmegaConf.merge(base, state["config"]))
        engine = self._engine(config)
        if engine.fingerprint() != state["model"]:
            raise InputError("this state belongs to other weights: load the model it was saved with")
        if form_of(self.codec) != state["codec"]:
            raise InputError("this state holds another decoder's past: load the codec, and tiles, it was saved with")
        spec = Spec(**{**state["spec"], "latent_size": tuple(state["spec"]["latent_size"])})
        seen, channels = state["rollout"]["channels"], None
        if seen is not None:
            channels = ConditionStream(self.codec, seen["picture"], seen["latent_frames"])
        noise = noise_from_state(state["noise"])
        session = StreamSession(engine, self.codec, self.encode_prompt, spec, noise, channels)
        session.load_state_dict(state)
        return session

    # ------------------------------------------------------------------------------------------- whole clips
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        *,
        seed: int | None = None,
        image=None,
        video=None,
        conditions=None,
    ) -> StreamingVideoPipelineOutput | tuple:
        """A clip of exactly `num_frames` frames.

        Args:
            prompt: a string -> frames [F, H, W, 3]; a list -> [B, F, H, W, 3].
            num_inference_steps, guidance_scale: None = what the preset and the model say.
            generator: its `initial_seed()` seeds the noise, a list gives one seed per sample; not with `seed`.
            output_type: np | pt | pil | latent ([B, C, F, h, w], normalised).
            callback_on_step_end: called as (pipe, chunk index, 0, {"latents": …}) after every chunk; setting
                `pipe._interrupt = True` stops there.
            seed: None = 0. Sample i of a batch has the i-th noise stream of the seed.
            image: PIL picture, uint8 [H, W, 3] or floats in [0, 1], the first frame of image-to-video models.
        """
        if output_type not in ("np", "pt", "pil", "latent"):
            raise InputError(f"output_type {output_type!r} is unknown: use np, pt, pil or latent")
        if num_videos_per_prompt > 1 and prompt is not None:
            texts = [prompt] if isinstance(prompt, str) else prompt
            prompt = [text for text in texts for _ in range(num_videos_per_prompt)]
        elif num_videos_per_prompt > 1 and prompt_embeds is not None:
            prompt_embeds = prompt_embeds.repeat_interleave(num_videos_per_prompt, 0)
        self._interrupt = False
        session = self.stream(
            prompt, negative_prompt, height, width, num_frames, seed, generator, num_inference_steps, guidance_scale,
            latents, prompt_embeds, negative_prompt_embeds, image, video, conditions,
        )
        chunks = self._drain(session, num_frames, callback_on_step_end)
        if output_type == "latent":
            shown = 1 + -(-(num_frames - 1) // self.codec.temporal_ratio)
            frames = torch.cat([chunk.latents for chunk in chunks], 2)[:, :, :shown]
        else:
            frames = _arrange(torch.cat([chunk.pixels for chunk in chunks], 2), output_type, isinstance(prompt, str))
        self.maybe_free_model_hooks()
        return StreamingVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _drain(self, session: StreamSession, num_frames: int, callback: Callable | None) -> list[Chunk]:
        """All chunks of a session, or those until a callback interrupts."""
        chunks = []
        with session, self.progress_bar(total=num_frames) as bar:
            for chunk in session:
                chunks.append(chunk)
                bar.update(chunk.pixels.shape[2])
                if callback:
                    callback(self, chunk.index, 0, {"latents": chunk.latents})
                if self._interrupt:
                    break
        return chunks


def _arrange(pixels: Tensor, output_type: str, single: bool) -> np.ndarray | Tensor | list:
    """[B, 3, F, H, W] -> what `output_type` asks for."""
    if output_type == "pt":
        return pixels.transpose(1, 2)
    frames = pixels.permute(0, 2, 3, 4, 1).cpu().numpy()
    if output_type == "pil":
        from PIL import Image

        clips = [[Image.fromarray((f * 255).round().astype(np.uint8)) for f in clip] for clip in frames]
        return clips[0] if single else clips
    return frames[0] if single else frames


def _seed(seed: int | None, generator) -> int | list[int]:
    if generator is not None:
        if seed is not None:
            raise InputError("give either seed or generator")
        many = isinstance(generator, (list, tuple))
        return [g.initial_seed() for g in generator] if many else generator.initial_seed()
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputError(f"seed must be an integer, got {seed!r}")
    return seed or 0
