"""How far back a chunk looks depends on how noisy it is: the noisier, the further (MAGI-1, arXiv:2505.13211)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamgen.cache.options import WindowOptions, rule_for_parts
from streamgen.cache.plan import FLIGHT, Group, Plan, Segment
from streamgen.cache.policies import Sizes, WindowPolicy, register_policy
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.schedules import Call, Row, Slot, SlotOp


@dataclass(frozen=True)
class LookBackOptions(WindowOptions):
    """A window, and how much of it a chunk reads.

    Args:
        look_back: chunks that a chunk reads, itself included, for each of several stages its ladder is cut into evenly,
            noisiest first; the last entry is for its commit. The sink is read beside them.
        steps: of a chunk's ladder.
    """

    look_back: tuple[int, ...] = (1, 1)
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.look_back) < 2 or min(self.look_back) < 1:
            raise InputError(
                f"cache.look_back={list(self.look_back)} lists chunks, itself included, for every stage of a ladder "
                "and then for its commit: give two entries or more, of at least 1"
            )
        if self.steps % (len(self.look_back) - 1):
            raise InputError(
                f"a ladder of {self.steps} steps cannot be cut into {len(self.look_back) - 1} equal stages: change "
                "ladder.timesteps, or the entries of cache.look_back, one per stage and one more"
            )

    @classmethod
    def from_config(cls, config: StreamConfig) -> LookBackOptions:
        coupling = config.schedule.coupling
        if coupling in ("joint", "held"):
            raise InputError(
                f"cache.policy=look-back says how far back each chunk sees, and with schedule.coupling={coupling} they "
                "see later ones too: use joint-causal or solo"
            )
        if config.cache.window != -1:
            rule_for_parts(config, "cache.policy=look-back")
        lengths = sorted({sum(t != 0 for t in steps) for steps in config.ladder.lists})
        if len(lengths) > 1:
            raise InputError(
                f"cache.policy=look-back needs ladders of one length, and ladder.timesteps has some of {lengths[0]} "
                f"and some of {lengths[-1]} steps"
            )
        options = vars(WindowOptions.from_config(config))
        return cls(**options, look_back=tuple(config.cache.look_back), steps=lengths[0])


@register_policy("look-back", LookBackOptions)
class LookBackPolicy(WindowPolicy):
    """A window of which each slot reads as many chunks as its stage says."""

    def __init__(self, options: LookBackOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        furthest, room = max(options.look_back) * sizes.chunk, options.window - options.sink
        if options.window != -1 and furthest > room:
            raise InputError(
                f"cache.look_back={list(options.look_back)} reaches over {furthest} frames, and cache.window="
                f"{options.window} leaves {room} beside cache.sink {options.sink}: raise cache.window"
            )

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        plan = super().plan(call, row, frames)
        if call.source != "flight":
            return plan
        firsts = [part.stop - self._reach(slot) * self.sizes.chunk for slot, part in zip(row.slots, frames)]
        cut = (_cut(*pair) for pair in zip(plan.groups, firsts, strict=True))  # one group per slot
        return replace(plan, groups=tuple(cut))

    def _reach(self, slot: Slot) -> int:
        """Chunks that a slot reads."""
        stages = len(self.options.look_back) - 1
        return self.options.look_back[-1 if slot.op is SlotOp.CLEAN else slot.p_in * stages // self.options.steps]

    def variant(self, row: Row) -> object:
        return super().variant(row), tuple(map(self._reach, row.slots))


def _cut(group: Group, first: int) -> Group:
    """Without recent frames and frames of the call that lie before `first`."""
    cut = [_from(s, first) if s.region in ("recent", FLIGHT) else s for s in group.segments]
    return replace(group, segments=tuple(segment for segment in cut if segment.pages))


def _from(segment: Segment, first: int) -> Segment:
    kept = [i for i, frame in enumerate(segment.frames) if frame >= first]
    take = lambda values: tuple(values[i] for i in kept)
    return replace(segment, pages=take(segment.pages), frames=take(segment.frames), positions=take(segment.positions))
