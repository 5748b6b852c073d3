"""The shape of one role's key-value tensor: [batch, layers, kv_heads, tokens, head_dim], contiguous."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from fibkv.contract import Count, MarkedContract
from fibkv.errors import ContractError

Role = Literal["key", "value"]
AttentionKind = Literal["mha", "mqa", "gqa"]
Dtype = Literal["f16", "bf16", "f32"]
RopeState = Literal["pre_rope", "post_rope", "not_applicable"]

_MAX_ELEMENTS = 2**63 - 1


class KVShape(MarkedContract):
    """Counts and kinds of a key or value tensor. An invalid shape cannot exist.

    Raises:
        ContractError: on construction, by the first of these rules that is broken: the marker; each
            count above 0 (and below 2^32); query heads that fit the attention kind; a rotary state
            that fits the role; an element count that fits in a signed 64-bit integer.
    """

    schema_version: Literal["fib_quant_kv_tensor_shape_v1"] = "fib_quant_kv_tensor_shape_v1"
    role: Role
    attention_kind: AttentionKind
    batch: Count
    layers: Count
    kv_heads: Count
    query_heads: Count
    tokens: Count
    head_dim: Count
    dtype: Dtype
    rope_state: RopeState

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_heads()
        if self.role == "key" and self.rope_state == "not_applicable":
            raise ContractError("KVShape.rope_state", "pre_rope or post_rope for a key", self.rope_state)
        if self.role == "value" and self.rope_state != "not_applicable":
            raise ContractError("KVShape.rope_state", "not_applicable for a value", self.rope_state)
        if self.element_count > _MAX_ELEMENTS:
            raise ContractError("KVShape.element_count", f"at most {_MAX_ELEMENTS}", self.element_count)
        return self

    def _check_heads(self) -> None:
        if self.attention_kind == "mha" and self.query_heads != self.kv_heads:
            raise ContractError("KVShape.query_heads", f"kv_heads ({self.kv_heads}) for mha", self.query_heads)
        if self.attention_kind == "mqa" and self.kv_heads != 1:
            raise ContractError("KVShape.kv_heads", "1 for mqa", self.kv_heads)
        if self.query_heads % self.kv_heads != 0:
            expected = f"a multiple of kv_heads ({self.kv_heads}) for {self.attention_kind}"
            raise ContractError("KVShape.query_heads", expected, self.query_heads)

    @property
    def vector_count(self) -> int:
        """Number of vectors of ``head_dim`` elements."""
        return self.batch * self.layers * self.kv_heads * self.tokens

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return self.vector_count * self.head_dim

    def validate_block_dim(self, block_dim: int) -> None:
        """Check that vectors split into whole blocks of ``block_dim`` coordinates.

        Raises:
            ContractError: ``block_dim`` is not positive or does not divide ``head_dim``.
        """
        if block_dim <= 0 or self.head_dim % block_dim != 0:
            raise ContractError("block_dim", f"a positive divisor of head_dim {self.head_dim}", block_dim)

    def with_tokens(self, tokens: int) -> KVShape:
        """The same shape with another number of tokens.

        Raises:
            ContractError: ``tokens`` is not a valid count.
        """
        return self.model_copy(update={"tokens": tokens})

    def fixed_part(self, tokens_per_page: int) -> KVShape:
        """The shape that the pages of a live cache are bound to: one batch row, one page of tokens.

        A live cache grows and its rows come and go, so neither is part of what a page depends on.

        Raises:
            ContractError: ``tokens_per_page`` is not a valid count.
        """
        return self.model_copy(update={"batch": 1, "tokens": tokens_per_page})
