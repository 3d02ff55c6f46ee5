"""A stream one can steer: chunks come out, prompts go in, and everything takes effect at a chunk boundary.

Chunks are computed when they are asked for, so nothing computed before a change is delivered after it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from streamgen.changes import Blend, Change, Request
from streamgen.config import ChunkConfig, check_next_prompt, check_switch
from streamgen.engine import Engine
from streamgen.errors import BrokenStreamError, InputError
from streamgen.flight import LatentChunk
from streamgen.models.codecs import Codec
from streamgen.models.codecs.base import form_of
from streamgen.noise import SeededNoise
from streamgen.schedules import begins, until_emission

STATE_VERSION = 5


@dataclass(frozen=True, eq=False)
class Chunk:
    """What a session delivers.

    `frames` uint8 [f, H, W, 3] (a batch: [B, f, H, W, 3]); `pixels` the same as floats [B, 3, f, H, W] in [0, 1];
    `latents` [B, C, f', h, w]; `index` and `epoch` only grow; `timings` seconds per stage.
    """

    pixels: Tensor
    latents: Tensor
    index: int
    epoch: int
    prompt: str | tuple[str, ...]
    timings: dict[str, float]

    @property
    def frames(self) -> np.ndarray:
        video = (self.pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()
        return video[0] if isinstance(self.prompt, str) else video


@dataclass
class Spec:
    """What a session is started with; a state keeps it."""

    prompt: str | list[str]
    negative_prompt: str = ""
    seed: int | list[int] = 0
    num_frames: int | None = None
    latent_size: tuple[int, int] = (8, 8)
    extra: dict = field(default_factory=dict)  # prompt_embeds, negative_prompt_embeds, image_embeds


def check_frames(pixels: Tensor, index: int) -> None:
    """Raises BrokenStreamError if frames [B, 3, F, H, W] cannot be a picture: not finite, or one colour throughout."""
    low, high = pixels.aminmax()
    what = None
    if not torch.isfinite(high - low):
        what = "values that are not finite"
    elif low == high:
        what = "blank frames"
    if what:
        raise BrokenStreamError(
            f"chunk {index} holds {what}: the weights do not fit the preset, or the dtype is too narrow for them "
            "(try float32: --dtype fp32)"
        )


def latent_frames_for(num_frames: int, ratio: int, chunk: ChunkConfig) -> int:
    """Latent frames, in whole chunks, that cover `num_frames` pixels frames (the first latent is one frame)."""
    return chunk.whole(1 + -(-(num_frames - 1) // ratio))


class StreamSession:
    """An endless stream (or `num_frames` long) of `Chunk`s; iterate it, or call `next`. Thread-safe.

    Args:
        encode_text: list of prompts -> [B, L, D].
        noise: an object of `streamgen.noise`; by default `SeededNoise(spec.seed)`.
        channels: what the transformer reads beside its latents (see `Engine.run`), None for text-to-video.
    """

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        encode_text: Callable[[list[str]], Tensor],
        spec: Spec,
        noise=None,
        channels=None,
    ) -> None:
        self.engine, self.codec, self.spec = engine, codec, spec
        self._encode_text = encode_text
        self._noise = noise or SeededNoise(spec.seed)
        self._channels = channels
        self._compute, self._mail = threading.RLock(), threading.Lock()
        self._playing = threading.Event()
        self._playing.set()
        self._closed = False
        self._request: Request | None = None
        self._blend: Blend | None = None
        self._epochs = 0  # the last one given out
        self.prompt = spec.prompt
        self.index, self.delivered = 0, 0  # of the next chunk; pixel frames so far
        self._computing = False  # the next chunk is being made: changes come too late for it,
        self._effect = 0  # and take effect with this one
        self._begun = False  # so they do where making it was interrupted, until it is made
        self._first = 0  # what the roll-out calls chunk 0
        self._prompts: dict[int, str | list[str]] = {0: self.prompt}  # of epochs that are still to be delivered
        self._decoder = None
        self._finished: LatentChunk | None = None  # computed, not yet decoded: a failing decoder loses nothing
        self._seconds: dict[str, float] = {}
        self._embeds = self._texts(self.prompt, spec.extra.get("prompt_embeds"))
        with torch.no_grad():
            self._rollout = self._start(self._embeds)

    # ------------------------------------------------------------------------------------------- starting
    def _texts(self, prompt: str | list[str], embeds: Tensor | None = None) -> Tensor:
        begin = time.perf_counter()
        with torch.no_grad():
            out = embeds if embeds is not None else self._encode_text([prompt] if isinstance(prompt, str) else prompt)
        self._seconds["text"] = time.perf_counter() - begin
        return out

    def _start(self, embeds: Tensor, frames: int | None = None):
        """A roll-out from frame 0; `frames` latent frames long if given, else what is left to deliver."""
        negative = self.spec.extra.get("negative_prompt_embeds")
        if negative is None and self.engine.reads_negative:
            negative = self._texts([self.spec.negative_prompt])
        channels = None if self._channels is None else self._channels.fork()  # another stream may start from them too
        return self.engine.start(
            embeds,
            self._noise,
            latent_size=tuple(self.spec.latent_size),
            num_latent_frames=self._frames_left() if frames is None else frames,
            negative_embeds=negative,
            batch=embeds.shape[0],
            conditions={"image_embeds": self.spec.extra.get("image_embeds"), "channels": channels},
        )

    def _frames_left(self) -> int | None:
        """Latent frames of a roll-out that delivers the rest; None = endless."""
        if self.spec.num_frames is None:
            return None
        left = self.spec.num_frames - self.delivered
        return latent_frames_for(left, self.codec.temporal_ratio, self.engine.config.chunk)

    @property
    def finished(self) -> bool:
        done = self.spec.num_frames is not None and self.delivered >= self.spec.num_frames
        return self._closed or done

    # ------------------------------------------------------------------------------------------- delivering
    def __iter__(self) -> Iterator[Chunk]:
        while True:
            try:
                yield self.next()
            except StopIteration:
                return

    def next(self, timeout: float | None = None) -> Chunk:
        """The next chunk.

        Raises: StopIteration at the end, TimeoutError if the stream is paused for `timeout` seconds.
        """
        if not self._playing.wait(timeout):
            raise TimeoutError(f"the stream is paused; nothing came for {timeout} s")
        with self._compute, torch.no_grad():
            if self.finished:
                raise StopIteration
            try:
                self._apply()
                if self._finished is None:
                    self._begun = True
                    self._finished = self._rollout.advance()
                    self._begun = False
                return self._deliver(self._finished)
            finally:
                self._computing = False

    def _deliver(self, chunk: LatentChunk) -> Chunk:
        begin = time.perf_counter()
        pixels, decoder = self.codec.decode(chunk.latents, self._decoder)
        pixels = (pixels + 1) / 2
        check_frames(pixels, self.index)
        self._decoder, self._finished = decoder, None
        if self.spec.num_frames is not None:
            pixels = pixels[:, :, : self.spec.num_frames - self.delivered]
        timings = {**self._seconds, **self._rollout.timings.take(), "decode": time.perf_counter() - begin}
        self._seconds = {}
        self.delivered += pixels.shape[2]
        with self._mail:
            self.index, self._computing = self.index + 1, False
        self._prompts = {epoch: prompt for epoch, prompt in self._prompts.items() if epoch >= chunk.epoch}
        prompt = self._prompts[chunk.epoch]
        prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        return Chunk(pixels, chunk.latents, self.index - 1, chunk.epoch, prompt, timings)

    # ------------------------------------------------------------------------------------------- steering
    def set_prompt(self, prompt: str | list[str], mode: str | None = None, blend: int = 0) -> Change:
        """A new prompt at the next chunk boundary, in a batch one for all or a list; see `update`."""
        return self.update(prompt=prompt, mode=mode, blend=blend)

    def update(
        self,
        prompt: str | list[str] | None = None,
        mode: str | None = None,
        blend: int = 0,
        guidance_scale: float | None = None,
        strength: float | None = None,
        options: dict | None = None,
    ) -> Change:
        """Change what is not None from the next chunk boundary on; of several pending changes the newest wins.

        Args:
            mode: keep | recache | reset | cut (design of the cache at a switch); None = the preset's.
            blend: chunks over which the text moves to the new one.
        Raises: InputError at once for what this stream cannot do.
        """
        self._check_open()
        mode = mode or self.engine.config.switch.mode
        check_switch(mode, self.engine.config, blend)
        if prompt is not None:
            check_next_prompt(prompt, self.prompt)
        if strength is not None:
            raise InputError("strength belongs to video-to-video streams; this one starts from text")
        if options:
            raise InputError(f"unknown options {', '.join(options)}: this stream has none that change while it runs")
        if guidance_scale is not None and self.engine.branches == 1 and guidance_scale != 1:
            raise InputError("this stream runs without guidance: start it with guidance_scale above 1 to change it")
        with self._mail:
            self._check_open()
            if mode == "recache" and prompt is not None and not self._rollout.can_recache:
                raise InputError("this stream keeps no latents to re-encode: start it with switch.mode=recache")
            self._epochs += 1
            self._request = Request(self._epochs, prompt, mode, blend, guidance_scale).after(self._request)
            return Change(self._takes_effect(self._request), self._epochs)

    def _takes_effect(self, request: Request) -> int:
        """The first chunk that will carry a request's epoch."""
        if request.mode == "reset" and request.prompt is not None:
            return self.index + self._computing
        return self._effect if self._computing or self._begun else self._first + self._rollout.takes_effect()

    def _apply(self) -> None:
        """Take the pending change, or the next step of a blend; all of it or nothing."""
        with self._mail:
            request, self._request = self._request, None
            reset = request is not None and request.prompt is not None and request.mode == "reset"
            if reset:
                self._finished, self._begun = None, False
            if not self._begun:
                self._effect = self._next_effect(reset)
            self._computing = True
        if self._begun or self._finished is not None:  # making or decoding it failed: it comes before this change
            self._put_back(request)
            return
        try:
            self._change(request)
        except BaseException:
            self._put_back(request)
            raise

    def _next_effect(self, reset: bool) -> int:
        """The first chunk that what comes while the next one is computed applies to."""
        if not reset:
            return self._first + self._rollout.takes_effect(after_next=self._finished is None)
        frames, engine = self._frames_left(), self.engine
        chunks = None if frames is None else engine.config.chunk.count(frames)
        ticks = until_emission(engine.schedule.ticks(engine.steps, chunks))
        return self.index + (len(ticks[-1].emits) if self._rollout.follows else begins(ticks))

    def _put_back(self, request: Request | None) -> None:
        """A change that could not be taken now is pending again, below one that came since."""
        with self._mail:
            self._request = request if self._request is None else self._request.after(request)

    def _change(self, request: Request | None) -> None:
        if request is None:
            if self._blend:
                self._step_blend(self._blend, self._rollout.epoch)
            return
        if request.guidance_scale is not None:
            self._rollout.guidance_scale = request.guidance_scale
        if request.prompt is None:
            if self._blend:
                self._step_blend(self._blend, request.epoch)
            else:
                self._rollout.relabel(request.epoch)
            self._prompts[request.epoch] = self.prompt
            return
        new = self._texts(request.prompt).expand(self._embeds.shape[0], -1, -1)
        if request.mode == "reset":
            scale = self._rollout.guidance_scale
            self._rollout, self._decoder, self._first = self._start(new), None, self.index
            self._rollout.guidance_scale = scale
            self._rollout.relabel(request.epoch)
            self._blend = None
        elif request.blend:
            self._step_blend(Blend(self._embeds, new, request.blend, request.mode), request.epoch)
        else:
            self._rollout.switch(new, request.mode, request.epoch)
            self._blend = None
        whole = isinstance(self.prompt, str) or isinstance(request.prompt, list)
        self.prompt = request.prompt if whole else [request.prompt] * len(self.prompt)
        self._prompts[request.epoch] = self.prompt
        if self._blend is None:
            self._embeds = new

    def _step_blend(self, blend: Blend, epoch: int) -> None:
        embeds = blend.next()
        # recent frames are dropped once; re-encoding follows every step of the text
        mode = blend.mode if blend.done == 0 or blend.mode == "recache" else "keep"
        self._rollout.switch(embeds, mode, epoch)
        blend.done += 1
        self._embeds, self._blend = embeds, blend if blend.done <= blend.chunks else None

    def push(self, name: str, item, time: float) -> None:
        """Feed a condition stream. Raises InputError: this model has none."""
        raise InputError(f"no condition stream {name!r}: this model is steered by text alone")

    def pause(self) -> None:
        """`next` waits until `play`."""
        self._playing.clear()

    def play(self) -> None:
        self._playing.set()

    def close(self) -> None:
        """End the stream and free its cache; waiting calls return."""
        with self._mail:
            self._closed = True
        self._playing.set()
        with self._compute, self._mail:
            self._rollout = self._decoder = None

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------- state
    def fork(self) -> StreamSession:
        """An independent session with the same past."""
        with self._compute, self._mail:
            self._check_open()
            other = object.__new__(StreamSession)
            other.__dict__.update(self.__dict__)
            other._compute, other._mail = threading.RLock(), threading.Lock()
            other._playing = threading.Event()
            other._playing.set()
            other._rollout = self._rollout.fork()
            other._blend = Blend(**vars(self._blend)) if self._blend else None
            other._seconds, other._prompts = dict(self._seconds), dict(self._prompts)
            return other

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the stream is closed: start a new one")

    def state_dict(self) -> dict:
        """The stream after the last delivered chunk: tensors and plain Python, safe for `torch.save`."""
        with self._compute, self._mail:
            self._check_open()
            return {
                "version": STATE_VERSION,
                "model": self.engine.fingerprint(),
                "config": OmegaConf.to_container(OmegaConf.structured(self.engine.config)),
                "spec": {**vars(self.spec), "latent_size": list(self.spec.latent_size)},
                "codec": form_of(self.codec),
                "noise": self._noise.state_dict(),
                "prompt": self.prompt,
                "prompts": dict(self._prompts),
                "embeds": self._embeds,
                "epochs": self._epochs,
                "index": self.index,
                "first": self._first,
                "delivered": self.delivered,
                "blend": vars(self._blend).copy() if self._blend else None,
                "request": vars(self._request).copy() if self._request else None,
                "begun": self._begun,
                "finished": None if self._finished is None else asdict(self._finished),
                "frames": self._rollout.num_latent_frames,
                "decoder": self._decoder,
                "rollout": self._rollout.state_dict(),
            }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state; `pipe.resume` checks that it fits."""
        with self._compute, self._mail:
            self.prompt, self._embeds, self._epochs = state["prompt"], state["embeds"], state["epochs"]
            self._prompts, self._first = dict(state["prompts"]), state["first"]
            self.index, self.delivered = state["index"], state["delivered"]
            self._blend = Blend(**state["blend"]) if state["blend"] else None
            self._request = Request(**state["request"]) if state["request"] else None
            self._decoder = state["decoder"]
            self._finished = LatentChunk(**state["finished"]) if state["finished"] else None
            self._begun = state["begun"]
            self._rollout = None  # a cache at a time
            with torch.no_grad():
                self._rollout = self._start(self._embeds, state["frames"])
                self._rollout.load_state_dict(state["rollout"])
