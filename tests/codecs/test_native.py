"""Attention of the native kernels, in place, on every instruction set of this machine."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fibkv import kernels
from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.codecs import codec_for
from fibkv.errors import KernelError
from fibkv.kernels import native
from fibkv.packed import Packed
from fibkv.page import METADATA_NBYTES
from fibkv.parameters import CodecParameters, FibParameters, named_parameters
from fibkv.policy import Policy
from fibkv.quarantine import Quarantine
from fibkv.ranges import SMALL_GRAIN
from fibkv.regions import ProtectedRegions
from fibkv.slabs import Slabs
from fibkv.view import Tail, View
from tests.codecs import test_codecs
from tests.codecs.conformance import BYTES, CodecConformance, attend_error, equal, gaussian, native_implementations
from tests.pages.helpers import layer_settings_of

AVAILABLE = native_implementations()
# Of bfloat16 numbers, in and out.
SHORT = 5e-3
pytestmark = pytest.mark.skipif(native.why_not() != "yes", reason=f"native kernels: {native.why_not()}")

PAIRS = [
    ("fib4", "fib4"),
    ("fib2", "fib2"),
    ("fib4", "fib2"),
    ("trellis2", "trellis2"),
    ("trellis4", "trellis3"),
    ("trellis3", "trellis4"),
    ("trellis3", "trellis3"),
    ("scalar4", "scalar4"),
    ("scalar2", "scalar2"),
    ("fib3", "fib3"),
    ("fib1", "fib3"),
    ("key3", "value3"),
    ("scalar3", "scalar3"),
    ("centered4", "fib4"),
    ("centered2", "centered2"),
    ("affine4", "affine4"),
    ("affine3", "fib4"),
    ("int8", "int8"),
    ("int8", "fib4"),
    ("fp8", "fp8"),
    ("fib4", "raw"),
    ("raw", "raw"),
]


class Operators(TorchDispatchMode):
    """Notes the names of torch's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def suites() -> list[type[CodecConformance]]:
    found = [value for value in vars(test_codecs).values() if isinstance(value, type)]
    return [suite for suite in found if issubclass(suite, CodecConformance) and suite is not CodecConformance]


def parameters(name: str | CodecParameters, dim: int) -> object:
    if not isinstance(name, str):
        return name
    scalar = {"scalar4": 16, "scalar3": 8, "scalar2": 4}
    if name in ("centered4", "centered2"):
        return FibParameters.of(dim, *{"centered4": (2, 256), "centered2": (4, 256)}[name], centered=True)
    return FibParameters.of(dim, 1, scalar[name]) if name in scalar else named_parameters(name, dim, "f32")


def filled(
    pair: tuple[str | CodecParameters, str],
    implementation: str,
    *,
    tokens: int = 150,
    batch: int = 2,
    heads: int = 2,
    groups: int = 2,
    dim: int = 64,
    policy: Policy | None = None,
    tokens_per_page: int = 16,
    device: str = "cpu",
) -> LayerCache:
    settings = layer_settings_of(
        *(parameters(name, dim) for name in pair),
        heads=heads,
        query_heads=heads * groups,
        policy=policy or Policy.per_token(ProtectedRegions(first_tokens_raw=3, last_tokens_raw=5)),
        tokens_per_page=tokens_per_page,
        implementation=implementation,
    )
    keys, values = (gaussian(batch, heads, tokens, dim, seed=seed).to(device) for seed in (0, 1))
    cache = LayerCache(settings, keys, values, Quarantine())
    cache.append(keys, values)
    return cache


def dense(query: Tensor, view: View, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attention in float64 on the decoded cache."""
    keys, values = (side.double() for side in view.decode(torch.float32))
    groups = query.shape[1] // keys.shape[1]
    keys, values = (side.repeat_interleave(groups, 1) for side in (keys, values))
    logits = query.double() @ keys.transpose(-1, -2) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    mask = scores.mask
    if mask is None and scores.causal:
        past, length = view.length - query.shape[2], view.length
        newest = past + torch.arange(query.shape[2], device=query.device)
        mask = torch.arange(length, device=query.device) <= newest[:, None]
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return torch.softmax(logits, -1).nan_to_num(0.0) @ values, torch.logsumexp(logits, -1)


def check(cache: LayerCache, query: Tensor, scores: Scores, error: float, implementation: str | None = None) -> None:
    view = cache.view()
    out, lse = attend(query, view, scores, implementation=implementation)
    expected, expected_lse = dense(query, view, scores)
    seen = torch.isfinite(expected_lse)
    assert not out[~seen].any()
    assert (lse[~seen] == -torch.inf).all()
    rms = float(expected[seen].square().mean().sqrt())
    assert float((out[seen].double() - expected[seen]).square().mean().sqrt()) <= error * rms
    torch.testing.assert_close(lse[seen].double(), expected_lse[seen], rtol=error, atol=error)


@pytest.mark.parametrize("implementation", AVAILABLE)
@pytest.mark.parametrize("pair", PAIRS)
class TestPairs:
    def test_one_query(self, pair: tuple[str, str], implementation: str) -> None:
        cache = filled(pair, implementation)
        assert all(isinstance(segment.held, Packed) for page in cache.pages() for segment in (*page.keys, *page.values))
        check(cache, gaussian(2, 4, 1, 64, seed=2), Scores(0.125), attend_error(implementation, *pair))

    def test_several_and_many_queries(self, pair: tuple[str, str], implementation: str) -> None:
        """Speculative verification and chunked prefill: causal among themselves."""
        cache = filled(pair, implementation)
        error = attend_error(implementation, *pair)
        for queries in (3, 9, 70):
            query = gaussian(2, 4, queries, 64, seed=2)
            check(cache, query, Scores(0.125), error)
            check(cache, query.bfloat16(), Scores(0.125), max(error, SHORT))

    def test_left_padding_and_softcap(self, pair: tuple[str, str], implementation: str) -> None:
        cache = filled(pair, implementation)
        mask = torch.ones(2, 1, 2, 150, dtype=torch.bool)
        mask[1, :, :, :40] = False
        mask[0, :, 1] = False
        query = gaussian(2, 4, 2, 64, seed=2)
        for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
            scores = Scores(0.125, softcap=2.0, mask=given)
            check(cache, query, scores, attend_error(implementation, *pair))


@pytest.mark.parametrize("implementation", AVAILABLE)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_grouped_queries_and_head_dims(implementation: str, groups: int, dim: int) -> None:
    for pair in (("fib4", "fib4"), ("fib2", "int8")):
        cache = filled(pair, implementation, groups=groups, dim=dim, batch=1)
        check(cache, gaussian(1, 2 * groups, 1, dim, seed=2), Scores(dim**-0.5), attend_error(implementation, *pair))


@pytest.mark.parametrize("implementation", AVAILABLE)
@pytest.mark.parametrize(
    "pair", [("fib3", "fib3"), ("key3", "value3"), ("trellis3", "trellis3"), ("trellis2", "trellis4")]
)
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_units_of_three_bytes_and_rings(implementation: str, pair: tuple[str, str], dim: int) -> None:
    """Of one register and of several, tiles for keys alone and for both, queries that decode them."""
    cache = filled(pair, implementation, dim=dim, batch=1, tokens_per_page=24)
    assert all(page.compute_digest() == page.digest for page in cache.pages())
    for queries in (1, 3, 20):
        query = gaussian(1, 4, queries, dim, seed=2)
        check(cache, query, Scores(dim**-0.5), attend_error(implementation, *pair))


@pytest.mark.parametrize("implementation", AVAILABLE)
@pytest.mark.parametrize("dim", [20, 48, 80, 96, 192])
def test_odd_head_dims(implementation: str, dim: int) -> None:
    for name in ("fib4", "fib3"):
        cache = filled((name, name), implementation, dim=dim)
        error = attend_error(implementation, name)
        for queries in (1, 21):
            query = gaussian(2, 4, queries, dim, seed=2)
            check(cache, query, Scores(0.1), error)
            check(cache, query.bfloat16(), Scores(0.1), max(error, SHORT))


@pytest.mark.parametrize("implementation", AVAILABLE)
@pytest.mark.parametrize("pair", [("fib4", "fib4"), ("key4", "value4"), ("int8", "fp8"), ("raw", "raw")])
def test_more_queries_than_a_task_takes(implementation: str, pair: tuple[str, str]) -> None:
    """Blocks of queries, the last one of a few; one split of the context, and two."""
    cache = filled(pair, implementation, tokens=1300, batch=1, heads=1, groups=4, tokens_per_page=64)
    error = attend_error(implementation, *pair)
    query, before = gaussian(1, 4, 257, 64, seed=2), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(cache, query, Scores(0.125), error)
            check(cache, query.bfloat16(), Scores(0.125), max(error, SHORT))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", AVAILABLE)
@pytest.mark.parametrize("tokens_per_page", [1, 5, 64, 100, 200])
def test_page_sizes(implementation: str, tokens_per_page: int) -> None:
    """Pages that are no multiple of a tile, and longer than one."""
    for pair in (("fib4", "fib2"), ("int8", "int8")):
        cache = filled(pair, implementation, tokens=420, tokens_per_page=tokens_per_page)
        check(cache, gaussian(2, 4, 1, 64, seed=2), Scores(0.125), attend_error(implementation, *pair))


@pytest.mark.parametrize("implementation", AVAILABLE)
def test_protected_heads_and_channels(implementation: str) -> None:
    for policy in (
        Policy.per_token(ProtectedRegions(raw_heads=(1,), first_tokens_raw=2)),
        Policy.role_aware_baseline(),
    ):
        cache = filled(("fib4", "fib4"), implementation, policy=policy)
        check(cache, gaussian(2, 4, 1, 64, seed=2), Scores(0.125), attend_error(implementation, "fib4"))


@pytest.mark.parametrize("implementation", AVAILABLE)
def test_a_mask_per_head_and_queries_that_are_not_contiguous(implementation: str) -> None:
    cache = filled(("int8", "fib4"), implementation)
    mask = torch.rand(2, 4, 3, 150, generator=torch.Generator().manual_seed(0)) > 0.4
    query = gaussian(2, 3, 4, 64, seed=2).transpose(1, 2)
    check(cache, query, Scores(0.125, mask=mask), attend_error(implementation, "int8", "fib4"))
    strided = mask.repeat_interleave(2, -1)[..., ::2]
    check(cache, query, Scores(0.125, mask=strided), attend_error(implementation, "int8", "fib4"))


@pytest.mark.parametrize("implementation", AVAILABLE)
@pytest.mark.parametrize("queries", [1, 20])
def test_whole_tiles_of_which_a_mask_hides_nothing_or_one_token(implementation: str, queries: int) -> None:
    """A token is hidden in the first, in the middle or at the end of a tile of 64, or made likelier."""
    cache = filled(("fib4", "int8"), implementation, tokens=450, tokens_per_page=64)
    query = gaussian(2, 4, queries, 64, seed=2)
    mask = torch.ones(2, 1, queries, 450, dtype=torch.bool)
    mask[1, :, :, :70] = False
    mask[0, :, -1, [191, 192, 300]] = False
    added = torch.zeros(2, 1, queries, 450)
    added[1, :, 0, [64, 255]] = 3.0
    for given in (mask, added):
        check(cache, query, Scores(0.125, mask=given), attend_error(implementation, "fib4", "int8"))
        # What one token changes is seen.
        out, _ = attend(query, cache.view(), Scores(0.125, mask=given), implementation=implementation)
        plain, _ = attend(query, cache.view(), Scores(0.125, mask=torch.ones_like(mask)), implementation=implementation)
        assert not torch.allclose(out[1, :, 0], plain[1, :, 0], rtol=0.05)


@pytest.mark.parametrize("implementation", AVAILABLE)
def test_the_result_does_not_depend_on_the_number_of_threads(implementation: str) -> None:
    """The context is split at other places: sums differ by rounding only."""
    cache = filled(("fib4", "fib4"), implementation, tokens=3000, batch=1, tokens_per_page=64)
    query, view = gaussian(1, 4, 1, 64, seed=2), cache.view()
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(attend(query, view, Scores(0.125)))
    finally:
        torch.set_num_threads(before)
    for out, lse in outs[1:]:
        torch.testing.assert_close(out, outs[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, outs[0][1], rtol=1e-5, atol=1e-5)


def test_the_result_does_not_depend_on_which_threads_come() -> None:
    """More threads than cores: some come late, and calls after that go on without them."""
    cache = filled(("fib4", "int8"), "native", tokens=3000, batch=1, tokens_per_page=64)
    query, view = gaussian(1, 4, 1, 64, seed=2), cache.view()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        outs = [attend(query, view, Scores(0.125)) for _ in range(30)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1]) for out, lse in outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    keys, values = gaussian(1, 2, 90, 64).to(dtype), gaussian(1, 2, 90, 64, seed=1).to(dtype)
    view = View.of_tensors(keys, values)
    query = gaussian(1, 4, 1, 64, seed=2).to(dtype)
    out, _ = attend(query, view, Scores(0.125))
    assert out.dtype == dtype
    expected, _ = attend(query.float(), View.of_tensors(keys.float(), values.float()), Scores(0.125))
    assert torch.equal(out, expected.to(dtype))


def test_small_halves_are_read_exactly() -> None:
    """Denormal float16 and every e4m3 code."""
    halves = torch.arange(1024, dtype=torch.int16).view(torch.float16).reshape(1, 1, 16, 64)
    out, _ = attend(torch.zeros(1, 1, 1, 64), View.of_tensors(halves, halves), Scores(1.0))
    torch.testing.assert_close(out[0, 0, 0], halves.float().mean(2)[0, 0], rtol=1e-5, atol=0)
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16).view(torch.float8_e4m3fn)
    codec = codec_for(named_parameters("fp8", 16, "f32"))
    finite = torch.isfinite(codes.float()[:, 0])
    coded = codec.assemble(
        {
            "scales": torch.ones(1, int(finite.sum()), dtype=torch.bfloat16),
            "values": codes.view(torch.uint8)[finite][None].view(codes.dtype),
        }
    )
    for token in range(0, coded.scales.shape[1], 7):
        one = coded.tokens(token, token + 1, lead=1)
        out, _ = kernels.attend(
            torch.zeros(1, 1, 16), one, codec.tables, one, codec.tables, scale=1.0, implementation="native"
        )
        assert torch.equal(out[0, 0], one.values[0, 0].float())


class TestMemory:
    def test_pages_that_are_sealed_together_are_neighbours(self) -> None:
        cache = filled(("fib4", "fib4"), "native", batch=1, tokens=200)
        addresses = [page.keys[0].held.data.data_ptr() for page in cache.rows[0] if len(page.keys) == 1]
        steps = {b - a for a, b in pairwise(addresses)}
        (step,) = steps
        held = cache.rows[0][2].nbytes - 64
        assert held <= step < held + 2 * 64, "blocks of equal size, one behind another"

    def test_attention_reads_the_pages_themselves(self) -> None:
        """No copy in between: damage to a page is damage to the output."""
        for pair in PAIRS:
            cache = filled(pair, "native")
            view, query = cache.view(), gaussian(2, 4, 1, 64, seed=2)
            held = {id(segment.held) for page in cache.pages() for segment in (*page.keys, *page.values)}
            assert {id(packed) for packed in view.rows.plan(kernels.resolve("native")).held} == held
            before, _ = attend(query, view, Scores(0.125))
            with cache.corrupted(0, 3):
                assert not torch.equal(attend(query, view, Scores(0.125))[0], before)
            assert torch.equal(attend(query, view, Scores(0.125))[0], before)

    def test_blocks_return_to_the_memory_they_came_from(self) -> None:
        cache = filled(("fib4", "fib4"), "native", batch=1, tokens=400)
        slabs = cache._inventory.slabs
        # Slack is at most what the last grain has behind blocks.
        assert 0 <= slabs.slack_nbytes < SMALL_GRAIN
        held = sum(page.nbytes - METADATA_NBYTES for page in cache.pages())
        assert held <= slabs.used_nbytes <= 1.05 * held, "segments are aligned"
        before = slabs.allocated_nbytes
        cache.crop(100)
        held = sum(page.nbytes - METADATA_NBYTES for page in cache.pages())
        assert held <= slabs.used_nbytes <= 1.05 * held
        assert slabs.allocated_nbytes <= before / 2
        cache.crop(0)
        assert slabs.allocated_nbytes == slabs.used_nbytes == 0

    def test_codes_are_the_reference_codes(self) -> None:
        """Only the order in memory differs: canonical bytes and digests are the same."""
        for pair in PAIRS:
            one, other = filled(pair, "native"), filled(pair, "reference")
            for left, right in zip(one.pages(), other.pages(), strict=True):
                assert left.digest == right.digest == left.compute_digest()

    def test_copies_pickles_and_cuts(self) -> None:
        cache = filled(("fib4", "int8"), "native")
        query = gaussian(2, 4, 1, 64, seed=2)
        expected, _ = attend(query, cache.view(), Scores(0.125))
        twin = copy.deepcopy(cache)
        assert twin.rows[0][0] is cache.rows[0][0]
        again = pickle.loads(pickle.dumps(cache))
        assert again.rows[0][0].keys[0].held is not cache.rows[0][0].keys[0].held
        for copied in (twin, again):
            assert torch.equal(attend(query, copied.view(), Scores(0.125))[0], expected)
        cache.crop(77)
        assert all(isinstance(segment.held, Packed) for page in cache.pages() for segment in page.keys)
        check(cache, query, Scores(0.125), BYTES)

    def test_another_implementation_reads_the_same_pages(self) -> None:
        cache = filled(("fib4", "fib4"), "native")
        query, view = gaussian(2, 4, 1, 64, seed=2), cache.view()
        expected, _ = attend(query, view, Scores(0.125), implementation="reference")
        portable, _ = attend(query, view, Scores(0.125), implementation="native-portable")
        torch.testing.assert_close(portable, expected, rtol=1e-4, atol=1e-5)

    def test_packing_keeps_every_codec_bit_for_bit(self) -> None:
        for suite in suites():
            codec = codec_for(suite.parameters, suite.axis)
            codes = codec.encode(gaussian(3, 21, codec.head_dim))
            for name in AVAILABLE:
                for role in ("key", "value"):
                    ((packed,),) = kernels.resolve(name).pack([(codec.tables, role)], [[codes]], Slabs())
                    assert equal(packed.canonical(), codes), (suite.__name__, name, role)
                    assert packed.to_bytes() == codec.to_bytes(codes), (suite.__name__, name, role)


class TestQueries:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_of_any_dtype_and_strides(self, dtype: torch.dtype) -> None:
        """As transformers hands them over: [B, Q, Hq, d] transposed; and with gaps between elements."""
        cache = filled(("int8", "fib4"), "native")
        rows = gaussian(2, 3, 4, 64, seed=2).to(dtype)
        gaps = torch.stack([rows, -rows], -1)[..., 0]
        whole, lse = attend(rows.transpose(1, 2).float(), cache.view(), Scores(0.125))
        for query in (rows.transpose(1, 2), rows.transpose(1, 2).contiguous(), gaps.transpose(1, 2)):
            out, found = attend(query, cache.view(), Scores(0.125))
            assert out.dtype == dtype
            assert torch.equal(out, whole.to(dtype))
            assert torch.equal(found, lse)

    def test_a_step_asks_torch_for_its_two_results_only(self) -> None:
        """Asking torch takes longer than a short context: what a step does is in its one native call."""
        cache = filled(("int8", "fib4"), "native")
        new, query = gaussian(2, 1, 2, 64, seed=1).transpose(1, 2), gaussian(2, 4, 1, 64, seed=2)
        attend(query, cache.append(new, new), Scores(0.125))
        with Operators() as operators:
            attend(query, cache.append(new, new), Scores(0.125))
        assert operators.names == ["aten::empty", "aten::empty"]

    def test_what_is_no_number_stays_none(self) -> None:
        """Also where bits of a NaN would round to infinity."""
        values = torch.full((1, 1, 2, 16), torch.nan)
        values.view(torch.int32).fill_(0x7FFFFFFF)
        view = View.of_tensors(torch.zeros(1, 1, 2, 16).bfloat16(), values)
        assert attend(torch.zeros(1, 1, 1, 16).bfloat16(), view, Scores(1.0))[0].isnan().all()


class TestRefusals:
    def test_tensors_elsewhere(self) -> None:
        view = View.of_tensors(torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 16))
        with pytest.raises(KernelError, match="'native': expected tensors on the CPU, got meta"):
            attend(torch.zeros(1, 1, 1, 16, device="meta"), view, Scores(1.0), implementation="native")
        elsewhere = View(view.rows, Tail(*[torch.zeros(1, 1, 2, 16, device="meta")] * 2, 2), 2)
        with pytest.raises(KernelError, match="expected tensors on the CPU, got one on meta"):
            attend(torch.zeros(1, 1, 1, 16), elsewhere, Scores(1.0), implementation="native")

    def test_codes_elsewhere(self) -> None:
        codec = codec_for(named_parameters("int8", 64, "f32"))
        codes = codec.encode(gaussian(2, 16, 64))
        ((packed,),) = kernels.resolve("native").pack([(codec.tables, "key")], [[codes]], Slabs())
        with pytest.raises(KernelError, match="expected codes on the CPU, got some on meta"):
            packed.store(codes.to(torch.device("meta")))
        assert equal(packed.canonical(), codes)

    @pytest.mark.parametrize("shape", [(1, 4, 1, 32), (1, 3, 1, 64), (2, 4, 1, 64), (4, 1, 64)])
    def test_queries_of_another_shape(self, shape: tuple[int, ...]) -> None:
        """Nothing may be read by a query that does not fit."""
        view = View.of_tensors(torch.zeros(1, 2, 2, 64), torch.zeros(1, 2, 2, 64))
        expected = "query: expected head_dim 64, 1 rows and a multiple of 2 heads, got shape"
        with pytest.raises(KernelError, match=expected):
            attend(torch.zeros(shape), view, Scores(1.0), implementation="native")

    def test_softcaps_that_are_not_positive(self) -> None:
        view = View.of_tensors(torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2, 16))
        for softcap in (0.0, -1.0):
            with pytest.raises(KernelError, match="softcap: expected a positive number or None"):
                attend(torch.zeros(1, 1, 1, 16), view, Scores(1.0, softcap=softcap), implementation="native")

    def test_what_is_not_built_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "extension", None)
        monkeypatch.setattr(native, "WHY_NOT", "not built (no compiler)")
        assert kernels.available()["native"] == "not built (no compiler)"
        assert kernels.resolve("auto") is kernels.resolve("reference")
        with pytest.raises(KernelError, match=r"native kernels: not built \(no compiler\)"):
            native.Native()

    def test_gradients_are_not_followed(self) -> None:
        cache = filled(("int8", "int8"), "native")
        query = gaussian(2, 4, 1, 64, seed=2).requires_grad_()
        out, _ = attend(query, cache.view(), Scores(0.125))
        assert not out.requires_grad
