"""Sizes in bytes, as people write and read them: ``2GiB``, ``512 MiB``, ``1.5GB``."""

from __future__ import annotations

import re
from decimal import Decimal

from fibkv.errors import ContractError

# IEC 80000-13: KiB is 1024 bytes, KB (kB) 1000. A bare K, M or G is either, so it is refused.
UNITS = {
    "B": 1,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
}
LIMIT = 2**63
"""Sizes are below it: they fit in a signed 64-bit integer."""

_FACTORS = {unit.lower(): factor for unit, factor in UNITS.items()}
_WRITTEN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)


def parse_size(size: str | int, *, field: str = "size") -> int:
    """The bytes of a size: a number, or a number with a unit, in capitals or not, with or without a space.

    A fraction is cut to whole bytes.

    Args:
        size: ``"2GiB"``, ``"512 MiB"``, ``"1.5GB"``, ``"4096"`` or a number of bytes.
        field: what the size is of, for the refusal.

    Raises:
        ContractError: not a size, or less than 1 byte, or `LIMIT` and more.
    """
    nbytes = size if type(size) is int else _parsed(size)
    if nbytes is None or not 0 < nbytes < LIMIT:
        raise ContractError(field, f"a size such as 2GiB: a positive number of {', '.join(UNITS)}", size)
    return nbytes


def _parsed(text: object) -> int | None:
    match = _WRITTEN.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        return None
    number, unit = match.groups()
    factor = _FACTORS.get(unit.lower() or "b")
    return None if factor is None else int(Decimal(number) * factor)


def format_size(nbytes: int) -> str:
    """A size in the largest binary unit that it fills, to two decimals: ``1.46 GiB``, ``512 MiB``, ``100 B``."""
    if nbytes < UNITS["KiB"]:
        return f"{nbytes} B"
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        # Rounded first: 1 byte less than 1 MiB is 1 MiB, not 1024 KiB.
        if (number := round(nbytes / UNITS[unit], 2)) >= 1:
            break
    return f"{number:.2f}".rstrip("0").rstrip(".") + f" {unit}"
