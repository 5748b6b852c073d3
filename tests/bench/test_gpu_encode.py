"""The timing of encoding on a GPU, at its tiny sizes in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fibkv.kernels import triton

SCRIPT = Path(__file__).parents[2] / "tools" / "time_gpu_encode.py"


@pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")
def test_the_tool_compares_codes_and_times_every_part(tmp_path: Path) -> None:
    path = tmp_path / "encode.json"
    command = [sys.executable, SCRIPT, "--quick", "--json", path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(path.read_text())
    assert result["layer us"] > 0
    assert [row["profile"] for row in result["rows"]] == ["key4/value4", "int8/fp8"]
    for row in result["rows"]:
        assert {share for side in row["equal bytes"] for share in side.values()} == {1.0}
        assert min(row["called us"], row["graph us"], row["waiting us"]) > 0
    keys, values = result["rows"][0]["stages us"]
    assert set(keys) == {"means", "subtraction", "rotation", "search", "norms"}
    assert set(values) == {"rotation", "search", "norms"}
