"""One stream in the engine: its cache, its chunks in flight, what it is told, and the commit that is still owed."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamgen.again import Pictures, by_frame, kept, latents_of
from streamgen.cache import CachePolicy, GraphStore, KVStore
from streamgen.cache.policies import POLICIES, Sizes, rule_for_parts
from streamgen.cache.rebuild import Rebuild
from streamgen.cache.store import Geometry
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.flight import CallRecord, Channels, Flight, LatentChunk, Text, Timings
from streamgen.flight_state import restore, save
from streamgen.forward import BoundRow, Work
from streamgen.held import held_level
from streamgen.ladder import TRAIN_STEPS
from streamgen.lanes import LaneCache
from streamgen.schedules import Call, Op, OpKind, Row, Slot, SlotOp, Tick, begins, clean_call, lanes, until_emission
from streamgen.source import Source

if TYPE_CHECKING:
    from streamgen.engine import Engine

log = logging.getLogger(__name__)


def build_policy(config: StreamConfig, flight_frames: int, total_frames: int | None) -> CachePolicy:
    """The cache policy of a configuration. Raises InputError below a window's floor and for what cannot be combined."""
    cls, options = POLICIES.get(config.cache.policy)
    if config.schedule.coupling == "joint-causal" and flight_frames > config.chunk.largest:
        if config.cache.window != -1:
            rule_for_parts(config, "schedule.coupling=joint-causal")
    if config.schedule.coupling == "rows" and config.switch.mode == "recache":
        raise InputError(
            "schedule.coupling=rows keeps what noisy steps left, which switch.mode=recache cannot renew by a clean "
            "pass: use switch.mode=keep, cut or reset"
        )
    branch = config.guidance.commit_branch
    if branch != "own" and config.schedule.commit == "inplace":
        raise InputError(
            f"guidance.commit_branch={branch} asks for a commit under that prompt, and schedule.commit=inplace has "
            "none: use separate or fused"
        )
    first, size = config.chunk.first, config.chunk.latent_frames
    if first != size and (config.cache.policy != "window" or config.switch.mask != "bidirectional"):
        raise InputError(
            f"chunk.first_latent_frames={first} beside chunk.latent_frames={size}: only cache.policy=window with "
            "switch.mask=bidirectional counts frames instead of chunks; use it, or chunks of one size"
        )
    if hasattr(options, "from_config"):  # the package's own read the shared keys
        chosen = options.from_config(config)
    else:
        try:
            chosen = options(**config.cache.options)
        except TypeError as error:
            raise InputError(f"cache.options of policy {config.cache.policy!r}: {error}") from None
    policy = cls(chosen, Sizes(config.chunk.latent_frames, flight_frames, total_frames))
    missing = [name for name in vars(CachePolicy) if not name.startswith("_") and not hasattr(policy, name)]
    if missing:
        raise InputError(
            f"cache policy {config.cache.policy!r} lacks {', '.join(missing)}: inherit from streamgen.cache.CachePolicy"
        )
    return policy


def recache_frames(config: StreamConfig, total_frames: int | None) -> int:
    """Most frames a re-encoding call may hold: finished latents that are kept for it."""
    if config.schedule.coupling == "rows":
        return 0  # a clean pass cannot renew what noisy ones left
    if config.cache.window != -1:
        return config.cache.window
    return total_frames if config.switch.mode == "recache" else 0


@functools.cache
def warn_once(message: str) -> None:
    """The same warning a second time says nothing."""
    log.warning(message)


@dataclass(frozen=True, slots=True)
class Due:
    """A row about to run: its chunks, and the plan and context it runs by."""

    row: Row
    flights: list[Flight]
    frames: tuple[range, ...]
    plan: Any
    work: BoundRow


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
        self.latent_size = latent_size
        self.num_latent_frames = num_latent_frames
        chunk = engine.config.chunk
        self.num_chunks = None if num_latent_frames is None else chunk.count(num_latent_frames)
        self.flight_frames = engine.schedule.in_flight(engine.steps, self.num_chunks) * chunk.largest
        self.caches = {lane: self._new_cache() for lane in lanes(engine.schedule, engine.steps, self.num_chunks)}
        self._check_span()
        self._check_experts()
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
        self._plans: dict[tuple, tuple] = {}  # of the present chunk: all its steps share them

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

    def _new_policy(self) -> CachePolicy:
        return build_policy(self.engine.config, self.flight_frames, self.num_latent_frames)

    def _new_cache(self) -> LaneCache:
        policy = self._new_policy()
        return LaneCache(policy, [self._new_store(expert, policy) for expert in self.engine.experts])

    def _new_store(self, model, policy: CachePolicy) -> KVStore | GraphStore:
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
        return KVStore(geometry, policy.pages, most, self.dtype, self.device, policy.aside)

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
        self._plans = {}
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
        if op.chunk < self.next_entry and op.kind is OpKind.BEGIN:
            return
        if op.kind is OpKind.BEGIN:
            yield from self._begin(op.chunk)
        elif op.kind is OpKind.CLONE:
            source, *others = op.lanes
            for lane in others:
                self.caches[lane] = self.caches[source].fork(self._new_policy())

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
        yield from self._commit()
        for chunk, flight in list(self.owed.items()):  # it would ride with a call that now comes too late
            call = clean_call((chunk,), self.engine.steps)
            yield from self._clean(self.next_tick, call, flight.x, flight.channels, [flight.frames], flight.text)
        yield from self._rebuild(changing=True)
        requested = self.next_frame if requested is None else requested
        self._plans = {}
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
        lengths = {flight.text.embeds.shape[1] for flight in (*beside, *past)}
        if lengths - {text.embeds.shape[1]}:
            raise InputError(
                f"a prompt of {text.embeds.shape[1]} tokens cannot stand beside those of chunks in flight "
                f"({', '.join(map(str, sorted(lengths)))} tokens): pad prompts to one length, or use "
                "switch.in_flight=follow"
            )

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
        x, channels = latents_of(wanted, self.past, self.pictures, self._blank(text))
        call = wanted.call(self.engine.config.chunk.holding, self.engine.steps)
        which = None
        if wanted.own_text:
            text, which = self._own_texts(wanted, text)
        yield from self._clean(-1, call, x, channels, list(wanted.parts), text, which)

    def _blank(self, text: Text) -> Flight:
        """One frame of nothing."""
        config = self.engine.transformer.config
        channels = config.out_channels or config.in_channels
        empty = lambda *shape: torch.zeros(*shape, 1, *self.latent_size, device=self.device)
        beside = None if self.channels is None else empty(1, config.in_channels - channels)
        return Flight(empty(self.batch, channels), range(-1, 0), text, self.engine.ladder, channels=beside)

    def _own_texts(self, wanted: Rebuild, present: Text) -> tuple[Text, Tensor | None]:
        """Every frame's prompt, as `_told` has it."""
        found = by_frame(self.past)
        texts = [found[frame].text if frame in found else present for frame in wanted.frames]
        once = {id(text): self._commit_text(text) for text in texts}
        return self._told([once[id(text)] for text in texts], tuple(range(f, f + 1) for f in wanted.frames))

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
        other.caches = {lane: cache.fork(self._new_policy()) for lane, cache in self.caches.items()}
        other.channels = self.channels.fork() if self.channels is not None else None
        other.pictures = self.pictures.fork() if self.pictures is not None else None
        other.flight = {chunk: replace(flight) for chunk, flight in self.flight.items()}
        other.held = {chunk: replace(flight) for chunk, flight in self.held.items()}
        other.owed = dict(self.owed)
        other.pending, other.past, other.ready = list(self.pending), list(self.past), list(self.ready)
        other._ticks, other._due, other._plans, other.timings = None, [], {}, Timings()
        return other

    # ------------------------------------------------------------------------------------------- calls
    def _bind(self, call: Call, row: Row, frames: tuple[range, ...], expert: int):
        """Plan and context of a call."""
        cache = self.caches[row.lane]
        plan = cache.policy.plan(call, row, frames)
        return plan, cache.stores[expert].bind(plan, self.engine.experts[expert].rope)

    def _denoise(self, tick: int, call: Call) -> Work:
        begin = time.perf_counter()
        dues = [self._due_row(tick, call, row.carrying(self.owed)) for row in call.rows]
        velocities = yield [due.work for due in dues]
        moved = [step for due, velocity in zip(dues, velocities, strict=True) for step in self._stepped(due, velocity)]
        for due in dues:
            self._keep(due)
        for flight, x, p in moved:  # nothing has changed before: an exception leaves the call to be made again
            flight.x, flight.p = x, p
        self.timings.add("denoise", begin)

    def _due_row(self, tick: int, call: Call, row: Row) -> Due:
        flights = [self._flight(slot) for slot in row.slots]
        frames = tuple(f.frames for f in flights)
        levels = [self._level(slot, flight) for slot, flight in zip(row.slots, flights, strict=True)]
        expert = self._expert(row, levels)
        plan, context = self._context(call, row, frames, expert)
        self._record(tick, call, row, frames, levels, plan, expert)
        texts = [self._commit_text(f.text) if s.op is SlotOp.CLEAN else f.text for s, f in zip(row.slots, flights)]
        text, which = self._told(texts, frames)
        work = BoundRow(
            expert, _joined([self._fed(slot, f, tick) for slot, f in zip(row.slots, flights)]).to(self.dtype),
            _joined([f.channels for f in flights]), self._timestep(levels, frames), text, context, which,
            self._scale(texts, frames),
        )  # fmt: skip
        return Due(row, flights, frames, plan, work)

    def _expert(self, row: Row, levels: list[float]) -> int:
        experts = {self.engine.expert_for(level) for level, slot in zip(levels, row.slots) if slot.op is SlotOp.STEP}
        if len(experts) > 1:
            raise InputError("chunks in flight straddle experts.boundary: two experts need schedule.coupling=solo")
        (expert,) = experts
        return expert

    def _stepped(self, due: Due, velocity: Tensor) -> Iterator[tuple[Flight, Tensor, int]]:
        """The chunks of a row, where a step takes them, and its number."""
        parts = velocity.split([len(part) for part in due.frames], 2)
        for slot, flight, part in zip(due.row.slots, due.flights, parts, strict=True):
            if slot.op is SlotOp.STEP:
                fresh = partial(self._noise, "renoise", flight.frames, slot.p_in)
                yield flight, flight.ladder.step(flight.x, part, slot.p_in, fresh), slot.p_out

    def _keep(self, due: Due) -> None:
        """What a row that is through leaves for later ones."""
        cache, work = self.caches[due.row.lane], due.work
        store = cache.stores[work.expert]
        store.stage(due.plan, work.context)
        published = due.row.published(due.frames)
        if published:
            self._publish(cache, [(store, due.plan, work.context, work.keys)], published)

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

    def _level(self, slot: Slot, flight: Flight) -> float:
        """The timestep a slot is fed with."""
        if slot.op is SlotOp.CLEAN:
            return self.engine.config.schedule.commit_level
        if slot.op is SlotOp.HOLD:
            return held_level(self.engine.config.schedule.held, slot, flight.ladder.timesteps)
        return flight.ladder.timesteps[slot.p_in]

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

    def _publish(self, cache: LaneCache, calls: list[tuple], frames: list[int]) -> None:
        """Make finished calls visible to later ones, all of them or none, and tell the policy."""
        for store, plan, context, text in calls:
            store.publish(plan, context, text)
        cache.policy.commit(frames)
        self.owed = {chunk: flight for chunk, flight in self.owed.items() if flight.frames.start not in frames}
        self._plans = {}  # they followed what was committed before

    def _context(self, call: Call, row: Row, frames: tuple[range, ...], expert: int):
        """Plans and their angles are shared by all steps of a chunk; training binds each forward anew."""
        if isinstance(self.store, GraphStore):
            return self._bind(call, row, frames, expert)
        key = (row.lane, frames, expert, self.caches[row.lane].policy.variant(row))
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
        self, tick: int, call: Call, x: Tensor, channels: Tensor | None, frames: list[range], text: Text,
        which: Tensor | None = None,
    ) -> Work:
        """Finished latents once more, for their keys and values in every expert's cache.

        `which`: the prompt in `text` that each frame reads, [branches·B, F]; None = they share one.
        Nothing is published before every expert is through: an exception in between leaves the commit owed.
        """
        begin = time.perf_counter()
        (row,), text = call.rows, text if which is not None else self._commit_text(text)
        cache, level = self.caches[row.lane], self.engine.config.schedule.commit_level
        timestep, calls = self._timestep([level], tuple(frames)), []
        for expert, store in enumerate(cache.stores):
            plan, context = self._bind(call, row, tuple(frames), expert)
            if not plan.publishes:  # nobody would read it
                continue
            self._record(tick, call, row, tuple(frames), [level], plan, expert)
            alone = not plan.remember  # otherwise the last layer's queries are read too
            x = x.to(self.dtype)
            yield [BoundRow(expert, x, channels, timestep, text, context, prompt_index=which, commit_only=alone)]
            calls.append((store, plan, context, text.keys[expert]))
        self._publish(cache, calls, [f for part in frames for f in part])
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
                level=row.lane.level,
            )
        )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Chunks along time."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, 2)
