from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fibkv.errors import ContractError, ModelError
from fibkv.prompts import bos_prefix, needle_prompts, spread_windows


def test_windows_reach_from_the_start_to_the_end_of_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, verbose=False).input_ids
    windows = spread_windows(tokenizer, text, num_windows=5, window_tokens=200)
    assert [window.shape for window in windows] == [(200,)] * 5
    assert windows[0].tolist() == ids[:200]
    assert windows[-1].tolist() == ids[-200:]
    assert windows[2].tolist() == ids[(start := (len(ids) - 200) // 2) : start + 200]


def test_windows_of_a_short_text_touch_but_do_not_overlap(tokenizer: Any) -> None:
    ids = torch.tensor(tokenizer("abc " * 60).input_ids)
    length = len(ids) // 3
    windows = spread_windows(tokenizer, "abc " * 60, num_windows=3, window_tokens=length)
    assert sum(len(window) for window in windows) <= len(ids)
    with pytest.raises(
        ContractError, match=r"text: expected at least \d+ tokens for 3 windows of \d+, got '\d+ tokens'"
    ):
        spread_windows(tokenizer, "abc " * 60, num_windows=3, window_tokens=length + 1)


class _WithBos:
    """A tokenizer of one token per character that starts every text with the token 99."""

    bos_token_id = 99

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[99] * add_special_tokens + [ord(letter) for letter in text])


def test_windows_start_with_the_bos_token_where_the_tokenizer_puts_one(tokenizer: Any) -> None:
    assert bos_prefix(tokenizer) == []
    windows = spread_windows(_WithBos(), "abcdefgh", num_windows=2, window_tokens=4)
    assert [window.tolist() for window in windows] == [[99, *b"abc"], [99, *b"fgh"]]


def test_needle_prompts_have_the_length_and_the_answers(tokenizer: Any, text: str) -> None:
    prompts = needle_prompts(tokenizer, text, num_prompts=4, num_tokens=512, num_needles=6, seed=1)
    for prompt in prompts:
        assert 512 - 40 <= len(prompt.ids) <= 512
        assert len(prompt.answers) == 6
        for start, stop in prompt.answers:
            answer = tokenizer.decode(prompt.ids[start:stop]).strip()
            before = tokenizer.decode(prompt.ids[:start])
            name = before.rsplit("assert ", 1)[1].split()[0]
            assert f"{name} = {answer}\n" in before


def test_needle_prompts_follow_the_seed(tokenizer: Any, text: str) -> None:
    def first(seed: int) -> list[int]:
        prompts = needle_prompts(tokenizer, text, num_prompts=1, num_tokens=256, num_needles=3, seed=seed)
        return prompts[0].ids.tolist()

    assert first(1) == first(1) != first(2)


def test_refuses_a_prompt_without_room_for_filler(tokenizer: Any, text: str) -> None:
    with pytest.raises(
        ContractError, match=r"num_tokens: expected 1 to \d+ tokens of filler for 64 tokens with 10 needles"
    ):
        needle_prompts(tokenizer, text, num_prompts=1, num_tokens=64, num_needles=10, seed=0)


def test_refuses_a_slow_tokenizer() -> None:
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ModelError, match="needs a fast tokenizer with offsets, got SimpleNamespace"):
        needle_prompts(slow, "text", num_prompts=1, num_tokens=64, num_needles=1, seed=0)
