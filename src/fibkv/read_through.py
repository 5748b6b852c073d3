"""Dense and compressed caches on the same text and the same needle prompts, everything read through the codecs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fibkv.errors import ContractError
from fibkv.prompts import NeedlePrompt
from fibkv.quality import (
    CacheVariant,
    CausalLM,
    TokenScores,
    cached_logits,
    count_recalled,
    dense_logits,
    poison,
    score_tokens,
)
from fibkv.quality_result import PoisonOutcome
from fibkv.report import CacheReport

DENSE = "dense"
"""Name of the row that the others are compared with."""


class ReadThrough:
    """The measurements that a demonstration and an evaluation share. Methods give figures by name of the row.

    Attributes:
        reports: of every cache that was read, by variant.
    """

    def __init__(
        self,
        model: CausalLM,
        variants: Sequence[CacheVariant],
        *,
        chunk_tokens: int,
        step: Callable[[str], None],
    ) -> None:
        """Measures ``model`` with each of the variants; ``step`` is told what comes next.

        Raises:
            ContractError: two variants of one name, or one named like the dense row.
        """
        self.reports: dict[str, list[CacheReport]] = {variant.name: [] for variant in variants}
        if len(self.reports) < len(variants) or DENSE in self.reports:
            raise ContractError("variants", f"different names, none of them {DENSE!r}", [v.name for v in variants])
        self._model = model
        self._variants = variants
        self._chunk_tokens = chunk_tokens
        self._step = step

    def poison_outcomes(self, ids: Tensor) -> dict[str, PoisonOutcome]:
        """The poison test of each variant on ``ids`` [tokens]."""
        outcomes = {}
        for variant in self._variants:
            self._step(f"poison test: {variant.title}")
            outcomes[variant.name] = poison(self._model, variant, ids, chunk_tokens=self._chunk_tokens)
        return outcomes

    def window_scores(self, windows: Sequence[Tensor]) -> dict[str, list[TokenScores]]:
        """The scores of each window [tokens]."""
        scores: dict[str, list[TokenScores]] = {DENSE: [], **{variant.name: [] for variant in self._variants}}
        # One window at a time, so that the dense logits of one window only are held.
        for ids in windows:
            self._step("text: dense")
            dense = dense_logits(self._model, ids)
            scores[DENSE].append(score_tokens(dense, dense, ids))
            for variant in self._variants:
                self._step(f"text: {variant.title}")
                scores[variant.name].append(score_tokens(dense, self._logits(variant, ids), ids))
        return scores

    def recalled(self, prompts: Sequence[NeedlePrompt]) -> dict[str, int]:
        """How many planted values were recalled, all prompts together."""
        counts = dict.fromkeys([DENSE, *self.reports], 0)
        for prompt in prompts:
            self._step("needles: dense")
            counts[DENSE] += count_recalled(dense_logits(self._model, prompt.ids), prompt)
            for variant in self._variants:
                self._step(f"needles: {variant.title}")
                counts[variant.name] += count_recalled(self._logits(variant, prompt.ids), prompt)
        return counts

    def _logits(self, variant: CacheVariant, ids: Tensor) -> Tensor:
        cache = variant.make_cache(self._model, read_through=True)
        with variant.attention(self._model):
            logits = cached_logits(self._model, ids, cache, chunk_tokens=self._chunk_tokens)
        self.reports[variant.name].append(cache.report())
        return logits
