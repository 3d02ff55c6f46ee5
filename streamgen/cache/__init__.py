"""Contract two: a cache policy says which frames each query may read, and at which positions.

`plan` holds the words of a plan, `policies` who writes plans, `store` the bytes and the attention that follows a plan.
"""

from streamgen.cache.plan import Group, Plan, Segment, Write
from streamgen.cache.policies import CachePolicy, WindowPolicy, register_policy
from streamgen.cache.store import CacheContext, GraphStore, KVStore

__all__ = [
    "CacheContext",
    "CachePolicy",
    "GraphStore",
    "Group",
    "KVStore",
    "Plan",
    "Segment",
    "WindowPolicy",
    "Write",
    "register_policy",
]
