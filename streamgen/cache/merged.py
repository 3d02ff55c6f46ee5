"""Frames that leave are merged into entries that stand for many keys (TempCache of FAST-AR, arXiv:2602.01801)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamgen.cache.options import WindowOptions, keeps_numbers, needs_own_commits
from streamgen.cache.plan import Absorb, Plan
from streamgen.cache.policies import Pages, Sizes, WindowPolicy, register_policy
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.schedules import Call, Row


@dataclass(frozen=True)
class MergedOptions(WindowOptions):
    """A window and the entries that remember what has left it; see `streamgen.cache.plan.Absorb`.

    Args:
        size: entries per place of the picture, in all as many as that number of frames has tokens.
        threshold: cosine from which a key counts as another one again.
        most: keys an entry may stand for.
        half_life: latent frames after which an entry that nothing joins is worth 1/e; the least is replaced.
    """

    size: int = 6
    threshold: float = 0.95
    most: int = 8
    half_life: float = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("size", self.size), ("most", self.most)):
            if value < 1:
                raise InputError(f"cache.merged.{name} must be at least 1, got {value}")
        if not -1 <= self.threshold <= 1:
            raise InputError(f"cache.merged.threshold is a cosine between -1 and 1, got {self.threshold}")
        if self.half_life <= 0:
            raise InputError(f"cache.merged.half_life is a number of frames above 0, got {self.half_life}")
        keeps_numbers(self, "cache.policy=merged")

    @classmethod
    def from_config(cls, config: StreamConfig) -> MergedOptions:
        needs_own_commits(config)
        merged = config.cache.merged
        own = dict(
            size=merged.size, threshold=merged.threshold, most=merged.most, half_life=float(merged.half_life)
        )  # fmt: skip
        return cls(**vars(WindowOptions.from_config(config)), **own)


@register_policy("merged", MergedOptions)
class MergedPolicy(WindowPolicy):
    """Sink, merged entries, recent frames. Pages: [sink | entries | ring].

    Sink and recent frames are never merged. An entry is read at its newest key's number, ln n added to its logit.
    """

    extra_region, extra_counted = "merged", True
    aside = {"counts": None, "times": None}

    def __init__(self, options: MergedOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self._needs_ring("cache.policy=merged takes up")
        self.used = 0  # pages of entries that may hold something

    @property
    def reserved(self) -> int:
        return self.options.size

    def _extra(self, first: int, *seen: Sequence[int]) -> Pages:
        """The pages in use; -1, for content knows what they hold."""
        return [(-1, self.sink + i) for i in range(self.used)]

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        plan = super().plan(call, row, frames)
        published = row.published(frames) if call.source == "flight" else []
        leaving = self._leaving(published) if published else range(0)
        if not leaving:
            return plan
        options, pages = self.options, tuple(range(self.sink, self.sink + self.reserved))
        sources, times = tuple(self.page(f) for f in leaving), tuple(float(f) for f in leaving)
        how = (options.threshold, options.most, options.half_life)
        return replace(plan, absorb=Absorb(sources, times, pages, self.used, *how))

    # ------------------------------------------------------------------------------------------- state
    def commit(self, frames: Sequence[int]) -> None:
        if frames[-1] >= self.frames:  # not a re-encoding
            self.used = min(self.options.size, self.used + len(self._leaving(frames)))
        super().commit(frames)

    def switch(self, mode: str, requested: int) -> range | None:
        """What has been merged keeps its prompt; a cut, or a sink that is replaced, forgets it."""
        base, frames = self.base, super().switch(mode, requested)
        if mode == "cut" or self.base != base:
            self.used = 0
        if frames is None or not self.used:
            return frames
        return range(max(frames.start, self.frames - self.ring), self.frames)

    def reach(self) -> int | None:
        return self.sizes.total  # an entry stays where its newest key was

    def state_dict(self) -> dict:
        return {**super().state_dict(), "used": self.used}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.used = state["used"]
