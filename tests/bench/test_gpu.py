"""The GPU benchmark, in Triton's interpreter: its rows are complete, its checks fail where they should, its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fibkv import bench_gpu, bench_gpu_tune
from fibkv.bench_contenders import BASELINES
from fibkv.bench_gpu import COPY, run_gpu
from fibkv.bench_gpu_clock import Clock
from fibkv.bench_gpu_forms import CodedLayer
from fibkv.bench_gpu_result import GpuResult
from fibkv.bench_settings import QUICK_GPU, GpuSettings
from fibkv.cli import app
from fibkv.codecs import codec_for
from fibkv.errors import ContractError, KernelError
from fibkv.kernels import triton
from fibkv.kernels.triton_tuning import Tuning, load_tunings, tunings_path
from fibkv.parameters import PARAMETER_NAMES, named_parameters
from tests.bench.conftest import quiet

pytestmark = pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")

SMALL = QUICK_GPU.model_copy(update={"batches": (2,), "profiles": ("fib4/int8",)})


def test_the_command_writes_every_row(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    options = ("--quick", "--batches", "2", "--profiles", "fib4/int8", "--json", str(path))
    shown = CliRunner().invoke(app, ["bench", "gpu", *options])
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80
    result = GpuResult.from_json(path.read_text())
    assert result.settings == SMALL
    assert result.passed
    assert [row.name for row in result.rows] == [*BASELINES, COPY, "fib4/int8"]
    assert [name for name, _ in result.first_calls] == ["fib4/int8, head_dim 64"]
    for row in result.rows:
        assert row.figures is not None
        assert row.figures.called.calls == QUICK_GPU.rounds
        assert row.figures.replayed is None, "there are no graphs on a CPU"
        assert row.figures.gigabytes_per_second == pytest.approx(row.nbytes / row.figures.best.median / 1e9)
        assert (row.batch, row.context, row.head_dim) == (2, 48, 64)
    # 33 bytes of a fib4 vector with its 8-bit norm and 4 of a page's norm range; 66 of an int8 vector.
    assert result.rows[-1].nbytes == 2 * 2 * (48 * (33 + 66) + 3 * 4)
    assert 1.0 in [row.figures.speedup for row in result.rows if row.figures and row.kind == "baseline"]


def test_a_wrong_output_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "exact", lambda query, *_: torch.ones_like(query).double())
    result = run_gpu(SMALL.model_copy(update={"contexts": (16,), "profiles": ("int8",), "batches": (1,)}), quiet)
    assert not result.passed
    assert [row.name for row in result.rows if row.figures is not None] == [COPY]


def test_tuning_keeps_the_fastest_launch_for_later_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast, impossible = Tuning(tokens=16), Tuning(tokens=32, programs=1), Tuning(tokens=64)
    monkeypatch.setenv("FIBKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(bench_gpu_tune, "CANDIDATES", (slow, fast, impossible))
    launched: list[Tuning] = []
    attend = triton.Triton.attend_plan

    def watched(self: triton.Triton, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.tunings(torch.device("cpu")).of("int81"))
        if launched[-1] == impossible:
            raise KernelError("out of shared memory")
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(triton.Triton, "attend_plan", watched)
    monkeypatch.setattr(Clock, "seconds", lambda self, call: 1.0 if (call(), launched[-1] == fast)[1] else 2.0)
    load_tunings.cache_clear()
    small = SMALL.model_copy(update={"profiles": ("int8",), "batches": (1,), "contexts": (16,), "tune": True})
    result = run_gpu(small, quiet)
    assert result.passed
    assert result.tunings.found == (("int81", fast),)
    assert set(launched) == {slow, fast, impossible}
    assert launched[-1] == fast, "it is measured as it was tuned"
    assert load_tunings("interpreter") == result.tunings
    load_tunings.cache_clear()
    tunings_path("interpreter").write_text("{}")
    with pytest.raises(KernelError, match=r"expected tunings of interpreter: .*remove it, or tune again"):
        load_tunings("interpreter")
    load_tunings.cache_clear()


def test_tunings_are_powers_of_two() -> None:
    with pytest.raises(ContractError, match=r"Tuning\.tokens: expected a power of two from 16 upwards, got 24"):
        Tuning(tokens=24)
    with pytest.raises(ContractError, match=r"Tuning\.warps: expected a power of two from 1 upwards, got 3"):
        Tuning(warps=3)


@pytest.mark.parametrize("name", PARAMETER_NAMES)
def test_random_codes_are_such_as_an_encoder_makes(name: str) -> None:
    layer = CodedLayer(
        name, batch=1, heads=2, head_dim=64, context=32, tokens_per_page=16, generator=torch.Generator().manual_seed(0)
    )
    run = layer.run()
    codec = codec_for(named_parameters(name, 64, "bf16"))
    for codes in (*run.keys[0], *run.values[0]):
        codec.check(codes)
    keys, values = layer.decoded()
    assert keys.shape == values.shape == (1, 2, 32, 64)
    assert torch.equal(codec.decode(run.keys[0][1], implementation="reference"), keys[0, :, 16:])
    with layer.damaged():
        assert not torch.equal(layer.decoded()[0], keys)
    assert torch.equal(layer.decoded()[0], keys)


def test_sizes_and_refusals() -> None:
    assert GpuSettings(most_tokens=1 << 17).sizes()[:3] == [(64, 1, 4096), (64, 1, 32768), (64, 1, 131072)]
    assert (64, 64, 4096) not in GpuSettings(most_tokens=1 << 17).sizes()
    with pytest.raises(ContractError, match="multiples of 64 tokens"):
        GpuSettings(contexts=(100,))
    with pytest.raises(ContractError, match="room for at least one"):
        GpuSettings(most_tokens=10)
    with pytest.raises(KernelError, match="triton kernels: expected tensors on a CUDA device, got meta"):
        run_gpu(SMALL.model_copy(update={"device": "meta"}), quiet)
