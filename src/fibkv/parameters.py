"""Codec parameters: what, beside a codebook, decides the bytes that a codec makes of a vector.

A union discriminated by the field ``codec``; a codec class and its parameters belong together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fibkv.allocation import KLT_BITS, KltParameters
from fibkv.contract import Count, MarkedContract
from fibkv.errors import ContractError
from fibkv.shape import Dtype
from fibkv.training_settings import TrainingSettings, training_settings

Rotation = Literal["hadamard", "haar"]
NormFormat = Literal["f16", "log8"]
CodewordSearch = Literal["exact", "table"]
PathSearch = Literal["full", "fast"]
Seed = Annotated[int, Field(ge=0, lt=2**64)]

_MAX_CODEBOOK_ELEMENTS = 67_108_864
_RATE_TOLERANCE = 1e-12
# Below, sign changes and Hadamard transforms leave coordinates on too coarse a grid (`fibkv.rotation`).
_MIN_HADAMARD = 32
# A decision table covers a plane, and holds one byte per cell.
_TABLE_BLOCK_DIM, _TABLE_MAX_SIZE = 2, 256
# Of a trellis, the symbols of so many coordinates fill whole bytes at every rate.
_TRELLIS_BLOCK_DIM = 8


class _ScalarParameters(MarkedContract):
    @property
    def block_dim(self) -> int:
        """Coordinates coded together: each stands alone."""
        return 1


class RawParameters(_ScalarParameters):
    """Vectors kept as they are, in one element type."""

    schema_version: Literal["fibkv_raw_parameters_v1"] = "fibkv_raw_parameters_v1"
    codec: Literal["raw"] = "raw"
    head_dim: Count
    dtype: Dtype


class Int8Parameters(_ScalarParameters):
    """Eight-bit integers with one scale per vector."""

    schema_version: Literal["fibkv_int8_parameters_v1"] = "fibkv_int8_parameters_v1"
    codec: Literal["int8"] = "int8"
    head_dim: Count


class Fp8Parameters(_ScalarParameters):
    """Eight-bit floats (e4m3) with one scale per vector."""

    schema_version: Literal["fibkv_fp8_parameters_v1"] = "fibkv_fp8_parameters_v1"
    codec: Literal["fp8"] = "fp8"
    head_dim: Count


class AffineParameters(_ScalarParameters):
    """Whole numbers on a grid between the least and the largest of a group, KIVI's code (arXiv 2402.02750).

    Per token a group is ``group`` channels of one vector, the last one perhaps fewer. Per channel it is the tokens of
    one page, whose length decides, and ``group`` is not looked at.
    """

    schema_version: Literal["fibkv_affine_parameters_v1"] = "fibkv_affine_parameters_v1"
    codec: Literal["affine"] = "affine"
    head_dim: Annotated[int, Field(gt=0, le=4096)]
    bits: Literal[2, 3, 4]
    group: Count = 32


class FibParameters(MarkedContract):
    """FibQuant: a norm, a rotation, and one codeword per block of ``block_dim`` coordinates.

    ``block_dim`` 1 is the scalar case (TurboQuant, arXiv 2504.19874). The rates are redundant and
    checked: ``paper_rate`` = log2(N)/k counts fractional bits, ``wire_rate`` = ceil(log2 N)/k those stored.

    ``codeword_search`` and ``scale_search`` are the encoder's alone, and the decoder need not know them: ``exact``
    finds the nearest codeword; ``table`` reads one near it from a table of the plane, for speed. ``scale_search``
    tries factors on the unit vector and keeps the codes whose direction fits best; the gain takes the factor up.

    ``centered``: the vectors of a head in a page are coded without their mean, which is stored once (`fibkv.means`).
    It is meant for keys; values lose by it.

    Raises:
        ContractError: on construction, for a broken bound or a rate that is not the computed one.
    """

    schema_version: Literal["fibkv_fib_parameters_v1"] = "fibkv_fib_parameters_v1"
    codec: Literal["fib"] = "fib"
    head_dim: Annotated[int, Field(ge=2, le=4096)]
    block_dim: Annotated[int, Field(gt=0, le=256)]
    codebook_size: Annotated[int, Field(ge=2, le=2**20)]
    paper_rate: float
    wire_bits: int
    wire_rate: float
    rotation: Rotation
    rotation_seed: Seed
    norm_format: NormFormat
    gain_corrected: bool
    codebook_seed: Seed
    codebook_version: Count
    training: TrainingSettings
    codeword_search: CodewordSearch = "exact"
    scale_search: bool = False
    centered: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        d, k, n = self.head_dim, self.block_dim, self.codebook_size
        if k >= d or d % k != 0:
            raise ContractError("FibParameters.block_dim", f"a divisor of head_dim {d} below it", k)
        if n * k > _MAX_CODEBOOK_ELEMENTS:
            expected = f"at most {_MAX_CODEBOOK_ELEMENTS} // block_dim {k}"
            raise ContractError("FibParameters.codebook_size", expected, n)
        if k >= self.training.head_dim:
            raise ContractError("FibParameters.training.head_dim", f"above block_dim {k}", self.training.head_dim)
        if self.rotation == "hadamard" and not _is_power_of_two(d):
            raise ContractError("FibParameters.rotation", f"haar, as head_dim {d} is no power of two", self.rotation)
        if self.codeword_search == "table" and (k != _TABLE_BLOCK_DIM or n > _TABLE_MAX_SIZE):
            expected = f"exact, as a table needs block_dim {_TABLE_BLOCK_DIM} and at most {_TABLE_MAX_SIZE} codewords"
            raise ContractError("FibParameters.codeword_search", expected, self.codeword_search)
        if self.scale_search and not self.gain_corrected:
            expected = "False, as the factors found go to the gain, and gain_corrected is False"
            raise ContractError("FibParameters.scale_search", expected, self.scale_search)
        for name, rate in _rates(k, n).items():
            if abs(getattr(self, name) - rate) > _RATE_TOLERANCE:
                raise ContractError(f"FibParameters.{name}", repr(rate), getattr(self, name))
        return self

    @classmethod
    def of(
        cls,
        head_dim: int,
        block_dim: int,
        codebook_size: int,
        *,
        rotation: Rotation | None = None,
        rotation_seed: int = 0,
        norm_format: NormFormat = "log8",
        gain_corrected: bool = True,
        codeword_search: CodewordSearch = "exact",
        scale_search: bool = False,
        centered: bool = False,
    ) -> FibParameters:
        """Parameters with the rates computed, of the codebook that fibkv ships or builds for (k, N).

        Args:
            head_dim: dimension d of the vectors.
            block_dim: coordinates k per codeword, a divisor of d below it.
            codebook_size: number N of codewords.
            rotation: by default ``hadamard`` where d is a power of two from 32 upwards, else ``haar``.
            rotation_seed: seed of the rotation.
            norm_format: how a vector's norm is stored.
            gain_corrected: whether the stored norm makes up for the shrinking of a centroid code.
            codeword_search: ``exact``, or ``table`` for k = 2 and N <= 256.
            scale_search: whether factors of the unit vector are tried; needs ``gain_corrected``.
            centered: whether vectors are coded without the mean of their head and page.

        Raises:
            ContractError: a bound is broken.
        """
        return cls(
            head_dim=head_dim,
            block_dim=block_dim,
            codebook_size=codebook_size,
            # Where no rates exist any will do: the bounds of the fields are checked before the rates.
            **_rates(max(block_dim, 1), max(codebook_size, 1)),
            rotation=rotation or _default_rotation(head_dim),
            rotation_seed=rotation_seed,
            norm_format=norm_format,
            gain_corrected=gain_corrected,
            codebook_seed=0,
            codebook_version=1,
            training=training_settings(max(block_dim, 1), max(codebook_size, 1)),
            codeword_search=codeword_search,
            scale_search=scale_search,
            centered=centered,
        )


class TrellisParameters(MarkedContract):
    """A trellis code (`fibkv.trellis`): norm and rotation as in `FibParameters`, and ``bits`` per coordinate.

    ``path_search`` and ``scale_search`` are the encoder's alone, and the decoder need not know them. ``path_search``
    says how many coordinates on both sides of the place where the vector closes to a ring are searched for what to
    have there, and how many levels are tried for each state: ``full`` 64 (or all) and three,
    ``fast`` 12 (8 at 4 bits) and two, and rotates in 16-bit integers (`fibkv.word_rotation`).
    ``scale_search`` and ``centered`` are those of `FibParameters`.

    Raises:
        ContractError: on construction, for a broken bound.
    """

    schema_version: Literal["fibkv_trellis_parameters_v1"] = "fibkv_trellis_parameters_v1"
    codec: Literal["trellis"] = "trellis"
    head_dim: Annotated[int, Field(ge=2 * _TRELLIS_BLOCK_DIM, le=4096, multiple_of=_TRELLIS_BLOCK_DIM)]
    bits: Literal[2, 3, 4]
    code_version: Count
    rotation: Rotation
    rotation_seed: Seed
    norm_format: NormFormat
    gain_corrected: bool
    path_search: PathSearch
    scale_search: bool
    centered: bool

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rotation == "hadamard" and not _is_power_of_two(self.head_dim):
            expected = f"haar, as head_dim {self.head_dim} is no power of two"
            raise ContractError("TrellisParameters.rotation", expected, self.rotation)
        if self.scale_search and not self.gain_corrected:
            expected = "False, as the factors found go to the gain, and gain_corrected is False"
            raise ContractError("TrellisParameters.scale_search", expected, self.scale_search)
        return self

    @property
    def block_dim(self) -> int:
        """Coordinates whose symbols fill whole bytes: a head_dim is a multiple of it."""
        return _TRELLIS_BLOCK_DIM

    @classmethod
    def of(
        cls,
        head_dim: int,
        bits: Literal[2, 3, 4],
        *,
        rotation: Rotation | None = None,
        rotation_seed: int = 0,
        norm_format: NormFormat = "log8",
        gain_corrected: bool = True,
        path_search: PathSearch = "full",
        scale_search: bool = False,
        centered: bool = False,
    ) -> TrellisParameters:
        """Parameters of the code that fibkv ships for ``bits``; arguments as in `FibParameters.of`.

        Raises:
            ContractError: a bound is broken.
        """
        return cls(
            head_dim=head_dim,
            bits=bits,
            code_version=1,
            rotation=rotation or _default_rotation(head_dim),
            rotation_seed=rotation_seed,
            norm_format=norm_format,
            gain_corrected=gain_corrected,
            path_search=path_search,
            scale_search=scale_search,
            centered=centered,
        )


AnyParameters = (
    RawParameters
    | Int8Parameters
    | Fp8Parameters
    | AffineParameters
    | FibParameters
    | TrellisParameters
    | KltParameters
)
"""The parameters of any codec."""

CodecParameters = Annotated[AnyParameters, Field(discriminator="codec")]
"""Field type: the parameters of any codec, told apart by their field ``codec``."""

_BOOKS = {4: (2, 256), 3: (2, 64), 2: (4, 256), 1: (8, 256)}

FIB_SETTINGS: Mapping[str, tuple[int, int]] = {
    **{f"fib{bits}": book for bits, book in _BOOKS.items()},
    **{f"key{bits}": book for bits, book in _BOOKS.items()},
    **{f"value{bits}": _BOOKS[bits] for bits in (4, 3)},
    "scalar4": (1, 16),
    "scalar3": (1, 8),
    "scalar2": (1, 4),
}
"""Block dim k and codebook size N by name; the digit is the payload's bits per coordinate, norms not counted.

``fib`` and ``scalar`` are the plain codes. ``key`` and ``value`` are the recipes of ``bits=`` (docs/RECIPES.md): the
code of ``fib``, for keys centered, and at 3 and 4 bits with a scale search.
"""

TRELLIS_SETTINGS: Mapping[str, Literal[2, 3, 4]] = {
    "trellis4": 4,
    "trellis3": 3,
    "trellis2": 2,
    "trelliskey4": 4,
    "trelliskey3": 3,
    "trelliskey2": 2,
}
"""Bits per coordinate by name; ``trelliskey`` is centered."""

AFFINE_SETTINGS: Mapping[str, Literal[2, 3, 4]] = {"affine4": 4, "affine3": 3, "affine2": 2}
"""The same of KIVI's code."""

PARAMETER_NAMES: tuple[str, ...] = ("raw", "int8", "fp8", *FIB_SETTINGS, *TRELLIS_SETTINGS, *AFFINE_SETTINGS)
"""What :func:`named_parameters` knows."""


def named_parameters(name: str, head_dim: int, dtype: Dtype) -> CodecParameters:
    """The parameters behind a short name.

    Args:
        name: one of :data:`PARAMETER_NAMES`.
        head_dim: dimension of the vectors.
        dtype: element type of raw vectors; the other codecs do not depend on it.

    Raises:
        ContractError: the name is unknown, or the setting does not fit ``head_dim``.
    """
    match name:
        case "raw":
            return RawParameters(head_dim=head_dim, dtype=dtype)
        case "int8":
            return Int8Parameters(head_dim=head_dim)
        case "fp8":
            return Fp8Parameters(head_dim=head_dim)
    if name in AFFINE_SETTINGS:
        return AffineParameters(head_dim=head_dim, bits=AFFINE_SETTINGS[name])
    if name in TRELLIS_SETTINGS:
        return TrellisParameters.of(head_dim, TRELLIS_SETTINGS[name], centered=name.startswith("trelliskey"))
    if name in KLT_BITS:
        raise ContractError("parameters name", f"a calibration of the model beside keys of {name}", None)
    if name not in FIB_SETTINGS:
        raise ContractError("parameters name", f"one of {', '.join(PARAMETER_NAMES)}", name)
    block_dim, size = FIB_SETTINGS[name]
    is_key = name.startswith("key")
    # In larger blocks each factor costs a search of all codewords, for 1 % of error.
    searched = block_dim == 2 and (is_key or name.startswith("value"))
    return FibParameters.of(head_dim, block_dim, size, scale_search=searched, centered=is_key)


def named_block_dim(name: str) -> int:
    """Coordinates that must divide a head_dim for `named_parameters` to serve it; 1 for names that it does not know."""
    if name in TRELLIS_SETTINGS:
        return _TRELLIS_BLOCK_DIM
    if name in KLT_BITS:
        return 2
    return FIB_SETTINGS[name][0] if name in FIB_SETTINGS else 1


def _default_rotation(head_dim: int) -> Rotation:
    return "hadamard" if _is_power_of_two(head_dim) and head_dim >= _MIN_HADAMARD else "haar"


def _rates(block_dim: int, codebook_size: int) -> dict[str, Any]:
    wire_bits = (codebook_size - 1).bit_length()
    return {
        "paper_rate": math.log2(codebook_size) / block_dim,
        "wire_bits": wire_bits,
        "wire_rate": wire_bits / block_dim,
    }


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
