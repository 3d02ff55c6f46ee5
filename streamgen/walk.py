"""A schedule and a cache policy walked without weights: every call of a stream, and the plan it would run by.

    for call in walk(Engine(None, load_preset("rolling-forcing")), chunks=7):
        call.tick, call.frames, call.plan

It does what `Rollout` does between two forwards, and nothing else; tests hold it against `Engine.trace()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from streamgen.building import build_policy
from streamgen.cache import CachePolicy
from streamgen.cache.plan import Plan
from streamgen.cache.rebuild import Rebuild
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.schedules import HORIZON, Call, Op, OpKind, Row, Tick, clean_call, lanes


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A row of a forward: each slot's latent frames, its plan, and the chunks that leave once it is through.

    `tick` of a re-encoding (`call.source` is not "flight") is the one it runs before; `rebuilt`: the policy asks for it
    before a chunk, whatever is prompted.
    """

    tick: int
    call: Call
    row: Row
    frames: tuple[range, ...]
    plan: Plan
    emits: tuple[int, ...] = ()
    rebuilt: bool = False

    @property
    def committed(self) -> set[int]:
        """Chunks whose keys and values lie in the cache from here on."""
        written = {write.frame for write in self.plan.writes}
        parts = zip(self.row.slots, self.frames, strict=True)
        return {slot.chunk for slot, part in parts if slot.publish and (self.call.commits or written & set(part))}


def walk(engine: Engine, chunks: int | None = None, switches: Sequence[int] = ()) -> Iterator[PlannedCall]:
    """The calls of a stream, in order; a finite one never runs its last commit.

    Args:
        engine: may be without weights, `Engine(None, config)`.
        chunks: None = endless.
        switches: latent frames at which a new prompt is asked for; `switch.mode` says what that does to the cache.
    """
    if switches and engine.config.switch.mode == "reset":
        raise InputError("switch.mode=reset begins a new stream, walked like the first: use keep, recache or cut")
    yield from _Walk(engine, chunks, switches).run()


class _Walk:
    """A stream between its calls: a policy per lane, prompts to come, and the commits that are owed."""

    def __init__(self, engine: Engine, chunks: int | None, switches: Sequence[int]) -> None:
        self.engine, self.config, self.chunk, self.chunks = engine, engine.config, engine.config.chunk, chunks
        self.policies = {lane: self._policy() for lane in lanes(engine.schedule, engine.steps, chunks)}
        self.due = sorted(switches)
        self.pending: list[tuple[int, Call]] = []  # commits that run before the next tick
        self.owed: tuple[int, ...] = ()  # finished, published by the next call

    def _policy(self) -> CachePolicy:
        total = self.chunk.frames(self.chunks - 1).stop if self.chunks else None
        return build_policy(self.config, self.engine.frames_in_flight(self.chunks), total)

    @property
    def first(self) -> CachePolicy:
        """The first lane's."""
        return next(iter(self.policies.values()))

    def run(self) -> Iterator[PlannedCall]:
        for tick in self.engine.schedule.ticks(self.engine.steps, self.chunks):
            for index, call in self.pending:
                yield from self._clean(index, call)
            for op in tick.ops:
                yield from self._operate(tick.index, op)
            for call in tick.calls:
                yield from self._denoise(tick, call)
            self.pending = [(tick.index, call) for call in tick.commits]
            self.owed = tick.emits if self.config.schedule.commit == "fused" else ()

    def _operate(self, tick: int, op: Op) -> Iterator[PlannedCall]:
        if op.kind is OpKind.BEGIN:
            start = self.chunk.frames(op.chunk).start
            asked = [frame for frame in self.due if frame <= start]
            if asked:  # of several that fell into one chunk the newest counts
                yield from self._switch(tick, start, asked[-1])
                self.owed, self.due = (), self.due[len(asked) :]
            yield from self._again(tick, self.first.rebuild(start, changing=False), rebuilt=True)
        elif op.kind is OpKind.CLONE:
            source, *others = op.lanes
            for lane in others:
                self.policies[lane] = self._policy()
                self.policies[lane].load_state_dict(self.policies[source].state_dict())

    def _denoise(self, tick: Tick, call: Call) -> Iterator[PlannedCall]:
        for row in call.rows:
            last = call is tick.calls[-1] and row is call.rows[-1]
            row, policy = row.carrying(self.owed), self.policies[row.lane]
            frames = self._frames(row)
            plan = policy.plan(call, row, frames)
            published = row.published(frames)
            if published:
                policy.commit(published)
            yield PlannedCall(tick.index, call, row, frames, plan, tick.emits if last else ())

    def _frames(self, row: Row) -> tuple[range, ...]:
        return tuple(self.chunk.frames(slot.chunk) for slot in row.slots)

    def _clean(
        self, tick: int, call: Call, frames: tuple[range, ...] | None = None, rebuilt: bool = False
    ) -> Iterator[PlannedCall]:
        (row,) = call.rows
        policy, frames = self.policies[row.lane], self._frames(row) if frames is None else frames
        plan = policy.plan(call, row, frames)
        policy.commit([frame for part in frames for frame in part])
        if plan.publishes:  # otherwise nobody would read it
            yield PlannedCall(tick, call, row, frames, plan, rebuilt=rebuilt)

    def _again(self, tick: int, wanted: Rebuild | None, rebuilt: bool = False) -> Iterator[PlannedCall]:
        if wanted is not None:
            yield from self._clean(tick, wanted.call(self.chunk.holding, self.engine.steps), wanted.parts, rebuilt)

    def _switch(self, tick: int, start: int, requested: int) -> Iterator[PlannedCall]:
        """`start`: the first frame of the chunk that a prompt takes effect with."""
        mode = self.config.switch.mode
        for index in self.owed:
            yield from self._clean(tick, clean_call((index,), self.engine.steps))
        yield from self._again(tick, self.first.rebuild(start, changing=True), rebuilt=True)
        for policy in self.policies.values():
            frames = policy.switch(mode, requested)
            yield from self._again(tick, None if frames is None else Rebuild(tuple(frames)))
            policy.switched(mode, requested)


@dataclass(frozen=True, slots=True)
class Cost:
    """Ticks until the first chunk leaves; calls of every further one, its commit too, and the frames in them.

    Means where several chunks make a segment. `kept`: latent frames in memory, None = all there are.
    """

    first: int
    calls: float
    frames: float
    kept: int | None


def cost(engine: Engine) -> Cost:
    """What a stream of this configuration costs, once it is long enough to repeat itself."""
    period = getattr(engine.schedule, "period", 1)
    shorter, longer = (list(walk(engine, HORIZON + more)) for more in (0, period))
    frames = lambda calls: sum(len(part) for call in calls for part in call.frames)
    bounded, caches = engine.config.cache.window != -1, len(lanes(engine.schedule, engine.steps, HORIZON))
    return Cost(
        first=next(call.tick for call in longer if call.emits) + 1,
        calls=(_forwards(longer) - _forwards(shorter)) / period,
        frames=(frames(longer) - frames(shorter)) / period,
        kept=caches * build_policy(engine.config, engine.flight_frames, None).pages if bounded else None,
    )


def steady_calls(engine: Engine) -> list[PlannedCall]:
    """One call of every kind that a long stream repeats: as many captured graphs or compiled regions are enough.

    Empty for streams whose memory grows.
    """
    if engine.config.cache.window == -1:
        return []
    chunk, last = engine.config.chunk, 4 * HORIZON
    try:
        calls = list(takewhile(lambda call: call.frames[-1].stop <= chunk.frames(last).start, walk(engine)))
    except InputError:  # needs an end: what drains it apart
        calls = [call for call in walk(engine, 6 * HORIZON) if call.frames[-1].stop <= chunk.frames(last).start]
    late = [call for call in calls if call.frames[0].start >= chunk.frames(2 * HORIZON).start]
    kinds: dict[tuple, PlannedCall] = {}
    for call in late:
        kinds.setdefault((call.call.kind, call.plan.signature()), call)
    return list(kinds.values())


def _forwards(calls: list[PlannedCall]) -> int:
    """Rows of one call run together."""
    return sum(1 for i, call in enumerate(calls) if not i or call.call is not calls[i - 1].call)
