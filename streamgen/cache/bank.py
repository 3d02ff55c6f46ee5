"""A memory bank: single frames of the past, kept while the prompt still asks for them (MemFlow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamgen.cache.options import WindowOptions, needs_own_commits
from streamgen.cache.plan import Group, Merge, Plan, Record, Route
from streamgen.cache.policies import Pages, Sizes, WindowPolicy, register_policy
from streamgen.config import StreamConfig
from streamgen.errors import InputError
from streamgen.schedules import Call, CallKind, Row


@dataclass(frozen=True)
class BankOptions(WindowOptions):
    """A window and its bank.

    Args:
        size: frames in the bank.
        interval: chunks between two records, each the first frame of a chunk.
        sparse: every head reads only the `kept` frames of sink and bank that suit its queries best.
        repeat: merge the newest record before every chunk, as released, not once.
    """

    size: int = 3
    interval: int = 3
    sparse: bool = False
    kept: int = 3
    repeat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("size", self.size), ("interval", self.interval), ("kept", self.kept)):
            if value < 1:
                raise InputError(f"cache.bank.{name} must be at least 1, got {value}")
        if self.window == -1:
            raise InputError("a bank remembers what a window forgets: cache.window=-1 forgets nothing")
        if self.positions in ("trail", "restart", "ahead"):
            raise InputError(
                f"positions.rule={self.positions} goes by the numbers of frames, which those in a bank lose: use "
                "absolute, packed, before or tri-region"
            )

    @classmethod
    def from_config(cls, config: StreamConfig) -> BankOptions:
        needs_own_commits(config)
        if config.cache.collapse_text:
            raise InputError(
                "cache.policy=bank scores frames by all rows of a prompt, and cache.collapse_text=true leaves one of "
                "its padding: use cache.collapse_text=false"
            )
        bank = config.cache.bank
        own = dict(size=bank.size, interval=bank.interval, sparse=bank.sparse, kept=bank.kept, repeat=bank.repeat)
        return cls(**vars(WindowOptions.from_config(config)), **own)


@register_policy("bank", BankOptions)
class BankPolicy(WindowPolicy):
    """Sink, bank, recent frames. Pages: [sink | bank | the newest record | ring].

    With absolute positions a frame in the bank stays where it was written, as released: content chooses it, so no plan
    knows its number. Other rules place it by its rank, from raw keys.
    """

    extra_region = "bank"

    def __init__(self, options: BankOptions, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self.extra_fixed = options.positions == "absolute"
        self.records = 0  # made so far

    @property
    def reserved(self) -> int:
        return self.options.size + 1

    def _extra_frames(self) -> int:
        return self.options.size

    # ------------------------------------------------------------------------------------------- reads
    def _extra(self, first: int, *seen: Sequence[int]) -> Pages:
        """What the bank holds; -1 for frames that content chose."""
        held, step = min(self.records, self.options.size), self.options.interval * self.sizes.chunk
        known = self.records <= self.options.size
        return [(i * step if known else -1, self.sink + i) for i in range(held)]

    def _group(self, own: list[int], part: tuple[int, int, int]) -> Group:
        return self._routed(super()._group(own, part))

    def _recache_group(self, own: list[int]) -> Group:
        return self._routed(super()._recache_group(own))

    def _routed(self, group: Group) -> Group:
        choices = sum(len(s.pages) for s in group.segments if s.region in ("sink", self.extra_region))
        if not self.options.sparse or choices <= self.options.kept:
            return group
        return replace(group, route=Route(("sink", self.extra_region), self.options.kept))

    # ------------------------------------------------------------------------------------------- writes
    def _records(self, first: int) -> bool:
        return first // self.sizes.chunk % self.options.interval == 0

    def plan(self, call: Call, row: Row, frames: Sequence[range]) -> Plan:
        plan = super().plan(call, row, frames)
        if call.kind is not CallKind.CLEAN:
            return plan
        staging = self.sink + self.options.size
        fresh = call.source == "flight" and self._records(frames[0].start)
        count = self.records + fresh
        record = Record(0, staging, frames[0].start if self.extra_fixed else None) if fresh else None
        if not count or not (fresh or self.options.repeat):
            return replace(plan, record=record)
        place = count - 1 if count <= self.options.size else None
        pages = tuple(range(self.sink, staging))
        return replace(plan, record=record, merge=Merge(pages, staging, place))

    def commit(self, frames: Sequence[int]) -> None:
        if frames[-1] >= self.frames and self._records(frames[0]):
            self.records += 1
        super().commit(frames)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "records": self.records}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.records = state["records"]
