import json

import pytest

from fibkv.errors import ContractError
from fibkv.shape import KVShape

from .examples import KEY_SHAPE, VALUE_SHAPE


def changed(**fields: object) -> KVShape:
    return KVShape(**{**KEY_SHAPE.model_dump(), **fields})


def test_check_value() -> None:
    text = KEY_SHAPE.to_json()
    assert text == (
        '{"schema_version":"fib_quant_kv_tensor_shape_v1","role":"key","attention_kind":"gqa","batch":1,"layers":2,'
        '"kv_heads":2,"query_heads":8,"tokens":16,"head_dim":64,"dtype":"f16","rope_state":"post_rope"}'
    )
    assert KEY_SHAPE.digest() == "blake3:8da7929878f73f0cbf406494b6b5f76c266278d0387c28208258453c2279adec"


def test_counts() -> None:
    shape = changed(batch=3)
    assert shape.vector_count == 3 * 2 * 2 * 16
    assert shape.element_count == 3 * 2 * 2 * 16 * 64


REFUSALS = [
    ({"schema_version": "v0"}, r"schema_version: expected 'fib_quant_kv_tensor_shape_v1', got 'v0'"),
    ({"role": "query"}, r"role: expected 'key' or 'value', got 'query'"),
    ({"attention_kind": "mla"}, r"attention_kind: expected 'mha', 'mqa' or 'gqa', got 'mla'"),
    ({"dtype": "f64"}, r"dtype: expected 'f16', 'bf16' or 'f32', got 'f64'"),
    *[
        ({name: 0}, rf"{name}: expected greater than 0, got 0")
        for name in ("batch", "layers", "kv_heads", "query_heads", "tokens", "head_dim")
    ],
    ({"batch": -1}, r"batch: expected greater than 0, got -1"),
    ({"tokens": 2**32}, r"tokens: expected less than 4294967296, got 4294967296"),
    ({"attention_kind": "mha"}, r"query_heads: expected kv_heads \(2\) for mha, got 8"),
    ({"attention_kind": "mqa"}, r"kv_heads: expected 1 for mqa, got 2"),
    ({"query_heads": 7}, r"query_heads: expected a multiple of kv_heads \(2\) for gqa, got 7"),
    ({"rope_state": "not_applicable"}, r"rope_state: expected pre_rope or post_rope for a key, got 'not_applicable'"),
    ({"role": "value"}, r"rope_state: expected not_applicable for a value, got 'post_rope'"),
    ({"tokens": 2**31, "layers": 2**31}, r"element_count: expected at most 9223372036854775807, got \d+"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSALS)
def test_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=rf"^KVShape\.{message}$"):
        changed(**fields)
    with pytest.raises(ContractError, match=rf"^KVShape\.{message}$"):
        KVShape.from_json(json.dumps({**KEY_SHAPE.model_dump(), **fields}))


ORDER = [
    ({"schema_version": "v0"}, "schema_version"),
    ({"batch": 0}, "batch"),
    ({"layers": 0}, "layers"),
    ({"kv_heads": 0}, "kv_heads"),
    ({"query_heads": 0}, "query_heads"),
    ({"tokens": 0}, "tokens"),
    ({"head_dim": 0}, "head_dim"),
    ({"attention_kind": "mqa", "kv_heads": 3}, "kv_heads"),
    ({"query_heads": 7}, "query_heads"),
    ({"rope_state": "not_applicable"}, "rope_state"),
    ({"tokens": 2**31, "layers": 2**31}, "element_count"),
]


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_the_first_broken_rule_is_the_one_named(first: int) -> None:
    fields: dict[str, object] = {}
    for later, _ in reversed(ORDER[first:]):
        fields |= later
    with pytest.raises(ContractError, match=rf"^KVShape\.{ORDER[first][1]}: "):
        changed(**fields)


def test_valid_kinds() -> None:
    changed(attention_kind="mha", query_heads=2)
    changed(attention_kind="mqa", kv_heads=1)
    changed(rope_state="pre_rope")
    assert VALUE_SHAPE.role == "value"


def test_largest_element_count() -> None:
    changed(kv_heads=1, query_heads=1, attention_kind="mha", layers=1, tokens=2**31, head_dim=2**32 - 1)


@pytest.mark.parametrize("block_dim", [1, 2, 32, 64])
def test_block_dims_that_fit(block_dim: int) -> None:
    KEY_SHAPE.validate_block_dim(block_dim)


@pytest.mark.parametrize("block_dim", [0, -2, 3, 128])
def test_block_dims_that_do_not(block_dim: int) -> None:
    with pytest.raises(
        ContractError, match=f"^block_dim: expected a positive divisor of head_dim 64, got {block_dim}$"
    ):
        KEY_SHAPE.validate_block_dim(block_dim)


def test_fixed_part_does_not_depend_on_batch_and_tokens() -> None:
    fixed = KEY_SHAPE.fixed_part(64)
    assert (fixed.batch, fixed.tokens, fixed.layers) == (1, 64, 2)
    assert changed(batch=5).with_tokens(4096).fixed_part(64).digest() == fixed.digest()
    with pytest.raises(ContractError, match=r"KVShape\.tokens: expected greater than 0, got 0"):
        KEY_SHAPE.with_tokens(0)
