"""What rows of one lane remember: a cache policy's bookkeeping, and the pages it speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamgen.cache import CachePolicy, GraphStore, KVStore, Plan
from streamgen.forward import BoundRow
from streamgen.schedules import Call, Row

Bound = tuple[Plan, Any]  # a plan, and the context that follows it


class LaneCache:
    """A policy and its stores, one per expert of the model, and the plans that calls of the present chunk share."""

    def __init__(self, policy: CachePolicy, stores: list[KVStore | GraphStore]) -> None:
        self.policy, self.stores = policy, stores
        self.plans: dict[tuple, Bound] = {}

    def bind(self, call: Call, row: Row, frames: tuple[range, ...], expert: int, rope) -> Bound:
        """Plan and context of a row."""
        plan = self.policy.plan(call, row, frames)
        return plan, self.stores[expert].bind(plan, rope)

    def shared(self, call: Call, row: Row, frames: tuple[range, ...], expert: int, rope) -> Bound:
        """The same, kept with its angles for all steps of a chunk; training binds each forward anew."""
        if isinstance(self.stores[expert], GraphStore):
            return self.bind(call, row, frames, expert, rope)
        key = (frames, expert, self.policy.variant(row))
        if key not in self.plans:
            self.plans[key] = self.bind(call, row, frames, expert, rope)
        return self.plans[key]

    def stage(self, plan: Plan, work: BoundRow) -> None:
        """Keep what later calls of the same chunk read."""
        self.stores[work.expert].stage(plan, work.context)

    def publish(self, calls: Sequence[tuple[Plan, BoundRow]], frames: Sequence[int]) -> None:
        """Make finished calls visible to later ones, and tell the policy once all of them are."""
        for plan, work in calls:
            self.stores[work.expert].publish(plan, work.context, work.keys)
        self.policy.commit(frames)
        self.plans = {}  # they followed what was committed before

    def reserve(self, frames: int) -> None:
        """Make room for a call of so many frames that encodes pages again; an exception changes nothing."""
        for store in self.stores if self.policy.pages else ():
            store.reserve(frames)

    def fork(self, policy: CachePolicy) -> LaneCache:
        """An independent copy; `policy` is a fresh one, to be brought to the same state."""
        policy.load_state_dict(self.policy.state_dict())
        return LaneCache(policy, [store.fork() for store in self.stores])

    def state_dict(self) -> dict:
        return {"policy": self.policy.state_dict(), "stores": [store.state_dict() for store in self.stores]}

    def load_state_dict(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"])
        for store, saved in zip(self.stores, state["stores"], strict=True):
            store.load_state_dict(saved)
        self.plans = {}
