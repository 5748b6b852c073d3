"""Attention on a CUDA device, in CUDA C++ and in Triton, against float64 on the decoded cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fibkv.attend import Scores
from fibkv.kernels import cuda_attend
from fibkv.kernels.cuda_attend import CudaPages
from tests.codecs.conformance import attend_error, gaussian
from tests.codecs.test_native import check, filled

PAIRS = [
    ("fib4", "fib4"),
    ("key4", "value4"),
    ("fib2", "fib2"),
    ("key2", "fib4"),
    ("key3", "value3"),
    ("trellis2", "trellis2"),
    ("trelliskey3", "trellis4"),
    ("trellis4", "trellis3"),
    ("int8", "int8"),
    ("fp8", "fp8"),
    ("int8", "fib2"),
    ("fib4", "trellis2"),
    ("trellis3", "fp8"),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[cuda_attend.Reading]:
    """What it was decided to read in CUDA C++ so far."""
    readings: list[cuda_attend.Reading] = []
    of = CudaPages.of

    def counted(group: Any, found: cuda_attend.Reading, *arguments: Any) -> CudaPages:
        readings.append(found)
        return of(group, found, *arguments)

    monkeypatch.setattr(CudaPages, "of", counted)
    return readings


def held(
    pair: tuple[str, str], scores: Scores, *, queries: int = 1, groups: int = 2, dim: int = 64, **made: Any
) -> None:
    """Holds attention of the newest queries to the stated tolerance."""
    cache = filled(pair, "triton", groups=groups, dim=dim, device="cuda", **made)
    batch, heads = cache.view().tail.keys.shape[:2]
    query = gaussian(batch, heads * groups, queries, dim, seed=2).cuda()
    # A step is decided, and Triton asked for its kernels; then it is known.
    for _ in range(2):
        check(cache, query, scores, attend_error("triton", *pair), "triton")


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs(pair: tuple[str, str], launched: list[cuda_attend.Reading]) -> None:
    held(pair, Scores(0.125))
    assert launched


@pytest.mark.parametrize("pair", [*PAIRS[:3], ("affine4", "affine4"), *PAIRS[5:10:2]])
def test_pairs_in_triton(pair: tuple[str, str], launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attend, "why_not", lambda: "not asked for")
    held(pair, Scores(0.125))
    assert not launched


@pytest.mark.parametrize(("pair", "queries"), [(PAIRS[1], 3), (PAIRS[1], 70), (PAIRS[2], 9), (PAIRS[9], 9)])
def test_several_queries(pair: tuple[str, str], queries: int, launched: list[cuda_attend.Reading]) -> None:
    held(pair, Scores(0.125), queries=queries, groups=4)
    assert launched


@pytest.mark.parametrize("added", [False, True])
def test_left_padding_and_softcap(added: bool, launched: list[cuda_attend.Reading]) -> None:
    mask = torch.ones(2, 1, 2, 150, dtype=torch.bool, device="cuda")
    mask[1, :, :, :70] = False
    mask[0, :, 1] = False
    given = torch.zeros(mask.shape, device="cuda").masked_fill(~mask, -torch.inf) if added else mask
    held(("key4", "fib2"), Scores(0.125, softcap=2.0, mask=given), queries=2)
    assert {reading.mask for reading in launched} == {"float" if added else "bool"}


@pytest.mark.parametrize(("dim", "groups"), [(32, 1), (96, 3), (128, 8), (256, 4)])
def test_head_dims_and_groups(dim: int, groups: int, launched: list[cuda_attend.Reading]) -> None:
    held(("key4", "value4"), Scores(dim**-0.5), dim=dim, groups=groups)
    assert launched


@pytest.mark.parametrize(("tokens_per_page", "tokens"), [(1, 13), (5, 24), (64, 150), (100, 420), (128, 700)])
def test_pages_of_any_size(tokens_per_page: int, tokens: int, launched: list[cuda_attend.Reading]) -> None:
    held(("key3", "fib2"), Scores(0.125), tokens_per_page=tokens_per_page, tokens=tokens)
    assert launched


def test_logits_and_norms_that_grow(launched: list[cuda_attend.Reading]) -> None:
    """Each page is sixteen times as long as the one before: sums are measured anew again and again."""
    cache = filled(("fib4", "fib4"), "triton", tokens=0, tokens_per_page=64, dim=128, device="cuda")
    for page in range(6):
        keys, values = (4.0**page * gaussian(2, 2, 64, 128, seed=page + part).cuda() for part in (0, 50))
        cache.append(keys / 64, values)
    check(cache, gaussian(2, 4, 1, 128, seed=2).cuda(), Scores(0.1), attend_error("triton", "fib4"), "triton")
    assert launched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[8]])
def test_outputs_of_halves_are_those_of_float32_rounded(pair: tuple[str, str], dtype: torch.dtype) -> None:
    from fibkv.attend import attend  # noqa: PLC0415

    view, query = filled(pair, "triton", device="cuda").view(), gaussian(2, 4, 1, 64, seed=2).cuda().to(dtype)
    wide, _ = attend(query.float(), view, Scores(0.125), implementation="triton")
    for _ in range(2):
        assert torch.equal(attend(query, view, Scores(0.125), implementation="triton")[0], wide.to(dtype))


def test_a_captured_step_reads_what_lies_there_when_it_is_replayed() -> None:
    from fibkv.attend import attend  # noqa: PLC0415

    cache = filled(("key4", "value4"), "triton", tokens=300, dim=128, device="cuda")
    view, query = cache.view(), gaussian(2, 4, 1, 128, seed=2).cuda()
    attend(query, view, Scores(0.1), implementation="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend(query, view, Scores(0.1), implementation="triton")
    query.neg_()
    graph.replay()
    expected, _ = attend(query, view, Scores(0.1), implementation="triton")
    torch.testing.assert_close(out, expected)
