"""Triton kernels in Triton's interpreter: every codec's suite, codes bit for bit; and compiled for devices."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fibkv.codecs import codec_for
from fibkv.kernels import reference, triton
from fibkv.kernels.triton_means import coded_means
from fibkv.kernels.triton_sides import on_device
from fibkv.means import encode_means
from fibkv.parameters import FibParameters, Rotation, named_parameters
from fibkv.tables import FibTables
from tests.codecs import test_codecs  # noqa: F401 - defines the suites
from tests.codecs.conformance import CodecConformance, attend_error, equal, gaussian
from tests.codecs.test_native_codes import PARAMETERS

pytestmark = pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")


def _suites() -> list[type[CodecConformance]]:
    """Of every codec but those that search scales or paths: the interpreter is too slow for them, and their codes are
    compared below."""
    suites = [suite for suite in CodecConformance.__subclasses__() if suite.parameters.codec != "trellis"]
    return [suite for suite in suites if not getattr(suite.parameters, "scale_search", False)]


for _suite in _suites():
    _name = f"{_suite.__name__}Triton"
    _error = attend_error("triton", _suite.parameters.codec)
    globals()[_name] = type(
        _name, (_suite,), {"implementation": "triton", "attend_error": _error, "__module__": __name__}
    )
del _suite, _name, _error

SETTINGS = {
    **PARAMETERS,
    "fib4_table": FibParameters.of(64, 2, 256, codeword_search="table", scale_search=True),
}


@pytest.mark.parametrize("axis", ["per_token", "per_channel"])
@pytest.mark.parametrize("name", SETTINGS)
def test_codes_are_the_reference_codes(name: str, axis: str) -> None:
    codec, implementation = codec_for(SETTINGS[name], axis), triton.Triton("cpu")
    rows = gaussian(3, 2, 11, codec.head_dim) * torch.logspace(-3, 3, 11)[:, None]
    rows[0, 0, 3] = 0
    expected = reference.encode(rows, codec.tables)
    assert equal(implementation.encode(rows, codec.tables), expected)
    decoded = reference.decode(expected, codec.tables)
    # Per vector: they are of very different length.
    scale = decoded.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    found = implementation.decode(expected, codec.tables)
    torch.testing.assert_close(found / scale, decoded / scale, rtol=1e-5, atol=1e-5)


def test_every_e4m3_code_and_every_border_between_two() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    borders = (codes[1:] + codes[:-1]) / 2
    beside = torch.cat([torch.nextafter(borders, borders * 0), borders, torch.nextafter(borders, borders * 2)])
    numbers = torch.cat([codes, beside])
    codec = codec_for(SETTINGS["fp8"].model_copy(update={"head_dim": 2 * numbers.numel()}))
    rows = torch.cat([numbers, -numbers])[None]
    coded = triton.Triton("cpu").encode(rows, codec.tables)
    assert equal(coded, reference.encode(rows, codec.tables))
    assert torch.equal(codec.decode(coded, implementation="triton"), codec.decode(coded, implementation="reference"))


def as_on_a_device(module: str) -> list[str]:
    """The lines that a module prints in a process of its own, without the interpreter; no device is needed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", f"tests.codecs.{module}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_kernels_compile_for_devices() -> None:
    made = as_on_a_device("compile_triton")
    assert any(line.startswith("sm_90 attend_splits fib4 fib4: ") for line in made)


def test_launches_are_those_that_triton_would_make_and_a_growing_layer_needs_no_new_kernels() -> None:
    """Launches are compared by `tests.codecs.launch_triton` itself."""
    lines = as_on_a_device("launch_triton")
    steps = [line for line in lines if " tokens, " in line]
    assert steps[0].startswith("91 tokens, 0 pages more")
    assert steps[-1].startswith("110 tokens, 1 pages more")
    assert {step.split(": ")[1] for step in steps} == {steps[0].split(": ")[1]}
    assert "0 kernels" not in steps[0]
    forms = lines[len(steps) :]
    assert len(forms) >= 4
    assert all(" 0 launches" not in form for form in forms)


def test_without_the_interpreter_the_cpu_is_refused() -> None:
    code = "from fibkv import kernels; print(kernels.available()['triton']); kernels.resolve('triton')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert "tensors on the CPU need TRITON_INTERPRET=1" in done.stdout
    assert "KernelError: triton kernels: tensors on the CPU need TRITON_INTERPRET=1" in done.stderr


def test_blocks_with_too_many_candidates_search_the_whole_book() -> None:
    tables = codec_for(SETTINGS["fib4"]).tables
    assert isinstance(tables, FibTables)
    # A ring, and nothing in its middle: any codeword may be nearest to a point there.
    angles = torch.arange(256) * (2 * torch.pi / 256)
    ring = replace(tables, codewords=torch.stack([angles.cos(), angles.sin()], 1) * 0.2, scales=(0.9, 1.0))
    rows = gaussian(2, 1, 20, tables.head_dim)
    rows[1, 0, :5] = 0
    expected = reference.encode(rows, ring)
    assert equal(triton.Triton("cpu").encode(rows, ring), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["key4", "fib4_haar", "int8"])
def test_rows_of_every_type_and_any_layout(name: str, dtype: torch.dtype) -> None:
    codec = codec_for(SETTINGS.get(name) or named_parameters(name, 64, "bf16"))
    rows = gaussian(7, 3, 2, codec.head_dim).to(dtype).transpose(0, 2)[:, 1:]
    assert not rows.is_contiguous()
    assert equal(triton.Triton("cpu").encode(rows, codec.tables), reference.encode(rows, codec.tables))


@pytest.mark.parametrize("tokens", [1, 11, 130])
@pytest.mark.parametrize(("head_dim", "rotation"), [(32, "hadamard"), (96, "haar"), (6, "haar")])
def test_means_are_those_of_torch(head_dim: int, rotation: Rotation, tokens: int) -> None:
    parameters = FibParameters.of(head_dim, 2, 16, rotation=rotation, centered=True)
    tables = codec_for(parameters).tables
    assert isinstance(tables, FibTables)
    rows = gaussian(9, tokens, head_dim) * torch.logspace(-30, 30, 9)[:, None, None]
    rows[3] = 0
    rows[4, :, 1:] = 0
    found = coded_means(rows, on_device(tables, rows.device))
    for made, expected in zip(found, encode_means(rows.double().mean(-2), tables.rotation.matrix), strict=True):
        assert torch.equal(made, expected)


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "version", lambda package: "3.4.0")
    triton._release.cache_clear()
    assert triton.why_not("cpu") == "triton 3.5 or newer is needed, 3.4.0 is installed"
    monkeypatch.undo()
    triton._release.cache_clear()
    assert triton.why_not("cpu") == "yes"
