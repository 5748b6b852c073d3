"""What is learned about one layer's queries, keys and values from text, and what follows from it for coding keys.

Plain tensors and pure functions. `fibkv calibrate` gathers `LayerStatistics` while a model reads; a key space
(`fibkv.space`) is made from the transforms; klt codes from `klt_parameters`.

A transform is an invertible matrix ``A [..., d, d]`` per KV head. Keys are coded as ``A (k - mean)`` and attention
takes ``A^-T q`` in place of the query, once per query: inner products stay what they were, and nothing is done per
token. All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fibkv.allocation import PAIR_LEVELS, HeadAllocation, KltParameters
from fibkv.errors import ContractError

# Share of the mean eigenvalue that is added to every eigenvalue: directions that the calibration text hardly
# used must not be stretched without bound.
RIDGE = 1e-3
# Share of the queries' energy that a Karhunen-Loeve transform takes to lie evenly in all directions. Where attention is
# decided, which second moments do not say, errors count more: half of it lowers the KL of a model (docs/KLT.md).
EVEN_SHARE = 0.5
# E|x - x^|^2 / E|x|^2 of the k = 2 codebooks of `fibkv.allocation.PAIR_LEVELS`, on the source they are trained on
# (`fibkv.codecs.fib.unit_distortion` at d = 128, without gain and scale search).
PAIR_DISTORTIONS = (1.0, 0.3605, 0.1065, 0.0294, 0.0077)
# Largest number of half octaves between the variances of two pairs.
MOST_HALF_OCTAVES = 255


@dataclass(frozen=True, slots=True, eq=False)
class LayerStatistics:
    """First and second moments of one layer, all float64. ``H`` KV heads, ``d`` head_dim.

    Attributes:
        tokens: tokens seen.
        key_mean: ``[H, d]``, E[k].
        key_moment: ``[H, d, d]``, E[k k^T], as the cache holds keys (rotary embedding applied).
        query_moment: ``[H, d, d]``, E[q q^T] over the queries of all heads of the group.
        value_mean: ``[H, d_value]``, E[v].
        value_moment: ``[H, d_value, d_value]``, E[v v^T].

    Raises:
        ContractError: on construction, for shapes that do not belong together, another dtype, or numbers that are not
            finite.
    """

    tokens: int
    key_mean: Tensor
    key_moment: Tensor
    query_moment: Tensor
    value_mean: Tensor
    value_moment: Tensor

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ContractError("LayerStatistics.tokens", "at least 1", self.tokens)
        for name, mean in (("key", self.key_mean), ("query", self.key_mean), ("value", self.value_mean)):
            moment = getattr(self, f"{name}_moment")
            if moment.shape != (*mean.shape, mean.shape[-1]):
                expected = f"shape {[*mean.shape, mean.shape[-1]]}"
                raise ContractError(f"LayerStatistics.{name}_moment", expected, list(moment.shape))
            if {moment.dtype, mean.dtype} != {torch.float64}:
                found = f"{moment.dtype}, and a mean of {mean.dtype}"
                raise ContractError(f"LayerStatistics.{name}_moment", "float64, as everywhere", found)
            if not bool(torch.isfinite(moment).all() & torch.isfinite(mean).all()):
                raise ContractError(f"LayerStatistics.{name}_moment", "finite numbers", "others")

    @property
    def key_covariance(self) -> Tensor:
        """``[H, d, d]``, E[(k - mean) (k - mean)^T]."""
        return self.key_moment - self.key_mean.unsqueeze(-1) * self.key_mean.unsqueeze(-2)


@dataclass(frozen=True, slots=True, eq=False)
class Klt:
    """A query-weighted Karhunen-Loeve transform.

    Attributes:
        transform: ``[..., d, d]``; row i gives coordinate i of the coded key.
        variances: ``[..., d]``, of those coordinates, falling. Errors in all of them weigh alike in the logits.
    """

    transform: Tensor
    variances: Tensor

    @property
    def pair_variances(self) -> Tensor:
        """``[..., d / 2]``: of a coordinate of each pair, on average."""
        pairs: Tensor = self.variances.unflatten(-1, (-1, 2)).mean(-1)
        return pairs.clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def whitened(self) -> Tensor:
        """``[..., d, d]``: the transform to pairs of variance 1 per coordinate, in which klt codes are."""
        scaled: Tensor = self.pair_variances.rsqrt().repeat_interleave(2, -1).unsqueeze(-1) * self.transform
        return scaled


def balanced_transform(key_covariance: Tensor, query_moment: Tensor) -> Tensor:
    """The symmetric ``A [..., d, d]`` that gives keys and queries one and the same second moment.

    A^2 = Sk^-1/2 (Sk^1/2 Sq Sk^1/2)^1/2 Sk^-1/2. For a code with one norm per vector behind a random rotation, whose
    error is white, it makes the expected error of logits smallest.

    Args:
        key_covariance: ``[..., d, d]``, Sk.
        query_moment: ``[..., d, d]``, Sq.
    """
    keys, queries = _regular(key_covariance), _regular(query_moment)
    root, inverse = _power(keys, 0.5), _power(keys, -0.5)
    return _power(inverse @ _power(root @ queries @ root, 0.5) @ inverse, 0.5)


def klt(key_covariance: Tensor, query_moment: Tensor) -> Klt:
    """Principal axes of the keys as the queries see them: y = U^T Sq^1/2 (k - mean), U the eigenvectors of cov(y).

    Args:
        key_covariance: ``[..., d, d]``, Sk.
        query_moment: ``[..., d, d]``; Sq is this with `EVEN_SHARE` of its trace on the diagonal.
    """
    root = _power(evened(query_moment), 0.5)
    variances, axes = torch.linalg.eigh(_symmetric(root @ _regular(key_covariance) @ root))
    # An eigenvector has no sign of its own: its largest component is positive.
    signs = axes.gather(-2, axes.abs().argmax(-2, keepdim=True)).sign()
    return Klt((axes * signs).flip(-1).transpose(-1, -2) @ root, variances.flip(-1))


def evened(moment: Tensor) -> Tensor:
    """A moment ``[..., d, d]`` with `EVEN_SHARE` of its trace over the diagonal, float64; the identity for zero."""
    matrix = _regular(moment)
    level = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    spread: Tensor = (1 - EVEN_SHARE) * matrix + EVEN_SHARE * level * identity
    return spread


def allocate(variances: Tensor, bits: int) -> Tensor:
    """Bits for pairs of coordinates: two by two to the pair whose expected error falls most.

    Args:
        variances: ``[..., m]`` of pairs.
        bits: to be given out, an even number.

    Returns:
        ``[..., m]`` int64, each of `fibkv.allocation.PAIR_LEVELS`, with sum ``bits`` in every row.

    Raises:
        ContractError: a number of bits that cannot be given out.
    """
    pairs = variances.shape[-1]
    if bits % 2 or not 0 <= bits <= pairs * PAIR_LEVELS[-1]:
        raise ContractError("allocate.bits", f"an even number up to {pairs * PAIR_LEVELS[-1]}", bits)
    # What each further step of a pair takes off its error; the gains fall from step to step.
    steps = torch.tensor([more - less for more, less in pairwise(PAIR_DISTORTIONS)], dtype=torch.float64)
    gains = (variances.to(torch.float64).unsqueeze(-1) * steps.to(variances.device)).flatten(-2)
    # Ties (a pair of no variance) go to the earlier pair and the earlier step.
    order = gains.argsort(dim=-1, descending=True, stable=True)[..., : bits // 2]
    given = torch.zeros_like(gains, dtype=torch.int64).scatter_(-1, order, 2)
    pairs_bits: Tensor = given.unflatten(-1, (pairs, -1)).sum(-1)
    return pairs_bits


def klt_parameters(found: Klt, bits: float) -> KltParameters:
    """Klt codes for keys in the space of `Klt.whitened`.

    Args:
        found: of the KV heads of a layer, ``[H, d, d]``.
        bits: per coordinate, rounded down to what can be given out.

    Raises:
        ContractError: nothing, or more than there is room for.
    """
    variances = found.pair_variances
    dim = 2 * variances.shape[-1]
    allocation = allocate(variances, 2 * int(bits * dim / 2))
    falls = (2 * (variances[..., :1] / variances).log2()).round().clamp(0, MOST_HALF_OCTAVES)
    heads = [
        HeadAllocation(bits=tuple(widths), half_octaves=tuple(fall))
        for widths, fall in zip(allocation.tolist(), falls.to(torch.int64).tolist(), strict=True)
    ]
    return KltParameters(head_dim=dim, heads=tuple(heads))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.transpose(-1, -2)) / 2


def _regular(moment: Tensor) -> Tensor:
    """A moment in float64 with `RIDGE` on its diagonal; the identity where it is zero."""
    matrix = _symmetric(moment.to(torch.float64))
    level = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    return torch.where(level > 0, matrix + RIDGE * level * identity, identity)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    scaled = vectors * values.clamp(min=torch.finfo(torch.float64).tiny).pow(exponent).unsqueeze(-2)
    return torch.matmul(scaled, vectors.mT)
