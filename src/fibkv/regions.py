"""What a profile is made of beside its codec: regions kept raw, page geometry, fallback, quality budget."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fibkv.contract import Contract, Count, Index, MarkedContract
from fibkv.errors import ContractError
from fibkv.shape import KVShape

Axis = Literal["raw", "per_token", "per_channel", "role_aware_kivi_style"]
FallbackMode = Literal["keep_raw", "fail_closed"]

_Bound = Annotated[float, Field(ge=0)]


class ProtectedRegions(Contract):
    """Vectors that stay raw: the first and last tokens, and whole layers and KV heads."""

    first_tokens_raw: Index = 0
    last_tokens_raw: Index = 0
    raw_layers: tuple[Index, ...] = ()
    raw_heads: tuple[Index, ...] = ()

    def is_protected(self, tokens: int, layer: int, head: int, token: int) -> bool:
        """Whether one vector of a tensor of ``tokens`` tokens is protected."""
        return (
            token < self.first_tokens_raw
            or token + self.last_tokens_raw >= tokens
            or layer in self.raw_layers
            or head in self.raw_heads
        )

    def boundaries(self, shape: KVShape) -> tuple[list[int], list[int], list[int]]:
        """Ascending indices of layers, heads and tokens, 0 and the count included, between which nothing changes."""
        last = max(0, shape.tokens - self.last_tokens_raw)
        return (
            _around(self.raw_layers, shape.layers),
            _around(self.raw_heads, shape.kv_heads),
            sorted({0, min(self.first_tokens_raw, shape.tokens), last, shape.tokens}),
        )

    def validate_for(self, shape: KVShape) -> None:
        """Check that everything listed exists in a shape.

        Raises:
            ContractError: more first or last tokens than the shape has, or a layer or head outside it.
        """
        for name in ("first_tokens_raw", "last_tokens_raw"):
            if getattr(self, name) > shape.tokens:
                raise ContractError(f"ProtectedRegions.{name}", f"at most {shape.tokens} tokens", getattr(self, name))
        for layer in self.raw_layers:
            if layer >= shape.layers:
                raise ContractError("ProtectedRegions.raw_layers", f"layers below {shape.layers}", layer)
        for head in self.raw_heads:
            if head >= shape.kv_heads:
                raise ContractError("ProtectedRegions.raw_heads", f"KV heads below {shape.kv_heads}", head)


class FallbackSettings(Contract):
    """What happens to vectors that the codec cannot encode.

    ``keep_raw`` stores them raw and counts the reason in the receipt; ``fail_closed`` refuses the operation.
    """

    mode: FallbackMode = "keep_raw"
    raw_available: bool = True


class QualityBudget(Contract):
    """Upper bounds on measured errors, each absent (None) or finite and not negative."""

    max_logit_mse: _Bound | None = None
    max_attention_tv: _Bound | None = None
    max_topk_disagreement: _Bound | None = None
    max_value_aggregation_mse: _Bound | None = None
    fallback_on_violation: FallbackMode = "keep_raw"

    @classmethod
    def unavailable(cls) -> QualityBudget:
        """The budget that bounds nothing."""
        return cls()

    @property
    def has_any_metric(self) -> bool:
        """Whether at least one bound is present."""
        bounds = (
            self.max_logit_mse,
            self.max_attention_tv,
            self.max_topk_disagreement,
            self.max_value_aggregation_mse,
        )
        return any(bound is not None for bound in bounds)


class PageGeometry(MarkedContract):
    """How tokens fall into pages, and the fixed sizes that make a page's address arithmetic.

    Raises:
        ContractError: on construction, for a size of zero or a raw vector that is not f32.
    """

    schema_version: Literal["fib_quant_kv_page_geometry_v1"] = "fib_quant_kv_page_geometry_v1"
    tokens_per_page: Count
    # An encoded block is one vector: nothing smaller is addressed, nothing larger has a fixed size.
    vectors_per_block: Literal[1] = 1
    head_dim: Count
    encoded_block_bytes: Count
    raw_vector_bytes: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.raw_vector_bytes != 4 * self.head_dim:
            expected = f"{4 * self.head_dim} (4 bytes for each of head_dim {self.head_dim})"
            raise ContractError("PageGeometry.raw_vector_bytes", expected, self.raw_vector_bytes)
        return self

    @classmethod
    def of(cls, tokens_per_page: int, head_dim: int, vector_nbytes: int) -> PageGeometry:
        """Geometry of pages whose encoded vectors take ``vector_nbytes`` bytes each.

        Raises:
            ContractError: a number is not a valid count.
        """
        return cls(
            tokens_per_page=tokens_per_page,
            head_dim=head_dim,
            encoded_block_bytes=vector_nbytes,
            raw_vector_bytes=4 * head_dim,
        )

    def num_pages(self, tokens: int) -> int:
        """Number of pages that hold ``tokens`` tokens; the last one may be short."""
        return -(-tokens // self.tokens_per_page)

    def validate_for(self, shape: KVShape, vector_nbytes: int) -> None:
        """Check the geometry against a shape and against the codec's real size of an encoded vector.

        Raises:
            ContractError: pages longer than the shape, another head_dim, or another encoded size.
        """
        if self.tokens_per_page > shape.tokens:
            raise ContractError("PageGeometry.tokens_per_page", f"at most {shape.tokens} tokens", self.tokens_per_page)
        if self.head_dim != shape.head_dim:
            raise ContractError("PageGeometry.head_dim", f"{shape.head_dim} of the shape", self.head_dim)
        block_nbytes = self.vectors_per_block * vector_nbytes
        if self.encoded_block_bytes != block_nbytes:
            expected = f"{block_nbytes} bytes of the codec"
            raise ContractError("PageGeometry.encoded_block_bytes", expected, self.encoded_block_bytes)


def _around(listed: tuple[int, ...], count: int) -> list[int]:
    return sorted({0, count, *listed, *(index + 1 for index in listed)})
