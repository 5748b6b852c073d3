import subprocess
import sys

import pytest

MODULES = [
    "contract",
    "digest",
    "errors",
    "parameters",
    "policy",
    "pressure",
    "profile",
    "quarantine",
    "receipt",
    "regions",
    "shape",
]
HEAVY = {"torch", "scipy", "transformers", "triton", "safetensors"}


@pytest.mark.parametrize("module", MODULES)
def test_contracts_need_no_torch(module: str) -> None:
    script = f"import sys, fibkv.{module}; print(*sorted(name for name in sys.modules if '.' not in name))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "fibkv" in loaded
    assert not loaded & HEAVY
