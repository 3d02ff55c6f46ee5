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
from streamgen.cache.plan import Plan
from streamgen.cache.rebuild import Rebuild
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.schedules import HORIZON, Call, OpKind, Row, clean_call, lanes


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
    config, chunk, due = engine.config, engine.config.chunk, sorted(switches)
    if due and config.switch.mode == "reset":
        raise InputError("switch.mode=reset begins a new stream, walked like the first: use keep, recache or cut")
    flight = engine.schedule.in_flight(engine.steps, chunks) * chunk.largest
    total = chunk.frames(chunks - 1).stop if chunks else None
    new = lambda: build_policy(config, flight, total)
    policies = {lane: new() for lane in lanes(engine.schedule, engine.steps, chunks)}
    pending: list[tuple[int, Call]] = []  # commits that run before the next tick
    owed: tuple[int, ...] = ()  # finished, published by the next call

    def parts(row: Row) -> tuple[range, ...]:
        return tuple(chunk.frames(slot.chunk) for slot in row.slots)

    def clean(
        tick: int, call: Call, frames: tuple[range, ...] | None = None, rebuilt: bool = False
    ) -> Iterator[PlannedCall]:
        row = call.rows[0]
        policy, spans = policies[row.lane], parts(row) if frames is None else frames
        plan = policy.plan(call, row, spans)
        policy.commit([frame for span in spans for frame in span])
        if plan.publishes:  # otherwise nobody would read it
            yield PlannedCall(tick, call, row, spans, plan, rebuilt=rebuilt)

    def again(tick: int, wanted: Rebuild | None, rebuilt: bool = False) -> Iterator[PlannedCall]:
        if wanted is not None:
            yield from clean(tick, wanted.call(chunk.holding, engine.steps), wanted.parts, rebuilt)

    def switch(tick: int, first: int, requested: int) -> Iterator[PlannedCall]:
        for index in owed:
            yield from clean(tick, clean_call((index,), engine.steps))
        for policy in policies.values():
            yield from again(tick, policy.rebuild(first, changing=True), rebuilt=True)
            frames = policy.switch(config.switch.mode, requested)
            yield from again(tick, None if frames is None else Rebuild(tuple(frames)))
            policy.switched(config.switch.mode, requested)

    for tick in engine.schedule.ticks(engine.steps, chunks):
        for index, call in pending:
            yield from clean(index, call)
        for op in tick.ops:
            asked = [frame for frame in due if op.kind is OpKind.BEGIN and frame <= chunk.frames(op.chunk).start]
            if asked:  # of several that fell into one chunk the newest counts
                yield from switch(tick.index, chunk.frames(op.chunk).start, asked[-1])
                owed, due = (), due[len(asked) :]
            if op.kind is OpKind.CLONE:
                for lane in op.lanes[1:]:
                    policies[lane] = new()
                    policies[lane].load_state_dict(policies[op.lanes[0]].state_dict())
            if op.kind is OpKind.BEGIN:
                first = next(iter(policies.values()))
                wanted = first.rebuild(chunk.frames(op.chunk).start, changing=False)
                yield from again(tick.index, wanted, rebuilt=True)
        for call in tick.calls:
            for row in call.rows:
                row, policy = row.carrying(owed), policies[row.lane]
                plan = policy.plan(call, row, parts(row))
                published = row.published(parts(row))
                if published:
                    policy.commit(published)
                last = call is tick.calls[-1] and row.lane == call.rows[-1].lane
                yield PlannedCall(tick.index, call, row, parts(row), plan, tick.emits if last else ())
        pending = [(tick.index, call) for call in tick.commits]
        owed = tick.emits if config.schedule.commit == "fused" else ()


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
