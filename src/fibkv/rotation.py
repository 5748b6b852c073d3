"""Rotations: the random orthogonal transform that makes every vector look like a uniform one to the codebook.

One rotation serves all layers, heads and tokens. It is determined, bit for bit, by (kind, dim, seed) on any machine:
the randomness is raw BLAKE3 output, and the arithmetic is exact integers (Hadamard) or single IEEE 754 operations in
a fixed order (Haar), never BLAS, LAPACK or a library's random stream. The digest of the matrix catches the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from fibkv.constants import constant
from fibkv.digest import digest_bytes
from fibkv.errors import ContractError
from fibkv.parameters import Rotation as RotationKind

ROTATION_DOMAIN = "fibkv_rotation_v1"
"""Domain of a rotation's digest, and of the stream that its randomness is taken from."""

HADAMARD_ROUNDS = 6
"""Sign changes and Hadamard transforms in a randomized Hadamard rotation.

One round sends a one-hot vector to d equal magnitudes, at which a 1-bit code errs 9 times too little and a 2-bit code
twice too much. Two rounds leave coordinates on a grid of 2/d, which is as coarse as the cells of a 4-bit code: 42 % too
much at d = 64. Three rounds still show it with two equal channels (8 %). Six are within 1 % for every input of the
tests from d = 32 upwards. The number is even so that the normalization d^(rounds/2) is a power of two and the
matrix is exact, hence exactly orthogonal, in float32 up to d = 256. Below d = 32 the grid stays coarse: take Haar.
"""

# Gaussians are rounded to this grid, far finer than any effect on the distribution and far coarser than the last-bit
# differences between implementations of the logarithm inside the inverse normal CDF.
_GAUSSIAN_GRID = 2.0**-16


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """An orthogonal transform of R^d.

    Attributes:
        kind: ``hadamard`` (random signs and Walsh-Hadamard transforms, d a power of two) or ``haar`` (uniform).
        dim: d.
        seed: what it was made from.
        matrix: ``[d, d]`` float32; row i gives coordinate i of the rotated vector. Computed in float64 or exactly.
        digest: over dim and matrix.
    """

    kind: RotationKind
    dim: int
    seed: int
    matrix: Tensor
    digest: str

    def apply(self, x: Tensor) -> Tensor:
        """Rotates vectors ``[..., d]`` of any floating dtype; returns ``[..., d]`` float32 on the same device."""
        return x.to(torch.float32) @ constant(self.matrix, x.device).T

    def invert(self, y: Tensor) -> Tensor:
        """Turns rotated vectors ``[..., d]`` back: the inverse of `apply`, in float32 on the same device."""
        return y.to(torch.float32) @ constant(self.matrix, y.device)


@lru_cache(maxsize=64)
def rotation(kind: RotationKind, dim: int, seed: int) -> Rotation:
    """The rotation of a kind, dimension and seed; cached in the process.

    Args:
        kind: ``hadamard`` or ``haar``.
        dim: d, at least 2; for ``hadamard`` a power of two.
        seed: unsigned 64-bit.

    Raises:
        ContractError: the kind is unknown, or the dimension or seed is out of its range.
    """
    if not 0 <= seed < 2**64:
        raise ContractError("rotation.seed", "an unsigned 64-bit number", seed)
    if dim < 2:
        raise ContractError("rotation.dim", "at least 2", dim)
    match kind:
        case "hadamard":
            exact = _hadamard_matrix(dim, seed)
        case "haar":
            exact = _haar_matrix(dim, seed)
        case _:
            raise ContractError("rotation.kind", "hadamard or haar", kind)
    matrix = exact.astype("<f4")
    digest = digest_bytes(ROTATION_DOMAIN, dim.to_bytes(4, "little"), matrix)
    return Rotation(kind, dim, seed, torch.from_numpy(matrix.astype(np.float32, copy=False)), digest)


def hadamard_signs(dim: int, seed: int) -> Tensor:
    """The random signs of a randomized Hadamard rotation, for kernels that transform without its matrix.

    Returns:
        ``[HADAMARD_ROUNDS, dim]`` int8, +1 or -1. Round r multiplies coordinate i by ``signs[r, i]``, then takes the
        Walsh-Hadamard transform in natural order divided by sqrt(dim).

    Raises:
        ContractError: the dimension is no power of two.
    """
    if dim & (dim - 1):
        raise ContractError("rotation.dim", "a power of two for a hadamard rotation", dim)
    octets = np.frombuffer(_random_bytes("hadamard", dim, seed, HADAMARD_ROUNDS * dim), dtype=np.uint8)
    # One byte a sign, of which the lowest bit counts.
    return torch.from_numpy(1 - 2 * (octets & 1).astype(np.int8)).reshape(HADAMARD_ROUNDS, dim)


def walsh_hadamard(x: Tensor) -> Tensor:
    """The transform in natural (Sylvester) order of integers ``[..., d]``, not normalized."""
    span = 1
    while span < x.shape[-1]:
        low, high = x.unflatten(-1, (-1, 2, span)).unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
        span *= 2
    return x


def _hadamard_matrix(dim: int, seed: int) -> npt.NDArray[np.float64]:
    # Exact: an orthogonal matrix has entries of at most 1, so these integers stay below d^3 <= 2^36.
    turned = torch.eye(dim, dtype=torch.int64)
    for signs in hadamard_signs(dim, seed):
        turned = walsh_hadamard(turned * signs)
    matrix: npt.NDArray[np.float64] = turned.T.contiguous().numpy() / dim ** (HADAMARD_ROUNDS // 2)
    return matrix


def _haar_matrix(dim: int, seed: int) -> npt.NDArray[np.float64]:
    words = np.frombuffer(_random_bytes("haar", dim, seed, 8 * dim * dim), dtype="<u8")
    # 52 bits and a half: exact in float64, and never 0 or 1.
    uniforms = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    gaussians = torch.special.ndtri(torch.from_numpy(uniforms)).numpy()
    return _orthonormal_rows(np.rint(gaussians / _GAUSSIAN_GRID).reshape(dim, dim) * _GAUSSIAN_GRID)


def _orthonormal_rows(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """QR decomposition of a square matrix by rows with a positive diagonal, so that Gaussians give the Haar measure.

    By Gram-Schmidt rather than by LAPACK: two LAPACKs differ in the last bits, by 5e-15 at d = 512, where one of five
    matrices then differed after rounding to float32, and with it the digest. Here every addition has its place.
    """
    basis = np.empty_like(rows)
    for i, row in enumerate(rows):
        rest = row
        # The second pass removes what rounding left of the first ("twice is enough", Kahan and Parlett).
        for _ in range(2 if i else 0):
            along = _ordered_sum((basis[:i] * rest).T)
            rest = rest - _ordered_sum(basis[:i] * along[:, None])
        basis[i] = rest / np.sqrt(_ordered_sum(rest * rest))
    return basis


def _ordered_sum(terms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum over the first axis by repeated halving, each addition an elementwise one, so the same on any machine."""
    while (count := len(terms)) > 1:
        half = count // 2
        folded = terms[:half] + terms[half : 2 * half]
        if count % 2:
            folded[0] += terms[-1]
        terms = folded
    total: npt.NDArray[np.float64] = terms[0]
    return total


def _random_bytes(kind: RotationKind, dim: int, seed: int, length: int) -> bytes:
    return blake3(f"{ROTATION_DOMAIN}:{kind}:{dim}:{seed}".encode()).digest(length=length)
