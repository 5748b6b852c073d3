import pytest
from pydantic import TypeAdapter

from fibkv.errors import ContractError
from fibkv.parameters import (
    PARAMETER_NAMES,
    AffineParameters,
    CodecParameters,
    FibParameters,
    Fp8Parameters,
    Int8Parameters,
    RawParameters,
    TrellisParameters,
    named_block_dim,
    named_parameters,
)
from fibkv.training_settings import TrainingSettings

from .examples import FIB


@pytest.mark.parametrize(
    ("block_dim", "size", "paper_rate", "wire_bits", "wire_rate"),
    [
        (2, 256, 4.0, 8, 4.0),
        (8, 256, 1.0, 8, 1.0),
        (1, 16, 4.0, 4, 4.0),
        (4, 3, 0.39624062518028907, 2, 0.5),
        (2, 2**20, 10.0, 20, 10.0),
    ],
)
def test_rates(block_dim: int, size: int, paper_rate: float, wire_bits: int, wire_rate: float) -> None:
    parameters = FibParameters.of(64, block_dim, size)
    assert parameters.paper_rate == pytest.approx(paper_rate, abs=1e-15)
    assert (parameters.wire_bits, parameters.wire_rate) == (wire_bits, wire_rate)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 1}, r"FibParameters\.head_dim: expected greater than or equal to 2, got 1"),
        ({"head_dim": 4098}, r"FibParameters\.head_dim: expected less than or equal to 4096, got 4098"),
        ({"block_dim": 0}, r"FibParameters\.block_dim: expected greater than 0, got 0"),
        ({"block_dim": 257}, r"FibParameters\.block_dim: expected less than or equal to 256, got 257"),
        ({"block_dim": 3}, r"FibParameters\.block_dim: expected a divisor of head_dim 64 below it, got 3"),
        ({"block_dim": 64}, r"FibParameters\.block_dim: expected a divisor of head_dim 64 below it, got 64"),
        ({"block_dim": 128}, r"FibParameters\.block_dim: expected a divisor of head_dim 64 below it, got 128"),
        ({"codebook_size": 1}, r"FibParameters\.codebook_size: expected greater than or equal to 2, got 1"),
        ({"codebook_size": 2**20 + 1}, r"FibParameters\.codebook_size: expected less than or equal to 1048576"),
        (
            {"head_dim": 256, "block_dim": 128, "codebook_size": 2**19 + 1},
            r"FibParameters\.codebook_size: expected at most 67108864 // block_dim 128, got 524289",
        ),
        ({"paper_rate": 4.0 + 2e-12}, r"FibParameters\.paper_rate: expected 4\.0, got 4\.000000000002"),
        ({"wire_bits": 7}, r"FibParameters\.wire_bits: expected 8, got 7"),
        ({"wire_rate": 4.5}, r"FibParameters\.wire_rate: expected 4\.0, got 4\.5"),
        ({"paper_rate": float("nan")}, r"FibParameters\.paper_rate: expected a finite number, got nan"),
        ({"rotation": "dct"}, r"FibParameters\.rotation: expected 'hadamard' or 'haar', got 'dct'"),
        ({"head_dim": 96}, r"FibParameters\.rotation: expected haar, as head_dim 96 is no power of two"),
        ({"rotation_seed": -1}, r"FibParameters\.rotation_seed: expected greater than or equal to 0, got -1"),
        ({"codebook_seed": 2**64}, r"FibParameters\.codebook_seed: expected less than 18446744073709551616"),
        ({"norm_format": "f8"}, r"FibParameters\.norm_format: expected 'f16' or 'log8', got 'f8'"),
        ({"codeword_search": "tree"}, r"FibParameters\.codeword_search: expected 'exact' or 'table', got 'tree'"),
        (
            {"scale_search": True, "gain_corrected": False},
            r"FibParameters\.scale_search: expected False, as .* gain_corrected is False, got True",
        ),
        (
            {"training": TrainingSettings(head_dim=2)},
            r"FibParameters\.training\.head_dim: expected above block_dim 2, got 2",
        ),
    ],
)
def test_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}"):
        FIB.model_copy(update=fields)


@pytest.mark.parametrize(("block_dim", "size"), [(1, 16), (4, 256), (2, 257)])
def test_a_table_needs_a_plane_and_a_byte(block_dim: int, size: int) -> None:
    message = "FibParameters.codeword_search: expected exact, as a table needs block_dim 2 and at most 256 codewords"
    with pytest.raises(ContractError, match=message):
        FibParameters.of(64, block_dim, size, codeword_search="table")


def test_the_encoders_settings_are_part_of_the_digest() -> None:
    settings = [{}, {"codeword_search": "table"}, {"scale_search": True}]
    digests = {FibParameters.of(64, 2, 256, **fields).digest() for fields in settings}
    assert len(digests) == 3
    plain = FibParameters.of(64, 2, 256)
    assert (plain.codeword_search, plain.scale_search) == ("exact", False)
    for fields in settings:
        parameters = FibParameters.of(64, 2, 256, **fields)
        assert FibParameters.from_json(parameters.to_json()) == parameters


def test_rates_may_be_off_by_a_rounding() -> None:
    assert FIB.model_copy(update={"paper_rate": 4.0 + 5e-13}).digest() != FIB.digest()


def test_largest_codebooks_are_allowed() -> None:
    assert FibParameters.of(4096, 64, 2**20).codebook_size * 64 == 67_108_864
    assert FibParameters.of(4096, 256, 2**18).block_dim == 256


@pytest.mark.parametrize(("block_dim", "size", "field"), [(0, 16, "block_dim"), (2, 0, "codebook_size")])
def test_of_refuses_what_has_no_rates(block_dim: int, size: int, field: str) -> None:
    with pytest.raises(ContractError, match=rf"^FibParameters\.{field}: expected greater than"):
        FibParameters.of(64, block_dim, size)


def test_rotation_defaults_by_dimension() -> None:
    assert FibParameters.of(128, 2, 256).rotation == "hadamard"
    assert FibParameters.of(96, 2, 256).rotation == "haar"
    assert FibParameters.of(128, 2, 256, rotation="haar").rotation == "haar"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples_per_codeword": 0}, "samples_per_codeword: expected greater than 0"),
        ({"restarts": 0}, "restarts: expected greater than 0"),
        ({"max_iterations": -1}, "max_iterations: expected greater than or equal to 0"),
        ({"relative_tolerance": 1.0}, "relative_tolerance: expected less than 1"),
        ({"relative_tolerance": -0.1}, "relative_tolerance: expected greater than or equal to 0"),
        ({"holdout_samples": 0}, "holdout_samples: expected greater than 0"),
        ({"head_dim": 1}, "head_dim: expected greater than or equal to 2"),
    ],
)
def test_training_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=rf"^TrainingSettings\.{message}"):
        FIB.training.model_copy(update=fields)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raw", RawParameters(head_dim=128, dtype="bf16")),
        ("int8", Int8Parameters(head_dim=128)),
        ("fp8", Fp8Parameters(head_dim=128)),
        ("fib4", FibParameters.of(128, 2, 256)),
        ("fib3", FibParameters.of(128, 2, 64)),
        ("fib2", FibParameters.of(128, 4, 256)),
        ("fib1", FibParameters.of(128, 8, 256)),
        ("key4", FibParameters.of(128, 2, 256, centered=True, scale_search=True)),
        ("key3", FibParameters.of(128, 2, 64, centered=True, scale_search=True)),
        ("key2", FibParameters.of(128, 4, 256, centered=True)),
        ("key1", FibParameters.of(128, 8, 256, centered=True)),
        ("value4", FibParameters.of(128, 2, 256, scale_search=True)),
        ("value3", FibParameters.of(128, 2, 64, scale_search=True)),
        ("affine3", AffineParameters(head_dim=128, bits=3)),
        ("scalar4", FibParameters.of(128, 1, 16)),
        ("scalar3", FibParameters.of(128, 1, 8)),
        ("scalar2", FibParameters.of(128, 1, 4)),
        ("trellis4", TrellisParameters.of(128, 4)),
        ("trellis3", TrellisParameters.of(128, 3)),
        ("trellis2", TrellisParameters.of(128, 2)),
        ("trelliskey4", TrellisParameters.of(128, 4, centered=True)),
        ("trelliskey3", TrellisParameters.of(128, 3, centered=True)),
        ("trelliskey2", TrellisParameters.of(128, 2, centered=True)),
    ],
)
def test_named_settings(name: str, expected: CodecParameters) -> None:
    assert named_parameters(name, 128, "bf16") == expected
    assert name in PARAMETER_NAMES
    if name[-1].isdigit() and isinstance(expected, FibParameters):
        assert expected.wire_rate == int(name[-1])


def test_every_known_name_is_served() -> None:
    digests = {named_parameters(name, 64, "f16").digest() for name in PARAMETER_NAMES}
    assert len(digests) == len(PARAMETER_NAMES) == 25


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ContractError, match=r"parameters name: expected one of raw, int8, fp8, fib4, .*, got 'fib5'"):
        named_parameters("fib5", 64, "f16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 8}, "head_dim: expected greater than or equal to 16, got 8"),
        ({"head_dim": 36}, "head_dim: expected a multiple of 8, got 36"),
        ({"bits": 5}, "bits: expected 2, 3 or 4, got 5"),
        ({"code_version": 0}, "code_version: expected greater than 0, got 0"),
        ({"head_dim": 24}, "rotation: expected haar, as head_dim 24 is no power of two"),
        ({"path_search": "all"}, "path_search: expected 'full' or 'fast', got 'all'"),
        (
            {"scale_search": True, "gain_corrected": False},
            "scale_search: expected False, as .* gain_corrected is False",
        ),
    ],
)
def test_trellis_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=rf"^TrellisParameters\.{message}"):
        TrellisParameters.of(64, 2).model_copy(update=fields)


@pytest.mark.parametrize("name", PARAMETER_NAMES)
def test_named_block_dims_are_those_of_the_parameters(name: str) -> None:
    assert named_block_dim(name) == named_parameters(name, 64, "f16").block_dim


def test_named_setting_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ContractError, match="expected a divisor of head_dim 66 below it, got 4"):
        named_parameters("fib2", 66, "f16")


@pytest.mark.parametrize("name", PARAMETER_NAMES)
def test_the_field_codec_tells_the_union_apart(name: str) -> None:
    parameters = named_parameters(name, 64, "f16")
    adapter: TypeAdapter[CodecParameters] = TypeAdapter(CodecParameters)
    assert adapter.validate_python(parameters.model_dump()) == parameters


def test_scalar_codecs_code_each_coordinate_alone() -> None:
    assert [named_parameters(name, 64, "f16").block_dim for name in ("raw", "int8", "fp8", "scalar4")] == [1] * 4
