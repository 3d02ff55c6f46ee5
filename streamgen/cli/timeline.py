"""A story as a YAML list: what to show from when on.

    - {at: 0, prompt: a red circle bouncing on a navy background}
    - {at: 2.5, prompt: a blue star bouncing on a navy background, mode: recache, blend: 2}
    - {frame: 96, prompt: a blue star spinning on a gray background}
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from streamgen.config import SWITCH_MODES, StreamConfig, check_choice, check_switch, suggest
from streamgen.errors import InputError

log = logging.getLogger(__name__)

FRAMES_PER_LATENT = 4  # of every VAE of the family; only for saying in advance where chunks begin
LONGEST = 1e12  # frames: two thousand years
KEYS = ("at", "frame", "prompt", "mode", "blend")


@dataclass(frozen=True)
class Entry:
    """From the first chunk that starts at or after pixel frame `frame` on: this prompt. `mode` None = the preset's."""

    frame: int
    prompt: str
    mode: str | None = None
    blend: int = 0
    when: str = "0 s"  # as it was written


def parse_timeline(text: str, source: str, fps: float, fresh: bool = True) -> list[Entry]:
    """Entries of a timeline file; see `timeline_entries`."""
    try:
        items = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise InputError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    return timeline_entries(items, source, fps, fresh)


def timeline_entries(items: object, source: str, fps: float, fresh: bool = True) -> list[Entry]:
    """A list of {at | frame, prompt, mode, blend} as entries.

    Args:
        fresh: a new stream, which needs an entry at 0; a continued one does not.
    Raises: InputError naming the entry and what is wrong with it.
    """
    if not isinstance(items, list) or not items:
        raise InputError(f"{source} must be a list of entries such as `- {{at: 0, prompt: a red circle}}`")
    entries = [_entry(item, f"{source}, entry {i}", fps) for i, item in enumerate(items, 1)]
    if fresh and entries[0].frame:
        raise InputError(f"{source} must start at 0, but its first entry is at {entries[0].when}")
    for i, (a, b) in enumerate(zip(entries, entries[1:]), 2):
        if b.frame <= a.frame:
            raise InputError(f"{source} runs backwards: entry {i} at {b.when} does not come after {a.when}")
    return entries


def _entry(item: object, where: str, fps: float) -> Entry:
    if not isinstance(item, dict):
        raise InputError(f"{where}: {item!r} is no entry; write {{at: seconds, prompt: text}}")
    for key in item:
        if key not in KEYS:
            raise InputError(f"{where}: unknown key {key!r}{suggest(str(key), KEYS)}; use {', '.join(KEYS)}")
    if ("at" in item) == ("frame" in item):
        raise InputError(f"{where}: give either at (seconds) or frame")
    key = "at" if "at" in item else "frame"
    value, kinds = item[key], (int, float) if key == "at" else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value < 0:
        unit = "seconds" if key == "at" else "a whole number"
        raise InputError(f"{where}: {key} is {value!r}; give {unit} from 0 on")
    prompt, mode, blend = item.get("prompt"), item.get("mode"), item.get("blend", 0)
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: the prompt is {'empty' if not prompt else repr(prompt)}; say what to show")
    if mode is not None:
        check_choice(f"{where}: mode", mode, SWITCH_MODES)
    if isinstance(blend, bool) or not isinstance(blend, int) or blend < 0:
        raise InputError(f"{where}: blend is {blend!r}; give a number of chunks from 0 on")
    if value * fps > LONGEST:
        raise InputError(f"{where}: {key} is {value!r}, which is beyond any clip; give a time within it")
    frame = round(value * fps) if key == "at" else value
    return Entry(frame, prompt, mode, blend, f"{value} s" if key == "at" else f"frame {value}")


def check_timeline(
    entries: Sequence[Entry], num_frames: int, config: StreamConfig, fps: float, given: int | None = None
) -> None:
    """Refuse what cannot be played in `num_frames`; warn about prompts that no chunk will show.

    `given`: frames a continued stream has in hand before it computes its next chunk; None = a fresh stream.
    """
    for i, entry in enumerate(entries, 1):
        if entry.frame >= num_frames:
            need = f"--num-frames {entry.frame + 1} or more"
            end = f"{num_frames} frames ({num_frames / fps:g} s)"
            raise InputError(f"timeline entry {i} at {entry.when} is past the end of {end}: give {need}")
        check_switch(entry.mode or config.switch.mode, config, entry.blend)
        if entry.mode == "recache" and config.cache.window == -1 and config.switch.mode != "recache":
            raise InputError(f"timeline entry {i}: mode recache re-encodes a window: add cache.window=21 or another")
    for entry in unseen(entries, num_frames, config.chunk.latent_frames, given):
        log.warning("no chunk begins between the prompt at %s and the next one or the end: not shown", entry.when)


def unseen(entries: Sequence[Entry], num_frames: int, chunk: int, given: int | None = None) -> list[Entry]:
    """Entries that no chunk shows: another one, or the end, comes before a chunk begins."""
    pending, shown, start, first = list(entries), [], given or 0, given is None
    while start < num_frames and pending:
        due = [entry for entry in pending if entry.frame <= start]
        if due:
            pending = pending[len(due) :]
            shown.append(due[-1])
            first = first or due[-1].mode == "reset"
        start += FRAMES_PER_LATENT * chunk - (FRAMES_PER_LATENT - 1 if first else 0)  # a stream's first latent is one
        first = False
    return [entry for entry in entries if entry not in shown]
