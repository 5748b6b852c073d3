"""What a demonstration measures and finds: plain data with a JSON form."""

from __future__ import annotations

from fibkv.contract import Contract, Count
from fibkv.quality_result import PoisonOutcome, Quality


class DemoSettings(Contract):
    """How much is measured.

    Attributes:
        num_windows: windows of text, spread evenly.
        window_tokens: tokens of a window, of a needle prompt and of the prompt before decoding.
        chunk_tokens: tokens per forward pass of the read-through evaluation.
        num_prompts: needle prompts.
        num_needles: planted values per prompt.
        new_tokens: tokens decoded per speed measurement.
        rounds: speed measurements per row, interleaved.
        seed: of the needle prompts.
        num_threads: CPU threads of torch while the run lasts. One by default: the tensors of a small model at batch 1
            gain little from more, and on a busy machine threads that wait for each other cost many times the run.
    """

    num_windows: Count = 6
    window_tokens: Count = 1024
    chunk_tokens: Count = 128
    num_prompts: Count = 12
    num_needles: Count = 8
    new_tokens: Count = 48
    rounds: Count = 3
    seed: int = 0
    num_threads: Count = 1


class DenseRow(Contract):
    """The dense model's figures.

    Attributes:
        bits_per_element: of the dtype that its cache holds, which is the model's.
        nbytes: of its cache at one window of tokens.
        perplexity: on the windows.
        recalled: planted values recalled.
        tokens_per_second: greedy decoding after a prompt of one window.
    """

    bits_per_element: float
    nbytes: int
    perplexity: float
    recalled: int
    tokens_per_second: float


class VariantRow(Contract):
    """One compressed cache's figures.

    Attributes:
        name: the variant's short name.
        title: what a reader of the table sees.
        bits_per_element: all counted bytes times 8 over elements, at one window of tokens.
        nbytes: all counted bytes at one window of tokens.
        quality: against dense, read-through.
        recalled: planted values recalled.
        tokens_per_second: greedy decoding after a prompt of one window.
        materialized: dense copies that attention had to make; 0 when it always read the pages.
        poison: outcome of the poison test.
    """

    name: str
    title: str
    bits_per_element: float
    nbytes: int
    quality: Quality
    recalled: int
    tokens_per_second: float
    materialized: int
    poison: PoisonOutcome


class DemoResult(Contract):
    """All figures of one run, and the conditions that they were taken under.

    Attributes:
        model: name of the model.
        num_parameters: weights of the model.
        dtype: of the model while it ran.
        device: that the model ran on, and its threads if it is a CPU.
        bos: whether each window starts with a beginning-of-sequence token.
        settings: how much was measured.
        needles_planted: values to recall in all prompts together.
        caveats: what has to be said of this model.
        dense: the yardstick.
        variants: one row per compressed cache.
        seconds: duration of the run.
    """

    model: str
    num_parameters: int
    dtype: str
    device: str
    bos: bool
    settings: DemoSettings
    needles_planted: int
    caveats: tuple[str, ...]
    dense: DenseRow
    variants: tuple[VariantRow, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every compressed cache passed the poison test and was read without dense copies."""
        return all(row.poison.passed and row.materialized == 0 for row in self.variants)
