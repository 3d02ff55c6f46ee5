"""The suites of `streamgen eval`, by name; `long` and `identity` take other lengths too, as in `long-300`.

A suite's module is imported when it is asked for, so that their names cost nothing.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING

from streamgen.config import suggest
from streamgen.errors import InputError

if TYPE_CHECKING:
    from streamgen.evaluation.suites.base import Suite

_MODULES = {
    "short": "short", "long": "short", "switch": "switch", "identity": "identity", "memory": "identity",
    "latency": "latency",
}  # fmt: skip
NAMES = tuple(_MODULES)
LENGTHS = ("long", "identity")
SHORTEST = 10  # seconds: two bins


def find_suite(name: str) -> Suite:
    """Raises InputError, with the nearest name, for what is none."""
    kind, _, seconds = name.partition("-")
    if name not in NAMES and not (kind in LENGTHS and re.fullmatch(r"[1-9]\d*", seconds)):
        raise InputError(
            f"unknown suite {name!r}{suggest(name, NAMES)}: choose of {', '.join(NAMES)}, "
            "or long-SECONDS, identity-SECONDS"
        )
    if seconds and int(seconds) < SHORTEST:
        raise InputError(f"suite {name!r} is too short to drift: it takes at least {SHORTEST} seconds")
    build = getattr(import_module(f"streamgen.evaluation.suites.{_MODULES[kind]}"), kind)
    return build(int(seconds)) if seconds else build()
