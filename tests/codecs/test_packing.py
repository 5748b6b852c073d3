"""T11: packing is exact at every width, and sizes are what the formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fibkv.packing import pack, packed_nbytes, stray_bits, unpack


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20])
@pytest.mark.parametrize("count", [1, 7, 8, 32, 33])
def test_round_trip_is_exact(bits: int, count: int) -> None:
    indices = torch.randint(0, 1 << bits, (5, 3, count), generator=torch.Generator().manual_seed(bits))
    indices[0, 0, 0], indices[0, 0, -1] = (1 << bits) - 1, (1 << bits) - 1
    packed = pack(indices, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 3, packed_nbytes(count, bits))
    assert torch.equal(unpack(packed, count, bits).long(), indices)


@given(st.integers(1, 20), st.lists(st.integers(0, 2**20 - 1), min_size=1, max_size=40))
def test_bit_order_is_little_endian(bits: int, numbers: list[int]) -> None:
    numbers = [number & ((1 << bits) - 1) for number in numbers]
    stream = sum(number << (position * bits) for position, number in enumerate(numbers))
    expected = stream.to_bytes(packed_nbytes(len(numbers), bits), "little")
    assert bytes(pack(torch.tensor(numbers), bits).tolist()) == expected


@pytest.mark.parametrize(
    ("head_dim", "bits_per_coordinate", "nbytes"),
    [(128, 4, 66), (128, 3, 50), (128, 2, 34), (128, 1, 18), (64, 4, 34), (64, 2, 18), (256, 4, 130), (256, 2, 66)],
)
def test_bytes_per_vector_with_a_16_bit_norm(head_dim: int, bits_per_coordinate: int, nbytes: int) -> None:
    assert 2 + packed_nbytes(head_dim, bits_per_coordinate) == nbytes


def test_stray_bits_are_seen() -> None:
    packed = pack(torch.tensor([[1, 2, 3]]), 3)
    assert not stray_bits(packed, 3, 3)
    packed[0, -1] |= 0x80
    assert stray_bits(packed, 3, 3)
    assert not stray_bits(torch.tensor([[255]], dtype=torch.uint8), 2, 4)
