import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibkv.errors import ContractError
from fibkv.sizes import LIMIT, UNITS, format_size, parse_size


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("512 MiB", 512 << 20),
        (" 1.5GB ", 1_500_000_000),
        ("1.5gib", 3 << 29),
        ("16kb", 16_000),
        ("16KiB", 16_384),
        ("2TiB", 2 << 40),
        ("1TB", 10**12),
        ("100", 100),
        ("100 B", 100),
        ("0.1KiB", 102),  # 102.4, cut
        (4096, 4096),
        (LIMIT - 1, LIMIT - 1),
        ("9223372036854775807", LIMIT - 1),
    ],
)
def test_what_is_written_is_read_exactly(size: str | int, nbytes: int) -> None:
    assert parse_size(size) == nbytes


@pytest.mark.parametrize(
    "nonsense",
    ["", "GiB", "-1GiB", "2G", "2k", "1,5GB", "1e9", "0", "0GiB", "0.5", "nan", "inf GiB", "1.GiB", ".5GiB", "2GiBs",
     "٣GiB", "9999999TiB", 0, -5, 2**63, True, 2.5, None],
)  # fmt: skip
def test_nonsense_is_refused_with_the_field(nonsense: object) -> None:
    with pytest.raises(ContractError, match=r"^Pool\.budget: expected a size such as 2GiB: .*KiB.*, got ") as refusal:
        parse_size(nonsense, field="Pool.budget")  # type: ignore[arg-type]
    assert refusal.value.actual is nonsense


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (1_500_000_000, "1.4 GiB"),
        (16 << 30, "16 GiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(1, LIMIT // 2))
def test_what_is_shown_is_read_back_to_its_two_decimals(nbytes: int) -> None:
    shown = format_size(nbytes)
    unit = UNITS[shown.split()[1]]
    assert abs(parse_size(shown) - nbytes) <= unit / 200 + 1
