"""What the tests of pages, caches and artifacts share."""

from __future__ import annotations

import torch
from torch import Tensor

from fibkv.coder import RoleCoder, bind_coder
from fibkv.parameters import CodecParameters, named_parameters
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


def layer_settings_of(
    keys: CodecParameters,
    values: CodecParameters,
    *,
    heads: int,
    query_heads: int,
    policy: Policy,
    tokens_per_page: int,
    implementation: str,
) -> LayerSettings:
    """Settings of layer 0 of a float32 model with these codecs."""
    shapes, coders = [], []
    for role, parameters in (("key", keys), ("value", values)):
        shape = KVShape(
            role=role,
            attention_kind="mha" if heads == query_heads else "gqa",
            batch=1,
            layers=1,
            kv_heads=heads,
            query_heads=query_heads,
            tokens=max(tokens_per_page, 64),
            head_dim=parameters.head_dim,
            dtype="f32",
            rope_state="post_rope" if role == "key" else "not_applicable",
        )
        is_raw = parameters.codec == "raw"
        coders.append(
            bind_coder(
                shape,
                parameters,
                policy.model_copy(update={"strategy": "raw"}) if is_raw else policy,
                profile_id="test",
                tokens_per_page=tokens_per_page,
                raw_dtype="f32",
                implementation=implementation,
            )
        )
        shapes.append(shape)
    return LayerSettings(
        layer=0,
        key_shape=shapes[0],
        value_shape=shapes[1],
        keys=coders[0],
        values=coders[1],
        tokens_per_page=tokens_per_page,
    )


def protecting(**regions: object) -> Policy:
    return Policy.per_token(ProtectedRegions(**regions))
