"""fibkv compresses the key-value cache of language models while they run, and attends to the compressed pages.

Names are loaded when they are first used, so that the contracts can be used without torch and without transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fibkv.artifact import Artifact
    from fibkv.artifact_decode import decode_slice, decode_tensor
    from fibkv.artifact_encode import encode_tensor
    from fibkv.coder import bind_profile
    from fibkv.errors import BudgetError, FibkvError
    from fibkv.hf import Cache
    from fibkv.hf_attention import attention
    from fibkv.hf_restore import restore
    from fibkv.hf_saver import Saver
    from fibkv.hf_session import Session
    from fibkv.ladder import Ladder
    from fibkv.policy import Policy, decide, plan
    from fibkv.pool import Pool
    from fibkv.pressure import PressureConfig, PressureController
    from fibkv.profile import Profile
    from fibkv.receipt import Receipt
    from fibkv.regions import ProtectedRegions, QualityBudget
    from fibkv.shape import KVShape

_HOMES = {
    "Artifact": "artifact",
    "BudgetError": "errors",
    "Cache": "hf",
    "FibkvError": "errors",
    "KVShape": "shape",
    "Ladder": "ladder",
    "Policy": "policy",
    "Pool": "pool",
    "PressureConfig": "pressure",
    "PressureController": "pressure",
    "Profile": "profile",
    "ProtectedRegions": "regions",
    "QualityBudget": "regions",
    "Receipt": "receipt",
    "Saver": "hf_saver",
    "Session": "hf_session",
    "attention": "hf_attention",
    "bind_profile": "coder",
    "decide": "policy",
    "decode_slice": "artifact_decode",
    "decode_tensor": "artifact_decode",
    "encode_tensor": "artifact_encode",
    "plan": "policy",
    "restore": "hf_restore",
}

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in the order of the ranks: contracts, tensors, models
    "FibkvError",
    "BudgetError",
    "KVShape",
    "Ladder",
    "Policy",
    "PressureConfig",
    "PressureController",
    "Profile",
    "ProtectedRegions",
    "QualityBudget",
    "Receipt",
    "decide",
    "plan",
    "Artifact",
    "bind_profile",
    "decode_slice",
    "decode_tensor",
    "encode_tensor",
    "Pool",
    "Cache",
    "Session",
    "Saver",
    "attention",
    "restore",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fibkv' has no attribute {name!r}")
    return getattr(import_module(f"fibkv.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
