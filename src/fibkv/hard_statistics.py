"""Statistics of keys that are known to hurt quantizers: a few channels far larger than the rest, and large biases.

As in models with a bias on their keys (Qwen2.5) or with outlier channels. Codes that are centered and rotated, or taken
per channel, stand them (`docs/RECIPES.md`); others lose several times as much. A report says where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A channel is large whose rms is so many times the median channel's.
LARGE_CHANNEL = 8.0
# A bias is large if keys have so many times less energy about their mean than about zero.
LARGE_BIAS = 4.0
# Fewer say nothing of spreads.
LEAST_TOKENS = 12


def key_statistics(keys: Tensor) -> Tensor:
    """``[2, H]`` float32 of keys ``[H, T, d]`` of one layer: how large channels and biases are; 0 for few tokens.

    Channels are looked at without their means: a bias makes a channel large, and is said to be one.
    """
    if keys.shape[1] < LEAST_TOKENS:
        return keys.new_zeros(2, keys.shape[0], dtype=torch.float32)
    vectors = keys.float()
    mean = vectors.mean(1, keepdim=True)
    spread = (vectors - mean).square().mean(1)
    ratio = (spread.amax(-1) / spread.median(-1).values.clamp_min(1e-30)).sqrt()
    energy = (vectors.square().mean(1).sum(-1) / spread.sum(-1).clamp_min(1e-30)).sqrt()
    return torch.stack([ratio, energy])


def key_flags(statistics: Tensor) -> tuple[str, ...]:
    """What `key_statistics` say is hard about keys: one line per kind, or nothing."""
    ratio, energy = statistics
    return (
        *_flag("channels up to {:.0f} times the median channel", ratio, LARGE_CHANNEL),
        *_flag("keys {:.0f} times as long as without their mean", energy, LARGE_BIAS),
    )


def _flag(text: str, values: Tensor, limit: float) -> tuple[str, ...]:
    heads = (values > limit).nonzero().flatten().tolist()
    if not heads:
        return ()
    return (f"{text.format(float(values.max()))} (heads {', '.join(map(str, heads))})",)
