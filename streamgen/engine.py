"""The engine: executes ticks, one transformer forward per call. It knows no paper by name.

    schedule (which chunk takes which step when)  ×  cache policy (who reads what, at which positions)

    engine = Engine(transformer, load_preset("self-forcing"))
    for chunk in engine.run(prompt_embeds, noise=SeededNoise(0), num_latent_frames=21, latent_size=(16, 24)):
        chunk.latents  # [B, C, f, H, W]
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamgen.cache import CachePolicy, GraphStore, KVStore
from streamgen.cache.policies import POLICIES
from streamgen.cache.store import Geometry
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.ladder import Ladder, build_ladder
from streamgen.noise import Noise, TensorNoise
from streamgen.schedules import SCHEDULES, Call, OpKind, Row, Tick, clean_call

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LatentChunk:
    """A finished chunk: latents [B, C, f, H, W], its number, its first latent frame, and the epoch of its prompt."""

    latents: Tensor
    index: int
    first_frame: int
    epoch: int


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One executed call: what ran, and the plan it ran by."""

    tick: int
    kind: str
    source: str
    chunks: tuple[int, ...]
    frames: tuple[int, ...]
    timesteps: tuple[float, ...]
    key_frames: tuple[tuple[int, ...], ...]  # per group of queries
    key_positions: tuple[tuple[float, ...], ...]
    query_positions: tuple[tuple[float, ...], ...]
    writes: tuple[int, ...]


@dataclass(slots=True)
class Flight:
    """A chunk being denoised: x [B, C, f, H, W] at level p of its ladder."""

    x: Tensor
    frames: range
    text: Text
    p: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """What a chunk is told, per guidance branch, and the epoch it belongs to."""

    embeds: Tensor  # [branches·B, L, D]
    keys: object  # TextKeys of those, one per transformer
    epoch: int


def build_policy(config: StreamConfig, flight_frames: int, total_frames: int | None) -> CachePolicy:
    """The cache policy of a configuration. Raises InputError below a window's floor."""
    cls, options = POLICIES.get(config.cache.policy)
    if config.cache.policy == "window":
        chosen = options(config.cache.window, config.cache.sink, config.positions.rule)
    else:
        try:
            chosen = options(**config.cache.options)
        except TypeError as error:
            raise InputError(f"cache.options of policy {config.cache.policy!r}: {error}") from None
    return cls(chosen, flight_frames, total_frames)


class Engine:
    """Streams a transformer by a configuration; holds no stream itself (see `Rollout`).

    Args:
        transformer: a CausalWanTransformer3DModel, or anything called like one.
        config: from `load_preset`.
        codec: kept for calls that re-encode pixels.
    """

    def __init__(self, transformer, config: StreamConfig, codec=None) -> None:
        self.transformer, self.config, self.codec = transformer, config, codec
        schedule, options = SCHEDULES.get(config.schedule.coupling)
        self.schedule = schedule(options(commit=config.schedule.commit))
        self.ladder = self._build_ladder()
        self.records: list[CallRecord] = []
        self.tracing = False
        build_policy(config, self.flight_frames, config.chunk.latent_frames)  # refuses bad sizes at once
        roomy = config.cache.sink + 2 * self.flight_frames
        if config.cache.policy == "window" and 0 < config.cache.window < roomy:
            log.warning("cache.window=%d leaves little memory: %d or more is advised", config.cache.window, roomy)

    def _build_ladder(self) -> Ladder:
        ladder = self.config.ladder
        return build_ladder(
            ladder.timesteps, shift=ladder.shift, warp=ladder.warp, sigma=ladder.sigma, solver=ladder.solver
        )

    def steps(self, chunk: int) -> int:
        """Length of a chunk's ladder."""
        return len(self.ladder)

    @property
    def flight_frames(self) -> int:
        """Latent frames that are denoised at once, at most."""
        return self.schedule.in_flight(self.steps) * self.config.chunk.latent_frames

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products, latents going in and cached keys; a few small tables may be kept in float32."""
        return getattr(self.transformer, "dtype", next(self.transformer.parameters()).dtype)

    def text(self, prompt_embeds: Tensor, negative_embeds: Tensor | None, batch: int, epoch: int) -> Text:
        """Embed a prompt for every branch once: [B or 1, L, D] (+ negative) -> keys all its chunks share."""
        embeds = prompt_embeds.expand(batch, -1, -1)
        if self.branches == 2:
            if negative_embeds is None:
                raise InputError(f"guidance.scale={self.config.guidance.scale} needs negative_prompt_embeds")
            pair = pad_rows([embeds, negative_embeds.expand(batch, -1, -1)])
            embeds = torch.cat(pair)
        embeds = embeds.to(self.device, self.dtype)
        return Text(embeds, self.transformer.text_keys(embeds), epoch)

    @property
    def branches(self) -> int:
        return 1 if self.config.guidance.scale == 1 else 2

    def start(
        self,
        prompt_embeds: Tensor,
        noise: Noise,
        *,
        latent_size: tuple[int, int],
        num_latent_frames: int | None = None,
        negative_embeds: Tensor | None = None,
        batch: int | None = None,
    ) -> Rollout:
        """A new stream; `num_latent_frames` None = endless."""
        return Rollout(self, prompt_embeds, noise, latent_size, num_latent_frames, negative_embeds, batch)

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
            switches: latent frame -> new text; effective at the first chunk that starts at or after it.
            conditions: none are known yet.
        Follows the caller's grad mode; with gradients the graph runs through the cache.
        """
        if conditions:
            raise InputError(f"unknown conditions {', '.join(conditions)}: this model is steered by text alone")
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
        )
        pending = sorted((switches or {}).items())
        while not rollout.finished:
            due = [text for frame, text in pending if frame <= rollout.next_frame]
            if due:  # of several that fell into one chunk the newest counts
                pending = pending[len(due) :]
                rollout.switch(due[-1], self.config.switch.mode)
            yield rollout.advance()

    def fingerprint(self) -> str:
        """Tells whether a saved stream belongs to these weights: shapes, and a few numbers of every tensor."""
        digest = hashlib.sha256()
        for name, weight in self.transformer.named_parameters():
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


class Timings:
    """Seconds spent per kind of call since they were last taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, name: str, begin: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


class Rollout:
    """One stream in the engine: cache, chunks in flight, text, and the commit that is still owed.

    Everything between two chunks is explicit state: `state_dict`, `fork` and `switch` work there.
    """

    def __init__(self, engine, prompt_embeds, noise, latent_size, num_latent_frames, negative_embeds, batch) -> None:
        self.engine, self.noise = engine, noise
        self.batch = batch or prompt_embeds.shape[0]
        self.latent_size = latent_size
        self.num_latent_frames = num_latent_frames
        per_chunk = engine.config.chunk.latent_frames
        if num_latent_frames is not None and (num_latent_frames < 1 or num_latent_frames % per_chunk):
            raise InputError(
                f"{num_latent_frames} latent frames are not a positive multiple of chunk.latent_frames={per_chunk}"
            )
        self.num_chunks = None if num_latent_frames is None else num_latent_frames // per_chunk
        self.policy = build_policy(engine.config, engine.flight_frames, num_latent_frames)
        self.negative = negative_embeds
        self.text = engine.text(prompt_embeds, negative_embeds, self.batch, epoch=0)
        self.flight: dict[int, Flight] = {}
        self.pending: list[tuple[int, Call, Flight]] = []  # commits owed: tick, call, chunk
        self.past: list[tuple[range, Tensor]] = []  # recent finished latents, for re-encoding under a new prompt
        self.next_chunk = 0
        self.guidance_scale = engine.config.guidance.scale  # may change at a chunk boundary
        self.timings = Timings()
        self.store = self._new_store()
        self._ticks: Iterator[Tick] | None = None
        self._plans: dict[tuple, tuple] = {}  # of the present chunk: all its steps share them

    # ------------------------------------------------------------------------------------------- state
    @property
    def next_frame(self) -> int:
        """The latent frame the next chunk begins at."""
        return self.next_chunk * self.engine.config.chunk.latent_frames

    @property
    def finished(self) -> bool:
        return self.num_chunks is not None and self.next_chunk >= self.num_chunks

    @property
    def epoch(self) -> int:
        return self.text.epoch

    def relabel(self, epoch: int) -> None:
        """Chunks from here on carry another epoch; nothing else changes."""
        self.text = replace(self.text, epoch=epoch)

    @property
    def can_recache(self) -> bool:
        """Whether finished latents are kept for re-encoding."""
        return bool(self._recache_frames())

    def _new_store(self) -> KVStore | GraphStore:
        model, (height, width) = self.engine.transformer, self.latent_size
        config, (_, ph, pw) = model.config, model.config.patch_size
        if height % ph or width % pw:
            raise InputError(f"latent size {height}x{width} is not a multiple of the patch {ph}x{pw}")
        geometry = Geometry(
            layers=config.num_layers,
            batch=self.batch * self.engine.branches,
            height=height // ph,
            width=width // pw,
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
        )
        if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            return GraphStore(geometry)
        most = max(self.engine.flight_frames, self._recache_frames())
        return KVStore(geometry, self.policy.pages, most, self.engine.dtype, self.engine.device)

    def _recache_frames(self) -> int:
        """Most frames a re-encoding call may hold."""
        window = self.engine.config.cache.window
        if self.engine.config.switch.mode != "recache" and window == -1:
            return 0
        return self.num_latent_frames if window == -1 else window

    # ------------------------------------------------------------------------------------------- running
    def advance(self) -> LatentChunk:
        """Run ticks until a chunk is finished. Raises StopIteration past the end."""
        if self.finished:
            raise StopIteration("the stream is over")
        self.commit()
        if self._ticks is None:
            self._ticks = self.engine.schedule.ticks(self.engine.steps, self.num_chunks, self.next_chunk)
        self._plans = {}
        try:
            for tick in self._ticks:
                for op in tick.ops:
                    if op.kind is OpKind.BEGIN:
                        self._begin(op.chunk)
                for call in tick.calls:
                    self._denoise(tick.index, call)
                if tick.emits:
                    return self._emit(tick)
        except BaseException:  # out of memory, Ctrl-C: what was in flight begins anew at the next call
            self._ticks, self.flight = None, {}
            raise
        raise StopIteration("the schedule ended before the stream")

    def _begin(self, chunk: int) -> None:
        per_chunk = self.engine.config.chunk.latent_frames
        frames = range(chunk * per_chunk, (chunk + 1) * per_chunk)
        self.flight[chunk] = Flight(self._noise("initial", frames, 0), frames, self.text)

    def _noise(self, purpose: str, frames: range, step: int) -> Tensor:
        channels = self.engine.transformer.config.in_channels
        shape = (self.batch, channels, *self.latent_size)
        return self.noise.frames(purpose, frames, step, shape).to(self.engine.device, torch.float32)

    def _emit(self, tick: Tick) -> LatentChunk:
        (index,) = tick.emits
        flight = self.flight.pop(index)
        self.pending = [(tick.index, call, flight) for call in tick.commits]
        self._remember(flight)
        self.next_chunk = index + 1
        return LatentChunk(flight.x, index, flight.frames.start, flight.text.epoch)

    def _remember(self, flight: Flight) -> None:
        window = self._recache_frames()
        if not window:
            return
        self.past.append((flight.frames, flight.x))
        while self.past and self.past[0][0].stop <= flight.frames.stop - window:
            self.past.pop(0)

    def commit(self) -> None:
        """Run the commit calls that are owed; a finite stream never runs its last one."""
        for tick, call, flight in self.pending:
            (row,) = call.rows
            self._clean(tick, call, row, flight.x, [flight.frames], flight.text)
        self.pending = []

    def switch(self, prompt_embeds: Tensor, mode: str, epoch: int | None = None) -> None:
        """A new prompt from the next chunk on; what is owed is committed under the old one first.

        Args:
            mode: keep (text alone) | recache (recent frames are encoded again under the new text) | cut (recent
                frames are dropped; the sink and the frame count stay). A reset is a new `Rollout`.
        """
        if mode == "reset":
            raise InputError("a reset begins a new stream: use keep, recache or cut here, or reset a session")
        self.commit()
        epoch = self.text.epoch + 1 if epoch is None else epoch
        self.text = self.engine.text(prompt_embeds, self.negative, self.batch, epoch)
        frames = self.policy.switch(mode)
        self._plans = {}
        if frames is None:
            return
        x = torch.cat([latents for _, latents in self.past], 2)
        x = x[:, :, frames.start - self.past[0][0].start :]
        per_chunk = self.engine.config.chunk.latent_frames
        chunks = tuple(range(frames.start // per_chunk, -(-frames.stop // per_chunk)))
        call = clean_call(chunks, self.engine.steps, source="past")
        self._clean(-1, call, call.rows[0], x, [frames], self.text)

    def state_dict(self) -> dict:
        """Everything a later `load_state_dict` needs to go on bit by bit: tensors and plain Python."""
        return {
            "next_chunk": self.next_chunk,
            "guidance_scale": self.guidance_scale,
            "policy": self.policy.state_dict(),
            "store": self.store.state_dict(),
            "text": self.text.embeds,
            "epoch": self.text.epoch,
            "past": [(frames.start, frames.stop, x) for frames, x in self.past],
            "pending": [
                (tick, flight.x, flight.frames.start, flight.frames.stop) for tick, _, flight in self.pending
            ],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken; the engine, the noise and the sizes must be the same."""
        device = self.engine.device
        self.next_chunk, self.guidance_scale = state["next_chunk"], state["guidance_scale"]
        self.policy.load_state_dict(state["policy"])
        self.store.load_state_dict(state["store"])
        embeds = state["text"].to(device)
        self.text = Text(embeds, self.engine.transformer.text_keys(embeds), state["epoch"])
        self.past = [(range(start, stop), x.to(device)) for start, stop, x in state["past"]]
        self.pending = []
        for tick, x, start, stop in state["pending"]:
            chunk = start // self.engine.config.chunk.latent_frames
            flight = Flight(x.to(device), range(start, stop), self.text, self.engine.steps(chunk))
            self.pending.append((tick, clean_call((chunk,), self.engine.steps), flight))
        self._ticks = None
        self._plans = {}

    def fork(self) -> Rollout:
        """An independent stream with the same past; what either does is unknown to the other."""
        other = copy(self)
        other.store = self.store.fork()
        other.policy = build_policy(self.engine.config, self.engine.flight_frames, self.num_latent_frames)
        other.policy.load_state_dict(self.policy.state_dict())
        other.flight, other.pending, other.past = dict(self.flight), list(self.pending), list(self.past)
        other._ticks, other._plans, other.timings = None, {}, Timings()
        return other

    # ------------------------------------------------------------------------------------------- calls
    def _bind(self, call: Call, row: Row, frames: tuple[range, ...]):
        """Plan and context of a call."""
        plan = self.policy.plan(call, row, frames)
        return plan, self.store.bind(plan, self.engine.transformer.rope)

    def _forward(self, x: Tensor, timestep: Tensor, text: Text, context, commit_only: bool = False):
        if self.engine.branches == 2:
            x = torch.cat([x, x])
        x = x.to(self.engine.dtype)
        out = self.engine.transformer(
            x, timestep, text_keys=text.keys, context=context, return_dict=False, commit_only=commit_only
        )
        if commit_only:
            return None
        velocity = out[0].float()
        if self.engine.branches == 1:
            return velocity
        positive, negative = velocity.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def _denoise(self, tick: int, call: Call) -> None:
        begin = time.perf_counter()
        (row,) = call.rows
        flights = [self.flight[slot.chunk] for slot in row.slots]
        frames = tuple(f.frames for f in flights)
        plan, context = self._context(call, row, frames)
        ladder = self.engine.ladder
        levels = [ladder.timesteps[slot.p_in] for slot in row.slots]
        self._record(tick, call, row, frames, levels, plan)
        x = torch.cat([f.x for f in flights], 2) if len(flights) > 1 else flights[0].x
        velocity = self._forward(x, self._timestep(levels, frames), flights[0].text, context)
        for slot, flight, part in zip(row.slots, flights, velocity.split([len(f) for f in frames], 2), strict=True):
            fresh: Callable[[], Tensor] = lambda f=flight, p=slot.p_in: self._noise("renoise", f.frames, p)  # noqa: E731
            flight.x, flight.p = ladder.step(flight.x, part, slot.p_in, fresh), slot.p_out
        self.timings.add("denoise", begin)

    def _context(self, call: Call, row: Row, frames: tuple[range, ...]):
        """Plans and their angles are shared by all steps of a chunk; training binds each forward anew."""
        if isinstance(self.store, GraphStore):
            return self._bind(call, row, frames)
        key = (call.kind, row.lane, frames)
        if key not in self._plans:
            self._plans[key] = self._bind(call, row, frames)
        return self._plans[key]

    def _timestep(self, levels: list[float], frames: tuple[range, ...]) -> Tensor:
        """[1, F], or [1, 1] where all frames share one level (the transformer's fastest form)."""
        if len(set(levels)) == 1:
            return torch.full((1, 1), levels[0], device=self.engine.device)
        per_frame = [level for level, part in zip(levels, frames, strict=True) for _ in part]
        return torch.tensor([per_frame], device=self.engine.device)

    def _clean(self, tick: int, call: Call, row: Row, x: Tensor, frames: list[range], text: Text) -> None:
        """Finished latents once more, for their keys and values; published only when the whole call is through."""
        begin = time.perf_counter()
        plan, context = self._bind(call, row, tuple(frames))
        if plan.writes:  # nobody would read it otherwise
            config = self.engine.config
            level = config.schedule.commit_level
            self._record(tick, call, row, tuple(frames), [level], plan)
            if config.guidance.commit_branch == "positive" and self.engine.branches == 2:
                embeds = text.embeds.chunk(2)[0].repeat(2, 1, 1)
                text = Text(embeds, self.engine.transformer.text_keys(embeds), text.epoch)
            self._forward(x, self._timestep([level], tuple(frames)), text, context, commit_only=True)
            self.store.publish(plan, *([context] if isinstance(self.store, GraphStore) else []))
        self.policy.commit([f for part in frames for f in part])
        self._plans = {}  # they followed what was committed before
        self.timings.add("commit" if call.source == "flight" else "recache", begin)

    def _record(self, tick: int, call: Call, row: Row, frames: tuple[range, ...], levels: list[float], plan) -> None:
        if not self.engine.tracing:
            return
        self.engine.records.append(
            CallRecord(
                tick=tick,
                kind=call.kind.value,
                source=call.source,
                chunks=tuple(slot.chunk for slot in row.slots),
                frames=tuple(f for part in frames for f in part),
                timesteps=tuple(levels),
                key_frames=tuple(g.key_frames for g in plan.groups),
                key_positions=tuple(g.key_positions for g in plan.groups),
                query_positions=tuple(g.query_positions for g in plan.groups),
                writes=tuple(w.frame for w in plan.writes),
            )
        )
