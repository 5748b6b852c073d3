"""Attention in CUDA C++, as far as it goes without a device: what is compiled, and what it is given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fibkv.codecs import codec_for
from fibkv.kernels import cuda_attend
from fibkv.kernels.cuda_attend import Reading
from fibkv.kernels.reference_trellis import windows
from fibkv.kernels.triton_sides import Side
from fibkv.parameters import named_parameters
from fibkv.tables import FibTables, trellis_of
from tests.codecs.compile_triton import usage

READINGS = [
    ("key4", "value4", 128, "none", 1),
    ("key4", "fib2", 128, "bool", 1),
    ("key3", "value3", 64, "float", 1),
    ("trelliskey2", "trellis3", 128, "none", 1),
    ("trellis4", "int8", 128, "none", 2),
    ("fp8", "fp8", 256, "none", 1),
]


def side(name: str, dim: int) -> Side:
    return Side.of(codec_for(named_parameters(name, dim, "bf16")).tables)


def reading(key: str, value: str, dim: int, mask: str = "none", tiles: int = 1) -> Reading:
    programs = 2 if tiles == 1 and dim <= 128 else 1
    return Reading(side(key, dim), side(value, dim), key == value, mask, mask != "none", tiles, 8, programs)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("made", READINGS, ids=str)
def test_it_compiles_for_devices(made: tuple[str, str, int, str, int], arch: str) -> None:
    registers, stack = usage(cuda_attend.compiled(reading(*made), arch).code)
    assert registers <= 255
    # A few spilled words cost less than the program that they would not leave room for.
    assert stack <= 64


def test_what_a_program_has_in_shared_memory() -> None:
    """Two programs of FibQuant or of 3-bit trellis codes find room on a multiprocessor of an A100 or H100."""
    both = reading("key4", "fib2", 128)
    assert (both.value_table, both.shared) == (128, 64 << 10)
    assert reading("fib4", "trellis3", 128).value_table == 64 << 10
    assert reading("fib4", "trellis3", 128).shared == 128 << 10
    assert reading("trellis3", "trellis3", 128).shared == 64 << 10
    # What warps have made at the end: eight queries of float32, and padding.
    assert reading("int8", "int8", 128).shared == 8 * 16 * 65 * 4


@pytest.mark.parametrize("name", ["trellis2", "trellis3", "trellis4"])
def test_tables_of_windows_have_what_symbols_stand_for(name: str) -> None:
    """At 2 and 3 bits an entry has two coordinates, of windows that overlap."""
    tables = codec_for(named_parameters(name, 64, "bf16")).tables
    assert isinstance(tables, FibTables)
    trellis = trellis_of(tables)
    assert trellis is not None
    bits, per_entry = tables.bits, 2 if tables.bits < 4 else 1
    symbols = torch.randint(1 << bits, (20, 64), generator=torch.Generator().manual_seed(0))
    stream = (symbols.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(-2)
    width = bits * per_entry + 8
    last = [stream.roll(width - end, -1)[:, :width] for end in range(bits * per_entry, 64 * bits + 1, bits * per_entry)]
    entries = torch.stack(last, 1) @ (1 << torch.arange(width))
    table = cuda_attend._table(tables, torch.device("cpu"))
    assert table is not None
    found = table.view(torch.float16)[entries, :per_entry].flatten(-2)
    expected = tables.codewords[:, 0].half()[windows(symbols, trellis.code)]
    assert torch.equal(found, expected)


@given(
    units=st.integers(1, 5000), programs=st.integers(1, 600), room=st.integers(1, 264), warps=st.sampled_from([8, 16])
)
def test_splits_have_all_units(units: int, programs: int, room: int, warps: int) -> None:
    count, each = cuda_attend._cut(units, programs, room, warps)
    assert count * each >= units > (count - 1) * each


def test_splits_fill_a_device() -> None:
    """An H100 has room for 264 programs: one row of 32k tokens is split among them, 64 rows of 4k are not."""
    count, each = cuda_attend._cut(512, 8, 264, 8)
    assert count * 8 > 200
    assert each <= 20
    assert cuda_attend._cut(64, 64 * 8, 264, 8) == (1, 64)
