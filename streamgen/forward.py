"""The transformer, called: rows of one stream or of several, those of one shape in one forward.

A stream says what it wants forwarded and goes on with the answer (`Work`); `drive` runs any number of streams so.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamgen.flight import Text
from streamgen.models.blocks import TextKeys, widen
from streamgen.models.context import RowsContext


@dataclass(frozen=True, slots=True, eq=False)
class BoundRow:
    """One row, ready to run.

    Args:
        expert: the transformer that runs it.
        x: [B, C, F, h, w].
        channels: [B or 1, C', F, h, w], read beside x.
        timestep: [1, F], or [1, 1] where all frames share one level.
        context: its cache, bound to its plan.
        prompt_index: [branches·B, F], which of the text's prompts each frame reads.
        scale: of guidance, one number or [F, 1, 1].
        commit_only: keys and values are all that is wanted.
    """

    expert: int
    x: Tensor
    channels: Tensor | None
    timestep: Tensor
    text: Text
    context: Any
    prompt_index: Tensor | None = None
    scale: float | Tensor = 1.0
    commit_only: bool = False

    @property
    def keys(self) -> TextKeys:
        return self.text.keys[self.expert]

    def signature(self) -> tuple:
        """Rows with equal ones may share a forward."""
        text, channels = self.keys.keys[0], self.channels
        told = None if self.prompt_index is None else self.prompt_index.shape
        beside = None if channels is None else channels.shape[1:]
        return self.expert, self.x.shape, beside, self.timestep.shape, text.shape, told, self.commit_only


Velocities = list[Tensor | None]
Work = Generator[Sequence[BoundRow], Velocities, None]  # yields rows to run, is sent their velocities


class Forward:
    """The experts of an engine, and how many branches of guidance they run."""

    def __init__(self, experts: Sequence, branches: int) -> None:
        self.experts, self.branches = experts, branches
        self._told: tuple[tuple[TextKeys, ...], TextKeys] | None = None  # rows' texts, and these below each other

    def drive(self, works: Iterable[Work]) -> None:
        """Run streams until each is through; what they want at the same time runs together."""
        waiting = {work: rows for work in works if (rows := next(work, None)) is not None}
        while waiting:
            answers = iter(self([row for rows in waiting.values() for row in rows]))
            asked, waiting = waiting, {}
            for work, rows in asked.items():
                try:
                    waiting[work] = work.send([next(answers) for _ in rows])
                except StopIteration:
                    pass

    def __call__(self, rows: Sequence[BoundRow]) -> Velocities:
        """The velocity of each row, guided; None for those that want none."""
        if len(rows) == 1:
            return self._together(rows)
        alike: dict[tuple, list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(row.signature(), []).append(index)
        found = {}
        for indices in alike.values():
            found.update(zip(indices, self._together([rows[i] for i in indices]), strict=True))
        return [found[index] for index in range(len(rows))]

    def _together(self, rows: Sequence[BoundRow]) -> Velocities:
        """Rows of one signature, in one forward."""
        first, inputs = rows[0], [self._input(row) for row in rows]
        if len(rows) == 1:
            x, timestep, told, context = inputs[0], first.timestep, first.prompt_index, first.context
            text = first.keys
        else:
            batch = len(inputs[0])
            below = lambda parts: None if parts[0] is None else torch.cat([part.expand(batch, -1) for part in parts])
            x, timestep = torch.cat(inputs), below([row.timestep for row in rows])
            told, context = below([row.prompt_index for row in rows]), RowsContext([r.context for r in rows], batch)
            text = self._text([row.keys for row in rows])
        more = {} if told is None else {"prompt_index": told}
        more.update(text_keys=text, context=context, return_dict=False, commit_only=first.commit_only)
        output = self.experts[first.expert](x, timestep, **more)
        if first.commit_only:
            return [None] * len(rows)
        parts = output[0].split(len(inputs[0])) if len(rows) > 1 else output
        return [self._guided(part, row) for part, row in zip(parts, rows, strict=True)]

    def _input(self, row: BoundRow) -> Tensor:
        """[branches·B, C, F, h, w]."""
        x = row.x
        if row.channels is not None:
            x = torch.cat([x, row.channels.to(x).expand(x.shape[0], -1, -1, -1, -1)], 1)
        return torch.cat([x] * self.branches) if self.branches > 1 else x

    def _text(self, parts: list[TextKeys]) -> TextKeys:
        """Texts of rows below each other; kept, because a stream's rows read the same ones tick after tick."""
        known = self._told
        if known is None or len(known[0]) != len(parts) or any(a is not b for a, b in zip(known[0], parts)):
            self._told = known = (tuple(parts), type(parts[0]).stack(parts))
        return known[1]

    def _guided(self, velocity: Tensor, row: BoundRow) -> Tensor:
        velocity = widen(velocity)
        if self.branches == 1:
            return velocity
        positive, negative = velocity.chunk(2)
        return negative + row.scale * (positive - negative)
