"""The engine: executes ticks, one transformer forward per call. It knows no paper by name.

    schedule (which chunk takes which step when)  ×  cache policy (who reads what, at which positions)

    engine = Engine(transformer, load_preset("self-forcing"))
    for chunk in engine.run(prompt_embeds, noise=SeededNoise(0), num_latent_frames=21, latent_size=(16, 24)):
        chunk.latents  # [B, C, f, H, W]
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from streamgen.building import build_policy
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.flight import CallRecord, LatentChunk, Text
from streamgen.forward import Forward
from streamgen.ladder import Ladder, build_ladder
from streamgen.models.blocks import collapse_padding
from streamgen.noise import Noise, TensorNoise
from streamgen.rollout import Rollout
from streamgen.schedules import HORIZON, SCHEDULES, Schedule, lanes
from streamgen.source import Source

log = logging.getLogger(__name__)


class Engine:
    """Streams a transformer by a configuration; holds no stream itself (see `Rollout`).

    Args:
        transformer: a CausalWanTransformer3DModel, or anything called like one.
        config: from `load_preset`.
        codec: kept for calls that re-encode pixels.
        transformer_2: the expert for levels below `experts.boundary` (Wan2.2-A14B); each expert has a cache of its own.
    """

    def __init__(self, transformer, config: StreamConfig, codec=None, transformer_2=None) -> None:
        self.config, self.codec = config, codec
        experts = (transformer,) if transformer_2 is None else (transformer, transformer_2)
        self.forward = Forward(experts, self.branches)
        if len(experts) > 1 and config.experts.boundary is None:
            raise InputError("two transformers need experts.boundary, the timestep below which the second one works")
        self.schedule = self._build_schedule()
        self.ladders = self._build_ladders()
        self.records: list[CallRecord] = []
        self.tracing = False
        build_policy(config, self.flight_frames, self.flight_frames)  # refuses bad sizes at once
        roomy = config.cache.sink + 2 * config.chunk.latent_frames
        if config.cache.policy == "window" and 0 < config.cache.window < roomy:
            log.warning("cache.window=%d leaves little memory: %d or more is advised", config.cache.window, roomy)

    def _build_schedule(self) -> Schedule:
        config = self.config.schedule
        schedule, options = SCHEDULES.get(config.coupling)
        if hasattr(options, "from_config"):  # reads shared keys beyond the two that all schedules have
            return schedule(options.from_config(self.config))
        try:
            return schedule(options(stagger=config.stagger, commit=config.commit, **config.options))
        except TypeError as error:
            raise InputError(f"schedule.options of schedule {config.coupling!r}: {error}") from None

    def _build_ladders(self) -> list[Ladder]:
        ladder = self.config.ladder
        return [
            build_ladder(steps, shift=ladder.shift, warp=ladder.warp, sigma=ladder.sigma, solver=ladder.solver)
            for steps in ladder.lists
        ]

    @property
    def ladder(self) -> Ladder:
        """The first chunk's steps."""
        return self.ladders[0]

    def ladder_of(self, chunk: int) -> Ladder:
        """The steps of a chunk; the last listed ladder repeats."""
        return self.ladders[min(chunk, len(self.ladders) - 1)]

    @property
    def experts(self) -> tuple:
        """The transformers."""
        return self.forward.experts

    @property
    def transformer(self):
        """The first expert: of shapes and conditions, which all experts share."""
        return self.experts[0]

    @property
    def latent_channels(self) -> int:
        config = self.transformer.config
        return config.out_channels or config.in_channels

    @property
    def extra_channels(self) -> int:
        """Read beside the latents: image-to-video."""
        return self.transformer.config.in_channels - self.latent_channels

    def expert_for(self, timestep: float) -> int:
        """Which expert denoises at a level."""
        return int(len(self.experts) > 1 and timestep < self.config.experts.boundary)

    def steps(self, chunk: int) -> int:
        """Length of a chunk's ladder."""
        return len(self.ladder_of(chunk))

    @property
    def flight_frames(self) -> int:
        """Latent frames that are denoised at once, at most."""
        return self.frames_in_flight()

    def frames_in_flight(self, chunks: int | None = None) -> int:
        """The same of a stream of so many chunks."""
        return self.schedule.in_flight(self.steps, chunks) * self.config.chunk.largest

    @property
    def chunks_in_flight(self) -> int:
        """Chunks that are being denoised at the same time, at most, in rows of their own or together."""
        return self.schedule.in_flight(self.steps) * len(lanes(self.schedule, self.steps, HORIZON))

    @property
    def device(self) -> torch.device:
        own = getattr(self.transformer, "device", None)  # diffusers' knows of offloaded weights where they compute
        return next(self.transformer.parameters()).device if own is None else own

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products, latents going in and cached keys; a few small tables may be kept in float32."""
        return getattr(self.transformer, "dtype", next(self.transformer.parameters()).dtype)

    def text(
        self, prompt_embeds: Tensor, negative_embeds: Tensor | None, batch: int, epoch: int, image: Tensor | None = None
    ) -> Text:
        """Embed a prompt for every branch once: [B or 1, L, D] (+ negative) -> keys all its chunks share.

        Args:
            image: [B or 1, tokens, D'], the embedded picture of image-to-video models with a CLIP branch.
        """
        embeds = prompt_embeds.expand(batch, -1, -1)
        if self.branches == 2:
            if negative_embeds is None:
                raise InputError(f"guidance.scale={self.config.guidance.scale} needs negative_prompt_embeds")
            pair = pad_rows([embeds, negative_embeds.expand(batch, -1, -1)])
            embeds = torch.cat(pair)
        embeds = embeds.to(self.device, self.dtype)
        if image is not None:
            image = image.to(self.device, self.dtype).expand(batch, -1, -1).repeat(self.branches, 1, 1)
        return self.keyed(embeds, epoch, image)

    def keyed(self, embeds: Tensor, epoch: int, image: Tensor | None) -> Text:
        """Keys of every expert for text that stands ready, [branches·B, L, D]."""
        more = () if image is None else (image,)
        keys = [expert.text_keys(embeds, *more) for expert in self.experts]
        if self.config.cache.collapse_text:
            keys = [collapse_padding(each, embeds) for each in keys]
        return Text(embeds, tuple(keys), epoch, image)

    @property
    def branches(self) -> int:
        return 1 if self.config.guidance.scale == 1 else 2

    @property
    def reads_negative(self) -> bool:
        """Whether streams need a negative prompt: for guidance, or for what their commits are told."""
        return self.branches == 2 or self.config.guidance.commit_branch == "negative"

    def start(
        self,
        prompt_embeds: Tensor,
        noise: Noise,
        *,
        latent_size: tuple[int, int],
        num_latent_frames: int | None = None,
        negative_embeds: Tensor | None = None,
        batch: int | None = None,
        conditions: Mapping | None = None,
        switches: Mapping[int, Tensor] | None = None,
    ) -> Rollout:
        """A new stream; `num_latent_frames` None = endless. `conditions` and `switches` as in `run`."""
        conditions = dict(conditions or {})
        source = Source.take(conditions)
        image, channels = conditions.pop("image_embeds", None), conditions.pop("channels", None)
        if conditions:
            known = "image_embeds, channels, video, strength and first_timestep"
            raise InputError(f"unknown conditions {', '.join(conditions)}: known are {known}")
        self._check_channels(channels)
        rollout = Rollout(
            self, prompt_embeds, noise, latent_size, num_latent_frames, negative_embeds, batch, image, channels, source
        )
        rollout.switches = sorted((switches or {}).items())
        return rollout

    def _check_channels(self, channels) -> None:
        extra = self.extra_channels
        if extra and channels is None:
            raise InputError(
                f"this transformer reads {extra} channels beside the latents (image-to-video): give it an image"
            )
        if channels is not None and not extra:
            raise InputError("this transformer has no channels beside the latents: it is steered by text alone")

    def run(
        self,
        prompt_embeds: Tensor,
        noise: Noise,
        num_latent_frames: int | None = None,
        latent_size: tuple[int, int] | None = None,
        switches: Mapping[int, Tensor] | None = None,
        conditions: Mapping | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Iterator[LatentChunk]:
        """Finished chunks, as they come.

        Args:
            prompt_embeds: [B or 1, L, D].
            noise: a `TensorNoise` knows its size, so the next two may be omitted with it.
            num_latent_frames: None = endless.
            latent_size: (h, w) of the latents.
            switches: latent frame -> new text; effective when the first chunk that starts at or after it enters.
            conditions: what image-to-video models read besides text: {"image_embeds": [B or 1, tokens, D'], "channels":
                an object with `frames(range) -> [B or 1, C', f, h, w]`, asked once per chunk, in order}; what
                video-to-video streams begin from: "video", "strength", "first_timestep" as in `streamgen.source`.
        Follows the caller's grad mode; with gradients the graph runs through the cache.
        """
        if isinstance(noise, TensorNoise):
            num_latent_frames = num_latent_frames or noise.num_latent_frames
            latent_size = latent_size or noise.latent_size
        if latent_size is None:
            raise InputError("latent_size=(h, w) is needed with this noise")
        batch = noise.batch if isinstance(noise, TensorNoise) else None
        rollout = self.start(
            prompt_embeds,
            noise,
            latent_size=latent_size,
            num_latent_frames=num_latent_frames,
            negative_embeds=negative_prompt_embeds,
            batch=batch,
            conditions=conditions,
            switches=switches,
        )
        while not rollout.finished:
            yield rollout.advance()

    def advance(self, rollouts: Sequence[Rollout]) -> list[LatentChunk]:
        """The next chunk of each of several streams of this engine: calls of one shape share a forward.

        Raises StopIteration if one of them is over.
        """
        self.forward.drive([rollout.computing() for rollout in rollouts])
        return [rollout.take() for rollout in rollouts]

    def fingerprint(self) -> str:
        """Tells whether a saved stream belongs to these weights: shapes, and a few numbers of every tensor."""
        digest = hashlib.sha256()
        for name, weight in (item for expert in self.experts for item in expert.named_parameters()):
            sample = weight.detach().flatten()[:: max(1, weight.numel() // 8)][:8]
            digest.update(f"{name}{tuple(weight.shape)}{sample.float().tolist()}".encode())
        return digest.hexdigest()[:16]

    def trace(self) -> list[CallRecord]:
        """Every call since `tracing` was set, with its plan; setting it empties the list."""
        return list(self.records)

    @property
    def tracing(self) -> bool:
        return self._tracing

    @tracing.setter
    def tracing(self, on: bool) -> None:
        self._tracing = on
        self.records.clear()


def pad_rows(texts: list[Tensor]) -> list[Tensor]:
    """Texts [B, L, D] to one length, with the zero rows the model itself pads with."""
    most = max(t.shape[1] for t in texts)
    return [torch.nn.functional.pad(t, (0, 0, 0, most - t.shape[1])) for t in texts]


