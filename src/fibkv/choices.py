"""What a user may name as the codecs of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fibkv.allocation import KLT_BITS, KltParameters
from fibkv.errors import ContractError
from fibkv.ladder import Choice
from fibkv.parameters import (
    AnyParameters,
    CodecParameters,
    named_block_dim,
    named_parameters,
)
from fibkv.shape import Dtype

NAMES_BY_BITS: Mapping[float, tuple[str, str]] = {
    1: ("key1", "fib1"),
    2: ("key2", "fib2"),
    2.5: ("key2", "value3"),
    3: ("key3", "value3"),
    3.5: ("key3", "value4"),
    4: ("key4", "value4"),
    8: ("int8", "int8"),
    16: ("raw", "raw"),
}
"""Codecs of keys and values behind ``bits=``. The odd half bit goes to the values, where it lowers KL more."""


def names_by_bits(bits: Any) -> tuple[str, str]:
    """Codecs of keys and values behind ``bits=``: a number of `NAMES_BY_BITS`, or a pair of whole ones.

    Raises:
        ContractError: anything else.
    """
    keys, values = pair_of("Cache.bits", bits)
    is_pair = isinstance(bits, tuple | list)
    for number in (keys, values):
        if type(number) not in (int, float) or number not in NAMES_BY_BITS or (is_pair and number % 1):
            expected = f"one of {', '.join(map(str, NAMES_BY_BITS))}, or a pair of whole ones"
            raise ContractError("Cache.bits", expected, bits)
    return NAMES_BY_BITS[keys][0], NAMES_BY_BITS[values][1]


def pair_of(field: str, given: Any) -> tuple[Any, Any]:
    """Keys' and values' choice from one for both, or a pair.

    Raises:
        ContractError: another number of them.
    """
    if not isinstance(given, tuple | list):
        return given, given
    if len(given) != 2:
        raise ContractError(field, "one choice, or a pair for keys and values", given)
    return given[0], given[1]


def known_pair(field: str, given: Any) -> tuple[Choice, Choice]:
    """Keys' and values' codec, both known.

    Raises:
        ContractError: an unknown one, or klt codes for values.
    """
    keys, values = (_known(choice) for choice in pair_of(field, given))
    if values in KLT_BITS or isinstance(values, KltParameters):
        raise ContractError(field, "another codec for values than klt, whose errors are weighed by queries", values)
    return keys, values


def _known(choice: Any) -> Choice:
    if not isinstance(choice, str | AnyParameters):
        raise ContractError("Cache.profile", "a name or codec parameters, or a pair", choice)
    if choice in KLT_BITS:
        return choice
    # Any head_dim will do to refuse an unknown name before a token has been seen.
    parameters_of(choice, 64, "f16")
    return choice


def parameters_of(choice: Choice, head_dim: int, raw_dtype: Dtype) -> CodecParameters:
    """The parameters of a choice for vectors of a dimension.

    Raises:
        ContractError: an unknown name, or one that does not fit, or that needs a calibration.
    """
    if isinstance(choice, str):
        return named_parameters(choice, head_dim, raw_dtype)
    return choice


def block_dim_of(choice: Choice) -> int:
    """Coordinates that a choice codes together."""
    return named_block_dim(choice) if isinstance(choice, str) else choice.block_dim
