"""What a suite is: cases (what is said when, how long, from which seed), and a judge that makes numbers of frames.

The two halves meet in frames alone, so a judge is tested on the world's own pictures, without any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgen.worlds.sprites.language import Scene, Timeline, describe
from streamgen.worlds.sprites.renderer import FPS

MEASURES = 2  # one more with every change by which a number may come out otherwise: older results are not mixed in
BIN = 5 * FPS  # frames: motion takes so long to be told

Values = dict[str, float | None]  # of one case, by metric; None = undefined there


@dataclass(frozen=True, slots=True)
class Options:
    """What the cases of a suite follow from."""

    prompts: int
    seed: int = 0
    split: str = "val"  # val | test


@dataclass(frozen=True, slots=True)
class Case:
    """One video to be made. `timeline`: what is asked for, by the pixel frame it is asked at; what a later scene
    does not name stays. `part`: a group of the suite's cases that is reported apart as well."""

    timeline: Timeline
    num_frames: int
    seed: int
    part: str = ""

    @property
    def scene(self) -> Scene:
        """What is asked for first."""
        return self.timeline.changes[0].scene

    @property
    def prompts(self) -> list[str]:
        return [describe(change.scene) for change in self.timeline.changes]

    @property
    def frames(self) -> tuple[int, ...]:
        """At which each prompt is asked for."""
        return tuple(change.frame for change in self.timeline.changes)


class Judge:
    """Frames of one case in, as they come; numbers out. Keeps no more than a few seconds of them."""

    def take(self, frames: np.ndarray) -> None:
        """The next frames, uint8 [f, S, S, 3]."""
        raise NotImplementedError

    def change(self, index: int) -> None:
        """Prompt `index` of the case is given now: later frames may show it."""

    def close(self) -> Values:
        """What is known at the end."""
        raise NotImplementedError

    def notes(self) -> dict[str, Any]:
        """After `close`, what there is to say beside numbers: `said`, and `pairs` as in `confusions`."""
        return {}


@dataclass(frozen=True)
class Suite:
    """`headline`: the metrics of the table; `purpose`: one line that says what they mean.

    Frames are judged case by case, or a pipeline is timed: `measure(pipe, options)` gives values then. `confusions`:
    its judges note what they read; frames of every case are kept until the worst are known (0.5 MB each).
    """

    name: str
    purpose: str
    headline: tuple[str, ...]
    cases: Callable[[Options], list[Case]] = lambda options: []
    judge: Callable[[Case], Judge] = Judge
    measure: Callable[..., list[Values]] | None = None
    confusions: bool = False


class Pieces:
    """Frames as they come -> pieces of `size` frames; what is left at the end is a piece if it has at least half."""

    def __init__(self, size: int) -> None:
        self.size, self.parts = size, []

    def take(self, frames: np.ndarray) -> list[np.ndarray]:
        self.parts.append(frames)
        if sum(map(len, self.parts)) < self.size:
            return []
        whole = np.concatenate(self.parts)
        full = len(whole) // self.size * self.size
        self.parts = [whole[full:].copy()]  # not a view, which would keep all of it
        return list(whole[:full].reshape(-1, self.size, *whole.shape[1:]))

    def rest(self) -> list[np.ndarray]:
        left = np.concatenate(self.parts) if self.parts else np.zeros(0)
        return [left] if 2 * len(left) >= self.size else []


def mean(values: Sequence[float | None]) -> float | None:
    """Of what is defined."""
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None


def seeds(options: Options, suite: int) -> tuple[np.random.Generator, Callable[[int], int]]:
    """A suite's own dice for its scenes, and the seed of its case `i`."""
    rng = np.random.default_rng([options.seed, 17, suite])
    return rng, lambda i: (options.seed * 64 + suite) * 100_000 + i
