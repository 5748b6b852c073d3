"""klt codes: heads with allocations of their own, the native kernels bit for bit, and what is refused.

The conformance suite runs them with one head (`tests.codecs.test_codecs.TestKlt`).
"""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from fibkv import kernels
from fibkv.allocation import HeadAllocation, KltParameters
from fibkv.attend import Scores
from fibkv.codecs import codec_for
from fibkv.errors import ContractError, EncodingError, KernelError, PageError
from fibkv.kernels import reference, reference_klt
from fibkv.parameters import named_parameters
from fibkv.policy import Policy
from fibkv.regions import ProtectedRegions
from fibkv.tables import KltTables
from tests.codecs.allocations import ONE_HEAD, TWO_HEADS, head_of, klt_of
from tests.codecs.conformance import attend_error, equal, gaussian, native_implementations
from tests.codecs.test_native import check, filled

IMPLEMENTATIONS = ["reference", *native_implementations()]
EVERY = [
    ONE_HEAD,
    TWO_HEADS,
    klt_of((0, 3, 2, 0, 5), (0, 2, 3, 1, 4), scale_search=False),
    klt_of((1, 0, 0, 0, 0)),
    klt_of((0, 0, 0, 1, 63)),
    klt_of((64, 0, 0, 0, 0)),
]


def rows_of(parameters: KltParameters, *lead: int, tokens: int = 37, seed: int = 0) -> Tensor:
    """Ordinary vectors, and some that leave the range of careless arithmetic, or stand on borders."""
    rows = gaussian(*lead, len(parameters.heads), tokens, parameters.head_dim, seed=seed)
    rows[..., 1, :] *= 1e-42
    rows[..., 2, :] *= 1e30
    rows[..., 3, :] = 0
    rows[..., 4, :] = -3.25
    rows[..., 5, :] = 0
    rows[..., 5, 0] = 1
    rows[..., 6, 0] = 1000
    rows[..., 7, -1] = 1000
    rows[..., 8, :] = torch.sign(rows[..., 8, :])
    return rows


@pytest.mark.parametrize("implementation", native_implementations())
@pytest.mark.parametrize("parameters", EVERY, ids=range(len(EVERY)))
def test_native_codes_are_the_reference_codes(parameters: KltParameters, implementation: str) -> None:
    tables, chosen = codec_for(parameters).tables, kernels.resolve(implementation)
    for lead in ((), (3, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            rows = rows_of(parameters, *lead).to(dtype)
            codes = reference.encode(rows, tables)
            assert equal(codes, chosen.encode(rows, tables))
            expected = reference.decode(codes, tables)
            decoded = chosen.decode(codes, tables)
            torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-44)
            out = torch.full(expected.shape, torch.nan, dtype=dtype)
            assert torch.equal(chosen.decode(codes, tables, out=out), decoded.to(dtype))


@pytest.mark.parametrize("implementation", native_implementations())
def test_native_codes_of_many_vectors(implementation: str) -> None:
    for parameters in (TWO_HEADS, klt_of((20, 16, 8, 10, 10))):
        tables = codec_for(parameters).tables
        rows = gaussian(20, len(parameters.heads), 64, parameters.head_dim)
        assert equal(reference.encode(rows, tables), kernels.resolve(implementation).encode(rows, tables))


def test_each_head_has_the_code_of_its_own_allocation() -> None:
    rows = gaussian(3, 2, 20, 64)
    codec = codec_for(TWO_HEADS)
    codes = codec.encode(rows)
    for head, allocation in enumerate(TWO_HEADS.heads):
        alone = codec_for(KltParameters(head_dim=64, heads=(allocation,)))
        expected = alone.encode(rows[:, head])
        assert equal(codes.map(lambda tensor, h=head: tensor[:, h]), expected)
        assert equal(
            codec.of_heads(head, head + 1).encode(rows[:, head : head + 1]), expected.map(lambda t: t[:, None])
        )
        zeros = allocation.bits.index(0)
        decoded = codec.decode(codes)[:, head]
        assert not decoded[..., 2 * zeros :].any()
        assert decoded[..., : 2 * zeros].all()
    assert codec.of_heads(0, 2) is codec
    assert codec.of_heads(1, 2) is codec.of_heads(1, 2)


def test_indices_stand_where_the_allocation_says() -> None:
    """Bit by bit, written out: pair after pair, the lowest bit first."""
    codec = codec_for(ONE_HEAD)
    indices = torch.stack(
        [torch.randint(1 << bits, (5,), generator=_seeded(bits)) for bits in ONE_HEAD.heads[0].bits], -1
    )
    stream = 0
    for bits, index in zip(reversed(ONE_HEAD.heads[0].bits), indices[3].flip(-1).tolist(), strict=True):
        stream = stream << bits | index
    packed = reference_klt.pack(indices.to(torch.int32), codec.tables)
    assert bytes(packed[3].tolist()) == stream.to_bytes(17, "little")
    assert torch.equal(reference_klt.unpack(packed, codec.tables), indices.to(torch.int32))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_gain_is_the_best_for_weighted_errors() -> None:
    """No other norm of the same direction has a smaller error in the weighted metric."""
    tables = codec_for(ONE_HEAD).tables
    assert isinstance(tables, KltTables)
    unit, _ = reference_klt.units(gaussian(200, 64), tables)
    coded = tables.bits[0].repeat_interleave(2) > 0
    torch.testing.assert_close(unit[:, coded].square().mean(-1), torch.ones(200), rtol=1e-5, atol=0)
    found = reference_klt.search(unit, tables)
    best = reference_klt.gain(found).unsqueeze(-1)
    directions = reference_klt.directions(found.indices, tables)
    weights = tables.weights[0].repeat_interleave(2)

    def error(gain: Tensor) -> Tensor:
        return (weights * (unit - gain * directions).square())[:, coded].sum(-1)

    assert (error(best) <= torch.minimum(error(best * 1.01), error(best * 0.99))).all()


def test_a_scale_search_lowers_the_weighted_error() -> None:
    rows, errors = gaussian(64, 64), []
    for parameters in (ONE_HEAD, ONE_HEAD.model_copy(update={"scale_search": False})):
        codec = codec_for(parameters)
        weights = codec.tables.weights[0].repeat_interleave(2)
        errors.append(float((weights * (rows - codec.decode(codec.encode(rows))).square()).sum()))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("values", ["fib4", "raw"])
def test_attention(values: str, implementation: str) -> None:
    policy = Policy.per_token(ProtectedRegions(first_tokens_raw=3, last_tokens_raw=5))
    cache = filled((TWO_HEADS, values), implementation, policy=policy)
    for queries in (1, 3, 70):
        error = attend_error(implementation, values)
        check(cache, gaussian(2, 4, queries, 64, seed=2), Scores(0.125), error)


@pytest.mark.parametrize("implementation", native_implementations())
@pytest.mark.parametrize("tokens_per_page", [1, 40, 100])
def test_attention_on_pages_of_any_length_and_widths_of_any_mix(tokens_per_page: int, implementation: str) -> None:
    """Registers of tokens that are not full, indices that cross words, sections that are empty."""
    mixes = [(0, 3, 2, 0, 5), (1, 0, 0, 0, 9), (0, 0, 0, 20, 0), (13, 17, 5, 3, 10)]
    for mix in mixes:
        parameters = klt_of(mix, mix, scale_search=False)
        cache = filled(
            (parameters, "raw"), implementation, tokens=230, tokens_per_page=tokens_per_page, dim=2 * sum(mix)
        )
        for queries in (1, 2, 4):
            query = gaussian(2, 4, queries, 2 * sum(mix), seed=2)
            check(cache, query, Scores(0.125), attend_error(implementation, "raw"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_protected_heads_leave_the_others_their_own_codes(implementation: str) -> None:
    for raw in ((0,), (1,)):
        policy = Policy.per_token(ProtectedRegions(raw_heads=raw))
        cache = filled((TWO_HEADS, "raw"), implementation, policy=policy)
        check(cache, gaussian(2, 4, 1, 64, seed=2), Scores(0.125), attend_error(implementation, "raw"))
        with cache.corrupted(0, 2):
            assert any(page.compute_digest() != page.digest for page in cache.pages())
        again = pickle.loads(pickle.dumps(cache))
        for one, other in zip(cache.pages(), again.pages(), strict=True):
            assert one.digest == other.compute_digest()


class TestRefusals:
    def test_allocations_that_do_not_fit(self) -> None:
        with pytest.raises(ContractError, match=r"heads\[0\]: expected 8 pairs, got \(2, 2\)"):
            KltParameters(head_dim=16, heads=(head_of(1, 0, 1, 0, 0),))
        rising = HeadAllocation(bits=(2, 4), half_octaves=(0, 0))
        with pytest.raises(ContractError, match=r"heads\[0\]\.bits: expected numbers that do not rise"):
            KltParameters(head_dim=4, heads=(rising,))
        with pytest.raises(ContractError, match=r"heads\[1\]\.bits: expected 8 bits, as of every head, got 6"):
            klt_of((1, 0, 0, 0, 1), (0, 1, 0, 0, 1))
        with pytest.raises(ContractError, match=r"heads\[0\]\.bits: expected some bits"):
            klt_of((0, 0, 0, 0, 2))
        with pytest.raises(ContractError, match="per_token for klt codes"):
            codec_for(ONE_HEAD, "per_channel")

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_other_heads(self, implementation: str) -> None:
        codec = codec_for(TWO_HEADS)
        codes = codec.encode(gaussian(2, 5, 64))
        with pytest.raises(
            KernelError, match=r"of 2 heads: expected shape \[\.\.\., heads, T, \.\.\.\], got \[3, 5, 64\]"
        ):
            codec.encode(gaussian(3, 5, 64), implementation=implementation)
        with pytest.raises(KernelError, match=r"of 2 heads: .* got \[1, 5, 16\]"):
            codec.decode(codes.map(lambda tensor: tensor[:1]), implementation=implementation)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_rows_that_cannot_be_coded(self, implementation: str) -> None:
        codec = codec_for(ONE_HEAD)
        rows = gaussian(2, 20, 64)
        rows[1, 19, -1] = torch.inf  # of a pair without bits
        with pytest.raises(EncodingError, match="finite, got 1 NaN or infinite"):
            codec.encode(rows, implementation=implementation)
        with pytest.raises(EncodingError, match="finite in float32"):
            codec.encode(
                torch.full((1, 2, 64), 3.4e38) * (1 + torch.arange(64) % 2 * -2), implementation=implementation
            )

    def test_stray_bits_and_ranges(self) -> None:
        codec = codec_for(ONE_HEAD)
        codes = codec.encode(gaussian(1, 2, 64))
        codes.indices[0, 1, -1] |= 0x80
        with pytest.raises(PageError, match="zero bits behind the last index"):
            codec.check(codes)

    def test_triton(self) -> None:
        if kernels.available()["triton"] != "yes":
            pytest.skip(kernels.available()["triton"])
        codec = codec_for(ONE_HEAD)
        rows = gaussian(1, 4, 64)
        codes = codec.encode(rows, implementation="triton")
        assert equal(codes, codec.encode(rows, implementation="reference"))
        assert torch.equal(
            codec.decode(codes, implementation="triton"), codec.decode(codes, implementation="reference")
        )
        raw = codec_for(named_parameters("raw", 64, "f32"))
        with pytest.raises(KernelError, match="another codec than klt"):
            kernels.attend(
                gaussian(1, 1, 64),
                codes,
                codec.tables,
                raw.encode(rows),
                raw.tables,
                scale=1.0,
                implementation="triton",
            )
