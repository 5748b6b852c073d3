"""Small models with random weights, one per architecture."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

COMMON = {
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _without(*names: str) -> dict[str, object]:
    return {name: value for name, value in COMMON.items() if name not in names}


CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "qwen2": lambda: tf.Qwen2Config(**COMMON),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, head_dim=32),
    "mistral": lambda: tf.MistralConfig(**COMMON, sliding_window=None),
    "gemma": lambda: tf.GemmaConfig(**COMMON, head_dim=64),
    "phi3": lambda: tf.Phi3Config(**COMMON),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=199,
        n_embd=128,
        n_layer=3,
        n_head=4,
        n_positions=1024,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_without("num_key_value_heads")),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """The model of that name in evaluation mode, the same weights every time."""
    torch.manual_seed(sum(map(ord, name)))
    return tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype).eval()


def prompt(batch: int = 1, tokens: int = 100, seed: int = 0) -> torch.Tensor:
    """Token ids ``[batch, tokens]``, none of them the padding token."""
    return torch.randint(2, 199, (batch, tokens), generator=torch.Generator().manual_seed(seed))
