"""Attention of the Triton kernels on whole layers, in Triton's interpreter, against float64 on the decoded cache."""

from __future__ import annotations

import pytest
import torch

from fibkv import kernels
from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.errors import KernelError
from fibkv.kernels import triton
from fibkv.policy import Policy
from fibkv.regions import ProtectedRegions
from fibkv.view import Tail, View
from tests.codecs.conformance import FLOATS, attend_error, gaussian
from tests.codecs.test_native import PAIRS, check, filled

pytestmark = pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")


def held(cache: LayerCache, queries: int, scores: Scores, *codecs: str, groups: int = 2, dim: int = 64) -> None:
    """Holds attention of the newest queries to the stated tolerance."""
    batch, heads = cache.view().tail.keys.shape[:2]
    query = gaussian(batch, heads * groups, queries, dim, seed=2)
    check(cache, query, scores, attend_error("triton", *codecs), "triton")


@pytest.mark.parametrize("pair", [*PAIRS, ("trellis2", "trellis3")])
def test_pairs_of_codecs(pair: tuple[str, str]) -> None:
    cache = filled(pair, "reference", batch=1, tokens=50)
    held(cache, 1, Scores(0.125), *pair)


def test_queries_that_are_causal_among_themselves() -> None:
    cache = filled(("fib4", "int8"), "reference", batch=2, tokens=40)
    held(cache, 3, Scores(0.125), "fib4")


@pytest.mark.parametrize("added", [False, True])
def test_left_padding_and_softcap(added: bool) -> None:
    """Rows of different lengths, and a query that sees nothing."""
    cache = filled(("fib2", "fp8"), "reference", batch=2, tokens=40)
    mask = torch.ones(2, 1, 2, 40, dtype=torch.bool)
    mask[1, :, :, :20] = False
    mask[0, :, 1] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if added else mask
    held(cache, 2, Scores(0.125, softcap=2.0, mask=given), "fib2")


HEADS = [(20, 3, "fib4"), (80, 2, "fib2"), (128, 8, "fib2"), (256, 1, "fp8")]


@pytest.mark.parametrize(("dim", "groups", "key"), HEADS)
def test_head_dims_and_groups(dim: int, groups: int, key: str) -> None:
    cache = filled((key, "fib4"), "reference", groups=groups, dim=dim, batch=1, tokens=30)
    held(cache, 1, Scores(dim**-0.5), "fib4", groups=groups, dim=dim)


@pytest.mark.parametrize(("tokens_per_page", "tokens"), [(1, 13), (5, 24), (64, 150), (100, 220)])
def test_page_sizes(tokens_per_page: int, tokens: int) -> None:
    """Pages below and beyond a tile, and addresses that no 16 bytes divide."""
    cache = filled(("fib4", "fib3"), "reference", batch=1, tokens=tokens, tokens_per_page=tokens_per_page)
    held(cache, 1, Scores(0.125), "fib4", "fib3")


def test_chunked_prefill() -> None:
    """More queries than a program takes."""
    cache = filled(("fib4", "fib4"), "reference", batch=1, heads=1, tokens=90, tokens_per_page=64)
    held(cache, 40, Scores(0.125), "fib4")


@pytest.mark.parametrize(
    "policy",
    [Policy.per_token(ProtectedRegions(raw_heads=(1,), first_tokens_raw=2)), Policy.role_aware_baseline()],
    ids=["protected_head", "channels"],
)
def test_protected_heads_and_channel_scales(policy: Policy) -> None:
    cache = filled(("fib4", "fib4"), "reference", batch=1, tokens=40, policy=policy)
    held(cache, 1, Scores(0.125), "fib4")


def test_a_mask_per_head_and_tensors_that_are_not_contiguous() -> None:
    cache = filled(("int8", "fib4"), "reference", tokens=30)
    mask = torch.rand(2, 4, 3, 30, generator=torch.Generator().manual_seed(0)) > 0.4
    query = gaussian(2, 3, 4, 64, seed=2).transpose(1, 2)
    for given in (mask, mask.repeat_interleave(2, -1)[..., ::2]):
        check(cache, query, Scores(0.125, mask=given), attend_error("triton", "fib4"), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_raw_halves(dtype: torch.dtype) -> None:
    keys, values = gaussian(1, 2, 90, 64).to(dtype), gaussian(1, 2, 90, 64, seed=1).to(dtype)
    query = gaussian(1, 4, 1, 64, seed=2).to(dtype)
    out, _ = attend(query, View.of_tensors(keys, values), Scores(0.125), implementation="triton")
    assert out.dtype == dtype
    wide = View.of_tensors(keys.float(), values.float())
    expected, _ = attend(query.float(), wide, Scores(0.125), implementation="reference")
    torch.testing.assert_close(out, expected.to(dtype), rtol=0.01, atol=FLOATS)


def test_pages_are_read_where_they_are() -> None:
    """Damage to a page is damage to the output, and the addresses are those of the pages."""
    cache = filled(("fib4", "int8"), "reference", batch=1, tokens=40)
    view, query = cache.view(), gaussian(1, 4, 1, 64, seed=2)
    before, _ = attend(query, view, Scores(0.125), implementation="triton")
    groups = view.rows.plan(kernels.resolve("triton")).groups
    planned = {tensor.data_ptr() for group in groups for placed in group.held for tensor in placed.tensors}
    assert planned >= {segment.codes.indices.data_ptr() for page in cache.pages() for segment in page.keys[-1:]}
    with cache.corrupted(0, 1):
        assert not torch.equal(attend(query, view, Scores(0.125), implementation="triton")[0], before)
    assert torch.equal(attend(query, view, Scores(0.125), implementation="triton")[0], before)


def test_devices_must_agree() -> None:
    view = filled(("int8", "int8"), "reference", batch=1, tokens=40).view()
    elsewhere = View(view.rows, Tail(*[torch.zeros(1, 2, 2, 64, device="meta")] * 2, 2), 40)
    with pytest.raises(KernelError, match="query: expected meta of the pages, got cpu"):
        attend(torch.zeros(1, 4, 1, 64), elsewhere, Scores(1.0), implementation="triton")
