"""What the tests of pages, caches and artifacts share."""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.coder import RoleCoder, bind_coder
from fibkv.parameters import named_parameters
from fibkv.policy import Policy
from fibkv.regions import ProtectedRegions
from fibkv.sealing import LayerSettings
from fibkv.shape import KVShape

HEADS, DIM = 2, 64


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shape_of(role: str, *, tokens: int = 64, batch: int = 1, layers: int = 3, dtype: str = "f32") -> KVShape:
    return KVShape(
        role=role,
        attention_kind="gqa",
        batch=batch,
        layers=layers,
        kv_heads=HEADS,
        query_heads=4,
        tokens=tokens,
        head_dim=DIM,
        dtype=dtype,
        rope_state="post_rope" if role == "key" else "not_applicable",
    )


def coder(
    role: str,
    name: str = "fib4",
    policy: Policy | None = None,
    *,
    shape: KVShape | None = None,
    implementation: str = "reference",
) -> RoleCoder:
    policy = policy or Policy.per_token()
    if name == "raw":
        policy = policy.model_copy(update={"strategy": "raw"})
    shape = shape or shape_of(role)
    return bind_coder(
        shape,
        named_parameters(name, DIM, shape.dtype),
        policy,
        profile_id=f"test:{name}",
        tokens_per_page=16,
        raw_dtype=shape.dtype,
        implementation=implementation,
    )


def layer_settings(
    keys: str = "fib4",
    values: str = "fib4",
    policy: Policy | None = None,
    *,
    read_through: bool = False,
    implementation: str = "reference",
) -> LayerSettings:
    return LayerSettings(
        layer=1,
        key_shape=shape_of("key"),
        value_shape=shape_of("value"),
        keys=coder("key", keys, policy, implementation=implementation),
        values=coder("value", values, policy, implementation=implementation),
        tokens_per_page=16,
        read_through=read_through,
    )


def protecting(**regions: object) -> Policy:
    return Policy.per_token(ProtectedRegions(**regions))
