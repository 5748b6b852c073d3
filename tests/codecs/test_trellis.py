"""Trellis codes: the format, the search for the best path, and what it buys; against an oracle that shares no code."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fibkv import kernels, label_counts, trellis
from fibkv.codecs import Codec, codec_for
from fibkv.errors import CodebookError, ContractError, PageError
from fibkv.kernels import reference_trellis
from fibkv.label_counts import LabelCounts, label_frequencies
from fibkv.packing import pack, unpack
from fibkv.parameters import TrellisParameters
from fibkv.trellis import STATE_BITS, Trellis, TrellisCode
from tests.codecs.conformance import gaussian, native_implementations, relative_mse
from tests.oracles import trellis as oracle

BITS = (2, 3, 4)
# E|u - û|² at d = 128 (docs/results/trellis.txt), full and fast.
DISTORTION = {2: (0.0708, 0.0737), 3: (0.01826, 0.01914), 4: (0.00464, 0.00500)}


def unit(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(gaussian(1, count, dim, seed=seed), dim=-1)


def distortion(codec: Codec, rows: Tensor) -> float:
    return relative_mse(rows, codec.decode(codec.encode(rows)))


@pytest.mark.parametrize("bits", BITS)
def test_distortion(bits: int) -> None:
    rows = unit(600, 128, seed=60)
    for search, expected in zip(("full", "fast"), DISTORTION[bits], strict=True):
        found = distortion(codec_for(TrellisParameters.of(128, bits, path_search=search)), rows)
        assert found == pytest.approx(expected, rel=0.015), search


@pytest.mark.parametrize("bits", BITS)
def test_scale_search_helps(bits: int) -> None:
    rows = unit(300, 64, seed=61)
    plain, searched = (codec_for(TrellisParameters.of(64, bits, scale_search=flag)) for flag in (False, True))
    assert distortion(searched, rows) < 0.99 * distortion(plain, rows)


@pytest.mark.parametrize("bits", BITS)
def test_windows_are_the_newest_bits_of_the_ring(bits: int) -> None:
    """The format, read off the packed bytes as text."""
    dim, code = 24, trellis.load(bits)
    symbols = torch.randint(2**bits, (dim,), generator=torch.Generator().manual_seed(bits))
    packed = pack(symbols, bits)
    stream = "".join(f"{byte:08b}"[::-1] for byte in packed.tolist())
    assert len(stream) == dim * bits
    ring = stream + stream
    windows = reference_trellis.windows(symbols, code)
    labels = code.labels()
    for t in range(dim):
        end = len(stream) + bits * (t + 1)
        newest_last = ring[end - bits - STATE_BITS : end] if t < dim // 2 else None
        end = bits * (t + 1)
        newest_last = newest_last or ring[end - bits - STATE_BITS : end]
        assert int(windows[t]) == int(newest_last[::-1], 2)
        oldest, middle, newest = (
            int(part[::-1], 2) for part in (newest_last[:bits], newest_last[bits:STATE_BITS], newest_last[STATE_BITS:])
        )
        label = oldest ^ newest << bits
        for place, column in enumerate(code.columns):
            label ^= column * (middle >> place & 1)
        assert int(labels[windows[t]]) == label


@pytest.mark.parametrize("bits", BITS)
def test_every_state_reaches_each_level_of_its_group_once(bits: int) -> None:
    code = trellis.load(bits)
    n = 1 << bits
    per_group = code.labels().view(n, 256 // n, n).transpose(0, 1).reshape(256 // n, -1)
    for labels in per_group:
        assert len(set(labels.tolist())) == n * n
    assert set(code.labels().bincount().tolist()) == {(1 << code.window_bits) >> code.label_bits}


@pytest.mark.parametrize("bits", [2, 4])
def test_oracle_decodes_the_same_and_encodes_no_better(bits: int) -> None:
    """The oracle keeps the newest symbol in the low bits; else it is the same trellis, with float costs."""
    codec = codec_for(TrellisParameters.of(64, bits, norm_format="f16"))
    window_bits = bits + STATE_BITS
    of_oracle = torch.arange(1 << window_bits)
    ours = torch.zeros_like(of_oracle)
    for place in range(0, window_bits, bits):
        ours |= (of_oracle >> place & (1 << bits) - 1) << (window_bits - bits - place)
    other = oracle.Trellis(bits, codec.tables.codewords[ours, 0] * 64**0.5)
    rotated = oracle.unit_vectors(64, 100, seed=62)
    rows = codec.tables.rotation.invert(rotated)
    codes = codec.encode(rows.unsqueeze(0))
    symbols = unpack(codes.indices, 64, bits)[0].to(torch.int64)
    decoded = other.decode(symbols) / 8 * codes.norms[0].float().unsqueeze(-1)
    torch.testing.assert_close(codec.tables.rotation.invert(decoded), codec.decode(codes)[0], rtol=1e-5, atol=1e-5)
    # Neither has the gain, and integer costs lose nothing. What the seam is taken for differs from vector to vector.
    of_symbols = float((rotated - other.decode(symbols)).square().mean())
    assert of_symbols < 1.005 * oracle.distortion(other, rotated)


def test_no_ring_with_the_same_seam_is_better() -> None:
    """The last four symbols fix the state at the seam; all others can be tried."""
    code = trellis.load(2)
    paths = Trellis.of(code, 11, 64)

    def levels(symbols: Tensor) -> Tensor:
        return paths.codewords[reference_trellis.windows(symbols, code), 0]

    rows = unit(20, 11, seed=63)[0]
    found = reference_trellis.symbols(rows, paths)
    free = torch.tensor(list(product(range(4), repeat=7)))
    rings = torch.cat([free.expand(20, -1, -1), found[:, None, -4:].expand(-1, len(free), -1)], dim=2)
    best = (rows.unsqueeze(1) - levels(rings)).square().sum(2).amin(1)
    # Coordinates and costs are rounded.
    assert ((rows - levels(found)).square().sum(1) <= best + 2.0**-8).all()


@pytest.mark.parametrize("bits", BITS)
def test_large_coordinates_take_the_outermost_levels(bits: int) -> None:
    codec = codec_for(TrellisParameters.of(16, bits, rotation="haar"))
    paths = codec.tables.trellis
    rows = torch.zeros(2, 16)
    rows[0, 5], rows[1, 5] = 1.0, -1.0
    symbols = reference_trellis.symbols(rows, paths)
    decoded = codec.tables.codewords[reference_trellis.windows(symbols, paths.code), 0]
    top = codec.tables.codewords.abs().max()
    assert decoded[0, 5] > 0.9 * top
    assert decoded[1, 5] < -0.9 * top


def test_codes_are_checked_like_those_of_fibquant() -> None:
    codec = codec_for(TrellisParameters.of(64, 2, norm_format="f16"))
    codes = codec.encode(gaussian(1, 2, 64))
    broken = replace(codes, norms=codes.norms * torch.inf)
    with pytest.raises(PageError, match="'norms'"):
        codec.from_bytes(memoryview(codec.to_bytes(broken)), 1, 2)


def test_settings_of_the_encoder_share_their_tables() -> None:
    plain = codec_for(TrellisParameters.of(64, 2)).tables
    for fields in ({"path_search": "fast"}, {"scale_search": True}, {"centered": True}):
        other = codec_for(TrellisParameters.of(64, 2, **fields)).tables
        assert [id(tensor) for tensor in other.tensors] == [id(tensor) for tensor in plain.tensors]


def test_unknown_code_versions_are_refused() -> None:
    parameters = TrellisParameters.of(64, 2).model_copy(update={"code_version": 2})
    with pytest.raises(ContractError, match=r"code_version: expected 1 of the code, got 2"):
        codec_for(parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": (1, 2)}, r"TrellisCode\.columns: expected 6 of them, got 2"),
        ({"columns": (1, 2, 3, 4, 5, 64)}, r"TrellisCode\.columns: expected labels below 64"),
        ({"columns": (16, 18, 44, 39, 12, 30)}, r"TrellisCode\.columns: expected two first ones that differ"),
        ({"columns": (5, 50, 44, 39, 12, 30)}, r"TrellisCode\.columns: expected two first ones that differ"),
        ({"levels": (0,) * 48}, r"TrellisCode\.levels: expected 64 of them, got 48"),
        ({"levels": (2**15,) * 64}, r"TrellisCode\.levels\.0: expected less than 32768, got 32768"),
        ({"bits": 1}, r"TrellisCode\.bits: expected 2, 3 or 4, got 1"),
    ],
)
def test_codes_that_are_none_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        trellis.load(2).model_copy(update=change)


def test_files_that_are_missing_or_damaged_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "trellis"
    folder.mkdir(parents=True)
    monkeypatch.setattr(trellis, "files", lambda _: tmp_path)
    load = trellis.load.__wrapped__
    with pytest.raises(CodebookError, match="trellis code of 2 bits: cannot be read"):
        load(2)
    text = trellis.load(3).to_json()
    (folder / "trellis2.json").write_text(text)
    with pytest.raises(CodebookError, match="expected 2 bits, got 3"):
        load(2)
    (folder / "trellis2.json").write_text(text[:-5])
    with pytest.raises(CodebookError, match="cannot be read: TrellisCode: expected JSON"):
        load(2)
    (folder / "trellis3.json").write_text(text)
    assert load(3) == TrellisCode.from_json(text)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("implementation", native_implementations())
def test_rounded_levels_have_no_bias(implementation: str, bits: int) -> None:
    """What all tokens share of an error does not average out. Equal weights: the output is the mean of the values."""
    codec = codec_for(TrellisParameters.of(128, bits, norm_format="f16"))
    codes = codec.encode(unit(1 << 16, 128, seed=64).view(4, -1, 128))
    query = torch.zeros(4, 1, 128)
    found, exact = (
        kernels.attend(query, codes, codec.tables, codes, codec.tables, scale=1.0, implementation=name)[0]
        for name in (implementation, "reference")
    )
    # In standard deviations of a coordinate; of labels that count as equal it would be 1.2e-4 at 2 and 3 bits.
    assert abs(float((found - exact).mean())) * 128**0.5 < 2e-5


@pytest.mark.parametrize("bits", BITS)
def test_labels_are_as_frequent_as_the_shipped_counts_say(bits: int) -> None:
    code = trellis.load(bits)
    codec = codec_for(TrellisParameters.of(128, bits))
    symbols = unpack(codec.encode(unit(1 << 12, 128, seed=65).unsqueeze(0)).indices, 128, bits)
    counts = code.labels()[reference_trellis.windows(symbols, code)].flatten().bincount(minlength=len(code.levels))
    frequencies = label_frequencies(code)
    assert float(frequencies.sum()) == pytest.approx(1)
    # Half a million coordinates: a hundredth at 64 labels, two at 256.
    torch.testing.assert_close(counts / counts.sum(), frequencies, rtol=0.1, atol=0.0, check_dtype=False)


def test_labels_of_other_codes_count_as_equal() -> None:
    code = trellis.load(2)
    other = code.model_copy(update={"levels": code.levels[::-1]})
    assert label_frequencies(other).tolist() == [1 / 64] * 64


def test_label_counts_that_are_missing_or_damaged_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "trellis"
    folder.mkdir(parents=True)
    monkeypatch.setattr(label_counts, "files", lambda _: tmp_path)
    code = trellis.load(2)
    with pytest.raises(CodebookError, match="label counts of 2 bits: cannot be read"):
        label_frequencies(code)
    short = LabelCounts(code=code.digest(), counts=(1, 2, 3))
    (folder / "counts2.json").write_text(short.to_json())
    with pytest.raises(CodebookError, match="expected 64 of them, got 3"):
        label_frequencies(code)
    (folder / "counts2.json").write_text(short.to_json()[:-5])
    with pytest.raises(CodebookError, match="cannot be read: LabelCounts: expected JSON"):
        label_frequencies(code)
