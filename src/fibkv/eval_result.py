"""What an evaluation measures and finds: plain data with a JSON form, stamped with its digest."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from fibkv.attention_errors import AttentionErrors
from fibkv.contract import Contract, Count, Index, MarkedContract
from fibkv.digest import Digest, require_digest
from fibkv.machine import Conditions
from fibkv.quality_result import PoisonOutcome, Quality

Kind = Literal["fibkv", "transformers", "simulated"]


class EvalSettings(Contract):
    """How much is measured.

    Attributes:
        num_windows: windows of text, spread evenly.
        window_tokens: tokens of a window and of a needle prompt.
        chunk_tokens: tokens per forward pass of the read-through evaluation.
        num_prompts: needle prompts of either kind.
        num_needles: planted values of a multi-key prompt.
        sinks: first tokens that every cache keeps raw.
        window: newest tokens that every cache keeps raw.
        drift_prompt: tokens fed at once before the decoding of a drift measurement.
        drift_buckets: stretches of decoded tokens over which the drift is averaged.
        num_queries: queries per head, spread evenly, of the errors per layer and head.
        seed: of the needle prompts.
        num_threads: CPU threads of torch.
    """

    num_windows: Count = 6
    window_tokens: Count = 1024
    chunk_tokens: Count = 128
    num_prompts: Count = 12
    num_needles: Count = 8
    sinks: Index = 0
    window: Index = 0
    drift_prompt: Count = 256
    drift_buckets: Count = 6
    num_queries: Count = 128
    seed: int = 0
    num_threads: Count = 1


QUICK = EvalSettings(
    num_windows=1, window_tokens=256, num_prompts=1, num_needles=4, drift_prompt=224, drift_buckets=2, num_queries=16
)
"""Tiny sizes, to see that it runs; the figures mean little."""


class HeadErrors(Contract):
    """The errors of one KV head of one layer, mean over windows."""

    layer: Index
    head: Index
    errors: AttentionErrors


class EvalRow(Contract):
    """One cache's figures.

    Attributes:
        name: short name.
        title: what a reader of the table sees.
        kind: whose it is: fibkv's pages, transformers' own quantizer, or a simulated one.
        codec_bits: codes, norms, scales and tables over the elements that are compressed, at one window of tokens.
        all_bits: every byte over all elements, at one window of tokens.
        raw_elements: elements kept raw (sinks, newest tokens, fallbacks), at one window of tokens.
        elements: of the whole cache then.
        quality: against dense, read-through.
        recalled_single: planted values recalled, one to a prompt.
        recalled_multi: the same, several to a prompt.
        drift: mean KL against dense in stretches of decoded tokens, from the first to the last.
        heads: errors of attention, layer by layer and head by head, on the dense model's keys, values and queries.
        mean_errors: their mean.
        materialized: dense copies that attention had to make; 0 when it always read the pages.
        poison: outcome of the poison test.
    """

    name: str
    title: str
    kind: Kind
    codec_bits: float
    all_bits: float
    raw_elements: int
    elements: int
    quality: Quality
    recalled_single: int
    recalled_multi: int
    drift: tuple[float, ...]
    heads: tuple[HeadErrors, ...]
    mean_errors: AttentionErrors
    materialized: int
    poison: PoisonOutcome

    @property
    def worst_head(self) -> HeadErrors:
        """The head with the largest total variation of its attention."""
        return max(self.heads, key=lambda one: one.errors.attention_tv)


class EvalResult(MarkedContract):
    """All figures of one run, and the conditions that they were taken under.

    Attributes:
        model: name of the model.
        model_digest: of its configuration.
        text_digest: of the text.
        num_parameters: weights of the model.
        dtype: of the model while it ran.
        bos: whether each window starts with a beginning-of-sequence token.
        settings: how much was measured.
        planted_single: values to recall in the prompts with one.
        planted_multi: values to recall in the prompts with several.
        dense_perplexity: of the dense model.
        dense_single: planted values that it recalled, one to a prompt.
        dense_multi: the same, several to a prompt.
        rows: one per cache.
        skipped: caches that could not be made here, each with the reason.
        caveats: what has to be said of this model.
        conditions: of the machine.
        seconds: duration of the run.
    """

    schema_version: Literal["fibkv_eval_v1"] = "fibkv_eval_v1"
    model: str
    model_digest: Digest
    text_digest: Digest
    num_parameters: int
    dtype: str
    bos: bool
    settings: EvalSettings
    planted_single: int
    planted_multi: int
    dense_perplexity: float
    dense_single: int
    dense_multi: int
    rows: tuple[EvalRow, ...]
    skipped: tuple[tuple[str, str], ...]
    caveats: tuple[str, ...]
    conditions: Conditions
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every cache passed the poison test and was read without dense copies."""
        return all(row.poison.passed and row.materialized == 0 for row in self.rows)


class EvalReceipt(Contract):
    """A result and its digest, as it is written to a file. ``values`` says that what was read is approximate.

    Raises:
        DigestMismatch: on construction, a result that is not the one which was stamped.
    """

    operation: Literal["eval"] = "eval"
    values: Literal["approximate"] = "approximate"
    digest: Digest
    result: EvalResult

    @classmethod
    def of(cls, result: EvalResult) -> Self:
        """The receipt of a result."""
        return cls(digest=result.digest(), result=result)

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_digest("EvalReceipt.digest", self.digest, self.result.digest())
        return self
