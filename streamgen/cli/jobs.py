"""What a `render` command stands for: its clips in order, each under a name that the next run finds again.

    a red circle bouncing                       a prompt file: one prompt a line, blank lines and # comments skipped
    {"prompt": "a blue star", "seed": 3, "name": "star", "seconds": 2}          a line may also be a JSON object
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamgen.cli.timeline import Entry, timeline_entries
from streamgen.config import StreamConfig, suggest
from streamgen.errors import InputError

FOLDER = "clips/"  # where several clips go if nobody says
KEYS = ("prompt", "timeline", "name", "seed", "negative_prompt", "seconds", "num_frames")
PLACES = ("name", "index", "prompt", "seed")  # what {…} in --output may say
_PLACE = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Clip:
    """One clip: what it shows, how long, and where it goes."""

    entries: tuple[Entry, ...]  # the first at frame 0, unless a stream is continued
    seed: int
    num_frames: int
    negative_prompt: str = ""
    name: str | None = None  # as the prompt file says
    index: int = 1  # of the prompt, from 1
    target: str = ""

    @property
    def slug(self) -> str:
        """A file name that says what is in it."""
        return slug(self.entries[0].prompt) if self.entries else "clip"


@dataclass(frozen=True)
class Setup:
    """What all clips of a command share."""

    model: str
    checkpoint: str | None
    preset: str | None
    overrides: list[str]
    config: StreamConfig
    height: int | None  # None only for a state that does not say
    width: int | None
    fps: float
    device: str
    dtype: str
    threads: int | None
    weights: str  # `records.stamp`
    endless: bool  # the stream could go on after the clip
    extend: str | None  # the state it goes on from
    lora: list[str]
    lora_2: list[str]
    codec: str | None
    tile: int | None
    image: str | None

    def settings(self, clip: Clip) -> dict[str, Any]:
        """All that frames follow from, as plain Python."""
        from omegaconf import OmegaConf

        prompts = [{"frame": e.frame, "prompt": e.prompt, "mode": e.mode, "blend": e.blend} for e in clip.entries]
        own = {"prompts": prompts, "negative_prompt": clip.negative_prompt, "seed": clip.seed}
        config = OmegaConf.to_container(OmegaConf.structured(self.config))
        return {**own, "num_frames": clip.num_frames, **vars(self), "config": config}


def slug(prompt: str) -> str:
    """Its words, at most 60 bytes."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    return words.encode()[:60].decode(errors="ignore").strip("-") or "clip"


# ------------------------------------------------------------------------------------------- prompt files
def parse_prompts(text: str, source: str, base: Clip, fps: float) -> list[Clip]:
    """Clips of a prompt file; what a line does not say is as in `base`. Raises InputError with the line's number."""
    clips: list[Clip] = []
    for number, line in enumerate(text.split("\n"), 1):
        line, where = line.strip(), f"{source}, line {number}"
        if not line or line.startswith("#"):
            continue
        if line.startswith("{") or source.endswith(".jsonl"):
            clip = _from_json(line, where, base, fps)
        else:
            clip = replace(base, entries=(Entry(0, line),))
        clips.append(replace(clip, index=len(clips) + 1))
    if not clips:
        raise InputError(f"--prompt-file {source} is empty: write one prompt per line")
    return clips


def _from_json(line: str, where: str, base: Clip, fps: float) -> Clip:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(item, dict):
        raise InputError(f'{where}: {line[:40]!r} is no object; write {{"prompt": "what to show"}}')
    for key in item:
        if key not in KEYS:
            raise InputError(f"{where}: unknown key {key!r}{suggest(key, KEYS)}; use {', '.join(KEYS)}")
    for one, other in (("prompt", "timeline"), ("seconds", "num_frames")):
        if one in item and other in item:
            raise InputError(f"{where}: give either {one} or {other}")
    changes = {key: _FIELDS[key](item[key], f"{where}: {key}") for key in item if key in _FIELDS}
    if "seconds" in changes:
        changes["num_frames"] = max(1, round(changes.pop("seconds") * fps))
    if "timeline" in item:
        changes["entries"] = tuple(timeline_entries(item["timeline"], f"{where}: timeline", fps))
    elif "prompt" in item:
        changes["entries"] = (Entry(0, changes.pop("prompt")),)
    else:
        raise InputError(f"{where}: give a prompt or a timeline")
    return replace(base, **changes)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{what} is {value!r}; give a text")
    return value


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{what} is {value!r}; give a whole number")
    return value


def _count(value: object, what: str) -> int:
    if _whole(value, what) < 1:
        raise InputError(f"{what} is {value}; give 1 or more")
    return value


def _length(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{what} is {value!r}; give a number above 0")
    return value


def _file_name(value: object, what: str) -> str:
    text = _text(value, what)
    if re.search(r'[/\\:*?"<>|\x00-\x1f]', text) or text.startswith(".") or text != text.strip():
        raise InputError(f"{what} {text!r} is no file name; use letters, digits, - and _")
    if len(text.encode()) > 200:
        raise InputError(f"{what} is longer than a file name may be; use at most 200 letters")
    return text


_FIELDS = {
    "prompt": _text, "name": _file_name, "seed": _whole, "negative_prompt": _text, "seconds": _length,
    "num_frames": _count,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- names
def with_seeds(clips: Sequence[Clip], videos: int) -> list[Clip]:
    """`videos` clips of each, with the seeds seed, seed + 1, …; a name of its own then gets its seed."""
    out = []
    for clip in clips:
        for seed in range(clip.seed, clip.seed + videos):
            name = clip.name if clip.name is None or videos == 1 else f"{clip.name}-s{seed}"
            out.append(replace(clip, seed=seed, name=name))
    return out


def place(clips: Sequence[Clip], output: str, batch: bool) -> list[Clip]:
    """Give every clip its target; where two would get the same, the later one gets -2, -3, …

    Args:
        output: a video file or a folder of PNG frames; for a `batch` a folder of clips; or a pattern of either.
    Raises: InputError.
    """
    from streamgen.media.paths import is_folder

    for word in _PLACE.findall(output):
        if word not in PLACES:
            known = ", ".join(f"{{{place}}}" for place in PLACES)
            raise InputError(f"--output {output}: unknown place {{{word}}}{suggest(word, PLACES)}; use {known}")
    pattern = output
    if not _PLACE.search(output):
        if batch and is_folder(output):
            pattern = os.path.join(output, "{name}.mp4")
        elif len(clips) > 1:
            raise InputError(f"--output {output} is one file for {len(clips)} clips: give a folder, or a {{name}}.mp4")
    taken: set[str] = set()
    return [replace(clip, target=_free(_fill(pattern, clip), taken)) for clip in clips]


def _fill(pattern: str, clip: Clip) -> str:
    index, seed = f"{clip.index:03d}", str(clip.seed)
    words = {"index": index, "prompt": clip.slug, "seed": seed, "name": clip.name or f"{index}-{clip.slug}-s{seed}"}
    return _PLACE.sub(lambda match: words[match[1]], pattern)


def _free(target: str, taken: set[str]) -> str:
    """A target whose record nobody has: one that differs by more than its suffix and its capitals."""
    slash = "/" if target.endswith(("/", os.sep)) else ""
    stem, suffix = os.path.splitext(target.rstrip("/" + os.sep) if slash else target)
    free, count = stem, 1
    while free.casefold() in taken:
        count += 1
        free = f"{stem}-{count}"
    taken.add(free.casefold())
    return free + suffix + slash


def folder_of(output: str, batch: bool) -> Path | None:
    """The folder below which the clips' own folders are made when they are needed; None = a single file."""
    from streamgen.media.paths import is_folder

    place = _PLACE.search(output)
    if place:
        return Path(os.path.dirname(output[: place.start()]))
    return Path(output) if batch and is_folder(output) else None


def check_places(clips: Sequence[Clip], folder: Path | None, replacing: bool) -> None:
    """Refuse what cannot be written, before anything loads; `replacing`: frames in a PNG folder may go. InputError."""
    from streamgen.media.paths import check_folder, check_kind, check_output, is_folder

    if folder is not None:
        check_folder(folder, "clips")
    for clip in clips:
        check_kind(clip.target)
        there = Path(clip.target).parent.is_dir()
        if there and replacing and is_folder(clip.target):
            check_folder(clip.target, "frames")
        elif there or folder is None:
            check_output(clip.target)
