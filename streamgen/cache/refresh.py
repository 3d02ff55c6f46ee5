"""A sink that is renewed where the scene has moved on, after StreamDiffusionV2's adaptive sinks (arXiv:2511.07399).

The released code overwrites a sink slot with the frame that was just made, instead of a place of the ring, so the rings
of different layers run apart. Here the ring always goes on, and a frame is looked at as it leaves it: nothing is held
twice, and every place is known without asking the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamgen.cache.options import WindowOptions
from streamgen.cache.plan import Group, Plan, Renew
from streamgen.cache.policies import Sizes, WindowPolicy, register_policy
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.schedules import Call, Row

BY_RANK = ("packed", "before")


@dataclass(frozen=True)
class RefreshOptions(WindowOptions):
    """A window whose sink is not fixed.

    Args:
        threshold: a frame that leaves the window takes the place of the sink frame it is least like, if it is less like
            that than this: mean cosine of the frames' mean keys and mean values, each layer and sample for itself.
    """

    threshold: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 < self.threshold <= 1:
            raise InputError(f"cache.refresh={self.threshold} is a cosine, above -1 and at most 1")
        if self.window == -1 or not self.sink:
            raise InputError(
                f"cache.policy=refresh renews the sink of a window: cache.window={self.window}, cache.sink={self.sink}"
            )
        if self.positions not in BY_RANK:
            raise InputError(
                f"cache.policy=refresh lets content choose the sink's frames, which positions.rule={self.positions} "
                f"would place by their numbers: use {' or '.join(BY_RANK)}"
            )
        if self.ema_decay is not None or self.switch_sink == "refresh":
            raise InputError(
                "cache.policy=refresh chooses what the sink holds, which cache.ema_decay would blend and "
                "switch.sink=refresh encode again: use one of them"
            )

    @classmethod
    def from_config(cls, config: StreamConfig) -> RefreshOptions:
        return cls(**vars(WindowOptions.from_config(config)), threshold=config.cache.refresh)


@register_policy("refresh", RefreshOptions)
class RefreshPolicy(WindowPolicy):
    """Sink, recent frames; what leaves the window may become part of the sink."""

    def __init__(self, options: RefreshOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self._needs_ring("cache.policy=refresh looks at")

    @property
    def changes_sink(self) -> bool:
        return True

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        plan = super().plan(call, row, frames)
        if self._leaving(self.frames - 1):  # from here on content has a say in what the sink holds
            plan = replace(plan, groups=tuple(map(self._anonymous, plan.groups)))
        published = row.published(frames) if call.source == "flight" else []
        if not published:
            return plan
        leaving = self._leaving(published[-1])
        fresh = range(max(leaving.start, self.frames - self.ring), leaving.stop)
        if not fresh:
            return plan
        return replace(plan, renew=Renew(tuple(map(self.page, fresh)), tuple(range(self.sink)), self.options.threshold))

    def _leaving(self, last: int) -> range:
        """Frames that are out of the ring once frame `last` is committed; what was cut is gone before."""
        return range(max(self.base + self.sink, self.oldest), last + 1 - self.ring)

    def _anonymous(self, group: Group) -> Group:
        """The group without the sink's frame numbers."""
        segments = (replace(s, frames=(-1,) * len(s.frames)) if s.region == "sink" else s for s in group.segments)
        return replace(group, segments=tuple(segments))
