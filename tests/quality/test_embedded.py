from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fibkv import embedded
from fibkv.errors import ModelError
from fibkv.metrics import perplexity, token_nll
from fibkv.prompts import needle_prompts, spread_windows
from fibkv.quality import count_recalled, dense_logits


def test_geometry(model: Any) -> None:
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (4, 4, 2)
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (64, 2048, 4096)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(3.5e6, rel=0.02)
    assert model.dtype == torch.float32
    assert not model.training


def test_perplexity_on_heldout_text_is_the_published_one(model: Any, tokenizer: Any, text: str) -> None:
    windows = spread_windows(tokenizer, text, num_windows=6, window_tokens=1024)
    nll = torch.cat([token_nll(dense_logits(model, ids)[:-1], ids[1:]) for ids in windows])
    # 7.26 over all held-out files; these six windows measure 6.91.
    assert perplexity(nll) == pytest.approx(6.91, abs=0.05)
    assert math.exp(nll.max().item()) > 100  # some tokens are hard: the figure is a mean of real predictions


def test_recall_at_1024_tokens_is_the_published_one(model: Any, tokenizer: Any, text: str) -> None:
    prompts = needle_prompts(tokenizer, text, num_prompts=6, num_tokens=1024, num_needles=8, seed=0)
    recalled = sum(count_recalled(dense_logits(model, prompt.ids), prompt) for prompt in prompts)
    assert 0.85 <= recalled / 48 <= 1.0


def test_recall_needs_the_planted_lines(model: Any, tokenizer: Any, text: str) -> None:
    prompt = needle_prompts(tokenizer, text, num_prompts=1, num_tokens=512, num_needles=6, seed=0)[0]
    questions = prompt.ids[prompt.answers[0][0] - 8 :]
    shift = len(prompt.ids) - len(questions)
    alone = type(prompt)(ids=questions, answers=tuple((start - shift, stop - shift) for start, stop in prompt.answers))
    assert count_recalled(dense_logits(model, prompt.ids), prompt) >= 4
    assert count_recalled(dense_logits(model, alone.ids), alone) == 0


def test_the_licence_and_the_card_come_with_the_weights() -> None:
    names = {path.name for path in embedded.model_dir().iterdir()}
    assert names >= {"LICENSE-PSF.txt", "MODEL_CARD.md", "config.json", "heldout.txt", "model.safetensors"}


def test_refuses_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a model directory of transformers, found no config.json there"):
        embedded.load_directory(tmp_path, torch.float32)


def test_translates_what_transformers_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="transformers cannot load a causal language model from it") as caught:
        embedded.load_directory(tmp_path, torch.float32)
    assert caught.value.__cause__ is not None


def test_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"language models need transformers: pip install 'fibkv\[hf\]'"):
        embedded.load()
