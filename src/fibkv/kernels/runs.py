"""What kernels that read pages where they lie are given: runs of pages, masking, and the two calls they offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fibkv.codes import Codes
from fibkv.packed import Held
from fibkv.space import KeySpace
from fibkv.tables import Tables


@dataclass(frozen=True, eq=False)
class Run:
    """P consecutive spans of T tokens, for B batch rows and a range of heads, each with codes of its own.

    Attributes:
        rows: half-open range of batch rows.
        heads: half-open range of KV heads.
        start: first token; span ``p`` starts at ``start + p * tokens``.
        tokens: T.
        key_tables: of the keys' codec.
        keys: [B][P] codes ``[heads, T, ...]``.
        value_tables: of the values' codec.
        values: [B][P] codes ``[heads, T, ...]``.
        rotated: whether attention rotates queries and un-rotates outputs; else both are in the codes' space already.
        space: of the keys, for all KV heads of the layer; None = keys are coded as they are.
    """

    rows: tuple[int, int]
    heads: tuple[int, int]
    start: int
    tokens: int
    key_tables: Tables
    keys: Sequence[Sequence[Held]]
    value_tables: Tables
    values: Sequence[Sequence[Held]]
    rotated: bool = True
    space: KeySpace | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """How logits become weights.

    Attributes:
        scale: factor of q.k.
        softcap: c of c * tanh(logits / c), or None.
        mask: ``[B or 1, heads or 1, Q, length]``, bool (True = attend) or floating (added); None = no mask.
        causal: without a mask, whether query i sees only keys up to its own position (the queries are the newest
            tokens).
    """

    scale: float
    softcap: float | None = None
    mask: Tensor | None = None
    causal: bool = True


class InPlace(ABC):
    """Kernels that attend to everything that a layer holds in one call, on pages where they lie."""

    @abstractmethod
    def plan(self, runs: Sequence[Run]) -> Any:
        """Makes runs ready to be attended to, once per page table; what it returns keeps their codes alive."""

    @abstractmethod
    def attend_plan(
        self,
        query: Tensor,
        plan: Any,
        tail: tuple[Tensor, Tensor, int],
        scores: Scores,
        *,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention on everything that a layer holds.

        Args:
            query: ``[B, Hq, Q, d]`` floating.
            plan: of the pages.
            tail: raw keys ``[B, H, capacity, d]`` and values ``[B, H, capacity, d_value]``, and how many tokens of
                them, the newest of the layer, are in use.
            scores: how logits become weights.
            length: tokens of the layer, the tail's included; the queries are the newest.

        Returns:
            ``out [B, Hq, Q, d_value]``, float32 or in the query's dtype, and ``lse [B, Hq, Q]`` float32.
        """

    def attend(
        self,
        query: Tensor,
        key_codes: Codes,
        key_tables: Tables,
        value_codes: Codes,
        value_tables: Tables,
        *,
        scale: float,
        mask: Tensor | None = None,
        softcap: float | None = None,
        key_mean: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of rotated queries on one part, as a layer of one page; see `fibkv.kernels.reference.attend`."""
        leading, tokens = key_codes.axes[:-1], key_codes.axes[-1]
        keys, values = (_flat(codes, leading) for codes in (key_codes, value_codes))
        heads = leading.numel()
        queries = query.expand(*leading, *query.shape[-2:]).reshape(1, heads, *query.shape[-2:])
        if mask is not None:
            mask = mask.expand(*leading, query.shape[-2], tokens).reshape(1, heads, query.shape[-2], tokens)
        run = Run(
            rows=(0, 1),
            heads=(0, heads),
            start=0,
            tokens=tokens,
            key_tables=key_tables,
            keys=[[keys]],
            value_tables=value_tables,
            values=[[values]],
            rotated=False,
            # Queries that are in the codes' space already take the mean there.
            space=None if key_mean is None else KeySpace.of(key_mean.expand(*leading, -1).reshape(heads, -1)),
        )
        tail = [query.new_empty(1, heads, 0, tables.head_dim) for tables in (key_tables, value_tables)]
        out, lse = self.attend_plan(
            queries,
            self.plan([run]),
            (tail[0], tail[1], 0),
            Scores(scale, softcap, mask, causal=False),
            length=tokens,
        )
        return out.view(*leading, *out.shape[2:]), lse.view(*leading, lse.shape[2])


def _flat(codes: Codes, leading: torch.Size) -> Codes:
    """Codes with their leading axes made one."""
    return codes.map(lambda tensor: tensor.reshape(leading.numel(), *tensor.shape[len(leading) :]))
