"""`short`: five seconds of a held-out prompt, some with two actors. `long`: the same prompts in bins of five seconds.

`long` asks what `short` cannot: whether bin 12 is as good as bin 1, whether the actor is still the same one, whether
it still moves, and whether the picture grows darker, paler, flatter or duller, flickers, or shows where chunks begin.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamgen.evaluation.confusions import pairs, said
from streamgen.evaluation.suites.base import BIN, Case, Judge, Options, Pieces, Suite, Values, mean, seeds
from streamgen.evaluation.suites.readings import (
    attributes,
    binding,
    dynamic_degree,
    jumps,
    stagnation,
    strangers,
)
from streamgen.evaluation.suites.scenes import ATTRIBUTES, specified
from streamgen.evaluation.video import VideoMeter
from streamgen.evaluation.video_drift import LOOKS
from streamgen.worlds.sprites.language import Change, Timeline
from streamgen.worlds.sprites.oracle import Reading, read
from streamgen.worlds.sprites.renderer import FPS

SHORT = BIN + 1  # 21 latent frames, what models are trained on


def specified_cases(options: Options, num_frames: int) -> list[Case]:
    """The same prompts and seeds whatever the length."""
    _, seed = seeds(options, 1)
    scenes = specified(options.prompts, options.split, options.seed + 1)
    parts = [f"{'one' if len(scene.actors) == 1 else 'two'}" for scene in scenes]
    return [
        Case(Timeline((Change(0, scene),)), num_frames, seed(i), part)
        for i, (scene, part) in enumerate(zip(scenes, parts))
    ]


class ShortJudge(Judge):
    """One reading of the whole clip."""

    def __init__(self, case: Case) -> None:
        self.scene, self.parts = case.scene, []
        self.reading: Reading | None = None

    def take(self, frames: np.ndarray) -> None:
        self.parts.append(frames)

    def close(self) -> Values:
        clip = np.concatenate(self.parts)
        reading = self.reading = read(clip, actors=len(self.scene.actors))
        return {
            **attributes(reading, self.scene),
            "binding": binding(reading, self.scene),
            "identity_changes_per_minute": reading.identity_changes * 60 * FPS / len(clip),
            "jumps_per_minute": jumps(clip) * 60 * FPS / len(clip),
            "stagnation": stagnation(clip),
            "dynamic_degree": dynamic_degree(reading, self.scene),
        }

    def notes(self) -> dict[str, Any]:
        return {"said": said(self.reading), "pairs": pairs(self.reading, self.scene)}


class LongJudge(Judge):
    """A reading per bin, and the metrics of any video over all of them; only numbers are kept."""

    def __init__(self, case: Case) -> None:
        self.scene, self.pieces = case.scene, Pieces(BIN)
        self.bins: list[Values] = []
        self.before: Reading | None = None
        self.last: np.ndarray | None = None  # frame of the bin before: a jump may lie between the two
        self.changes, self.jumps = 0, 0
        self.meter = VideoMeter(FPS)
        self.chunks: list[int] = []  # frames of each

    def take(self, frames: np.ndarray) -> None:
        self.chunks.append(len(frames))
        for piece in self.pieces.take(frames):
            self._read(piece)

    def _read(self, piece: np.ndarray) -> None:
        reading = read(piece, actors=len(self.scene.actors))
        self.changes += reading.identity_changes
        self.jumps += jumps(piece if self.last is None else np.concatenate([self.last, piece]))
        self.last = piece[-1:].copy()
        calm = self.before is not None and not reading.identity_changes and not self.before.identity_changes
        if calm:  # else the two votes differ because of a change that is counted already
            self.changes += strangers(self.before, reading)
        self.before = reading
        self.meter.add(piece)
        alive = {"stagnation": stagnation(piece), "dynamic_degree": dynamic_degree(reading, self.scene)}
        self.bins.append({**attributes(reading, self.scene), **alive})

    def close(self) -> Values:
        for piece in self.pieces.rest():
            self._read(piece)
        out: Values = {}
        series = lambda name: [values[name] for values in self.bins]
        for name in (*ATTRIBUTES, "stagnation", "dynamic_degree"):
            out[name] = mean(series(name))
            out |= drift(name, series(name))
        minutes = self.meter.frames / FPS / 60
        out["identity_changes_per_minute"] = self.changes / minutes if minutes else None
        out["jumps_per_minute"] = self.jumps / minutes if minutes else None
        for name in (*ATTRIBUTES, "dynamic_degree"):
            out |= {f"{name}@{i * BIN // FPS}": value for i, value in enumerate(series(name))}
        return {**self._pictures(), **out}  # of two, the world's own stagnation and dynamic degree

    def _pictures(self) -> Values:
        """The metrics of any video; looks also by how far they went, since over clips ups and downs cancel out."""
        if self.meter.frames < 2:
            return {}
        found = self.meter.metrics(self.chunks)
        changes = {name: found[f"drift_{name}_change"] for name in LOOKS}
        return {**found, **{f"{name}_drift": None if v is None else abs(v) for name, v in changes.items()}}


def drift(name: str, series: list[float | None]) -> Values:
    """NAME_slope, per minute, and NAME_change, the last bin minus the first; None with less than two."""
    at = [i for i, value in enumerate(series) if value is not None]
    if len(at) < 2:
        return {f"{name}_slope": None, f"{name}_change": None}
    known = np.array([series[i] for i in at], float)
    slope = np.polyfit(np.array(at) * BIN / FPS / 60, known, 1)[0]
    return {f"{name}_slope": float(slope), f"{name}_change": float(known[-1] - known[0])}


def short() -> Suite:
    return Suite(
        "short",
        "5 s of a held-out prompt: the share of clips in which each named attribute is right; whole = every actor one "
        "body of one shape; present = as many actors as named in 95 % of the frames; all_right = all of them; "
        "binding = the share of two actors that has its own colour, shape and motion",
        ("all_right", "colour", "shape", "background", "motion", "whole", "present", "binding"),
        lambda options: specified_cases(options, SHORT),
        ShortJudge,
        confusions=True,
    )


def long(seconds: int = 60) -> Suite:
    return Suite(
        "long" if seconds == 60 else f"long-{seconds}",
        f"{seconds} s of a held-out prompt in bins of 5 s (NAME@SECOND): change = last bin minus first, slope per "
        "minute; stagnation = the share of frames in which nothing moves; dynamic_degree = speed of what is "
        "to travel against the world's, 0 = in place; identity_changes_per_minute in colour, shape or size, "
        "jumps_per_minute of the place; "
        "NAME_drift of a look = how far its last bin is from its first; seam = change at chunk borders against change "
        "inside chunks, 1 = none; flicker, warping_error, drift_* and spectral_drift_* as `streamgen eval video` says",
        (
            "all_right", "all_right_change", "identity_changes_per_minute", "jumps_per_minute", "stagnation",
            "dynamic_degree", "seam", "flicker",
        ),  # fmt: skip
        lambda options: specified_cases(options, seconds * FPS),
        LongJudge,
    )
