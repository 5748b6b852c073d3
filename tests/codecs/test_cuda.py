"""Attention in CUDA C++, as far as it goes without a device: what is compiled, and what it is given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fibkv import kernels
from fibkv.attend import Scores, attend
from fibkv.codecs import codec_for
from fibkv.kernels import cuda_attend, triton
from fibkv.kernels.cuda_attend import Program, Reading
from fibkv.kernels.reference_trellis import windows
from fibkv.kernels.triton_sides import Side
from fibkv.parameters import named_parameters
from fibkv.tables import FibTables, trellis_of
from tests.codecs.compile_triton import usage
from tests.codecs.conformance import gaussian
from tests.codecs.test_native import filled

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


@pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")
@pytest.mark.parametrize("masked", [False, True])
def test_what_a_launch_is_given(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments by their names in `attend.cu`, when it is decided and when it is known; nothing is launched."""
    launches: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cuda_attend, "why_not", lambda: "yes")
    monkeypatch.setattr(cuda_attend, "_most_shared", lambda device: 200 << 10)
    monkeypatch.setattr(cuda_attend, "_program", lambda found, device: Program(found, 256, found.shared))
    monkeypatch.setattr(cuda_attend, "_launch", lambda *launch: launches.append(launch))
    source = (cuda_attend.SOURCES / "attend.cu").read_text()
    signature = re.search(r" attend\((.*?)\)", source, re.DOTALL)
    assert signature is not None
    names = [parameter.split()[-1] for parameter in signature.group(1).split(",")]
    view = filled(("key4", "fib2"), "reference", heads=1, tokens=150, tokens_per_page=64).view()
    group = max(view.rows.plan(kernels.resolve("triton")).groups, key=lambda group: group.start)
    mask = torch.ones(2, 1, 3, 150, dtype=torch.bool)
    scores = Scores(0.5, 4.0 if masked else None, mask if masked else None, causal=False)
    for seed in range(2):
        attend(gaussian(2, 2, 3, 64, seed=seed), view, scores, implementation="triton")
        made = [(found, config, dict(zip(names, given, strict=True))) for found, config, _, *given in launches]
        found, config, given = next(launch for launch in made if launch[2]["addresses"] == group.addresses.data_ptr())
        launches.clear()
        assert (found.mask, found.softcap) == (("bool", True) if masked else ("none", False))
        assert config.grid == (1, 1, 2)
        tables = [cuda_attend._table(side, torch.device("cpu")) for side in (group.key_tables, group.value_tables)]
        expected = {
            **{"key_codewords": tables[0].data_ptr(), "value_codewords": tables[1].data_ptr()},
            **{"bias": 0, "mask_start": mask.data_ptr() if masked else 0},
            **{"row0": 0, "head0": 0, "rows": 2, "heads": 1, "num_queries": 6, "length": 3},
            **{"start": 64, "spans": 1, "tokens": 64, "capacity": 64, "units_each": 1},
            **{"mask_row": 450 * masked, "mask_head": 0, "mask_query": 150 * masked},
            **{"scale": 0.5, "softcap": 4.0 * masked},
        }
        assert expected.items() <= given.items()
        assert given["slot"] in range(4)
        moving = {given[name] for name in ("query", "out", "lse")}
        assert len(moving) == 3
        assert all(address % 16 == 0 for address in moving)
