"""Quality budgets while a cache runs: some pages are measured when they are sealed, while their originals are there.

A cache is never told of queries, so they are drawn once with the second moments that the calibration saw, head by head,
and every sampled page of the layer is looked at with the same ones. What is measured is attention over the page alone,
with one role through its codec and the other exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fibkv.attention_errors import AttentionErrors, attention_errors
from fibkv.calibration import LayerStatistics
from fibkv.errors import EncodingError
from fibkv.page import Segment, decode_segments
from fibkv.regions import QualityBudget
from fibkv.report import BudgetViolation
from fibkv.shape import Role

QUERIES = 32
"""Per KV head."""


@dataclass(frozen=True, eq=False)
class PageSampler:
    """Measures pages of one layer.

    Attributes:
        layer: its index.
        budget: what holds for each KV head of each page.
        every: the page of every so many is measured, from the first one on.
        queries: ``[H, QUERIES, d]`` float32, on the CPU.
        found: where broken bounds are noted, in order; the layers of a cache share it.
    """

    layer: int
    budget: QualityBudget
    every: int
    queries: Tensor
    found: list[BudgetViolation]

    @classmethod
    def of(
        cls, layer: int, budget: QualityBudget, every: int, statistics: LayerStatistics, found: list[BudgetViolation]
    ) -> PageSampler:
        """A sampler with queries that have the second moment of a calibration."""
        values, vectors = torch.linalg.eigh(statistics.query_moment.to(torch.float64))
        root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
        heads, dim = root.shape[:2]
        noise = torch.randn(heads, QUERIES, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
        return cls(layer, budget, every, (noise @ root).to(torch.float32), found)

    def broken(
        self, page: int, start: int, exact: tuple[Tensor, Tensor], sealed: tuple[Sequence[Segment], Sequence[Segment]]
    ) -> set[Role]:
        """The roles of a page that break the budget; they are noted.

        Args:
            page: number of the page in its row.
            start: its first token.
            exact: keys ``[H, T, d]`` and values ``[H, T, d_value]`` as they came.
            sealed: the segments of both.

        Raises:
            EncodingError: a bound is broken, and the budget's fallback is ``fail_closed``.
        """
        if page % self.every or not all(bool(torch.isfinite(side).all()) for side in exact):
            return set()
        wide = [side.detach().to(torch.float32) for side in exact]
        roles: tuple[tuple[Role, int], ...] = (("key", 0), ("value", 1))
        broken: set[Role] = set()
        for role, index in roles:
            if all(segment.codec.name == "raw" for segment in sealed[index]):
                continue
            decoded = list(wide)
            decoded[index] = decode_segments(sealed[index], torch.empty_like(wide[index]))
            errors = attention_errors(self.queries.to(wide[0].device), (wide[0], wide[1]), (decoded[0], decoded[1]))
            violations = list(self._violations(start, role, sealed[index], errors))
            if violations and self.budget.fallback_on_violation == "fail_closed":
                raise EncodingError(f"quality budget, {violations[0]}")
            if violations:
                broken.add(role)
                self.found.extend(violations)
        return broken

    def _violations(
        self, start: int, role: Role, segments: Sequence[Segment], errors: Sequence[AttentionErrors]
    ) -> Iterator[BudgetViolation]:
        codec = next(segment.codec.name for segment in segments if segment.codec.name != "raw")
        for head, of_head in enumerate(errors):
            for bound, value in of_head.by_bound().items():
                allowed = getattr(self.budget, bound)
                if allowed is not None and value > allowed:
                    yield BudgetViolation(
                        layer=self.layer,
                        head=head,
                        role=role,
                        profile=codec,
                        bound=bound,
                        allowed=allowed,
                        measured=value,
                        start=start,
                    )
