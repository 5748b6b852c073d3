"""What a model is evaluated on: windows of a text, and needle prompts with that text as filler.

Tokenizers are those of transformers. Token ids are int64 tensors on the CPU.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fibkv.errors import ContractError, ModelError
from fibkv.needle import draw_needles, plant

# Tokens at the seams between filler and planted lines may merge or split: room left for that in each prompt.
_SEAM_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedlePrompt:
    """A tokenized recall prompt.

    Attributes:
        ids: token ids, int64 [tokens].
        answers: ``(start, stop)`` in tokens of each value that must be recalled; start is at least 1.
    """

    ids: Tensor
    answers: tuple[tuple[int, int], ...]


def spread_windows(tokenizer: Any, text: str, *, num_windows: int, window_tokens: int) -> tuple[Tensor, ...]:
    """Windows spread evenly over the text, the first at its start and the last at its end.

    Where the tokenizer starts a text with a beginning-of-sequence token, each window starts with it and counts it.

    Args:
        tokenizer: of the model.
        text: held-out text.
        num_windows: how many; they do not overlap.
        window_tokens: length of each.

    Returns:
        ``num_windows`` tensors, int64 [window_tokens].

    Raises:
        ContractError: the text is too short.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    prefix = torch.tensor(bos_prefix(tokenizer), dtype=torch.int64)
    length = window_tokens - len(prefix)
    if num_windows < 1 or length < 2 or len(ids) < num_windows * length:
        wanted = f"at least {num_windows * window_tokens} tokens for {num_windows} windows of {window_tokens}"
        raise ContractError("text", wanted, f"{len(ids)} tokens")
    starts = [(len(ids) - length) * i // max(1, num_windows - 1) for i in range(num_windows)]
    return tuple(torch.cat([prefix, ids[start : start + length]]) for start in starts)


def bos_prefix(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence id that this tokenizer puts before a text, as a list of one id or none."""
    ids = tokenizer("a").input_ids
    return ids[:1] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def needle_prompts(
    tokenizer: Any, text: str, *, num_prompts: int, num_tokens: int, num_needles: int, seed: int
) -> tuple[NeedlePrompt, ...]:
    """Recall prompts (`fibkv.needle`) of at most, and nearly, ``num_tokens`` tokens.

    Args:
        tokenizer: a fast tokenizer, which can tell the characters of each token.
        text: filler; each prompt takes a random stretch of it.
        num_prompts: how many prompts.
        num_tokens: length of each in tokens.
        num_needles: planted values per prompt.
        seed: of the stretches, names, values and places.

    Raises:
        ContractError: the text is shorter than the filler of one prompt, or the needles leave no room for filler.
        ModelError: the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"the needle task needs a fast tokenizer with offsets, got {type(tokenizer).__name__}")
    offsets = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    ).offset_mapping  # one (start, stop) in characters per token
    rng = random.Random(seed)
    return tuple(
        _needle_prompt(tokenizer, text, offsets, rng, num_tokens=num_tokens, num_needles=num_needles)
        for _ in range(num_prompts)
    )


def _needle_prompt(
    tokenizer: Any,
    text: str,
    offsets: list[tuple[int, int]],
    rng: random.Random,
    *,
    num_tokens: int,
    num_needles: int,
) -> NeedlePrompt:
    needles = draw_needles(rng, num_needles, filler=text)
    around = plant(rng, needles, filler="").text
    filler_tokens = num_tokens - len(tokenizer(around).input_ids) - _SEAM_TOKENS
    if not 0 < filler_tokens <= len(offsets):
        wanted = f"1 to {len(offsets)} tokens of filler for {num_tokens} tokens with {num_needles} needles"
        raise ContractError("num_tokens", wanted, filler_tokens)
    first = rng.randrange(len(offsets) - filler_tokens + 1)
    filler = text[offsets[first][0] : offsets[first + filler_tokens - 1][1]]
    prompt = plant(rng, needles, filler=filler)
    encoded = tokenizer(prompt.text, return_offsets_mapping=True, verbose=False)
    return NeedlePrompt(
        ids=torch.tensor(encoded.input_ids, dtype=torch.int64),
        answers=tuple(_token_span(encoded.offset_mapping, span) for span in prompt.spans),
    )


def _token_span(offsets: list[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int]:
    """``(start, stop)`` of the tokens that hold at least one character of the span."""
    start, stop = span
    inside = [index for index, (left, right) in enumerate(offsets) if left < stop and right > start]
    return inside[0], inside[-1] + 1
