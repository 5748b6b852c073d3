"""Small models with random weights, for long contexts; `architectures.py` has one of every kind, and smaller."""

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


CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "qwen2": lambda: tf.Qwen2Config(**COMMON),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """The model of that name in evaluation mode, the same weights every time."""
    torch.manual_seed(sum(map(ord, name)))
    return tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype).eval()


def prompt(batch: int = 1, tokens: int = 100, seed: int = 0) -> torch.Tensor:
    """Token ids ``[batch, tokens]``, none of them the padding token."""
    return torch.randint(2, 199, (batch, tokens), generator=torch.Generator().manual_seed(seed))
