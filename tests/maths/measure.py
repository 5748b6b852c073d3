"""Measuring codes in float64, apart from the code under test. D is E||u - u_hat||^2 of unit vectors throughout."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_vectors(dim: int, count: int, seed: int) -> Tensor:
    """Uniformly random unit vectors ``[count, dim]`` float64."""
    vectors = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=1, keepdim=True)


def quantize(vectors: Tensor, codewords: Tensor) -> Tensor:
    """Each block of ``vectors [V, d]`` replaced by the nearest of ``codewords [N, k]``, given in units of 1/sqrt(d)."""
    words = codewords.to(vectors.dtype) / vectors.shape[1] ** 0.5
    blocks = vectors.reshape(-1, words.shape[1])
    nearest = [
        torch.addmm(words.square().sum(1) / 2, tile, words.T, beta=-1).argmax(1)
        for tile in blocks.split(2**19 // len(words))
    ]
    return words[torch.cat(nearest)].reshape(vectors.shape)


def with_gain(vectors: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` times the float16 norm that a gain-corrected code stores: <u, q> / <q, q>."""
    gain = (vectors * quantized).sum(1) / quantized.square().sum(1)
    return quantized * gain.to(torch.float16).to(vectors.dtype)[:, None]


def distortion(vectors: Tensor, decoded: Tensor) -> float:
    """Mean squared error over mean squared norm."""
    return float((vectors - decoded).square().sum() / vectors.square().sum())
