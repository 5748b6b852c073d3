from __future__ import annotations

import pytest
import torch

from fibkv.bench_read import METHODS, ROW, ROW_NBYTES, PureRead, cold_nbytes


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("byte", [0, 3 * ROW_NBYTES + 1234, 5 * ROW_NBYTES - 4])
def test_every_method_looks_at_every_byte(name: str, byte: int) -> None:
    rows, vector = torch.ones(5, ROW), torch.ones(ROW)
    before = METHODS[name](rows, vector)
    rows.view(-1)[byte // 4] = torch.nan  # its bytes make an int8 of 127 and more
    assert not torch.equal(METHODS[name](rows, vector), before)


def test_reads_walk_through_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    read = PureRead(10 * ROW_NBYTES)
    seen: list[tuple[int, int]] = []
    start = read._rows.data_ptr()
    monkeypatch.setitem(
        METHODS, "int8 maximum", lambda rows, _: seen.append(((rows.data_ptr() - start) // ROW_NBYTES, len(rows)))
    )
    read._methods[4 * ROW_NBYTES - 3] = "int8 maximum"  # rounded up to 4 rows
    for _ in range(4):
        assert read.turn(4 * ROW_NBYTES - 3)[0] > 0
    assert seen == [(0, 4), (4, 4), (0, 4), (4, 4)]


def test_the_fastest_method_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = PureRead(ROW_NBYTES)
    times = dict.fromkeys(METHODS, 9.0) | {"float32 matrix @ vector": 3.0, "float32 x . x": 1.0, "int8 maximum": 2.0}
    monkeypatch.setattr(read, "_timed", lambda name, nbytes: times[name])
    assert read.method(100) == "float32 x . x"
    times["int8 maximum"] = 0.5
    assert read.method(100) == "float32 x . x"
    assert read.method(200) == "int8 maximum"
    assert read.turn(200) == [0.5]


def test_a_read_is_at_most_the_buffer() -> None:
    read = PureRead(ROW_NBYTES + 1)
    assert read.nbytes == 2 * ROW_NBYTES
    assert read.turn(100 * ROW_NBYTES)[0] > 0


def test_cold_bytes_are_twice_the_cache_within_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibkv.bench_read.last_level_cache", lambda: 1000)
    monkeypatch.setattr("fibkv.bench_read.available_memory", lambda: 10000)
    assert cold_nbytes(None, 2) == 2000
    assert cold_nbytes(None, 5) == 1000
    assert cold_nbytes(300, 2) == 300
    assert cold_nbytes(9000, 1) == 5000
    monkeypatch.setattr("fibkv.bench_read.last_level_cache", lambda: None)
    monkeypatch.setattr("fibkv.bench_read.available_memory", lambda: 1 << 40)
    assert cold_nbytes(None, 1) == 512 << 20
