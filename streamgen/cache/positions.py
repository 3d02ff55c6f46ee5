"""At which temporal position a frame is read: rules over what one call sees.

Keys are stored raw, so a rule may give a cached frame another position at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamgen.errors import InputError


@dataclass(frozen=True, slots=True)
class Seen:
    """Stream frames a call reads, region by region in reading order; `own` are the call's."""

    sink: Sequence[int]
    recent: Sequence[int]
    own: Sequence[int]


def absolute(seen: Seen) -> list[int]:
    """Every frame at its own number, as caches that rotate keys when they write them."""
    return [*seen.sink, *seen.recent, *seen.own]


def packed(seen: Seen) -> list[int]:
    """Ranks among what is visible: they never grow, however long the stream (Infinity-RoPE, LongLive's second mode)."""
    return list(range(len(seen.sink) + len(seen.recent) + len(seen.own)))


def before(seen: Seen) -> list[int]:
    """The sink directly before what is recent, which keeps its numbers (Rolling Forcing, arXiv:2509.25161)."""
    follows = [*seen.recent, *seen.own]
    first = follows[0]
    return [*range(first - len(seen.sink), first), *follows]


RULES: dict[str, Callable[[Seen], list[int]]] = {"absolute": absolute, "packed": packed, "before": before}


def position_rule(name: str) -> Callable[[Seen], list[int]]:
    """Raises InputError that lists the choices."""
    if name not in RULES:
        raise InputError(f"positions.rule {name!r} is unknown: use {', '.join(RULES)}")
    return RULES[name]
