"""How attention is launched on a device: sizes that were found fastest there, kept in a file per device name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from fibkv.codebook import cache_dir
from fibkv.contract import Contract, Count, MarkedContract
from fibkv.errors import ContractError, KernelError
from fibkv.files import write_text


class Tuning(Contract):
    """Sizes of a launch. Results do not depend on them but for rounding.

    Attributes:
        tokens: that a program multiplies at a time, at most; a power of two from 16 upwards.
        warps: of a program; a power of two.
        stages: of the loads that run ahead.
        programs: for each multiprocessor, among which the context is split.
    """

    tokens: Count = 64
    warps: Count = 4
    stages: Count = 2
    programs: Count = 4

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, number, least in (("tokens", self.tokens, 16), ("warps", self.warps, 1)):
            if number < least or number & (number - 1):
                raise ContractError(f"Tuning.{name}", f"a power of two from {least} upwards", number)
        return self


class Tunings(MarkedContract):
    """The tunings of one device.

    Attributes:
        device: its name.
        found: by kind of keys (`fibkv.kernels.triton_sides.Side.kind`) what was found fastest.
        cuda: whether pages that CUDA C++ reads too (`fibkv.kernels.cuda_attend`) are left to it.
    """

    schema_version: Literal["fibkv_triton_tunings_v1"] = "fibkv_triton_tunings_v1"
    device: str
    found: tuple[tuple[str, Tuning], ...] = ()
    cuda: bool = True

    def of(self, kind: str) -> Tuning:
        """The tuning of a kind of keys, or the default one."""
        return dict(self.found).get(kind, DEFAULT)

    def save(self) -> None:
        """Writes the file of the device; processes that start later launch by it."""
        write_text(tunings_path(self.device), self.to_json())


DEFAULT = Tuning()


def tunings_path(device: str) -> Path:
    """The file of a device name, beside the codebooks built on this machine."""
    return cache_dir().parent / "triton" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}.json"


@cache
def load_tunings(device: str) -> Tunings:
    """The tunings found on a device of this name, or none; read once per process.

    Raises:
        KernelError: the file is damaged.
    """
    path = tunings_path(device)
    if not path.exists():
        return Tunings(device=device)
    try:
        return Tunings.from_json(path.read_text())
    except (OSError, ContractError) as error:
        raise KernelError(f"{path}: expected tunings of {device}: {error}; remove it, or tune again") from error
