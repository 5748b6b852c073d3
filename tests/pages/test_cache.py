"""The live cache of one layer: what it holds, what it reads, what it counts, what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.errors import ContractError, DecisionError, DigestMismatch, EncodingError, KernelError, PageError
from fibkv.policy import Policy
from fibkv.quarantine import Quarantine
from fibkv.regions import FallbackSettings, ProtectedRegions
from fibkv.sealing import LayerSettings
from tests.pages.helpers import DIM, HEADS, coder, gaussian, layer_settings, protecting, shape_of

pytestmark = pytest.mark.usefixtures("sealed")
AT_ONCE = pytest.mark.parametrize("sealed", ["at once"], indirect=True)


def make(layer: LayerSettings | None = None, batch: int = 1) -> LayerCache:
    empty = torch.zeros(batch, HEADS, 0, DIM)
    return LayerCache(layer or layer_settings(), empty, empty, Quarantine())


def fill(cache: LayerCache, tokens: int, *, step: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    keys = gaussian(cache.batch, HEADS, tokens, DIM, seed=seed)
    values = gaussian(cache.batch, HEADS, tokens, DIM, seed=seed + 1000)
    for start in range(0, tokens, step or tokens):
        stop = start + (step or tokens)
        cache.append(keys[:, :, start:stop], values[:, :, start:stop])
    return keys, values


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Float64 attention ``[B, Hq, Q, d]`` on dense keys and values, queries the newest tokens."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if mask is None:
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - query.shape[2])
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1).nan_to_num(0.0) @ values


def test_pages_fill_and_the_rest_stays_in_the_tail() -> None:
    cache = make(layer_settings(policy=protecting(first_tokens_raw=4, last_tokens_raw=5)))
    keys, values = fill(cache, 60, step=1)
    # 60 - 5 tokens may be sealed: three pages of 16; 12 stay in the tail.
    assert [(page.start, page.tokens) for page in cache.rows[0]] == [(0, 16), (16, 16), (32, 16)]
    assert (cache.length, cache.tail.length) == (60, 12)
    dense_keys, dense_values = cache.view().decode(torch.float32)
    for dense, exact in ((dense_keys, keys), (dense_values, values)):
        assert torch.equal(dense[:, :, :4], exact[:, :, :4]), "sinks are kept raw"
        assert torch.equal(dense[:, :, 48:], exact[:, :, 48:]), "the tail is kept raw"
        error = (dense - exact)[:, :, 4:48].square().mean() / exact[:, :, 4:48].square().mean()
        assert 0.004 < error < 0.01


@pytest.mark.parametrize("step", [1, 7, 16, 60])
def test_the_way_of_appending_does_not_change_what_is_stored(step: int) -> None:
    policy = protecting(first_tokens_raw=4, last_tokens_raw=5)
    whole, parts = make(layer_settings(policy=policy)), make(layer_settings(policy=policy))
    fill(whole, 60)
    fill(parts, 60, step=step)
    assert [page.digest for page in whole.rows[0]] == [page.digest for page in parts.rows[0]]
    for left, right in zip(whole.view().decode(torch.float32), parts.view().decode(torch.float32), strict=True):
        assert torch.equal(left, right)


def test_rows_encode_as_they_would_alone() -> None:
    cache = make(batch=3)
    keys, values = fill(cache, 40)
    for row in range(3):
        alone = make()
        alone.append(keys[row : row + 1], values[row : row + 1])
        assert [page.digest for page in alone.rows[0]] == [page.digest for page in cache.rows[row]]


@pytest.mark.parametrize("pair", [("fib4", "fib4"), ("raw", "raw"), ("int8", "fp8"), ("fib4", "raw"), ("fp8", "fib2")])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("policy", ["plain", "sinks", "heads", "role_aware"])
def test_attention_on_parts_equals_attention_on_the_dense_cache(
    pair: tuple[str, str], queries: int, policy: str
) -> None:
    chosen = {
        "plain": Policy.per_token(),
        "sinks": protecting(first_tokens_raw=3, last_tokens_raw=4),
        "heads": protecting(raw_heads=(1,), first_tokens_raw=2),
        "role_aware": Policy.role_aware_baseline(),
    }[policy]
    cache = make(layer_settings(*pair, chosen), batch=2)
    fill(cache, 75)
    view = cache.view()
    keys, values = view.decode(torch.float32)
    query = gaussian(2, 2 * HEADS, queries, DIM, seed=5)
    out, lse = attend(query, view, Scores(scale=0.2))
    expected = dense_attention(query, keys, values, 0.2, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)
    assert lse.shape == (2, 2 * HEADS, queries)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks(heads: int, dtype: torch.dtype) -> None:
    cache = make(layer_settings(policy=protecting(first_tokens_raw=3)), batch=2)
    fill(cache, 50)
    view = cache.view()
    seen = torch.rand(2, heads, 3, 50, generator=torch.Generator().manual_seed(1)) > 0.4
    seen[0, :, 1] = False
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    query = gaussian(2, 4, 3, DIM, seed=5)
    out, _ = attend(query, view, Scores(scale=0.1, mask=mask))
    expected = dense_attention(query, *view.decode(torch.float32), 0.1, seen)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)
    assert not out[0, :, 1].any(), "a query that sees nothing gets zeros"


def test_softcap_and_no_causality() -> None:
    cache = make()
    fill(cache, 50)
    query = gaussian(1, 4, 3, DIM, seed=5)
    out, _ = attend(query, cache.view(), Scores(scale=0.5, softcap=2.0, causal=False))
    keys, values = cache.view().decode(torch.float64)
    keys, values = (t.repeat_interleave(2, 1) for t in (keys, values))
    scores = 2 * torch.tanh(query.double() @ keys.transpose(-1, -2) * 0.5 / 2)
    torch.testing.assert_close(out.double(), torch.softmax(scores, -1) @ values, rtol=1e-4, atol=2e-5)


def test_query_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    fill(cache, 80)
    query = gaussian(1, 4, 30, DIM, seed=5)
    whole, _ = attend(query, cache.view(), Scores(scale=0.2))
    monkeypatch.setattr("fibkv.attend.LOGITS_LIMIT", 4 * 80 * 7)
    monkeypatch.setattr("fibkv.view.TILE_TOKENS", 32)
    blocks, _ = attend(query, cache.view(), Scores(scale=0.2))
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-6)


def test_append_reads_the_new_tokens_exactly_and_the_past_as_stored() -> None:
    cache = make()
    first, _ = fill(cache, 32)
    keys = gaussian(1, HEADS, 20, DIM, seed=9)
    dense, _ = cache.append(keys, keys).decode(torch.float32)
    assert torch.equal(dense[:, :, 32:], keys)
    assert not torch.equal(dense[:, :, :32], first)
    assert cache.tail.length == 4, "the page behind the snapshot is sealed"


def test_read_through_reads_everything_through_the_codec() -> None:
    cache = make(layer_settings("int8", "int8", read_through=True))
    keys = gaussian(1, HEADS, 21, DIM)
    dense, _ = cache.append(keys, keys).decode(torch.float32)
    codec = coder("key", "int8").compressing
    assert torch.equal(dense, codec.decode(codec.encode(keys)))
    assert [page.tokens for page in cache.rows[0]] == [16, 5]
    assert cache.tail.length == 0


def test_a_snapshot_outlives_what_happens_after_it() -> None:
    cache = make()
    keys = gaussian(1, HEADS, 10, DIM)
    view = cache.append(keys, keys)
    before = view.decode(torch.float32)
    fill(cache, 40, step=1, seed=50)
    cache.crop(3)
    fill(cache, 20, step=1, seed=60)
    assert all(torch.equal(a, b) for a, b in zip(before, view.decode(torch.float32), strict=True))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_cropping_keeps_what_was_there(data: st.DataObject) -> None:
    """Crop, select and append in any order against a model that keeps dense tensors (int8 decodes token by token)."""
    cache = make(layer_settings("int8", "int8", protecting(first_tokens_raw=2, last_tokens_raw=3)), batch=2)
    seen = torch.zeros(2, HEADS, 0, DIM)
    for step in range(data.draw(st.integers(2, 6))):
        action = data.draw(st.sampled_from(["append", "append", "crop", "select"]))
        if action == "append":
            keys = gaussian(cache.batch, HEADS, data.draw(st.integers(1, 40)), DIM, seed=step)
            cache.append(keys, keys)
            seen = torch.cat([seen, keys], 2)
        elif action == "crop":
            length = data.draw(st.integers(0, cache.length))
            cache.crop(length)
            seen = seen[:, :, :length]
        else:
            rows = data.draw(st.lists(st.integers(0, cache.batch - 1), min_size=1, max_size=3))
            cache.select(rows)
            seen = seen[rows]
        if cache.length:
            dense, _ = cache.view().decode(torch.float32)
            assert dense.shape == seen.shape
            assert (dense - seen).abs().max() < 0.03
            for row in cache.rows:
                assert [page.start for page in row] == sorted({page.start for page in row})
        cache.verify()
        assert not cache.quarantine.records


def test_a_crop_through_a_page_keeps_its_codes() -> None:
    cache = make(layer_settings(policy=protecting(first_tokens_raw=4)))
    fill(cache, 48)
    before, _ = cache.view().decode(torch.float32)
    cache.crop(21)
    after, _ = cache.view().decode(torch.float32)
    torch.testing.assert_close(after, before[:, :, :21], rtol=1e-6, atol=1e-6)
    assert [(page.start, page.tokens) for page in cache.rows[0]] == [(0, 16), (16, 5)]
    fill(cache, 30, step=1, seed=7)
    assert cache.length == 51
    query = gaussian(1, 4, 1, DIM, seed=5)
    out, _ = attend(query, cache.view(), Scores(scale=0.2))
    expected = dense_attention(query, *cache.view().decode(torch.float32), 0.2, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)


def test_rows_go_on_sharing_pages_after_a_crop() -> None:
    cache = make()
    fill(cache, 48)
    cache.select([0, 0])
    cache.crop(21)
    assert all(a is b for a, b in zip(*cache.rows, strict=True))


def test_copies_share_pages_and_diverge() -> None:
    cache = make()
    fill(cache, 40)
    fork = copy.deepcopy(cache)
    assert all(a is b for a, b in zip(cache.rows[0], fork.rows[0], strict=True))
    before = cache.view().decode(torch.float32)
    fill(fork, 30, seed=3)
    assert (cache.length, fork.length) == (40, 70)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.view().decode(torch.float32), strict=True))


def test_bytes_are_those_of_the_tensors() -> None:
    cache = make(layer_settings(policy=protecting(first_tokens_raw=4, last_tokens_raw=5)), batch=2)
    fill(cache, 60)
    tensors = {
        id(tensor): tensor.numel() * tensor.element_size()
        for page in cache.pages()
        for segment in (*page.keys, *page.values)
        for _, tensor in segment.codes.named()
    }
    tail = 2 * 2 * HEADS * (16 + 5) * DIM * 4
    # 64 bytes of digest, counts and table entry for each of 6 pages.
    assert cache.nbytes == sum(tensors.values()) + tail + 6 * 64
    # 4 + 44 tokens in two roles, two heads, two rows; 33 bytes per vector, 4 per group of one head and segment.
    assert sum(tensors.values()) == 2 * 2 * 2 * (4 * 256 + 44 * 33 + 3 * 4)
    cache.select([0, 0, 0])
    shared = sum(tensors.values()) // 2 + 3 * 64 + 6 * 8 + tail // 2 * 3
    assert cache.nbytes == shared


@AT_ONCE  # beside the model each page has one block, of which its tensors are views
def test_pages_own_their_memory() -> None:
    """A page must not keep a whole prefill's storage alive."""
    cache = make()
    fill(cache, 64)
    for page in cache.pages():
        for segment in (*page.keys, *page.values):
            for _, tensor in segment.codes.named():
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@AT_ONCE  # beside the model the next append finds out, see test_ahead.py
class TestFallback:
    def bad_values(self) -> tuple[Tensor, Tensor]:
        keys, values = gaussian(2, HEADS, 32, DIM), gaussian(2, HEADS, 32, DIM, seed=1)
        values[1, 0, 20, 3] = torch.inf
        return keys, values

    def test_what_cannot_be_encoded_is_kept_raw_and_counted(self) -> None:
        cache = make(batch=2)
        keys, values = self.bad_values()
        cache.append(keys, values)
        assert dict(cache.raw_reasons()) == {"not_encodable": HEADS * 16}
        dense_keys, dense_values = cache.view().decode(torch.float32)
        assert torch.equal(dense_values[1, :, 16:], values[1, :, 16:])
        assert not torch.equal(dense_values[0], values[0])
        # Rows that differ in form are still read together.
        query = gaussian(2, 4, 1, DIM, seed=5)
        mask = torch.ones(2, 1, 1, 32, dtype=torch.bool)
        out, _ = attend(query[:1], first_row(cache), Scores(scale=0.2))
        expected = dense_attention(query[:1], dense_keys[:1], dense_values[:1], 0.2, mask[:1])
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-5)
        both, _ = attend(query, cache.view(), Scores(scale=0.2))
        torch.testing.assert_close(both[0], out[0])

    @pytest.mark.parametrize(
        "fallback", [FallbackSettings(mode="fail_closed"), FallbackSettings(mode="keep_raw", raw_available=False)]
    )
    def test_fail_closed_refuses_and_changes_nothing(self, fallback: FallbackSettings) -> None:
        base = layer_settings()
        closed = base.values.profile.model_copy(update={"fallback": fallback})
        closed_values = replace(base.values, profile=closed)
        cache = make(
            LayerSettings(
                layer=1,
                key_shape=shape_of("key"),
                value_shape=shape_of("value"),
                keys=base.keys,
                values=closed_values,
                tokens_per_page=16,
            ),
            batch=2,
        )
        fill(cache, 20)
        before = cache.view().decode(torch.float32)
        with pytest.raises(EncodingError, match=r"'test:fib4': vectors must be finite.*raw fallback is not allowed"):
            cache.append(*self.bad_values())
        assert cache.length == 20
        assert all(torch.equal(a, b) for a, b in zip(before, cache.view().decode(torch.float32), strict=True))
        fill(cache, 20, seed=4)
        assert cache.length == 40


def first_row(cache: LayerCache) -> object:
    """The view of the first row alone."""
    alone = copy.deepcopy(cache)
    alone.select([0])
    return alone.view()


class TestDamage:
    def test_a_damaged_page_changes_the_output_and_is_restored_exactly(self) -> None:
        for name in ("raw", "int8", "fp8", "fib4", "fib2"):
            cache = make(layer_settings(name, name))
            fill(cache, 40)
            query = gaussian(1, 4, 1, DIM, seed=5)
            before, _ = attend(query, cache.view(), Scores(scale=0.2))
            with cache.corrupted(row=0, page=1):
                damaged, _ = attend(query, cache.view(), Scores(scale=0.2))
            after, _ = attend(query, cache.view(), Scores(scale=0.2))
            assert (damaged - before).abs().max() > 1e-3, name
            assert torch.equal(before, after), name

    def test_verify_quarantines_a_damaged_page(self) -> None:
        cache = make()
        fill(cache, 40)
        with cache.corrupted(row=0, page=1):
            cache.verify()
        (record,) = cache.quarantine.records
        assert record.subject == "page"
        assert "layer 1, tokens 16..31" in record.name
        with pytest.raises(PageError, match=r"layer 1, tokens 16..31.*quarantine"):
            cache.view()
        with pytest.raises(PageError, match="quarantine"):
            fill(cache, 1)

    def test_no_move_or_cut_gives_a_damaged_page_a_new_digest(self) -> None:
        cache = make()
        fill(cache, 40)
        damaged = cache.rows[0][1]
        sealed = damaged.digest
        with cache.corrupted(row=0, page=1):
            with pytest.raises(DigestMismatch, match=r"Page\(layer=1, start=16\): digest mismatch"):
                cache.crop(20)
            assert cache.length == 40
            moved = replace(damaged, held=damaged.held)
            assert moved.digest == sealed != moved.compute_digest()
        cache.crop(20)
        cache.verify()
        assert not cache.quarantine.records


class TestRefusals:
    def test_wrong_tensors(self) -> None:
        cache = make()
        good = gaussian(1, HEADS, 3, DIM)
        with pytest.raises(PageError, match=r"layer 1 keys: expected .* \[1, 2, 64, torch.float32\], got \[2, 2, 64"):
            cache.append(gaussian(2, HEADS, 3, DIM), good)
        with pytest.raises(PageError, match=r"layer 1 values: .*got \[1, 2, 64, torch.float16\]"):
            cache.append(good, good.half())
        with pytest.raises(PageError, match="layer 1: 3 keys but 2 values"):
            cache.append(good, good[:, :, :2])
        assert cache.length == 0

    def test_wrong_queries_and_masks(self) -> None:
        cache = make()
        fill(cache, 20)
        with pytest.raises(KernelError, match=r"1 rows and a multiple of 2 heads, got shape \[1, 3, 1, 64\]"):
            attend(gaussian(1, 3, 1, DIM), cache.view(), Scores(scale=1.0))
        mask = torch.ones(1, 1, 1, 19, dtype=torch.bool)
        with pytest.raises(
            KernelError, match=r"expected shape \[1, 4, 1, 20\] or 1 in its first two, got \[1, 1, 1, 19\]"
        ):
            attend(gaussian(1, 4, 1, DIM), cache.view(), Scores(scale=1.0, mask=mask))
        with pytest.raises(KernelError, match="softcap: expected a positive number"):
            attend(gaussian(1, 4, 1, DIM), cache.view(), Scores(scale=1.0, softcap=0.0))

    def test_policy_and_profile_must_protect_the_same(self) -> None:
        good = coder("key")
        with pytest.raises(ContractError, match=r"Profile.protected: expected ProtectedRegions\(first_tokens_raw=3"):
            replace(good, policy=protecting(first_tokens_raw=3))

    def test_a_missing_calibration_is_refused(self) -> None:
        needs = Policy(
            strategy="fib_quant_per_token",
            protected=ProtectedRegions(),
            require_calibration=True,
            allow_raw_fallback=False,
        )
        with pytest.raises(DecisionError, match="need_calibration"):
            fill(make(layer_settings(policy=needs)), 20)
