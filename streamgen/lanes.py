"""What rows of one lane remember: a cache policy's bookkeeping, and the pages it speaks of."""

from __future__ import annotations

from dataclasses import dataclass

from streamgen.cache import CachePolicy, GraphStore, KVStore


@dataclass(slots=True)
class LaneCache:
    """A policy and its stores, one per expert of the model."""

    policy: CachePolicy
    stores: list[KVStore | GraphStore]

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
