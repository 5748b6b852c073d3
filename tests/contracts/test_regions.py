import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibkv.errors import ContractError
from fibkv.regions import FallbackSettings, PageGeometry, ProtectedRegions, QualityBudget

from .examples import KEY_SHAPE

REGIONS = ProtectedRegions(first_tokens_raw=2, last_tokens_raw=3, raw_layers=(1,), raw_heads=(0,))


@pytest.mark.parametrize(
    ("layer", "head", "token", "protected"),
    [
        (0, 1, 0, True),
        (0, 1, 1, True),
        (0, 1, 2, False),
        (0, 1, 12, False),
        (0, 1, 13, True),
        (0, 1, 15, True),
        (1, 1, 7, True),
        (0, 0, 7, True),
        (0, 1, 7, False),
    ],
)
def test_protected(layer: int, head: int, token: int, protected: bool) -> None:
    assert REGIONS.is_protected(16, layer, head, token) is protected


def test_nothing_is_protected_by_default() -> None:
    assert not any(ProtectedRegions().is_protected(4, 0, 0, token) for token in range(4))


@given(first=st.integers(0, 16), last=st.integers(0, 16))
def test_protection_changes_at_boundaries_only(first: int, last: int) -> None:
    regions = ProtectedRegions(first_tokens_raw=first, last_tokens_raw=last, raw_layers=(1,))
    layers, heads, tokens = regions.boundaries(KEY_SHAPE)
    assert (layers, heads) == ([0, 1, 2], [0, 2])
    assert (tokens[0], tokens[-1]) == (0, 16)
    for token in range(1, 16):
        if token not in tokens:
            assert regions.is_protected(16, 0, 0, token) == regions.is_protected(16, 0, 0, token - 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_tokens_raw": 17}, "first_tokens_raw: expected at most 16 tokens, got 17"),
        ({"last_tokens_raw": 17}, "last_tokens_raw: expected at most 16 tokens, got 17"),
        ({"raw_layers": (0, 2)}, "raw_layers: expected layers below 2, got 2"),
        ({"raw_heads": (5, 0)}, "raw_heads: expected KV heads below 2, got 5"),
    ],
)
def test_regions_outside_the_shape_are_refused(fields: dict[str, object], message: str) -> None:
    regions = ProtectedRegions().model_copy(update=fields)
    with pytest.raises(ContractError, match=rf"^ProtectedRegions\.{message}$"):
        regions.validate_for(KEY_SHAPE)


def test_regions_may_cover_the_whole_shape() -> None:
    ProtectedRegions(first_tokens_raw=16, last_tokens_raw=16, raw_layers=(0, 1), raw_heads=(1, 0)).validate_for(
        KEY_SHAPE
    )


def test_negative_regions_are_refused() -> None:
    with pytest.raises(ContractError, match=r"ProtectedRegions\.first_tokens_raw: expected greater than or equal to 0"):
        ProtectedRegions(first_tokens_raw=-1)


METRICS = ["max_logit_mse", "max_attention_tv", "max_topk_disagreement", "max_value_aggregation_mse"]


@pytest.mark.parametrize("metric", METRICS)
def test_budget_metrics(metric: str) -> None:
    budget = QualityBudget.unavailable()
    assert budget.model_copy(update={metric: 0.0}).has_any_metric
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ContractError, match=rf"^QualityBudget\.{metric}: expected"):
            budget.model_copy(update={metric: bad})


def test_unavailable_budget() -> None:
    budget = QualityBudget.unavailable()
    assert not budget.has_any_metric
    assert budget.fallback_on_violation == "keep_raw"
    assert all(getattr(budget, metric) is None for metric in METRICS)


def test_fallback_defaults_are_conservative() -> None:
    assert FallbackSettings() == FallbackSettings(mode="keep_raw", raw_available=True)
    with pytest.raises(
        ContractError, match=r"FallbackSettings\.mode: expected 'keep_raw' or 'fail_closed', got 'drop'"
    ):
        FallbackSettings(mode="drop")  # type: ignore[arg-type]


GEOMETRY = PageGeometry.of(tokens_per_page=8, head_dim=64, vector_nbytes=33)


def test_geometry_json_starts_with_its_marker() -> None:
    assert GEOMETRY.to_json() == (
        '{"schema_version":"fib_quant_kv_page_geometry_v1","tokens_per_page":8,"vectors_per_block":1,"head_dim":64,'
        '"encoded_block_bytes":33,"raw_vector_bytes":256}'
    )


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_page_count(tokens: int, pages: int) -> None:
    assert GEOMETRY.num_pages(tokens) == pages


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_per_page": 0}, "tokens_per_page: expected greater than 0, got 0"),
        ({"vectors_per_block": 2}, "vectors_per_block: expected 1, got 2"),
        ({"encoded_block_bytes": 0}, "encoded_block_bytes: expected greater than 0, got 0"),
        ({"raw_vector_bytes": 128}, r"raw_vector_bytes: expected 256 \(4 bytes for each of head_dim 64\), got 128"),
    ],
)
def test_geometry_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=rf"^PageGeometry\.{message}$"):
        GEOMETRY.model_copy(update=fields)


def test_geometry_fits_shape_and_codec() -> None:
    GEOMETRY.validate_for(KEY_SHAPE, 33)
    PageGeometry.of(16, 64, 33).validate_for(KEY_SHAPE, 33)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (PageGeometry.of(17, 64, 33), "tokens_per_page: expected at most 16 tokens, got 17"),
        (PageGeometry.of(8, 32, 33), "head_dim: expected 64 of the shape, got 32"),
        (PageGeometry.of(8, 64, 34), "encoded_block_bytes: expected 33 bytes of the codec, got 34"),
    ],
)
def test_geometry_that_does_not_fit_is_refused(geometry: PageGeometry, message: str) -> None:
    with pytest.raises(ContractError, match=rf"^PageGeometry\.{message}$"):
        geometry.validate_for(KEY_SHAPE, 33)
