"""Encoding and decoding in C++ against the reference: the same codes bit for bit, on every instruction set here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fibkv.codecs import Codec, codec_for
from fibkv.codes import ChannelCodes, Codes, FibCodes
from fibkv.errors import EncodingError, KernelError
from fibkv.kernels import reference
from fibkv.kernels.reference_norms import decode_norms
from fibkv.means import decode_means
from fibkv.packing import unpack
from fibkv.parameters import (
    CodecParameters,
    FibParameters,
    Fp8Parameters,
    Int8Parameters,
    RawParameters,
    TrellisParameters,
)
from fibkv.rotation import hadamard_signs
from fibkv.tables import ChannelTables, FibTables, Tables
from tests.codecs import test_codecs
from tests.codecs.conformance import (
    CodecConformance,
    attend_error,
    equal,
    gaussian,
    native_implementations,
    relative_mse,
)

native = pytest.importorskip("fibkv.kernels._native", reason="the native kernels were not compiled")
native_codes = pytest.importorskip("fibkv.kernels.native_codes")

ISAS = [isa for isa in (native.Isa.portable, native.Isa.avx2, native.Isa.avx512) if native.has_isa(isa)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What rounding to a dtype costs decoded vectors: relative, and where it runs out of exponents.
ROUNDOFF = {torch.float32: (0.0, 2.0**-149), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}


def _on_native(suite: type[CodecConformance], implementation: str) -> type[CodecConformance]:
    name = f"{suite.__name__}{implementation.title().replace('-', '')}"
    error = attend_error(implementation, suite.parameters.codec)
    fields = {"implementation": implementation, "attend_error": error, "name": suite.native_name or suite.name}
    return type(name, (suite,), {**fields, "__module__": __name__})


# The whole suite of every codec, its golden bytes among it.
for _suite in list(CodecConformance.__subclasses__()):
    for _implementation in native_implementations():
        _case = _on_native(_suite, _implementation)
        globals()[_case.__name__] = _case
del _suite, _implementation, _case


def fib(*shape: int, **fields: object) -> FibParameters:
    return FibParameters.of(*shape, **fields)


# Every search and rotation, sizes that are no multiple of any number of lanes, widths of codes that cross bytes.
PARAMETERS: dict[str, CodecParameters] = {
    "int8": Int8Parameters(head_dim=20),
    "fp8": Fp8Parameters(head_dim=80),
    "fib4": fib(128, 2, 256),
    "fib4_plain": fib(128, 2, 256, norm_format="f16", gain_corrected=False),
    "fib4_half": fib(128, 2, 256, norm_format="f16"),
    "fib4_haar": fib(96, 2, 256),
    "fib4_256": fib(256, 2, 256),
    "fib4_scales": fib(128, 2, 256, scale_search=True),
    "fib4_centered": fib(128, 2, 256, scale_search=True, centered=True),
    "scalar3_centered_haar": fib(80, 1, 8, centered=True),
    "fib3": fib(64, 2, 64),
    "fib2": fib(128, 4, 256),
    "fib2_80": fib(80, 4, 256),
    "fib2_scales": fib(64, 4, 256, scale_search=True),
    "fib1": fib(64, 8, 256),
    "fib_k16": fib(64, 16, 256),
    "fib_k2_small": fib(20, 2, 16),
    "fib_k3": fib(24, 3, 16),
    "scalar4": fib(128, 1, 16),
    "scalar3": fib(80, 1, 8),
    "scalar4_scales": fib(64, 1, 16, scale_search=True),
    "hadamard_8": fib(8, 2, 16, rotation="hadamard"),
    "trellis2": TrellisParameters.of(64, 2),
    "trellis2_fast_scales": TrellisParameters.of(32, 2, path_search="fast", scale_search=True, centered=True),
    "trellis3_haar": TrellisParameters.of(24, 3),
    "trellis3_fast": TrellisParameters.of(40, 3, path_search="fast"),
    "trellis4_full": TrellisParameters.of(32, 4),
    "trellis4": TrellisParameters.of(64, 4, path_search="fast", norm_format="f16"),
}
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
each_setting = pytest.mark.parametrize("name", PARAMETERS)


def hard_rows(dim: int) -> Tensor:
    """``[..., 4, dim]``: what sits on borders, and what leaves the range of careless arithmetic."""
    one_hot = torch.eye(dim)[:: max(1, dim // 32)][: dim // 4 * 4]
    noise = gaussian(len(one_hot), dim, seed=7)
    powers = torch.logspace(-44, 35, len(one_hot))[:, None]
    sparse = torch.where(noise > 1.5, noise, torch.zeros(()))
    integers = (noise * 2).round()
    rows = [
        one_hot,
        -one_hot * 3,
        one_hot + one_hot.roll(1, 0),
        torch.full_like(noise, -3.25),
        torch.sign(noise),
        noise * powers,
        noise * 1e-44,
        sparse,
        integers,
        torch.zeros_like(noise),
        one_hot * 1e-45,
        noise + 100 * one_hot,
    ]
    return torch.cat(rows).reshape(-1, 4, dim)


def half_safe(rows: Tensor, parameters: CodecParameters, dtype: torch.dtype) -> Tensor:
    """Rows in a dtype, within float16 where it, or the format of the norms, asks for that."""
    if dtype == torch.float16 or getattr(parameters, "norm_format", "") == "f16":
        rows = rows.clamp(-3e3, 3e3)
    return rows.to(dtype)


def assert_same(expected: Codes, found: Codes) -> None:
    for (field, a), (_, b) in zip(expected.named(), found.named(), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        different = int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())
        assert not different, f"{field}: {different} of {b.nbytes} bytes"


def assert_equal_codes(rows: Tensor, codec: Codec, isa: object) -> None:
    assert_same(reference.encode(rows, codec.tables), native_codes.encode(rows, codec.tables, isa=isa))


def assert_decoded(
    codes: Codes, expected: Tensor, tables: Tables, isa: object, dtype: torch.dtype = torch.float32
) -> None:
    """Codes decode to ``expected`` within 1e-5 of each vector, and what rounding to the dtype costs."""
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    assert native_codes.decode(codes, tables, out=out, isa=isa) is out
    expected = expected.double()
    wanted = expected.clamp(-65504, 65504) if dtype == torch.float16 else expected
    relative, least = ROUNDOFF[dtype]
    # The reference adds up d denormal numbers where a vector is one: hence the last term.
    allowed = 1e-5 * expected.abs().amax(-1, keepdim=True) + relative * wanted.abs() + 2 * least + 2.0**-142
    assert ((out.double() - wanted).abs() <= allowed).all(), dtype


def decoded_exactly(codes: Codes, tables: Tables) -> Tensor:
    """What codes decode to, in float64: behind channel scales the reference's own float32 errs by nearly 1e-5."""
    match codes, tables:
        case ChannelCodes(), ChannelTables():
            return decoded_exactly(codes.inner, tables.inner) * codes.channel_scales.double().unsqueeze(-2)
        case FibCodes(), FibTables():
            indices = unpack(codes.indices, tables.num_blocks, tables.bits)
            norms = decode_norms(codes.norms, codes.norm_range).double().unsqueeze(-1)
            vectors = reference._directions(indices, tables).double() * norms
            if tables.centered:
                vectors = vectors + decode_means(codes.mean).double().unsqueeze(-2)
            return vectors @ tables.rotation.matrix.double()
        case _:
            return reference.decode(codes, tables).double()


@cache
def samples(name: str, axis: str) -> list[tuple[Tensor, Codes, Tensor]]:
    """Ordinary and hard rows of every dtype, what the reference makes of them, and that decoded."""
    codec = codec_for(PARAMETERS[name], axis)
    found = []
    for dtype in DTYPES:
        for rows in (gaussian(3, 17, codec.head_dim), half_safe(hard_rows(codec.head_dim), codec.parameters, dtype)):
            codes = reference.encode(rows.to(dtype), codec.tables)
            found.append((rows.to(dtype), codes, decoded_exactly(codes, codec.tables)))
    return found


@each_isa
@each_setting
@pytest.mark.parametrize("axis", ["per_token", "per_channel"])
def test_codes_equal_the_reference(name: str, axis: str, isa: object) -> None:
    codec = codec_for(PARAMETERS[name], axis)
    for rows, codes, _ in samples(name, axis):
        assert_same(codes, native_codes.encode(rows, codec.tables, isa=isa))


@each_isa
@each_setting
@pytest.mark.parametrize("axis", ["per_token", "per_channel"])
def test_decoding_is_exact_to_float32(name: str, axis: str, isa: object) -> None:
    codec = codec_for(PARAMETERS[name], axis)
    for _, codes, decoded in samples(name, axis):
        for dtype in DTYPES:
            assert_decoded(codes, decoded, codec.tables, isa, dtype)


@pytest.mark.parametrize(
    "name", ["fib4", "fib4_plain", "fib4_half", "fib4_scales", "fib3", "fib2", "fib2_scales", "scalar4", "fib4_haar"]
)
def test_codes_equal_the_reference_on_many_vectors(name: str) -> None:
    """Some 10^5 vectors in all, with the best instruction set."""
    codec = codec_for(PARAMETERS[name])
    vectors = 1024 if name.endswith("scales") else 4096
    for seed, dtype in enumerate(DTYPES):
        assert_equal_codes(gaussian(vectors // 64, 64, codec.head_dim, seed=seed).to(dtype), codec, native.best_isa())


@each_isa
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(isa: object, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(PARAMETERS)))
    codec = codec_for(PARAMETERS[name], data.draw(st.sampled_from(["per_token", "per_channel"])))
    lead = data.draw(st.lists(st.integers(1, 3), max_size=2))
    tokens = data.draw(st.sampled_from([1, 2, 3, 15, 16, 17, 33]))
    rows = gaussian(*lead, tokens, codec.head_dim, seed=data.draw(st.integers(0, 1000)))
    rows = rows.to(data.draw(st.sampled_from(DTYPES)))
    assert_equal_codes(rows, codec, isa)
    codes = reference.encode(rows, codec.tables)
    assert_decoded(codes, reference.decode(codes, codec.tables), codec.tables, isa)


def with_book(codewords: Tensor) -> FibTables:
    """Tables at d = 32 of a codebook ``[N, k]`` that nobody trained, in units of a vector of norm sqrt(d)."""
    tables = codec_for(fib(32, 2, 16)).tables
    return replace(tables, codewords=codewords / 32**0.5, bits=(len(codewords) - 1).bit_length())


@each_isa
@pytest.mark.parametrize("block_dim", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 3, 5, 17, 100, 256, 300, 1000])
def test_any_codebook(size: int, block_dim: int, isa: object) -> None:
    """Sizes that are no power of two or take more than a byte; clustered books, of which cells see many words."""
    words = gaussian(size, block_dim, seed=size)
    ties = words.clone()
    ties[size // 2 :] = words[: size - size // 2]
    rows = torch.cat([gaussian(1, 64, 32), hard_rows(32).reshape(1, -1, 32)], 1)
    for book in (words.sort(0).values, words, ties, words * 0.05, words**3):
        tables = with_book(book)
        expected = reference.encode(rows, tables)
        found = native_codes.encode(rows, tables, isa=isa)
        assert_same(expected, found)
        assert_decoded(found, reference.decode(found, tables), tables, isa)


@each_isa
def test_points_on_the_border_of_two_codewords(isa: object) -> None:
    """One step of float32 to either side of where the exact search changes its mind."""
    codec = codec_for(fib(128, 2, 256))
    matrix, words = codec.tables.rotation.matrix.double(), codec.tables.codewords.double()
    pairs = torch.randint(0, 256, (64, 64, 2), generator=torch.Generator().manual_seed(0))
    middles = words[pairs].mean(-2).flatten(-2)
    rows = (middles @ matrix).to(torch.float32)[None]
    for scaled in (rows, rows * (1 + 2.0**-23), rows * (1 - 2.0**-24)):
        assert_equal_codes(scaled, codec, isa)


def rotated_units(rows: Tensor, tables: FibTables) -> tuple[Tensor, Tensor]:
    """Rotated unit vectors ``[..., d]`` and lengths ``[...]``, float64."""
    wide = rows.double()
    length = wide.square().sum(-1, keepdim=True).sqrt()
    unit = wide / length.masked_fill(length == 0, 1.0)
    return unit @ tables.rotation.matrix.double().T, length.squeeze(-1)


def codes_around(unit: Tensor, tables: FibTables) -> Tensor:
    """``[9, ..., m]`` int32: codewords of the cells of rotated unit vectors, and of the cells around them."""
    assert tables.decisions is not None
    cell = 2 * tables.decisions.extent / tables.decisions.side
    steps = cell * torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    points = unit.float().reshape(-1, 2)
    return torch.stack([tables.decisions.look_up(points + step) for step in steps]).view(9, *unit.shape[:-1], -1)


def assert_of_cells_around(rows: Tensor, tables: FibTables, isa: object) -> None:
    """Each code is of the cell of its point or one next to it, and norms have the gain of these codes."""
    found = native_codes.encode(rows, tables, isa=isa)
    indices = unpack(found.indices, tables.num_blocks, tables.bits)
    unit, length = rotated_units(rows, tables)
    assert (indices == codes_around(unit, tables)).any(0).all()
    quantized = tables.codewords.double()[indices].flatten(-2)
    gain = ((unit * quantized).sum(-1) / quantized.square().sum(-1)).clamp(min=0)
    norms = decode_norms(found.norms, found.norm_range).double()
    # Half a step of the stored norm (2^-25 at the end of float16), and what 16 bits cost the gain: at most half of the
    # smallest coordinates that are rounded, which are equal ones, 31900 / d.
    relative = 2.0**-11 if tables.norm_format == "f16" else 0.35 * found.norm_range[..., 1:].double()
    wanted = length * gain if tables.gain_corrected else length
    assert ((norms - wanted).abs() <= (relative + 0.5 * tables.head_dim / 31900 + 1e-3) * wanted + 2.0**-25).all()


class TestTable:
    """The table's search in integers: its own codes, of the cell that the reference finds or of one next to it."""

    parameters = fib(128, 2, 256, codeword_search="table")

    @pytest.mark.parametrize("scale_search", [False, True])
    def test_costs_less_than_two_percent(self, scale_search: bool) -> None:
        rows = gaussian(16, 512, 128)
        search = {"scale_search": scale_search}
        exact = codec_for(fib(128, 2, 256, **search))
        table = codec_for(self.parameters.model_copy(update=search))
        errors = [relative_mse(rows, codec.decode(codec.encode(rows))) for codec in (exact, table)]
        assert errors[0] < errors[1] < 1.02 * errors[0]

    @each_isa
    @pytest.mark.parametrize(
        "parameters",
        [
            parameters,
            fib(8, 2, 16, rotation="hadamard", codeword_search="table"),
            fib(16, 2, 64, rotation="hadamard", codeword_search="table"),
            fib(32, 2, 4, codeword_search="table", gain_corrected=False),
            fib(64, 2, 100, codeword_search="table", norm_format="f16"),
            fib(256, 2, 256, codeword_search="table"),
            fib(96, 2, 256, codeword_search="table"),
        ],
        ids=lambda parameters: f"d{parameters.head_dim}_n{parameters.codebook_size}",
    )
    def test_codes_are_of_the_cell_or_one_next_to_it(self, parameters: FibParameters, isa: object) -> None:
        codec = codec_for(parameters)
        assert isinstance(codec.tables, FibTables)
        for dtype in DTYPES:
            for rows in (gaussian(4, 256, codec.head_dim), half_safe(hard_rows(codec.head_dim), parameters, dtype)):
                assert_of_cells_around(rows.to(dtype), codec.tables, isa)

    @each_isa
    def test_few_codes_differ_from_the_reference(self, isa: object) -> None:
        codec = codec_for(self.parameters)
        rows = gaussian(8, 512, 128).to(torch.bfloat16)
        expected, found = reference.encode(rows, codec.tables), native_codes.encode(rows, codec.tables, isa=isa)
        assert (expected.indices != found.indices).float().mean() < 0.025
        errors = [relative_mse(rows, codec.decode(codes)) for codes in (expected, found)]
        assert errors[1] == pytest.approx(errors[0], rel=2e-3)

    @each_isa
    def test_no_vector_overflows(self, isa: object) -> None:
        """Vectors that after some number of rounds have one coordinate alone: none is larger."""
        tables = codec_for(self.parameters).tables
        assert isinstance(tables, FibTables)
        transform = torch.ones(1, 1, dtype=torch.float64)
        while len(transform) < 128:
            transform = torch.cat([torch.cat([transform, transform], 1), torch.cat([transform, -transform], 1)])
        product = torch.eye(128, dtype=torch.float64)
        for signs in hadamard_signs(128, tables.rotation.seed).double():
            product = transform @ (signs[:, None] * product) / 128**0.5
            for scale in (1.0, -1e37, 1e-40):
                assert_of_cells_around((product * scale).float(), tables, isa)
        torch.testing.assert_close(product, tables.rotation.matrix.double())

    @each_isa
    @pytest.mark.parametrize("scale_search", [False, True])
    def test_every_instruction_set_finds_the_same(self, isa: object, scale_search: bool) -> None:
        codec = codec_for(self.parameters.model_copy(update={"scale_search": scale_search}))
        for dtype in DTYPES:
            for rows in (gaussian(3, 45, 128), half_safe(hard_rows(128), self.parameters, dtype)):
                expected = native_codes.encode(rows.to(dtype), codec.tables, isa=native.Isa.portable)
                assert_same(expected, native_codes.encode(rows.to(dtype), codec.tables, isa=isa))

    @each_isa
    def test_codes_do_not_depend_on_their_neighbours(self, isa: object) -> None:
        rows = gaussian(40, 1, 128)
        alone = native_codes.encode(rows, codec_for(self.parameters).tables, isa=isa)
        for scale in (0.0, 1e-30, 1e30):
            beside = rows.clone()
            beside[::3] *= scale
            found = native_codes.encode(beside, codec_for(self.parameters).tables, isa=isa)
            kept = torch.arange(40) % 3 > 0
            assert torch.equal(found.indices[kept], alone.indices[kept])

    @each_isa
    def test_scale_search_costs_as_little(self, isa: object) -> None:
        codec = codec_for(self.parameters.model_copy(update={"scale_search": True}))
        rows = gaussian(4, 512, 128)
        expected, found = reference.encode(rows, codec.tables), native_codes.encode(rows, codec.tables, isa=isa)
        errors = [relative_mse(rows, codec.decode(codes)) for codes in (expected, found)]
        assert errors[1] == pytest.approx(errors[0], rel=2e-3)


@each_isa
def test_rows_and_outputs_of_any_layout(isa: object) -> None:
    for name in ("fib4", "int8", "fp8"):
        codec = codec_for(PARAMETERS[name])
        wide = gaussian(3, codec.head_dim, 34)
        rows = wide[..., ::2].transpose(-1, -2)
        assert not rows.is_contiguous()
        assert_equal_codes(rows, codec, isa)
        codes = reference.encode(rows, codec.tables)
        out = torch.full_like(wide, torch.nan)[..., ::2].transpose(-1, -2)
        assert native_codes.decode(codes, codec.tables, out=out, isa=isa) is out
        torch.testing.assert_close(out, native_codes.decode(codes, codec.tables, isa=isa))
        double = torch.full(rows.shape, torch.nan, dtype=torch.float64)
        native_codes.decode(codes, codec.tables, out=double, isa=isa)
        torch.testing.assert_close(double.float(), out)
        some = native_codes.decode(codes.tokens(3, 9, lead=1), codec.tables, isa=isa)
        assert torch.equal(some, native_codes.decode(codes, codec.tables, isa=isa)[:, 3:9])


def test_threads_make_no_difference() -> None:
    before = torch.get_num_threads()
    try:
        for name in ("fib4", "fib2", "int8"):
            codec = codec_for(PARAMETERS[name], "per_channel")
            rows = gaussian(7, 131, codec.head_dim).to(torch.bfloat16)
            results = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                codes = native_codes.encode(rows, codec.tables)
                results.append((codes, native_codes.decode(codes, codec.tables)))
            assert equal(results[0][0], results[1][0])
            assert torch.equal(results[0][1], results[1][1])
    finally:
        torch.set_num_threads(before)


class TestErrors:
    """The reference's refusals, in its words."""

    @each_isa
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_not_finite(self, isa: object, bad: float, dtype: torch.dtype) -> None:
        for name in ("fib4", "fib2", "scalar3", "int8", "fp8"):
            for axis in ("per_token", "per_channel"):
                codec = codec_for(PARAMETERS[name], axis)
                rows = gaussian(2, 70, codec.head_dim).to(dtype)
                rows[1, 69, 3] = rows[0, 20, -1] = bad
                with pytest.raises(EncodingError, match=f"finite, got 2 NaN or infinite of {rows.numel()} elements"):
                    native_codes.encode(rows, codec.tables, isa=isa)
        codec = codec_for(TestTable.parameters)
        with pytest.raises(EncodingError, match="finite, got 128 NaN or infinite"):
            native_codes.encode(torch.full((1, 1, 128), bad, dtype=dtype), codec.tables, isa=isa)

    def test_norms_out_of_range(self) -> None:
        with pytest.raises(EncodingError, match=r"at most 65504 to be stored as float16, got 1\.13"):
            native_codes.encode(torch.full((1, 2, 128), 1e6), codec_for(PARAMETERS["fib4_plain"]).tables)
        with pytest.raises(EncodingError, match="finite in float32, got 3"):
            native_codes.encode(torch.full((1, 1, 128), 3e38), codec_for(PARAMETERS["fib4"]).tables)

    def test_codes_of_another_codec(self) -> None:
        int8, fib4 = codec_for(PARAMETERS["int8"]), codec_for(PARAMETERS["fib4"])
        codes = int8.encode(gaussian(1, 2, 20))
        with pytest.raises(KernelError, match="ScaledCodes cannot be read with FibTables"):
            native_codes.decode(codes, fib4.tables)

    def test_out_of_another_shape(self) -> None:
        codec = codec_for(PARAMETERS["fib4"])
        codes = codec.encode(gaussian(1, 2, 128))
        with pytest.raises(KernelError, match=r"out: expected shape \[1, 2, 128\], got \[1, 3, 128\]"):
            native_codes.decode(codes, codec.tables, out=torch.empty(1, 3, 128))

    def test_other_devices(self) -> None:
        codec = codec_for(PARAMETERS["fib4"])
        with pytest.raises(KernelError, match="rows: expected a tensor on the CPU for the native kernels, got meta"):
            native_codes.encode(torch.empty(1, 2, 128, device="meta"), codec.tables)
        codes = codec.encode(gaussian(1, 2, 128)).map(lambda tensor: tensor.to("meta"))
        with pytest.raises(KernelError, match="mean: expected a tensor on the CPU"):
            native_codes.decode(codes, codec.tables)


def test_raw_vectors_are_copied() -> None:
    codec = codec_for(RawParameters(head_dim=16, dtype="bf16"))
    rows = gaussian(2, 3, 16)
    codes = native_codes.encode(rows, codec.tables)
    assert equal(codes, reference.encode(rows, codec.tables))
    assert torch.equal(native_codes.decode(codes, codec.tables), rows.to(torch.bfloat16).float())


def test_nothing_decodes_to_nothing() -> None:
    for name in ("fib4", "int8"):
        for axis in ("per_token", "per_channel"):
            codec = codec_for(PARAMETERS[name], axis)
            codes = codec.encode(gaussian(2, 3, codec.head_dim)).tokens(1, 1, lead=1)
            assert native_codes.decode(codes, codec.tables).shape == (2, 0, codec.head_dim)


def test_every_suite_runs_here_too() -> None:
    plain = [name for name, value in vars(test_codecs).items() if isinstance(value, type) and name.startswith("Test")]
    suites = {name for name in plain if issubclass(getattr(test_codecs, name), CodecConformance)}
    for implementation in native_implementations():
        suffix = implementation.title().replace("-", "")
        assert suites <= {name.removesuffix(suffix) for name in globals() if name.endswith(suffix)}
