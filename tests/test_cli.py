"""The command line: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fibkv
from fibkv import codebook


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fibkv", *arguments], capture_output=True, text=True, check=False, timeout=600
    )


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == fibkv.__version__
    shown = run("--help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout
    assert "codebooks" in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    ["--version", "--help", "demo --help", "bench kernels --help", "pages ls --help", "demo --windows 0", "plan", "no"],
)
def test_help_version_and_wrong_usage_load_no_torch(arguments: str) -> None:
    code = "import sys; from fibkv.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, check=False
    )
    assert shown.returncode == (0 if arguments.startswith("--") or arguments.endswith("--help") else 2)
    loaded = set(shown.stderr.split())
    assert "fibkv.cli_demo" in loaded
    assert not loaded & {"torch", "transformers", "scipy", "safetensors", "triton"}


def test_codebooks_list_shows_every_shipped_book() -> None:
    shown = run("codebooks", "list")
    assert shown.returncode == 0, shown.stderr
    for block_dim, size in codebook.SHIPPED:
        assert codebook.load(block_dim, size).digest.removeprefix("blake3:")[:8] in shown.stdout


def test_demo_on_the_embedded_model(tmp_path: Path) -> None:
    """The whole command at a small size: every row is there, passes the poison test, and reads its pages."""
    figures, plot = tmp_path / "out" / "demo.json", tmp_path / "demo.png"
    options = (
        "--windows",
        "1",
        "--prompts",
        "1",
        "--window-tokens",
        "512",
        "--json",
        str(figures),
        "--plot",
        str(plot),
    )
    shown = run("demo", *options)
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for title in ("dense", "raw bf16", "int8", "fp8 e4m3", "4 bits (default)", "3 bits", "2 bits"):
        assert title in shown.stdout
    # No progress bars and no colours where nobody watches.
    assert "Loading weights" not in shown.stdout + shown.stderr
    assert "\x1b" not in shown.stdout + shown.stderr
    result = json.loads(figures.read_text())
    bits = [row["bits_per_element"] for row in result["variants"]]
    assert bits == sorted(bits, reverse=True)
    kl = [row["quality"]["kl_mean"] for row in result["variants"]]
    assert kl[0] < 1e-3 < kl[3] < kl[4]
    assert all(row["poison"]["moved"] > 0 and row["poison"]["restored"] for row in result["variants"])
    assert all(row["materialized"] == 0 for row in result["variants"])
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        (("--model", "nowhere"), 2, "--model and --text go together"),
        (("--model", "nowhere", "--text", __file__), 1, "fibkv: nowhere: expected a model directory of transformers"),
        (("--dtype", "float8"), 1, "dtype: expected one of float32, bfloat16, float16, auto, got 'float8'"),
        (("--windows", "0"), 2, "Invalid value for '--windows'"),
        (("--window-tokens", "100000"), 1, "window_tokens: expected at most"),
    ],
)
def test_demo_refusals(options: tuple[str, ...], code: int, match: str) -> None:
    shown = run("demo", *options)
    assert shown.returncode == code, shown.stderr
    assert match in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.stderr


def test_demo_on_a_model_directory() -> None:
    model = Path(fibkv.__file__).parent / "data" / "reference_lm"
    options = ("--windows", "1", "--prompts", "1", "--window-tokens", "256")
    shown = run("demo", "--model", str(model), "--text", str(model / "heldout.txt"), *options)
    assert shown.returncode == 0, shown.stderr
    assert "2 bits" in shown.stdout
    assert "M parameters, bfloat16" in " ".join(shown.stdout.split())


def test_a_missing_text_is_one_line(tmp_path: Path) -> None:
    model = Path(fibkv.__file__).parent / "data" / "reference_lm"
    shown = run("demo", "--model", str(model), "--text", str(tmp_path / "absent.txt"))
    assert shown.returncode == 1
    assert "absent.txt: expected a text file in UTF-8" in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.stderr


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    shown = run("codebooks", "build", str(tmp_path / "file" / "books"))
    assert shown.returncode == 1
    assert "fibkv: [Errno" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["", "file/figures.json"])
@pytest.mark.parametrize(
    "command",
    ["bench kernels --quick --json", "demo --plot", "eval embedded --json", "calibrate embedded -o", "plan x --json"],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(command: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    options = ("--memory", "1GiB") if command.startswith("plan") else ()
    shown = run(*command.split(), str(tmp_path / place), *options)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr.startswith("fibkv: [Errno")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_eval_on_the_embedded_model(tmp_path: Path) -> None:
    receipt = tmp_path / "eval.json"
    shown = run("eval", "embedded", "--quick", "--caches", "fib2,kivi2", "--json", str(receipt))
    assert shown.returncode == 0, shown.stderr
    assert "KIVI-2 g32" in shown.stdout
    assert [row["name"] for row in json.loads(receipt.read_text())["result"]["rows"]] == ["fib2", "kivi2"]


def test_eval_asks_for_a_text_beside_a_model() -> None:
    model = Path(fibkv.__file__).parent / "data" / "reference_lm"
    shown = run("eval", str(model), "--quick")
    assert shown.returncode == 1
    assert "expected a text file beside a model directory" in " ".join(shown.stderr.split())


def test_calibrate_then_evaluate(tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    shown = run(
        "calibrate", "embedded", "--windows", "2", "--window-tokens", "64", "--trial-windows", "1", "-o", str(file)
    )
    assert shown.returncode == 0, shown.stderr
    assert "recommended" in shown.stdout
    shown = run("eval", "embedded", "--quick", "--caches", "calmix", "--calibration", str(file))
    assert shown.returncode == 0, shown.stderr
    assert "calibrated, per layer" in shown.stdout
