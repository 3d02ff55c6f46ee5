"""What goes into a row and comes out of it: levels, prompts and guidance of its chunks, their steps, and the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from streamgen.cache import Plan
from streamgen.config import ScheduleConfig
from streamgen.errors import InputError
from streamgen.flight import CallRecord, Flight, Text
from streamgen.forward import BoundRow
from streamgen.held import held_level
from streamgen.schedules import Call, Row, Slot, SlotOp


@dataclass(frozen=True, slots=True)
class Due:
    """A row about to run: its chunks, their latent frames, and the plan it runs by."""

    row: Row
    flights: list[Flight]
    frames: tuple[range, ...]
    plan: Plan
    work: BoundRow


def level(config: ScheduleConfig, slot: Slot, flight: Flight) -> float:
    """The timestep a slot is fed with."""
    if slot.op is SlotOp.CLEAN:
        return config.commit_level
    if slot.op is SlotOp.HOLD:
        return held_level(config.held, slot, flight.ladder.timesteps)
    return flight.ladder.timesteps[slot.p_in]


def timestep(levels: Sequence[float], frames: Sequence[range], device: torch.device) -> Tensor:
    """[1, F], or [1, 1] where all frames share one level (the transformer's fastest form)."""
    if len(set(levels)) == 1:
        return torch.full((1, 1), levels[0], device=device)
    return torch.tensor([_per_frame(levels, frames)], device=device)


def told(
    texts: Sequence[Text], frames: Sequence[range], batch: int, device: torch.device
) -> tuple[Text, Tensor | None]:
    """One text for a whole call, or several beside each other and the one each frame reads, [branches·B, F].

    `batch`: rows of a forward, all branches of guidance.
    """
    different = {id(text.keys): text for text in texts}
    if len(different) == 1:
        return texts[0], None
    keys = tuple(type(parts[0]).join(parts) for parts in zip(*(text.keys for text in different.values()), strict=True))
    order = list(different)
    which = _per_frame([order.index(id(text.keys)) for text in texts], frames)
    return replace(texts[0], keys=keys), torch.tensor(which, device=device).expand(batch, -1)


def check_length(text: Text, beside: Iterable[Text]) -> None:
    """Raises InputError if chunks could not read this text beside those."""
    lengths = {other.embeds.shape[1] for other in beside}
    if lengths - {text.embeds.shape[1]}:
        raise InputError(
            f"a prompt of {text.embeds.shape[1]} tokens cannot stand beside those of chunks in flight "
            f"({', '.join(map(str, sorted(lengths)))} tokens): pad prompts to one length, or use "
            "switch.in_flight=follow"
        )


def guidance(texts: Sequence[Text], frames: Sequence[range], device: torch.device) -> float | Tensor:
    """Guidance of a call: one number, or that of each frame, [F, 1, 1]."""
    scales = [text.scale for text in texts]
    if len(set(scales)) == 1:
        return scales[0]
    return torch.tensor(_per_frame(scales, frames), device=device)[:, None, None]


def expert(row: Row, levels: Sequence[float], expert_for: Callable[[float], int]) -> int:
    """Who denoises a row."""
    experts = {expert_for(level) for level, slot in zip(levels, row.slots, strict=True) if slot.op is SlotOp.STEP}
    if len(experts) > 1:
        raise InputError("chunks in flight straddle experts.boundary: two experts need schedule.coupling=solo")
    return experts.pop()


def stepped(due: Due, velocity: Tensor, noise: Callable[..., Tensor]) -> Iterator[tuple[Flight, Tensor, int]]:
    """The chunks of a row, where a step takes them, and its number. `noise(purpose, frames, step)`."""
    parts = velocity.split([len(part) for part in due.frames], 2)
    for slot, flight, part in zip(due.row.slots, due.flights, parts, strict=True):
        if slot.op is SlotOp.STEP:
            fresh = partial(noise, "renoise", flight.frames, slot.p_in)
            yield flight, flight.ladder.step(flight.x, part, slot.p_in, fresh), slot.p_out


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Chunks along time."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, 2)


def record(
    tick: int, call: Call, row: Row, frames: Sequence[range], levels: Sequence[float], plan: Plan, expert: int
) -> CallRecord:
    """What a row was, for `Engine.trace`."""
    return CallRecord(
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


def _per_frame(values: Sequence, frames: Sequence[range]) -> list:
    """A value for each frame, of one for each chunk."""
    return [value for value, part in zip(values, frames, strict=True) for _ in part]
