"""Contract two: a cache policy says which frames each query may read, and at which positions.

`plan` holds the words of a plan, `policies` who writes plans (`options`: by what), `store` the bytes and the attention
that follows a plan, `graph` the same for training; `rebuild` what runs once more, with the policies that make their
context anew in `context` and `shots`.
"""

from streamgen.cache.anchors import AnchorPolicy
from streamgen.cache.bank import BankPolicy
from streamgen.cache.context import RebuildPolicy
from streamgen.cache.deep import DeepPolicy
from streamgen.cache.graph import GraphStore
from streamgen.cache.look_back import LookBackPolicy
from streamgen.cache.merged import MergedPolicy
from streamgen.cache.plan import Fold, Group, Plan, Segment, Write
from streamgen.cache.policies import CachePolicy, Sizes, WindowPolicy, register_policy
from streamgen.cache.refresh import RefreshPolicy
from streamgen.cache.shots import ShotPolicy
from streamgen.cache.store import CacheContext, KVStore

__all__ = [
    "AnchorPolicy",
    "BankPolicy",
    "CacheContext",
    "CachePolicy",
    "DeepPolicy",
    "Fold",
    "GraphStore",
    "Group",
    "KVStore",
    "LookBackPolicy",
    "MergedPolicy",
    "Plan",
    "RebuildPolicy",
    "RefreshPolicy",
    "ShotPolicy",
    "Sizes",
    "Segment",
    "WindowPolicy",
    "Write",
    "register_policy",
]
