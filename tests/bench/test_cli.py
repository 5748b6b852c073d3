"""`fibkv bench` on the command line: what it prints and writes, what it refuses, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fibkv.bench_contenders import BASELINES
from fibkv.bench_result import KernelResult, PrefillResult, StepResult
from fibkv.cli import app

RESULTS = {"kernels": KernelResult, "steps": StepResult, "prefill": PrefillResult}


@pytest.mark.parametrize("command", RESULTS)
def test_a_benchmark_prints_and_writes(command: str, tmp_path: Path) -> None:
    figures, plot = tmp_path / "out" / "bench.json", tmp_path / "bench.png"
    options = ("--quick", "--rounds", "1", "--profiles", "int8,int8/fib4", "--seed", "7")
    shown = CliRunner().invoke(app, ["bench", command, *options, "--json", str(figures), "--plot", str(plot)])
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "int8/fib4" in shown.stdout
    result = RESULTS[command].from_json(figures.read_text())
    assert result.settings.profiles == ("int8", "int8/fib4")
    assert (result.settings.rounds, result.settings.seed, result.settings.head_dim) == (1, 7, 64)
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_kernel_options(tmp_path: Path) -> None:
    options = ("--contexts", "128, 192", "--query-heads", "2", "--kv-heads", "1", "--head-dim", "32", "--batch", "2")
    more = ("--implementations", "reference", "--threads", "1", "--cache-bytes", "4096", "--profiles", "fib2")
    shown = CliRunner().invoke(app, ["bench", "kernels", "--quick", *options, *more, "--json", str(tmp_path / "j")])
    assert shown.exit_code == 0, shown.output
    settings = json.loads((tmp_path / "j").read_text())["settings"]
    assert settings["contexts"] == [128, 192]
    assert (settings["query_heads"], settings["kv_heads"], settings["head_dim"], settings["batch"]) == (2, 1, 32, 2)
    assert (settings["implementations"], settings["num_threads"], settings["cache_bytes"]) == (["reference"], 1, 4096)


def test_a_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASELINES, "bf16 matmul", lambda query, *_: query)
    shown = CliRunner().invoke(app, ["bench", "kernels", "--quick", "--profiles", "int8"])
    assert shown.exit_code == 1
    assert "FAILED" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (("kernels", "--contexts", "many"), 2, "expected whole numbers by comma, got 'many'"),
        (("steps", "--rounds", "0"), 2, "Invalid value for '--rounds'"),
        (("kernels", "--profiles", "fib5"), 1, "profiles: expected different names of raw, int8"),
        (
            ("kernels", "--quick", "--implementations", "gone"),
            1,
            "kernel implementation: expected one of ",
        ),
        (("steps", "--quick", "--implementation", "gone"), 1, "kernel implementation: expected one of auto, "),
        (("prefill", "--quick", "--context", "5"), 1, "context: expected at least 128 tokens, got 5"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: int, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = CliRunner().invoke(app, ["bench", *arguments])
    # What `main` turns into one line and exit code 1 comes out of the app as it is.
    said = shown.output + (str(shown.exception) if shown.exit_code == 1 else "")
    assert shown.exit_code == code
    assert match in " ".join(said.split())


def test_an_error_is_one_line_and_help_is_quick() -> None:
    command = [sys.executable, "-m", "fibkv", "bench", "kernels", "--quick", "--head-dim", "70", "--profiles", "fib2"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert shown.returncode == 1
    assert "fibkv: profiles: expected codecs whose block_dim divides head_dim 70" in " ".join(shown.stderr.split())
    assert "Traceback" not in shown.stderr
    code = "import sys, fibkv.cli_bench; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0
