"""One stream in the engine: its cache, its chunks in flight, what it is told, and the commit that is still owed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamgen import calls
from streamgen.again import Pictures, by_frame, kept, latents_of, texts_of
from streamgen.building import build_policy, build_store, call_frames, check_experts, check_span, recache_frames
from streamgen.cache import CachePolicy, GraphStore, KVStore, Plan
from streamgen.cache.rebuild import Rebuild
from streamgen.calls import Due
from streamgen.errors import InputError
from streamgen.flight import Channels, Flight, LatentChunk, Text, Timings
from streamgen.flight_state import restore, save, twin
from streamgen.forward import BoundRow, Work
from streamgen.ladder import TRAIN_STEPS
from streamgen.lanes import LaneCache
from streamgen.schedules import Call, Op, OpKind, Row, Slot, SlotOp, Tick, begins, clean_call, lanes, until_emission
from streamgen.source import Source

if TYPE_CHECKING:
    from streamgen.engine import Engine


class Rollout:
    """Runs the ticks of one stream. Everything between two chunks is explicit state: see `state_dict`."""

    def __init__(
        self, engine: Engine, prompt_embeds, noise, latent_size, num_latent_frames, negative_embeds, batch, image,
        channels: Channels | None, source: Source | None = None,
    ) -> None:
        """Arguments as in `Engine.start`, which makes these."""
        self.engine, self.noise, self.channels, self.source = engine, noise, channels, source
        self.device, self.dtype = engine.device, engine.dtype  # asked once: diffusers walks all modules for them
        self.batch = batch or prompt_embeds.shape[0]
        self.rows = self.batch * engine.branches  # of a forward
        self.latent_size = latent_size
        self.num_latent_frames = num_latent_frames
        chunk = engine.config.chunk
        self.num_chunks = None if num_latent_frames is None else chunk.count(num_latent_frames)
        self.flight_frames = engine.frames_in_flight(self.num_chunks)
        check_experts(engine.config, len(engine.experts))
        self.caches = {lane: self._new_cache() for lane in lanes(engine.schedule, engine.steps, self.num_chunks)}
        check_span(engine.config, self.policy)
        self.negative = negative_embeds
        if engine.reads_negative and negative_embeds is None and engine.branches == 1:
            raise InputError("guidance.commit_branch=negative needs negative_prompt_embeds")
        self._commit_told: Text | None = None  # the negative prompt, once a commit was told it
        text = engine.text(prompt_embeds, negative_embeds, self.batch, 0, image)
        self.text = replace(text, scale=engine.config.guidance.scale)
        self.image = image
        self.switches: list[tuple[int, Tensor]] = []  # to come: latent frame, text
        self.flight: dict[int, Flight] = {}
        self.held: dict[int, Flight] = {}  # finished chunks that later calls hold
        self.pending: list[tuple[int, Call, Flight]] = []  # commits owed: tick, call, chunk
        self.past: list[Flight] = []  # recent finished chunks, and others the policy keeps, to be encoded again
        self.pictures = Pictures(engine.codec) if self.policy.pictures else None
        self.next_chunk = 0  # to be delivered
        self.next_entry = 0  # to begin
        self.next_tick = 0
        self.owed: dict[int, Flight] = {}  # finished chunks that the next call publishes
        self.ready: list[LatentChunk] = []  # finished together with one that was delivered
        self.timings = Timings()
        self._ticks: Iterator[Tick] | None = None
        self._due: list[Tick] = []  # drawn from it and not yet run: what the next chunk takes

    # ------------------------------------------------------------------------------------------- state
    @property
    def next_frame(self) -> int:
        """The latent frame that the next chunk to enter begins at."""
        return self.engine.config.chunk.frames(self.next_entry).start

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
            for flight in (*self.flight.values(), *self.held.values()):
                flight.text = text

    def takes_effect(self, after_next: bool = False) -> int:
        """The first chunk that a change made now, or once the next chunk is delivered, applies to."""
        chunk = self.next_chunk + len(self.ready) if self.follows else self.next_entry
        if after_next and not self.ready:
            ticks = self._upcoming()
            chunk += len(ticks[-1].emits) if self.follows else begins(ticks)
        return chunk

    @property
    def policy(self) -> CachePolicy:
        """The first lane's."""
        return next(iter(self.caches.values())).policy

    @property
    def stores(self) -> list[KVStore | GraphStore]:
        """The first lane's, one per expert."""
        return next(iter(self.caches.values())).stores

    @property
    def store(self) -> KVStore | GraphStore:
        """The first lane's, of the first expert."""
        return self.stores[0]

    @property
    def can_recache(self) -> bool:
        """Whether finished latents are kept for re-encoding."""
        return bool(self._recache_frames())

    def new_policy(self) -> CachePolicy:
        """A lane's, which has seen nothing yet."""
        return build_policy(self.engine.config, self.flight_frames, self.num_latent_frames)

    def _new_cache(self) -> LaneCache:
        engine, policy = self.engine, self.new_policy()
        most = call_frames(engine.config, policy, self.flight_frames, self.num_latent_frames)
        sizes = (self.rows, self.latent_size, most, self.dtype, self.device)
        return LaneCache(policy, [build_store(expert, policy, *sizes) for expert in engine.experts])

    def _recache_frames(self) -> int:
        if any(lane.level is not None for lane in self.caches):
            return 0  # a clean pass cannot renew what every step of a ladder left in a cache of its own
        return recache_frames(self.engine.config, self.num_latent_frames)

    # ------------------------------------------------------------------------------------------- running
    def advance(self) -> LatentChunk:
        """Run ticks until a chunk is finished. Raises StopIteration past the end."""
        return self.engine.advance([self])[0]

    def computing(self) -> Work:
        """What it takes to have a chunk ready; nothing if one is."""
        if self.finished:
            raise StopIteration("the stream is over")
        return iter(()) if self.ready else self._run_ticks()

    def take(self) -> LatentChunk:
        """The chunk that is ready."""
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

    def _run_ticks(self) -> Work:
        """Ticks until one emits.

        An exception (out of memory, Ctrl-C) costs the call it hit: the next attempt begins with that.
        """
        yield from self._commit()
        self._forget_plans()
        for tick in list(self._upcoming()):
            yield from self._run_tick(tick)
            self._due.pop(0)

    def _run_tick(self, tick: Tick) -> Work:
        for op in tick.ops:
            yield from self._operate(op)
        for call in tick.calls:
            yield from self._denoise(tick.index, call)
        self.next_tick = tick.index + 1
        if tick.emits:
            self._emit(tick)

    def _operate(self, op: Op) -> Work:
        """What comes before a tick's calls; a tick that is tried again does it once."""
        if op.kind is OpKind.BEGIN and op.chunk >= self.next_entry:
            yield from self._begin(op.chunk)
        elif op.kind is OpKind.CLONE:
            source, *others = op.lanes
            for lane in others:
                self.caches[lane] = self.caches[source].fork(self.new_policy())

    def _begin(self, chunk: int) -> Work:
        config = self.engine.config
        frames = config.chunk.frames(chunk)
        due = [(frame, text) for frame, text in self.switches if frame <= frames.start]
        if due:  # of several that fell into one chunk the newest counts
            yield from self._switch(due[-1][1], config.switch.mode, requested=due[-1][0])
            self.switches = self.switches[len(due) :]
        yield from self._rebuild()
        channels = None if self.channels is None else self.channels.frames(frames)
        x, ladder = self._noise("initial", frames, 0), self.engine.ladder_of(chunk)
        if self.source is not None:
            ladder = self.source.ladder(chunk, ladder, config.ladder.shift, config.ladder.sigma)
            x = self.source.begin(chunk, frames, x, ladder)
        self.flight[chunk] = Flight(x, frames, self.text, ladder, channels=channels)
        self.next_entry = chunk + 1

    def _noise(self, purpose: str, frames: range, step: int) -> Tensor:
        if self.engine.config.ladder.fixed_noise:
            frames = range(len(frames))
        shape = (self.batch, self.engine.latent_channels, *self.latent_size)
        drawn = self.noise.frames(purpose, frames, step, shape)
        return drawn.to(self.device, torch.promote_types(torch.float32, self.dtype))

    def _emit(self, tick: Tick) -> None:
        done = {index: self.flight.pop(index) for index in tick.emits}
        for index, flight in done.items():
            self._remember(flight)
            self.ready.append(LatentChunk(flight.x, index, flight.frames.start, flight.text.epoch))
        self.pending = [(tick.index, call, done[call.rows[0].slots[0].chunk]) for call in tick.commits]
        self.held = {k: flight for k, flight in {**self.held, **done}.items() if k in tick.holds}
        if self.engine.config.schedule.commit == "fused":
            self.owed = done

    def _remember(self, flight: Flight) -> None:
        window = self._recache_frames()
        if window:
            self.past = kept([*self.past, flight], window, self.policy.keeps())

    def commit(self) -> None:
        """Run the commit calls that are due; a finite stream never runs its last one."""
        self.engine.forward.drive([self._commit()])

    def _commit(self) -> Work:
        while self.pending:
            tick, call, flight = self.pending[0]
            yield from self._clean(tick, call, flight.x, flight.channels, [flight.frames], flight.text)
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
        self.engine.forward.drive([self._switch(prompt_embeds, mode, epoch, requested)])

    def _switch(
        self, prompt_embeds: Tensor, mode: str, epoch: int | None = None, requested: int | None = None
    ) -> Work:
        if mode == "reset":
            raise InputError("a reset begins a new stream: use keep, recache or cut here, or reset a session")
        if mode == "recache" and not self.can_recache:
            raise InputError("this stream keeps no latents to re-encode: start it with switch.mode=recache")
        epoch = self.text.epoch + 1 if epoch is None else epoch
        text = self.engine.text(prompt_embeds, self.negative, self.batch, epoch, self.image)
        text = replace(text, scale=self.text.scale)
        self._check_length(text)
        if mode == "recache":
            for cache in self.caches.values():
                cache.reserve(self._recache_frames())
        yield from self._commit()
        for chunk, flight in list(self.owed.items()):  # it would ride with a call that now comes too late
            call = clean_call((chunk,), self.engine.steps)
            yield from self._clean(self.next_tick, call, flight.x, flight.channels, [flight.frames], flight.text)
        yield from self._rebuild(changing=True)
        requested = self.next_frame if requested is None else requested
        self._forget_plans()
        for cache in self.caches.values():
            frames = cache.policy.switch(mode, requested)
            if frames is not None:
                yield from self._recache(Rebuild(tuple(frames)), text)
            cache.policy.switched(mode, requested)
        self._tell(text)

    def _check_length(self, text: Text) -> None:
        """Raises InputError if chunks in flight could not read this text beside theirs."""
        if getattr(self.engine.transformer.config, "text_len", None) is not None:
            return  # the model brings every text to one length
        beside = () if self.follows else (*self.flight.values(), *self.held.values())
        past = self.past if self.policy.own_texts else ()  # frames that will be told theirs once more
        calls.check_length(text, [flight.text for flight in (*beside, *past)])

    def _rebuild(self, changing: bool = False) -> Work:
        """Encode again what the policy wants before the next chunk enters, or before that chunk's prompt changes."""
        if self.pictures is not None:
            for flight in self.past:
                self.pictures.look(flight)
            self.pictures.keep(by_frame(self.past))
        wanted = self.policy.rebuild(self.next_frame, changing)
        if wanted is not None:
            yield from self._recache(wanted, self.text)

    def _recache(self, wanted: Rebuild, text: Text) -> Work:
        """Encode finished frames again, under the present text or their own."""
        empty = lambda *shape: torch.zeros(*shape, 1, *self.latent_size, device=self.device)
        beside = None if self.channels is None else empty(1, self.engine.extra_channels)
        blank = (empty(self.batch, self.engine.latent_channels), beside)
        x, channels = latents_of(wanted, self.past, self.pictures, blank)
        call = wanted.call(self.engine.config.chunk.holding, self.engine.steps)
        which = None
        if wanted.own_text:
            texts = texts_of(wanted, self.past, text)
            once = {id(text): self._commit_text(text) for text in texts}
            each = tuple(range(frame, frame + 1) for frame in wanted.frames)
            text, which = calls.told([once[id(text)] for text in texts], each, self.rows, self.device)
        yield from self._clean(-1, call, x, channels, list(wanted.parts), text, which)

    def state_dict(self) -> dict:
        """Everything a later `load_state_dict` needs to go on bit by bit: tensors and plain Python."""
        return save(self)

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state` was taken; the engine, the noise and the sizes must be the same."""
        restore(self, state)
        self._ticks, self._due = None, []

    def fork(self) -> Rollout:
        """An independent stream with the same past; what either does is unknown to the other."""
        other = twin(self)
        other._ticks, other._due = None, []
        return other

    # ------------------------------------------------------------------------------------------- calls
    def _forget_plans(self) -> None:
        for cache in self.caches.values():
            cache.plans = {}

    def _denoise(self, tick: int, call: Call) -> Work:
        begin = time.perf_counter()
        dues = [self._due_row(tick, call, row.carrying(self.owed)) for row in call.rows]
        velocities = yield [due.work for due in dues]  # nothing has changed so far: a forward that fails is made again
        moved = [calls.stepped(*pair, self._noise) for pair in zip(dues, velocities, strict=True)]
        moved = [step for steps in moved for step in steps]
        for due in dues:
            self._keep(due)
        for flight, x, p in moved:
            flight.x, flight.p = x, p
        self.timings.add("denoise", begin)

    def _due_row(self, tick: int, call: Call, row: Row) -> Due:
        flights = [self._flight(slot) for slot in row.slots]
        frames = tuple(f.frames for f in flights)
        slots = list(zip(row.slots, flights, strict=True))
        levels = [calls.level(self.engine.config.schedule, slot, f) for slot, f in slots]
        expert = calls.expert(row, levels, self.engine.expert_for)
        plan, context = self.caches[row.lane].shared(call, row, frames, expert, self.engine.experts[expert].rope)
        self._record(tick, call, row, frames, levels, plan, expert)
        texts = [self._commit_text(f.text) if slot.op is SlotOp.CLEAN else f.text for slot, f in slots]
        text, which = calls.told(texts, frames, self.rows, self.device)
        work = BoundRow(
            expert, calls.joined([self._fed(slot, f, tick) for slot, f in slots]).to(self.dtype),
            calls.joined([f.channels for f in flights]), calls.timestep(levels, frames, self.device), text, context,
            which, calls.guidance(texts, frames, self.device),
        )  # fmt: skip
        return Due(row, flights, frames, plan, work)

    def _flight(self, slot: Slot) -> Flight:
        """The chunk of a slot: in flight, or finished and held, or just finished and riding along to be published."""
        if slot.op is SlotOp.CLEAN:
            return self.owed[slot.chunk]
        return self.flight[slot.chunk] if slot.chunk in self.flight else self.held[slot.chunk]

    def _fed(self, slot: Slot, flight: Flight, tick: int) -> Tensor:
        """A chunk's latents as a call sees them; overlap is noised anew every time, up to the level it is fed with."""
        sigma = self.engine.config.schedule.held.overlap_level / TRAIN_STEPS
        if not (slot.overlap and sigma):
            return flight.x
        return (1 - sigma) * flight.x + sigma * self._noise("context", flight.frames, tick)

    def _keep(self, due: Due) -> None:
        """What a row that is through leaves for later ones."""
        cache = self.caches[due.row.lane]
        cache.stage(due.plan, due.work)
        published = due.row.published(due.frames)
        if published:
            self._publish(cache, [(due.plan, due.work)], published)

    def _publish(self, cache: LaneCache, done: list[tuple[Plan, BoundRow]], frames: list[int]) -> None:
        cache.publish(done, frames)
        self.owed = {chunk: flight for chunk, flight in self.owed.items() if flight.frames.start not in frames}

    def _commit_text(self, text: Text) -> Text:
        """What a finished chunk is told as it is published."""
        branch = self.engine.config.guidance.commit_branch
        if branch == "negative":
            if self._commit_told is None:
                told = self.engine.text(self.negative, self.negative, self.batch, text.epoch, self.image)
                self._check_length(told)
                self._commit_told = told
            return replace(self._commit_told, epoch=text.epoch, scale=text.scale)
        if branch == "own" or self.engine.branches == 1:
            return text
        positive = text.embeds.chunk(2)[0].repeat(2, 1, 1)
        return self.engine.keyed(positive, text.epoch, text.image)

    def _clean(
        self, tick: int, call: Call, x: Tensor, channels: Tensor | None, frames: list[range], text: Text,
        which: Tensor | None = None,
    ) -> Work:
        """Finished latents once more, for their keys and values in every expert's cache.

        `which`: the prompt in `text` that each frame reads, [branches·B, F]; None = they share one.
        Nothing is published before every expert is through: an exception in between leaves the commit owed.
        """
        begin = time.perf_counter()
        (row,), text = call.rows, text if which is not None else self._commit_text(text)
        cache, levels, parts = self.caches[row.lane], [self.engine.config.schedule.commit_level], tuple(frames)
        timestep, done = calls.timestep(levels, parts, self.device), []
        for expert, model in enumerate(self.engine.experts):
            plan, context = cache.bind(call, row, parts, expert, model.rope)
            if not plan.publishes:  # nobody would read it
                continue
            self._record(tick, call, row, parts, levels, plan, expert)
            alone = not plan.remember  # otherwise the last layer's queries are read too
            x = x.to(self.dtype)
            work = BoundRow(expert, x, channels, timestep, text, context, prompt_index=which, commit_only=alone)
            yield [work]
            done.append((plan, work))
        self._publish(cache, done, [f for part in frames for f in part])
        self.timings.add("commit" if call.source == "flight" else "recache", begin)

    def _record(self, *what) -> None:
        if self.engine.tracing:
            self.engine.records.append(calls.record(*what))
