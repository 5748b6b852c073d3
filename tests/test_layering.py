"""The import graph: ranks read from docs/DESIGN.md as data, no circles, no upward imports, no torch in contracts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fibkv

SOURCE = Path(fibkv.__file__).parent
DESIGN = Path(__file__).parents[1] / "docs" / "DESIGN.md"


def _ranks() -> dict[str, int]:
    """Module name to rank, from the table of the design: ``rank 2  codecs/{__init__, raw}``."""
    ranks: dict[str, int] = {}
    for rank, names in re.findall(r"^rank (\d)  (.+)$", DESIGN.read_text(), flags=re.MULTILINE):
        for folder, inside, plain in re.findall(r"(\w+)/\{([^}]*)\}|(\w+)", names):
            modules = [f"{folder}.{name.strip()}" for name in inside.split(",")] if folder else [plain]
            ranks.update((f"fibkv.{module}".removesuffix(".__init__"), int(rank)) for module in modules)
    return ranks


def _modules() -> dict[str, Path]:
    return {
        ".".join(("fibkv", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in SOURCE.rglob("*.py")
    }


def _imports(path: Path, known: set[str]) -> set[str]:
    """Modules of fibkv that a file imports anywhere; names of the package itself count as the modules behind them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if (node.module or "").split(".")[0] == "fibkv":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    home = fibkv._HOMES.get(alias.name) if node.module == "fibkv" else None
                    found.add(inner if inner in known else f"fibkv.{home}" if home else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in known)
    return found


def _graph() -> dict[str, set[str]]:
    modules = _modules()
    # The package itself names its exports lazily; its TYPE_CHECKING block imports nothing at run time.
    return {name: _imports(path, set(modules)) for name, path in modules.items() if name != "fibkv"}


# Top-level packages that contracts must not load.
HEAVY = {"torch", "scipy", "safetensors", "transformers", "triton"}
# `import fibkv` alone gives a module everything by way of lazy names: only the command line may.
ROOT_USERS = {"fibkv.cli"}


def test_every_module_has_a_rank() -> None:
    missing = set(_graph()) - set(_ranks())
    assert not missing, f"not in the table of docs/DESIGN.md: {sorted(missing)}"


def test_every_rank_has_its_module() -> None:
    assert not set(_ranks()) - set(_graph()), "the table of docs/DESIGN.md names modules that do not exist"


def test_no_circles() -> None:
    order = list(TopologicalSorter(_graph()).static_order())  # raises CycleError
    assert set(order) >= set(_graph())


def test_no_upward_imports() -> None:
    ranks = _ranks()
    upward = [
        f"{name} (rank {ranks[name]}) imports {target} (rank {ranks[target]})"
        for name, targets in _graph().items()
        for target in targets - {"fibkv"}
        if ranks[target] > ranks[name]
    ]
    assert not upward


def test_the_package_itself_is_imported_by_the_command_line_only() -> None:
    assert {name for name, targets in _graph().items() if "fibkv" in targets} <= ROOT_USERS


def test_the_check_would_see_an_upward_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    for line in ("from fibkv import hf", "from fibkv.hf import x", "import fibkv.hf", "from fibkv import Cache"):
        bad.write_text(line)
        assert _imports(bad, set(_modules())) == {"fibkv.hf"}, line
    bad.write_text("import fibkv")
    assert _imports(bad, set(_modules())) == {"fibkv"}
    bad.write_text("from . import hf")
    with pytest.raises(AssertionError, match="relative import"):
        _imports(bad, set(_modules()))


@pytest.mark.parametrize("module", sorted(name for name, rank in _ranks().items() if rank == 0))
def test_contracts_import_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert module in shown
    assert not HEAVY & set(shown)


def test_package_imports_without_transformers() -> None:
    code = "import sys, fibkv, fibkv.cache, fibkv.artifact; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_exported_names() -> None:
    assert sorted(fibkv.__all__) == [
        "Artifact",
        "BudgetError",
        "Cache",
        "FibkvError",
        "KVShape",
        "Ladder",
        "Policy",
        "Pool",
        "PressureConfig",
        "PressureController",
        "Profile",
        "ProtectedRegions",
        "QualityBudget",
        "Receipt",
        "Saver",
        "Session",
        "attention",
        "bind_profile",
        "decide",
        "decode_slice",
        "decode_tensor",
        "encode_tensor",
        "plan",
        "restore",
    ]
    assert all(getattr(fibkv, name) is not None for name in fibkv.__all__)
    assert callable(fibkv.attention)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fibkv.nonsense  # noqa: B018
