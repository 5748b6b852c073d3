"""The published evaluation (docs/results/eval.json) keeps what docs/QUALITY.md says that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from fibkv.eval_result import EvalReceipt, EvalResult, EvalRow

RECEIPT = Path(__file__).parents[2] / "docs" / "results" / "eval.json"


@pytest.fixture(scope="module")
def result() -> EvalResult:
    """Checked against its digest."""
    return EvalReceipt.from_json(RECEIPT.read_text(encoding="utf-8")).result


@pytest.fixture(scope="module")
def rows(result: EvalResult) -> dict[str, EvalRow]:
    return {row.name: row for row in result.rows}


@pytest.mark.parametrize(
    ("name", "most_bits", "rival", "factor"),
    [
        ("bits4", 4.4, "kivi4", 1.0),
        ("bits4", 4.4, "hqq4", 0.5),
        ("bits4", 4.4, "quanto4", 0.5),
        ("bits3", 3.4, "kivi3", 1.0),
        ("bits2", 2.4, "kivi2", 0.75),
    ],
)
def test_recipes_stand_below_others_of_more_bits(
    rows: dict[str, EvalRow], name: str, most_bits: float, rival: str, factor: float
) -> None:
    row = rows[name]
    assert row.codec_bits <= most_bits < rows[rival].codec_bits
    assert row.quality.kl_mean <= factor * rows[rival].quality.kl_mean


def test_the_best_two_bits_lose_little(rows: dict[str, EvalRow]) -> None:
    """Their pages take 2.13 bits; the row counts matrices too, which 1024 tokens have to bear alone."""
    assert rows["klt2-trellis2"].quality.kl_mean <= 0.42 * rows["kivi2"].quality.kl_mean


@pytest.mark.parametrize("bits", ["4", "3.5", "3", "2.5", "2"])
def test_a_calibration_makes_no_rate_worse(rows: dict[str, EvalRow], bits: str) -> None:
    assert rows[f"cal{bits}"].quality.kl_mean <= rows[f"bits{bits}"].quality.kl_mean


def test_four_bits_recall_what_dense_recalls(result: EvalResult, rows: dict[str, EvalRow]) -> None:
    """Within a point."""
    row = rows["bits4"]
    assert row.recalled_single >= result.dense_single - 0.01 * result.planted_single
    assert row.recalled_multi >= result.dense_multi - 0.01 * result.planted_multi


def test_every_row_was_read(result: EvalResult) -> None:
    assert result.passed
    assert not result.skipped
