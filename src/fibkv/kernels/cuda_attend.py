"""CUDA C++ beside the Triton kernels: attention on pages of codes, compiled for the device at hand by NVRTC.

Triton has no say in where a table lies in shared memory; `cuda/attend.cu` says what that is worth. `cuda-core`
(NVIDIA's) compiles and launches; where it is not installed, and for what this does not read, attention is Triton's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fibkv.errors import KernelError
from fibkv.kernels.triton_moving import Kind, Moving
from fibkv.kernels.triton_plan import Group
from fibkv.kernels.triton_queries import Turned
from fibkv.kernels.triton_sides import Side, on_device
from fibkv.tables import FibTables, Tables

SOURCES = Path(__file__).parent / "cuda"
# As in cuda/: threads of a warp, queries of a tile, tokens that a warp takes at a time, bytes of a table from one
# FibQuant codeword to the next and of the copies there, and floats that a warp's part of the output has for each
# eighth of a vector's coordinates.
LANES, QUERIES, UNIT, STRIDE, COPIES, PART = 32, 8, 64, 256, 128, 65
FORMS = {"fib": 0, "trellis": 1, "int8": 2, "fp8": 3}
MASKS = {"none": 0, "bool": 1, "float": 2}
# Shared memory that a program gets without asking for more, less what the kernel has besides; and that.
GRANTED, BESIDES = 46 << 10, 2 << 10
# What a program costs besides its units, in units of each warp.
FIXED = 2


class Reading(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        key: of the keys.
        value: of the values.
        one_table: whether both have the same codewords.
        mask: a key of MASKS.
        softcap: whether logits are bent.
        query_tiles: of 8 queries, that a program takes.
        warps: of a program.
        programs: that a multiprocessor has at a time: while one begins or ends, another computes.
    """

    key: Side
    value: Side
    one_table: bool
    mask: str
    softcap: bool
    query_tiles: int
    warps: int
    programs: int

    @property
    def value_table(self) -> int:
        """Where the values' codewords are in shared memory."""
        both = _form(self.key) == _form(self.value) == "fib"
        return COPIES if both else _table_nbytes(self.key)

    @property
    def shared(self) -> int:
        """Bytes of shared memory: tables, and in their place what warps made at the end."""
        tables = _table_nbytes(self.key)
        if not self.one_table:
            tables = max(tables, self.value_table - self.value_table % STRIDE + _table_nbytes(self.value))
        return max(tables, self.warps * self.value.dim // 8 * PART * 4)


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled kernel: of cuda-core, and what is launched with it."""

    kernel: Any
    block: int
    shared: int


@cache
def why_not() -> str:
    """ "yes" if kernels can be compiled and launched, else the reason."""
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return "cuda-core is not installed"
    return "yes" if torch.cuda.is_available() else "no CUDA device"


def reading(group: Group, mask: str, softcap: bool, queries: int) -> Reading | None:
    """The kernel that reads a group's pages for so many queries of a head, or None."""
    if why_not() != "yes" or group.aligned < 16 or mask not in MASKS:
        return None
    tiles = 1 if queries <= QUERIES else 2
    return _reading(group.key_tables, group.value_tables, mask, softcap, tiles, group.device)


@lru_cache(maxsize=1 << 10)
def _reading(
    key_tables: Tables, value_tables: Tables, mask: str, softcap: bool, tiles: int, device: torch.device
) -> Reading | None:
    key, value = Side.of(key_tables), Side.of(value_tables)
    if not (_reads(key) and _reads(value)) or value.centered or key.dim != value.dim:
        return None
    one_table = _one_table(key_tables, value_tables)
    found = Reading(key, value, one_table, mask, softcap, query_tiles=tiles, warps=8, programs=1)
    room = _most_shared(device)
    if found.shared > room:
        return None
    # More queries, and longer vectors, take registers of twice as many threads.
    many = tiles == 1 and key.dim <= 128 and 2 * found.shared <= room
    return found._replace(programs=2) if many else found


@lru_cache(maxsize=1 << 12)
def _cut(units: int, programs: int, room: int, warps: int) -> tuple[int, int]:
    """So that `programs` of each split, of which there is room for some at a time, take as little time as can be."""

    def seconds(count: int) -> int:
        return _ceil(programs * count, room) * (_ceil(_ceil(units, count), warps) + FIXED)

    each = _ceil(units, min(range(1, min(units, max(1, 4 * room // programs)) + 1), key=seconds))
    return _ceil(units, each), each


@dataclass(frozen=True, slots=True, eq=False)
class CudaPages:
    """Pages of one group as a step reads them.

    Attributes:
        program: that reads them.
        config: how cuda-core launches it.
        splits: of the context.
        tables: addresses of the group, and the codewords of its keys and values; None = there are none.
        where: the addresses of these.
        sizes: the numbers that the kernel is given, from the first row to the units of a split.
    """

    program: Program
    config: Any
    splits: int
    tables: tuple[Tensor | None, ...]
    where: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, group: Group, found: Reading, kind: Kind, room: int) -> Self:
        """The pages of a group.

        Args:
            group: the pages.
            found: of `reading`.
            kind: of the queries.
            room: multiprocessors of the device.

        Raises:
            KernelError: NVRTC refuses, or the device does.
        """
        rows, heads, queries = kind.sizes
        run_rows, run_heads = group.rows[1] - group.rows[0], group.heads[1] - group.heads[0]
        programs = run_heads * _ceil(queries, QUERIES * found.query_tiles)
        units = group.spans * _ceil(group.tokens, UNIT)
        count, each = _cut(units, programs * run_rows, room * found.programs, found.warps)
        program = _program(found, kind.device.index or 0)
        tables = group.addresses, *(_table(side, kind.device) for side in (group.key_tables, group.value_tables))
        place = group.rows[0], group.heads[0], rows, heads, queries, kind.length
        return cls(
            program,
            _config((count, programs, run_rows), program),
            count,
            tables,
            tuple(_address(table) for table in tables),
            (*place, group.start, group.spans, group.tokens, group.tokens, each),
        )

    def launch(self, turned: Turned, slot: int, moving: Moving) -> None:
        """Launches `cuda/attend.cu`; arguments have the meaning that `triton_attend.attend_splits` gives them."""
        query, bias = turned
        _launch(
            self.program.kernel,
            self.config,
            moving.stream,
            query.data_ptr(),
            _address(bias),
            *self.where,
            _address(moving.mask),
            moving.outs.data_ptr(),
            moving.lses.data_ptr(),
            *self.sizes,
            slot,
            *moving.strides,
            moving.scale,
            moving.softcap,
        )


def compiled(found: Reading, arch: str) -> Any:
    """The `cuda.core.ObjectCode` for an architecture, such as ``sm_90``; needs no device.

    Raises:
        KernelError: NVRTC refuses.
    """
    from cuda.core import Program as Source  # noqa: PLC0415 - optional
    from cuda.core import ProgramOptions  # noqa: PLC0415

    constants = {"HEAD_DIM": found.key.dim, "KEY_CENTERED": int(found.key.centered)}
    for name, side in (("KEY", found.key), ("VALUE", found.value)):
        constants |= {f"{name}_FORM": FORMS[_form(side)], f"{name}_BITS": side.bits, f"{name}_BLOCK": side.block}
    constants |= {"ONE_TABLE": int(found.one_table), "VALUE_TABLE": found.value_table, "MASK": MASKS[found.mask]}
    constants |= {"QUERY_TILES": found.query_tiles, "WARPS": found.warps, "MIN_BLOCKS": found.programs}
    options = ProgramOptions(
        std="c++17",
        arch=arch,
        include_path=str(SOURCES),
        define_macro=[(name, str(number)) for name, number in {**constants, "SOFTCAP": int(found.softcap)}.items()],
    )
    text = (SOURCES / "attend.cu").read_text()
    try:
        return Source(text, "c++", options).compile("cubin")
    except Exception as error:  # cuda-core has no one class for what its libraries refuse
        raise KernelError(f"cuda kernels: {found}: {error}") from error


@lru_cache(maxsize=256)
def _program(found: Reading, device: int) -> Program:
    from cuda.core import Device  # noqa: PLC0415 - optional

    capability = Device(device).compute_capability
    kernel = compiled(found, f"sm_{capability.major}{capability.minor}").get_kernel("attend")
    if found.shared > GRANTED:
        _grant(kernel, found.shared, device)
    return Program(kernel, found.warps * LANES, found.shared)


def _grant(kernel: Any, shared: int, device: int) -> None:
    from cuda.bindings import driver  # noqa: PLC0415 - optional

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared, kernel.handle, device)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(f"cuda kernels: {shared} bytes of shared memory for a program: {status.name}")


def _config(grid: tuple[int, int, int], program: Program) -> Any:
    from cuda.core import LaunchConfig  # noqa: PLC0415 - optional

    return LaunchConfig(grid=grid, block=program.block, shmem_size=program.shared)


def _launch(kernel: Any, config: Any, stream: int, *arguments: float) -> None:
    from cuda.core import launch  # noqa: PLC0415 - optional

    launch(_stream(stream), config, kernel, *arguments)


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    from cuda.core import Stream  # noqa: PLC0415 - optional

    return Stream.from_handle(handle)


def _form(side: Side) -> str:
    return "trellis" if side.form == "fib" and side.window > side.bits else side.form


def _reads(side: Side) -> bool:
    # A lane has whole bytes of a vector.
    if side.channels or side.dim % 32 or side.dim > 256 or side.nbytes % 8:
        return False
    match _form(side):
        case "fib":
            return side.norm == "log8" and side.block in (2, 4) and side.bits <= 8
        case "trellis":
            return side.norm == "log8" and side.block == 1 and side.window == side.bits + 8
        case form:
            return form in FORMS


def _table_nbytes(side: Side) -> int:
    match _form(side):
        case "fib":
            return STRIDE << side.bits
        case "trellis":
            return 4 << (_step(side) + 8)
        case _:
            return 0


def _step(side: Side) -> int:
    """Bits by which the windows of a trellis's table move on: those of two coordinates, where a table has room."""
    return 2 * side.bits if side.bits < 4 else side.bits


@lru_cache(maxsize=64)
def _table(tables: Tables, device: torch.device) -> Tensor | None:
    """The words that the kernel copies to shared memory; None where a codec has none."""
    if not isinstance(tables, FibTables):
        return None
    side, halves = Side.of(tables), on_device(tables, device).halves
    if _form(side) == "fib":
        return halves
    windows = torch.arange(1 << (_step(side) + 8), device=device)
    first, last = (halves.view(torch.int16).flatten()[at & (len(halves) - 1)] for at in (windows, windows >> side.bits))
    return torch.stack([first, last] if _step(side) > side.bits else [first, first], 1).contiguous()


def _one_table(key: Tables, value: Tables) -> bool:
    if not isinstance(key, FibTables) or not isinstance(value, FibTables):
        return False
    return _form(Side.of(key)) == _form(Side.of(value)) and torch.equal(key.codewords, value.codewords)


@lru_cache(maxsize=16)
def _most_shared(device: torch.device) -> int:
    from cuda.core import Device  # noqa: PLC0415 - optional

    return int(Device(device.index or 0).properties.max_shared_memory_per_block_optin) - BESIDES


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ceil(number: int, by: int) -> int:
    return -(-number // by)
