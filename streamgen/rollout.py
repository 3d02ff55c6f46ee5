"""One stream in the engine: its cache, its chunks in flight, what it is told, and the commit that is still owed."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamgen.cache import CachePolicy, GraphStore, KVStore
from streamgen.cache.policies import POLICIES, Sizes, rule_for_parts
from streamgen.cache.store import Geometry
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.flight import CallRecord, Channels, Flight, LatentChunk, Text, Timings
from streamgen.flight_state import restore, save
from streamgen.models.blocks import widen
from streamgen.schedules import Call, OpKind, Row, Slot, SlotOp, Tick, begins, clean_call, until_emission

if TYPE_CHECKING:
    from streamgen.engine import Engine

log = logging.getLogger(__name__)


def build_policy(config: StreamConfig, flight_frames: int, total_frames: int | None) -> CachePolicy:
    """The cache policy of a configuration. Raises InputError below a window's floor and for what cannot be combined."""
    cls, options = POLICIES.get(config.cache.policy)
    if config.schedule.coupling == "joint-causal" and flight_frames > config.chunk.latent_frames:
        if config.cache.window != -1:
            rule_for_parts(config, "schedule.coupling=joint-causal")
    if config.guidance.commit_branch == "positive" and config.schedule.commit == "inplace":
        raise InputError(
            "guidance.commit_branch=positive asks for a commit under the prompt, and schedule.commit=inplace has none: "
            "use separate or fused"
        )
    if hasattr(options, "from_config"):  # the package's own read the shared keys
        chosen = options.from_config(config)
    else:
        try:
            chosen = options(**config.cache.options)
        except TypeError as error:
            raise InputError(f"cache.options of policy {config.cache.policy!r}: {error}") from None
    return cls(chosen, Sizes(config.chunk.latent_frames, flight_frames, total_frames))


def recache_frames(config: StreamConfig, total_frames: int | None) -> int:
    """Most frames a re-encoding call may hold: finished latents that are kept for it."""
    if config.cache.window != -1:
        return config.cache.window
    return total_frames if config.switch.mode == "recache" else 0


@functools.cache
def warn_once(message: str) -> None:
    """The same warning a second time says nothing."""
    log.warning(message)


class Rollout:
    """Runs the ticks of one stream. Everything between two chunks is explicit state: see `state_dict`."""

    def __init__(
        self, engine: Engine, prompt_embeds, noise, latent_size, num_latent_frames, negative_embeds, batch, image,
        channels: Channels | None,
    ) -> None:
        """Arguments as in `Engine.start`, which makes these."""
        self.engine, self.noise, self.channels = engine, noise, channels
        self.device, self.dtype = engine.device, engine.dtype  # asked once: diffusers walks all modules for them
        self.batch = batch or prompt_embeds.shape[0]
        self.latent_size = latent_size
        self.num_latent_frames = num_latent_frames
        per_chunk = engine.config.chunk.latent_frames
        if num_latent_frames is not None and (num_latent_frames < 1 or num_latent_frames % per_chunk):
            raise InputError(
                f"{num_latent_frames} latent frames are not a positive multiple of chunk.latent_frames={per_chunk}"
            )
        self.num_chunks = None if num_latent_frames is None else num_latent_frames // per_chunk
        self.flight_frames = engine.schedule.in_flight(engine.steps, self.num_chunks) * per_chunk
        self.policy = build_policy(engine.config, self.flight_frames, num_latent_frames)
        self._check_span()
        self._check_experts()
        self.negative = negative_embeds
        text = engine.text(prompt_embeds, negative_embeds, self.batch, 0, image)
        self.text = replace(text, scale=engine.config.guidance.scale)
        self.image = image
        self.switches: list[tuple[int, Tensor]] = []  # to come: latent frame, text
        self.flight: dict[int, Flight] = {}
        self.pending: list[tuple[int, Call, Flight]] = []  # commits owed: tick, call, chunk
        self.past: list[Flight] = []  # recent finished chunks, for re-encoding under a new prompt
        self.next_chunk = 0  # to be delivered
        self.next_entry = 0  # to begin
        self.next_tick = 0
        self.owed: dict[int, Flight] = {}  # finished chunks that the next call publishes
        self.ready: list[LatentChunk] = []  # finished together with one that was delivered
        self.timings = Timings()
        self.stores = [self._new_store(expert) for expert in engine.experts]
        self._ticks: Iterator[Tick] | None = None
        self._due: list[Tick] = []  # drawn from it and not yet run: what the next chunk takes
        self._plans: dict[tuple, tuple] = {}  # of the present chunk: all its steps share them

    # ------------------------------------------------------------------------------------------- state
    @property
    def next_frame(self) -> int:
        """The latent frame that the next chunk to enter begins at."""
        return self.next_entry * self.engine.config.chunk.latent_frames

    @property
    def finished(self) -> bool:
        return self.num_chunks is not None and self.next_chunk >= self.num_chunks

    @property
    def epoch(self) -> int:
        return self.text.epoch

    @property
    def follows(self) -> bool:
        """Whether chunks in flight take every change with them."""
        return self.engine.config.switch.in_flight == "follow"

    @property
    def guidance_scale(self) -> float:
        return self.text.scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._tell(replace(self.text, scale=scale))

    def relabel(self, epoch: int) -> None:
        """Chunks from here on carry another epoch; nothing else changes."""
        self._tell(replace(self.text, epoch=epoch))

    def _tell(self, text: Text) -> None:
        """What chunks are told as they enter, those in flight too if they follow."""
        self.text = text
        if self.follows:
            for flight in self.flight.values():
                flight.text = text

    def takes_effect(self, after_next: bool = False) -> int:
        """The first chunk that a change made now, or once the next chunk is delivered, applies to."""
        chunk = self.next_chunk + len(self.ready) if self.follows else self.next_entry
        if after_next and not self.ready:
            ticks = self._upcoming()
            chunk += len(ticks[-1].emits) if self.follows else begins(ticks)
        return chunk

    @property
    def store(self) -> KVStore | GraphStore:
        """The first expert's cache."""
        return self.stores[0]

    @property
    def can_recache(self) -> bool:
        """Whether finished latents are kept for re-encoding."""
        return bool(self._recache_frames())

    def _new_store(self, model) -> KVStore | GraphStore:
        height, width = self.latent_size
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
        most = max(self.flight_frames, self._recache_frames())
        aside = getattr(self.policy, "aside", None)
        return KVStore(geometry, self.policy.pages, most, self.dtype, self.device, aside)

    def _recache_frames(self) -> int:
        return recache_frames(self.engine.config, self.num_latent_frames)

    def _check_span(self) -> None:
        """Warns, or raises InputError, where positions run past what the model was trained on."""
        reach, positions = self.policy.reach(), self.engine.config.positions
        if reach is not None and reach <= positions.span:
            return
        far = "without end" if reach is None else f"over {reach} frames"
        message = (
            f"positions.rule={positions.rule} spreads what a call sees {far}, past the positions.span="
            f"{positions.span} the model was trained on: give positions.rule=packed and a cache.window within the span"
        )
        if positions.strict:
            raise InputError(f"{message}, or positions.strict=false")
        warn_once(message)

    def _check_experts(self) -> None:
        commit = self.engine.config.schedule.commit
        if len(self.engine.experts) > 1 and commit in ("fused", "inplace"):
            raise InputError(
                f"two experts keep a cache each, and schedule.commit={commit} fills that of one alone: use separate"
            )

    # ------------------------------------------------------------------------------------------- running
    def advance(self) -> LatentChunk:
        """Run ticks until a chunk is finished. Raises StopIteration past the end."""
        if self.finished:
            raise StopIteration("the stream is over")
        if not self.ready:
            self._run_ticks()
        self.next_chunk += 1
        return self.ready.pop(0)

    def _upcoming(self) -> list[Tick]:
        """The ticks up to the next that finishes a chunk."""
        if not self._due:
            ticks = self._ticks or self.engine.schedule.ticks(self.engine.steps, self.num_chunks, self.next_tick)
            self._ticks = None  # an interrupted generator is dead
            self._due = until_emission(ticks)
            self._ticks = ticks
        if not (self._due and self._due[-1].emits):
            raise RuntimeError("the schedule ended before the stream")
        return self._due

    def _run_ticks(self) -> None:
        """Ticks until one emits.

        An exception (out of memory, Ctrl-C) costs the call it hit: the next attempt begins with that.
        """
        self.commit()
        self._plans = {}
        for tick in list(self._upcoming()):
            self._run_tick(tick)
            self._due.pop(0)

    def _run_tick(self, tick: Tick) -> None:
        for op in tick.ops:
            if op.kind is OpKind.BEGIN and op.chunk >= self.next_entry:  # not begun by an attempt that failed
                self._begin(op.chunk)
        for call in tick.calls:
            self._denoise(tick.index, call)
        self.next_tick = tick.index + 1
        if tick.emits:
            self._emit(tick)

    def _begin(self, chunk: int) -> None:
        per_chunk = self.engine.config.chunk.latent_frames
        frames = range(chunk * per_chunk, (chunk + 1) * per_chunk)
        due = [(frame, text) for frame, text in self.switches if frame <= frames.start]
        if due:  # of several that fell into one chunk the newest counts
            self.switch(due[-1][1], self.engine.config.switch.mode, requested=due[-1][0])
            self.switches = self.switches[len(due) :]
        channels = None if self.channels is None else self.channels.frames(frames)
        self.flight[chunk] = Flight(self._noise("initial", frames, 0), frames, self.text, channels=channels)
        self.next_entry = chunk + 1

    def _noise(self, purpose: str, frames: range, step: int) -> Tensor:
        config = self.engine.transformer.config
        channels = config.out_channels or config.in_channels
        shape = (self.batch, channels, *self.latent_size)
        drawn = self.noise.frames(purpose, frames, step, shape)
        return drawn.to(self.device, torch.promote_types(torch.float32, self.dtype))

    def _emit(self, tick: Tick) -> None:
        done = {index: self.flight.pop(index) for index in tick.emits}
        for index, flight in done.items():
            self._remember(flight)
            self.ready.append(LatentChunk(flight.x, index, flight.frames.start, flight.text.epoch))
        self.pending = [(tick.index, call, done[call.rows[0].slots[0].chunk]) for call in tick.commits]
        if self.engine.config.schedule.commit == "fused":
            self.owed = done

    def _remember(self, flight: Flight) -> None:
        window = self._recache_frames()
        if not window:
            return
        self.past.append(flight)
        while self.past and self.past[0].frames.stop <= flight.frames.stop - window:
            self.past.pop(0)

    def commit(self) -> None:
        """Run the commit calls that are due; a finite stream never runs its last one."""
        while self.pending:
            tick, call, flight = self.pending[0]
            self._clean(tick, call, call.rows[0], flight.x, flight.channels, [flight.frames], flight.text)
            self.pending.pop(0)

    def switch(
        self, prompt_embeds: Tensor, mode: str, epoch: int | None = None, requested: int | None = None
    ) -> None:
        """A new prompt from the next chunk on; what is owed is committed under the old one first.

        Args:
            mode: keep (text alone) | recache (recent frames are encoded again under the new text) | cut (recent
                frames are dropped; the sink and the frame count stay). A reset is a new `Rollout`.
            requested: the latent frame the user named; None = the one it takes effect at.
        """
        if mode == "reset":
            raise InputError("a reset begins a new stream: use keep, recache or cut here, or reset a session")
        epoch = self.text.epoch + 1 if epoch is None else epoch
        text = self.engine.text(prompt_embeds, self.negative, self.batch, epoch, self.image)
        text = replace(text, scale=self.text.scale)
        self._check_length(text)
        self.commit()
        for chunk, flight in list(self.owed.items()):  # it would ride with a call that now comes too late
            call = clean_call((chunk,), self.engine.steps)
            self._clean(self.next_tick, call, call.rows[0], flight.x, flight.channels, [flight.frames], flight.text)
        requested = self.next_frame if requested is None else requested
        frames = self.policy.switch(mode, requested)
        self._plans = {}
        if frames is not None:
            self._recache(frames, text)
        self.policy.switched(mode, requested)
        self._tell(text)

    def _check_length(self, text: Text) -> None:
        """Raises InputError if chunks in flight could not read this text beside theirs."""
        if self.follows or getattr(self.engine.transformer.config, "text_len", None) is not None:
            return  # the model brings every text to one length
        lengths = {flight.text.embeds.shape[1] for flight in self.flight.values()}
        if lengths - {text.embeds.shape[1]}:
            raise InputError(
                f"a prompt of {text.embeds.shape[1]} tokens cannot stand beside those of chunks in flight "
                f"({', '.join(map(str, sorted(lengths)))} tokens): pad prompts to one length, or use "
                "switch.in_flight=follow"
            )

    def _recache(self, frames: range, text: Text) -> None:
        """Encode finished frames again, under another text."""
        begin = frames.start - self.past[0].frames.start
        x = torch.cat([flight.x for flight in self.past], 2)[:, :, begin:]
        channels = None
        if self.channels is not None:
            channels = torch.cat([flight.channels for flight in self.past], 2)[:, :, begin:]
        per_chunk = self.engine.config.chunk.latent_frames
        chunks = tuple(range(frames.start // per_chunk, -(-frames.stop // per_chunk)))
        call = clean_call(chunks, self.engine.steps, source="past")
        self._clean(-1, call, call.rows[0], x, channels, [frames], text)

    def state_dict(self) -> dict:
        """Everything a later `load_state_dict` needs to go on bit by bit: tensors and plain Python."""
        return save(self)

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken; the engine, the noise and the sizes must be the same."""
        restore(self, state)
        self._ticks, self._due, self._plans = None, [], {}

    def fork(self) -> Rollout:
        """An independent stream with the same past; what either does is unknown to the other."""
        other = copy(self)
        other.stores = [store.fork() for store in self.stores]
        other.channels = self.channels.fork() if self.channels is not None else None
        other.policy = build_policy(self.engine.config, self.flight_frames, self.num_latent_frames)
        other.policy.load_state_dict(self.policy.state_dict())
        other.flight = {chunk: replace(flight) for chunk, flight in self.flight.items()}
        other.owed = dict(self.owed)
        other.pending, other.past, other.ready = list(self.pending), list(self.past), list(self.ready)
        other._ticks, other._due, other._plans, other.timings = None, [], {}, Timings()
        return other

    # ------------------------------------------------------------------------------------------- calls
    def _bind(self, call: Call, row: Row, frames: tuple[range, ...], expert: int):
        """Plan and context of a call."""
        plan = self.policy.plan(call, row, frames)
        return plan, self.stores[expert].bind(plan, self.engine.experts[expert].rope)

    def _forward(
        self, expert: int, x: Tensor, channels: Tensor | None, timestep: Tensor, text: Text, context,
        commit_only: bool = False, prompt_index: Tensor | None = None, scale: float | Tensor = 1.0,
    ) -> Tensor | None:
        """The velocity, guided by `scale` (one number or [F, 1, 1]), or None from a commit."""
        if channels is not None:
            x = torch.cat([x, channels.to(x).expand(x.shape[0], -1, -1, -1, -1)], 1)
        if self.engine.branches == 2:
            x = torch.cat([x, x])
        x = x.to(self.dtype)
        more = {} if prompt_index is None else {"prompt_index": prompt_index}
        more.update(text_keys=text.keys[expert], context=context, return_dict=False, commit_only=commit_only)
        out = self.engine.experts[expert](x, timestep, **more)
        if commit_only:
            return None
        velocity = widen(out[0])
        if self.engine.branches == 1:
            return velocity
        positive, negative = velocity.chunk(2)
        return negative + scale * (positive - negative)

    def _denoise(self, tick: int, call: Call) -> None:
        begin = time.perf_counter()
        (row,) = call.rows
        row = row.carrying(self.owed)
        flights = [self._flight(slot) for slot in row.slots]
        frames = tuple(f.frames for f in flights)
        levels = [self._level(slot) for slot in row.slots]
        experts = {self.engine.expert_for(level) for level, slot in zip(levels, row.slots) if slot.op is SlotOp.STEP}
        if len(experts) > 1:
            raise InputError("chunks in flight straddle experts.boundary: two experts need schedule.coupling=solo")
        (expert,) = experts
        plan, context = self._context(call, row, frames, expert)
        self._record(tick, call, row, frames, levels, plan, expert)
        x, channels = _joined([f.x for f in flights]), _joined([f.channels for f in flights])
        timestep = self._timestep(levels, frames)
        texts = [self._commit_text(f.text) if s.op is SlotOp.CLEAN else f.text for s, f in zip(row.slots, flights)]
        text, which = self._told(texts, frames)
        scale = self._scale(texts, frames)
        velocity = self._forward(expert, x, channels, timestep, text, context, prompt_index=which, scale=scale)
        moved = []
        for slot, flight, part in zip(row.slots, flights, velocity.split([len(f) for f in frames], 2), strict=True):
            if slot.op is SlotOp.STEP:
                fresh = partial(self._noise, "renoise", flight.frames, slot.p_in)
                x = self.engine.ladder_of(slot.chunk).step(flight.x, part, slot.p_in, fresh)
                moved.append((flight, x, slot.p_out))
        published = row.published(frames)
        self.stores[expert].stage(plan, context)
        if published:
            self._publish([(self.stores[expert], plan, context, text.keys[expert])], published)
        for flight, x, p in moved:  # nothing has changed before: an exception leaves the call to be made again
            flight.x, flight.p = x, p
        self.timings.add("denoise", begin)

    def _flight(self, slot: Slot) -> Flight:
        """The chunk of a slot: in flight, or just finished and riding along to be published."""
        return self.flight[slot.chunk] if slot.op is not SlotOp.CLEAN else self.owed[slot.chunk]

    def _level(self, slot: Slot) -> float:
        """The timestep a slot is fed with."""
        if slot.op is SlotOp.CLEAN:
            return self.engine.config.schedule.commit_level
        return self.engine.ladder_of(slot.chunk).timesteps[slot.p_in]

    def _told(self, texts: list[Text], frames: tuple[range, ...]) -> tuple[Text, Tensor | None]:
        """One text for a whole call, or several beside each other and the one each frame reads, [branches·B, F]."""
        different = {id(text.keys): text for text in texts}
        if len(different) == 1:
            return texts[0], None
        keys = tuple(
            type(parts[0]).join(parts) for parts in zip(*(text.keys for text in different.values()), strict=True)
        )
        order = list(different)
        which = [order.index(id(text.keys)) for text, part in zip(texts, frames, strict=True) for _ in part]
        rows = self.batch * self.engine.branches
        return replace(texts[0], keys=keys), torch.tensor(which, device=self.device).expand(rows, -1)

    def _scale(self, texts: list[Text], frames: tuple[range, ...]) -> float | Tensor:
        """Guidance of a call: one number, or that of each frame, [F, 1, 1]."""
        if len({text.scale for text in texts}) == 1:
            return texts[0].scale
        scales = [text.scale for text, part in zip(texts, frames, strict=True) for _ in part]
        return torch.tensor(scales, device=self.device)[:, None, None]

    def _commit_text(self, text: Text) -> Text:
        """What a finished chunk is told as it is published."""
        if self.engine.config.guidance.commit_branch == "own" or self.engine.branches == 1:
            return text
        positive = text.embeds.chunk(2)[0].repeat(2, 1, 1)
        return self.engine.keyed(positive, text.epoch, text.image)

    def _publish(self, calls: list[tuple], frames: list[int]) -> None:
        """Make finished calls visible to later ones, all of them or none, and tell the policy."""
        for store, plan, context, text in calls:
            store.publish(plan, context, text)
        self.policy.commit(frames)
        self.owed = {chunk: flight for chunk, flight in self.owed.items() if flight.frames.start not in frames}
        self._plans = {}  # they followed what was committed before

    def _context(self, call: Call, row: Row, frames: tuple[range, ...], expert: int):
        """Plans and their angles are shared by all steps of a chunk; training binds each forward anew."""
        if isinstance(self.store, GraphStore):
            return self._bind(call, row, frames, expert)
        key = (row.lane, frames, expert, self.policy.variant(row))
        if key not in self._plans:
            self._plans[key] = self._bind(call, row, frames, expert)
        return self._plans[key]

    def _timestep(self, levels: list[float], frames: tuple[range, ...]) -> Tensor:
        """[1, F], or [1, 1] where all frames share one level (the transformer's fastest form)."""
        if len(set(levels)) == 1:
            return torch.full((1, 1), levels[0], device=self.device)
        per_frame = [level for level, part in zip(levels, frames, strict=True) for _ in part]
        return torch.tensor([per_frame], device=self.device)

    def _clean(
        self, tick: int, call: Call, row: Row, x: Tensor, channels: Tensor | None, frames: list[range], text: Text
    ) -> None:
        """Finished latents once more, for their keys and values in every expert's cache.

        Nothing is published before every expert is through: an exception in between leaves the commit owed.
        """
        begin = time.perf_counter()
        level, text = self.engine.config.schedule.commit_level, self._commit_text(text)
        calls = []
        for expert, store in enumerate(self.stores):
            plan, context = self._bind(call, row, tuple(frames), expert)
            if not plan.publishes:  # nobody would read it
                continue
            self._record(tick, call, row, tuple(frames), [level], plan, expert)
            timestep = self._timestep([level], tuple(frames))
            commit_only = not plan.remember  # otherwise the last layer's queries are read too
            self._forward(expert, x, channels, timestep, text, context, commit_only)
            calls.append((store, plan, context, text.keys[expert]))
        self._publish(calls, [f for part in frames for f in part])
        self.timings.add("commit" if call.source == "flight" else "recache", begin)

    def _record(
        self, tick: int, call: Call, row: Row, frames: tuple[range, ...], levels: list[float], plan, expert: int
    ) -> None:
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
                expert=expert,
            )
        )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Chunks along time."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, 2)
