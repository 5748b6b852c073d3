"""Where codebooks come from: the package, the disk cache, a build; and what happens when a file is not sound."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fibkv import codebook, training
from fibkv.codebook_file import CodebookReport, codebook_digest, file_name, read, write
from fibkv.errors import CodebookError, ContractError
from fibkv.training_settings import TrainingSettings

QUICK = TrainingSettings(samples_per_codeword=200, restarts=1, max_iterations=3, holdout_samples=500, head_dim=16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, nothing loaded in this process yet, and builds that take no time."""
    monkeypatch.setenv("FIBKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(codebook, "_loaded", {})
    monkeypatch.setattr(codebook, "default_settings", lambda block_dim, size: QUICK)
    return tmp_path / "codebooks"


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("block_dim", "size"), codebook.SHIPPED)
def test_shipped(block_dim: int, size: int, cache: Path) -> None:
    book = codebook.load(block_dim, size)
    assert (book.block_dim, book.size) == (block_dim, size)
    assert book.codewords.shape == (size, block_dim)
    assert book.codewords.dtype == torch.float32
    assert book.codewords.is_contiguous()
    assert book.digest == book.report.codebook_digest == codebook_digest(book.codewords)
    assert codebook.load(block_dim, size) is book
    assert not cache.exists()


def test_package_holds_the_shipped_codebooks_and_nothing_else() -> None:
    found = {path.name for path in codebook.shipped_dir().iterdir()}
    assert found == {file_name(*key) for key in codebook.SHIPPED}
    assert len(codebook.SHIPPED) == 12


def test_shipped_codebooks_load_without_scipy() -> None:
    script = "import sys; from fibkv import codebook; codebook.load(2, 256); print('scipy' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "False\n"
    )


def test_report_round_trips() -> None:
    report = codebook.load(4, 256).report
    assert CodebookReport.from_json(report.to_json()) == report
    assert report.digest() != report.model_copy(update={"iterations": report.iterations + 1}).digest()


def test_built_once_then_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int, str]] = []
    book = codebook.load(2, 5, progress=lambda *step: steps.append(step))
    assert steps
    assert [path.name for path in cache.iterdir()] == ["k2_n5.safetensors"]
    # Another process finds the file.
    monkeypatch.setattr(codebook, "_loaded", {})
    steps.clear()
    again = codebook.load(2, 5, progress=lambda *step: steps.append(step))
    assert not steps
    assert again is not book
    assert again.digest == book.digest
    assert again.report == book.report
    assert torch.equal(again.codewords, book.codewords)


def test_scalar_codebooks_are_built_without_progress(cache: Path) -> None:
    book = codebook.load(1, 3)
    assert book.codewords[:, 0].tolist() == pytest.approx([-1.21263, 0, 1.21263], abs=1e-5)
    assert book.report.training_samples == 0


@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign", "no report"])
def test_damaged_cache_is_set_aside_and_rebuilt(
    damage: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    book = codebook.load(2, 5)
    path = cache / "k2_n5.safetensors"
    match damage:
        case "flipped":
            _flip_last_byte(path)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-5])
        case "foreign":
            shutil.copy(codebook.shipped_dir() / file_name(2, 16), path)
        case "no report":
            from safetensors.torch import save_file  # noqa: PLC0415, only this damage needs it

            save_file({"codewords": book.codewords}, path)
    damaged = path.read_bytes()
    monkeypatch.setattr(codebook, "_loaded", {})
    with caplog.at_level(logging.WARNING):
        assert codebook.load(2, 5).digest == book.digest
    assert "k2_n5.safetensors" in caplog.text
    assert "set aside as" in caplog.text
    assert (cache / "k2_n5.damaged").read_bytes() == damaged
    assert read(path, 2, 5).digest == book.digest


def test_damaged_shipped_codebook_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = codebook.load(2, 16).digest
    shutil.copy(codebook.shipped_dir() / file_name(2, 16), tmp_path)
    _flip_last_byte(tmp_path / file_name(2, 16))
    monkeypatch.setattr(codebook, "_loaded", {})
    monkeypatch.setattr(codebook, "shipped_dir", lambda: tmp_path)
    with pytest.raises(
        CodebookError, match=rf"k2_n16.*digest mismatch: expected {expected}, got blake3:[0-9a-f]{{64}}"
    ):
        codebook.load(2, 16)
    with pytest.raises(CodebookError, match=r"k2_n64.*cannot be read: No such file"):
        codebook.load(2, 64)


def test_wrong_size_in_a_file(tmp_path: Path) -> None:
    write(tmp_path / "book", codebook.load(2, 16))
    with pytest.raises(CodebookError, match=r"expected float32 codewords of shape \(16, 4\).*got.*\(16, 2\)"):
        read(tmp_path / "book", 4, 16)


def test_unwritable_cache_still_serves(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIBKV_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        book = codebook.load(2, 5)
    assert book.size == 5
    assert "k=2, N=5 cannot be kept at" in caplog.text


def test_write_leaves_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = codebook.load(2, 16)
    write(tmp_path / "a" / "book", book)
    write(tmp_path / "a" / "book", book)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["book"]

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a" / "other", book)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["book"]


def test_threads_build_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = training.build

    def counted(*args: object, **options: object) -> codebook.Codebook:
        built.append(1)
        return build(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "build", counted)
    with ThreadPoolExecutor(8) as pool:
        books = list(pool.map(lambda _: codebook.load(2, 5), range(8)))
    assert len(built) == 1
    assert all(book is books[0] for book in books)


def test_two_processes_at_once(tmp_path: Path) -> None:
    script = "import torch; torch.set_num_threads(1); from fibkv import codebook; print(codebook.load(2, 3).digest)"
    environment = {"FIBKV_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    digests = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    files = list((tmp_path / "codebooks").iterdir())
    assert [path.name for path in files] == ["k2_n3.safetensors"]
    assert digests == {read(files[0], 2, 3).digest}


@pytest.mark.parametrize(
    ("block_dim", "size", "message"),
    [
        (0, 16, "block_dim: expected between 1 and 256, got 0"),
        (257, 16, "block_dim: expected between 1 and 256, got 257"),
        (2, 1, "size: expected between 2 and 1048576, got 1"),
        (128, 2**20, "size: expected between 2 and 524288, got 1048576"),
    ],
)
def test_range(block_dim: int, size: int, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        codebook.load(block_dim, size)


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBKV_CACHE_DIR", "/somewhere")
    assert codebook.cache_dir() == Path("/somewhere/codebooks")
    monkeypatch.delenv("FIBKV_CACHE_DIR")
    assert codebook.cache_dir().parts[-2:] == ("fibkv", "codebooks")


def test_rebuilding_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "shipped_settings", lambda size: QUICK)
    monkeypatch.setattr(training, "SHIPPED", ((1, 4), (2, 4)))
    training.build_shipped(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k1_n4.safetensors", "k2_n4.safetensors"]
    assert read(tmp_path / "k2_n4.safetensors", 2, 4).report.training == QUICK


@pytest.mark.parametrize(("block_dim", "size"), [key for key in codebook.SHIPPED if key[0] == 1])
def test_shipped_scalar_codebooks_are_what_the_command_builds(block_dim: int, size: int) -> None:
    rebuilt = training.build(block_dim, size, training.shipped_settings(size))
    assert torch.allclose(rebuilt.codewords, codebook.load(block_dim, size).codewords, atol=1e-6)


def test_reports_are_json_for_people() -> None:
    fields = json.loads(codebook.load(2, 256).report.to_json())
    assert list(fields)[:3] == ["schema_version", "block_dim", "size"]
    assert {entry["head_dim"] for entry in fields["held_out"]} == {64, 96, 128}
