"""Finished frames that run once more for their keys and values: which they are, and what they see of each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from streamgen.cache.plan import FLIGHT, Group
from streamgen.schedules import Call, Steps, clean_call

MASKS = ("bidirectional", "block-causal")


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Frames of one CLEAN call.

    Args:
        frames: stream frames in the order of their positions; negative ones are blank (zero latents).
        pixels: those whose latents are made anew, each alone, from the picture that was shown.
        own_text: each is told its own chunk's prompt, not the present one; blank frames always the present one.
    """

    frames: tuple[int, ...]
    pixels: Collection[int] = ()
    own_text: bool = False

    @property
    def source(self) -> str:
        """Where the latents come from, as `Call` has it."""
        if self.frames[0] < 0:
            return "external"
        return "pixels" if self.pixels else "past"

    @property
    def parts(self) -> tuple[range, ...]:
        """The frames as runs of neighbours."""
        starts = [i for i, frame in enumerate(self.frames) if i == 0 or frame != self.frames[i - 1] + 1]
        ends = [*starts[1:], len(self.frames)]
        return tuple(range(self.frames[a], self.frames[b - 1] + 1) for a, b in zip(starts, ends, strict=True))

    def call(self, holding: Callable[[int], int], steps: Steps) -> Call:
        """The call over all of them; `holding`: the chunk that holds a frame."""
        chunks = sorted({holding(frame) for frame in self.frames if frame >= 0})
        return clean_call(tuple(chunks), steps, self.source)


def block_causal(group: Group, starts: Sequence[int]) -> tuple[Group, ...]:
    """A group that sees all of its call, as one group per block: a block sees itself and what lies before it.

    `starts`: the index in the call at which each block begins. Positions stay those of the whole call.
    """
    parts = []
    for first, stop in zip(starts, [*starts[1:], len(group.query_frames)], strict=True):
        segments = tuple(
            replace(s, pages=s.pages[:stop], frames=s.frames[:stop], positions=s.positions[:stop])
            if s.region == FLIGHT
            else s
            for s in group.segments
        )
        queries = slice(first, stop)
        parts.append(replace(
            group, query_frames=group.query_frames[queries], query_positions=group.query_positions[queries],
            segments=segments,
        ))  # fmt: skip
    return tuple(parts)


def attenuated(group: Group, log_bias: float) -> Group:
    """The group with `log_bias` added to the logits of its recent keys; sink, anchors and bank count in full."""
    segments = tuple(replace(s, log_bias=log_bias) if s.region == "recent" else s for s in group.segments)
    return replace(group, segments=segments)
