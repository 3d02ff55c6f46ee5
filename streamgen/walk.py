"""A schedule and a cache policy walked without weights: every call of a stream, and the plan it would run by.

    for call in walk(Engine(None, load_preset("rolling-forcing")), chunks=7):
        call.tick, call.frames, call.plan

It does what `Rollout` does between two forwards, and nothing else; tests hold it against `Engine.trace()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streamgen.cache.plan import Plan
from streamgen.cache.rebuild import Rebuild
from streamgen.engine import Engine
from streamgen.errors import InputError
from streamgen.rollout import build_policy
from streamgen.schedules import HORIZON, Call, OpKind, Row, clean_call


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One forward: its row, each slot's latent frames, its plan, and the chunks that leave once it is through.

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
    config, size, due = engine.config, engine.config.chunk.latent_frames, sorted(switches)
    if due and config.switch.mode == "reset":
        raise InputError("switch.mode=reset begins a new stream, walked like the first: use keep, recache or cut")
    flight = engine.schedule.in_flight(engine.steps, chunks) * size
    policy = build_policy(config, flight, None if chunks is None else chunks * size)
    pending: list[tuple[int, Call]] = []  # commits that run before the next tick
    owed: tuple[int, ...] = ()  # finished, published by the next call

    def parts(row: Row) -> tuple[range, ...]:
        return tuple(range(slot.chunk * size, (slot.chunk + 1) * size) for slot in row.slots)

    def clean(
        tick: int, call: Call, frames: tuple[range, ...] | None = None, rebuilt: bool = False
    ) -> Iterator[PlannedCall]:
        row = call.rows[0]
        spans = parts(row) if frames is None else frames
        plan = policy.plan(call, row, spans)
        policy.commit([frame for span in spans for frame in span])
        if plan.publishes:  # otherwise nobody would read it
            yield PlannedCall(tick, call, row, spans, plan, rebuilt=rebuilt)

    def again(tick: int, wanted: Rebuild | None, rebuilt: bool = False) -> Iterator[PlannedCall]:
        if wanted is not None:
            yield from clean(tick, wanted.call(size, engine.steps), wanted.parts, rebuilt)

    def switch(tick: int, first: int, requested: int) -> Iterator[PlannedCall]:
        for chunk in owed:
            yield from clean(tick, clean_call((chunk,), engine.steps))
        yield from again(tick, policy.rebuild(first, changing=True), rebuilt=True)
        frames = policy.switch(config.switch.mode, requested)
        yield from again(tick, None if frames is None else Rebuild(tuple(frames)))
        policy.switched(config.switch.mode, requested)

    for tick in engine.schedule.ticks(engine.steps, chunks):
        for index, call in pending:
            yield from clean(index, call)
        for op in tick.ops:
            asked = [frame for frame in due if op.kind is OpKind.BEGIN and frame <= op.chunk * size]
            if asked:  # of several that fell into one chunk the newest counts
                yield from switch(tick.index, op.chunk * size, asked[-1])
                owed, due = (), due[len(asked) :]
            if op.kind is OpKind.BEGIN:
                yield from again(tick.index, policy.rebuild(op.chunk * size, changing=False), rebuilt=True)
        for call in tick.calls:
            (row,) = call.rows
            row = row.carrying(owed)
            plan = policy.plan(call, row, parts(row))
            published = row.published(parts(row))
            if published:
                policy.commit(published)
            yield PlannedCall(tick.index, call, row, parts(row), plan, tick.emits if call is tick.calls[-1] else ())
        pending = [(tick.index, call) for call in tick.commits]
        owed = tick.emits if config.schedule.commit == "fused" else ()


@dataclass(frozen=True, slots=True)
class Cost:
    """Ticks until the first chunk leaves; calls of every further one, its commit too, and the frames in them.

    `kept`: latent frames in memory, None = all there are.
    """

    first: int
    calls: int
    frames: int
    kept: int | None


def cost(engine: Engine) -> Cost:
    """What a stream of this configuration costs, once it is long enough to repeat itself."""
    shorter, longer = (list(walk(engine, chunks)) for chunks in (HORIZON, HORIZON + 1))
    frames = lambda calls: sum(len(part) for call in calls for part in call.frames)
    bounded = engine.config.cache.window != -1
    return Cost(
        first=next(call.tick for call in longer if call.emits) + 1,
        calls=len(longer) - len(shorter),
        frames=frames(longer) - frames(shorter),
        kept=build_policy(engine.config, engine.flight_frames, None).pages if bounded else None,
    )
