"""Queries turned and splits merged by the Triton kernels, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fibkv.kernels import triton
from tests.codecs.conformance import gaussian

pytestmark = pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")

CPU = torch.device("cpu")
DIM = 20


def rotation(seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(DIM, DIM, seed=seed).double())[0].float().contiguous()


def merged(outs: Tensor, lses: Tensor, spaces: list[tuple[int, int, Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Splits ``outs [S, 1, queries, 1, d]``, of which those behind the spaces are in none of them."""
    from fibkv.kernels.triton_merge import Merge, Space  # noqa: PLC0415 - imports triton

    slots, *axes = lses.shape
    stop = spaces[-1][1] if spaces else 0
    merge = Merge([Space(*space) for space in spaces], None if stop == slots else stop, outs.shape[1:], dtype, CPU)
    out, lse = merge(outs.flatten(), lses.flatten(), slots, 0)
    assert out.shape == (*axes, DIM)
    return [out, lse]


def expected(outs: Tensor, lses: Tensor, spaces: list[tuple[int, int, Tensor]]) -> list[Tensor]:
    shares = torch.softmax(lses.double(), 0).nan_to_num(0.0).unsqueeze(-1)
    parts = torch.where(shares > 0, outs.double() * shares, 0.0)
    for first, stop, matrix in spaces:
        parts[first:stop] = parts[first:stop] @ matrix.double()
    return [parts.sum(0), torch.logsumexp(lses.double(), 0)]


@pytest.mark.parametrize("queries", [3, 300])
@pytest.mark.parametrize("stops", [[], [5], [18], [4, 9], [4, 18]])
def test_spaces_and_what_is_in_none(stops: list[int], queries: int) -> None:
    """18 splits, so that a program looks at them twice; one query sees nothing, one is not in every split."""
    outs, lses = gaussian(18, 1, queries, 1, DIM), 3 * gaussian(18, 1, queries, 1, seed=1)
    lses[:, 0, 0] = -torch.inf
    lses[::2, 0, 1] = -torch.inf
    outs[lses == -torch.inf] = torch.nan
    spaces = [(first, stop, rotation(stop)) for first, stop in zip([0, *stops], stops, strict=False)]
    for found, wanted in zip(merged(outs, lses, spaces, torch.float32), expected(outs, lses, spaces), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_outputs_in_the_dtype_of_queries_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    # The interpreter's float16 warns of numbers that it has not.
    exponents = (-8, 4) if dtype == torch.float16 else (-44, 37)
    outs = gaussian(1, 1, 40, 1, DIM) * torch.logspace(*exponents, 40).view(1, 40, 1, 1)
    outs[0, 0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    # As far from two bfloat16 numbers each, below and above.
    outs[0, 0, 1, 0, :4] = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F818001], dtype=torch.int32).view(
        torch.float32
    )
    found, _ = merged(outs, torch.zeros(1, 1, 40, 1), [], dtype)
    assert found.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert torch.equal(found.nan_to_num(7.0), outs[0].to(found.dtype).nan_to_num(7.0))
    assert torch.equal(found.isnan(), outs[0].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_queries_are_widened_and_turned(dtype: torch.dtype) -> None:
    from fibkv.kernels.triton_merge import Turn  # noqa: PLC0415 - imports triton

    query, matrix = gaussian(2, 3, 7, DIM).to(dtype), rotation(0)
    plain, turned = Turn.of(dtype, matrix)(query, 0)
    assert torch.equal(plain, query.float())
    torch.testing.assert_close(turned.double(), query.double() @ matrix.double().T, rtol=1e-5, atol=1e-5)
