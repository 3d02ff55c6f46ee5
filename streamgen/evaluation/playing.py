"""Cases in, frames out: batches of prompts streamed causally, each frame handed to its judge and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from streamgen.errors import InputError
from streamgen.evaluation.suites.base import Case, Judge
from streamgen.worlds.sprites.renderer import SIZE

RESTART = 10_000_000  # what a restarted stream adds to the seed


class Strip(Judge):
    """Hands everything on to another judge, and keeps `count` frames, evenly spread, for a contact sheet."""

    def __init__(self, judge: Judge, num_frames: int, count: int = 10) -> None:
        self.judge, self.done = judge, 0
        self.wanted = set(np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int).tolist())
        self.kept: list[np.ndarray] = []

    def take(self, frames: np.ndarray) -> None:
        self.kept += [frame.copy() for i, frame in enumerate(frames, self.done) if i in self.wanted]
        self.done += len(frames)
        self.judge.take(frames)

    def change(self, index: int) -> None:
        self.judge.change(index)

    def close(self):
        return self.judge.close()

    def notes(self):
        return self.judge.notes()


def draw_sheet(path: Path, strips: Sequence[Strip], labels: list[str]) -> None:
    """A row of the kept frames per strip."""
    from streamgen.media import contact_sheet, save_image

    path.parent.mkdir(exist_ok=True)
    clips = [np.stack(strip.kept) for strip in strips]
    save_image(path, contact_sheet(clips, max(map(len, clips)), labels))


def batches(cases: Sequence[Case], size: int) -> Iterator[list[int]]:
    """Indices of cases that can be streamed side by side: equally long, asked for the next prompt at equal frames."""
    alike: dict[tuple, list[int]] = {}
    for i, case in enumerate(cases):
        alike.setdefault((case.num_frames, case.frames), []).append(i)
    for rows in alike.values():
        for first in range(0, len(rows), size):
            yield rows[first : first + size]


def play(
    pipe,
    cases: Sequence[Case],
    judges: Sequence[Judge],
    batch: int = 8,
    mode: str | None = None,
    restart: int | None = None,
    tell: Callable[[int], None] = lambda frames: None,
) -> None:
    """Stream every case to its judge. A request is made before the first chunk that begins at or after its frame.

    Args:
        pipe: whatever has the `stream` of `StreamingVideoPipeline`.
        mode: what a new prompt does to the cache; None = as the preset says.
        restart: frames after which a stream is thrown away and another one begun, with another seed: the control that
            remembers nothing.
        tell: hears of frames, as they come.
    Raises: InputError where the preset does not fit the model, or the pictures are not those of the world.
    """
    for rows in batches(cases, batch):
        take = _Batch([cases[i] for i in rows], [judges[i] for i in rows], mode, tell)
        while take.done < take.num_frames:
            take.stream(pipe, min(restart or take.num_frames, take.num_frames - take.done))


class _Batch:
    """Cases that are streamed side by side."""

    def __init__(self, cases: list[Case], judges: list[Judge], mode: str | None, tell: Callable[[int], None]) -> None:
        self.cases, self.judges, self.mode, self.tell = cases, judges, mode, tell
        self.frames, self.num_frames = cases[0].frames, cases[0].num_frames
        self.done, self.index, self.streams = 0, 0, 0

    def _due(self) -> list[str] | None:
        """The prompts that are asked for now, if these are new ones."""
        due = sum(frame <= self.done for frame in self.frames) - 1
        if due == self.index:
            return None
        for index in range(self.index + 1, due + 1):
            for judge in self.judges:
                judge.change(index)
        self.index = due
        return [case.prompts[due] for case in self.cases]

    def stream(self, pipe, count: int) -> None:
        """`count` frames of one stream."""
        seeds = [case.seed + RESTART * self.streams for case in self.cases]
        self._due()
        prompts, stop = [case.prompts[self.index] for case in self.cases], self.done + count
        self.streams += 1
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with pipe.stream(prompts, height=SIZE, width=SIZE, num_frames=count, generator=generators) as stream:
            while self.done < stop:
                new = self._due()
                if new:
                    stream.set_prompt(new, mode=self.mode)
                frames = stream.next().frames  # [B, f, S, S, 3]
                if frames.shape[2:] != (SIZE, SIZE, 3):
                    raise InputError(f"pictures of {frames.shape[3]}x{frames.shape[2]}: the suites judge {SIZE}x{SIZE}")
                for judge, clip in zip(self.judges, frames, strict=True):
                    judge.take(clip)
                self.done += frames.shape[1]
                self.tell(frames.shape[0] * frames.shape[1])
