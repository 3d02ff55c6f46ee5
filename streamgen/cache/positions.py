"""At which temporal position a frame is read: rules over what one call sees.

Keys are stored raw, so a rule may give a cached frame another position at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamgen.errors import InputError


@dataclass(frozen=True, slots=True)
class Seen:
    """Stream frames a call reads, region by region in reading order; `own` are the call's.

    `window`: what a step may read besides `extra` (anchors, bank); `span`: positions the model was trained on; `chunk`:
    frames of one; `lead`: how far ahead of the call a sink is placed; `restart`: the number that is counted up to.
    """

    sink: Sequence[int]
    extra: Sequence[int]
    recent: Sequence[int]
    own: Sequence[int]
    window: int
    span: int
    chunk: int = 0
    lead: int = 0
    restart: int = 0


def absolute(seen: Seen) -> list[int]:
    """Every frame at its own number, as caches that rotate keys when they write them."""
    return [*seen.sink, *seen.extra, *seen.recent, *seen.own]


def packed(seen: Seen) -> list[int]:
    """Ranks among what is visible: they never grow, however long the stream (Infinity-RoPE, LongLive's second mode)."""
    return list(range(len(absolute(seen))))


def before(seen: Seen) -> list[int]:
    """The sink directly before what is recent, which keeps its numbers (Rolling Forcing, arXiv:2509.25161)."""
    follows = [*seen.recent, *seen.own]
    leads = len(seen.sink) + len(seen.extra)
    return [*range(follows[0] - leads, follows[0]), *follows]


def trail(seen: Seen) -> list[int]:
    """The sink a chunk's length before the rest, never before its own numbers; all others keep theirs (Deep Forcing).

    The released code dates the first recent frame without counting the chunk itself; the gap is what remains of that.
    """
    follows = [*seen.recent, *seen.own]
    if not seen.sink:
        return absolute(seen)
    start = max(seen.sink[0], follows[0] - seen.chunk - len(seen.extra) - len(seen.sink))
    return [*range(start, start + len(seen.sink)), *seen.extra, *follows]


def tri_region(seen: Seen) -> list[int]:
    """Sink at its start, what is recent at the end of the trained span, anchors between (Anchor Forcing).

    Numbers stay as they are until the call reaches the end of the span; from there on they are held.
    """
    held = max(0, seen.own[-1] + 1 - seen.span)
    first = seen.span - seen.window - len(seen.extra)
    anchors = range(first, first + len(seen.extra))
    return [*range(len(seen.sink)), *anchors, *(frame - held for frame in (*seen.recent, *seen.own))]


def ahead(seen: Seen) -> list[int]:
    """The sink `lead` frames ahead of the call, once the stream has moved away from it (Live Avatar)."""
    leads, follows = [*seen.sink, *seen.extra], [*seen.recent, *seen.own]
    if leads and leads[-1] + 1 < follows[0]:
        leads = range(seen.own[0] + seen.lead, seen.own[0] + seen.lead + len(leads))
    return [*leads, *follows]


def restart(seen: Seen) -> list[int]:
    """Every frame at its own number, which goes back to the window's last before it reaches `restart`, again and again.

    What was written before keeps its number and is ahead of the call until it leaves (StreamDiffusionV2's sessions).
    """
    first = seen.window - 1
    period = seen.restart - first
    return [f if f < seen.restart else first + (f - seen.restart) % period for f in absolute(seen)]


RULES: dict[str, Callable[[Seen], list[int]]] = {
    "absolute": absolute, "packed": packed, "before": before, "trail": trail, "tri-region": tri_region, "ahead": ahead,
    "restart": restart,
}  # fmt: skip


OWN_NUMBERS = ("absolute", "trail")  # rules by which recent frames keep their numbers, as memories by content need


def position_rule(name: str) -> Callable[[Seen], list[int]]:
    """Raises InputError that lists the choices."""
    if name not in RULES:
        raise InputError(f"positions.rule {name!r} is unknown: use {', '.join(RULES)}")
    return RULES[name]
