"""What a step of attention on a device is decided by, and what moves from one such step to the next."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from fibkv.kernels.runs import Scores


class Held(NamedTuple):
    """What is known of one side of a tail: its tokens come and go."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Kind(NamedTuple):
    """What a step is decided by. Whatever is not here may differ from one call to the next.

    Attributes:
        device: of the queries.
        dtype: of the queries.
        shape: of the queries, ``[B, Hq, Q, d]``.
        heads: H, KV heads.
        keys: of the tail; None = it is empty.
        values: of the tail; None = it is empty.
        masks: of each group of pages, and of the tail at last: ``none``, ``causal``, ``bool`` or ``float``.
        softcap: whether logits are bent.
    """

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    heads: int
    keys: Held | None
    values: Held | None
    masks: tuple[str, ...]
    softcap: bool

    @property
    def length(self) -> int:
        """Q."""
        return self.shape[2]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, H, and G * Q, the queries of a KV head."""
        rows, query_heads, length, _ = self.shape
        return rows, self.heads, query_heads // self.heads * length


class Moving(NamedTuple):
    """What the launches of one step share.

    Attributes:
        past: tokens before the first query.
        mask: as kernels read it, bytes or float32; None = there is none.
        strides: of the mask's rows, heads and queries.
        scale: of the logits.
        softcap: of the logits; 0 = they are not bent.
        outs: of ``[S, B, H, G * Q, d_value]`` float32.
        lses: of ``[S, B, H, G * Q]`` float32.
        stream: handle of the device's current one.
    """

    past: int
    mask: Tensor | None
    strides: tuple[int, int, int]
    scale: float
    softcap: float
    outs: Tensor
    lses: Tensor
    stream: int

    @classmethod
    def of(cls, scores: Scores, past: int, outs: Tensor, lses: Tensor, stream: int) -> Self:
        """By how logits become weights."""
        mask, strides = _as_read(scores.mask)
        return cls(past, mask, strides, float(scores.scale), float(scores.softcap or 0.0), outs, lses, stream)


def _as_read(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    if mask is None:
        return None, (0, 0, 0)
    mask = mask.detach()
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.to(torch.float32)
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    row, head, query = (0 if mask.shape[axis] == 1 else mask.stride(axis) for axis in range(3))
    return mask, (row, head, query)
