"""The tool that trains trellis codes, on a few vectors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fibkv import trellis
from fibkv.label_counts import LabelCounts

SCRIPT = Path(__file__).parents[2] / "tools" / "train_trellis.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_trellis", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in (("FIRST", (64, 4, 16)), ("SECOND", (256, 4, 16)), ("TEST_VECTORS", 128)):
        monkeypatch.setattr(module, name, value)
    return module


def test_training_lowers_the_error(tool: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, others = (tool.unit_vectors(256, generator) for _ in range(2))
    code = tool.drawn(2, generator)
    better = tool.trained(code, rows, 6, 16)
    assert better.columns == code.columns
    assert tool.distortion(better, others, 16) < 0.99 * tool.distortion(code, others, 16)
    # The shipped ones are the best of many, trained for longer.
    assert tool.distortion(trellis.load(2), others, 64) < 0.99 * tool.distortion(better, others, 64)


def test_the_same_seed_trains_the_same_code(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    codes = [tool.train(3, 3, seed) for seed in (1, 1, 2)]
    assert codes[0] == codes[1] != codes[2]
    assert tool.distortion(codes[0], tool.unit_vectors(128, torch.Generator().manual_seed(4)), 64) < 0.0225
    best, _, worst = map(float, capsys.readouterr().out.split("[")[1].split("]")[0].split(", "))
    assert best < worst


def test_counts_name_their_code_and_are_shipped(tool: ModuleType) -> None:
    code = trellis.load(2)
    counted = tool.counted(code)
    assert sum(counted.counts) == tool.COUNTED[0] * tool.HEAD_DIM
    shipped = SCRIPT.parents[1] / "src/fibkv/data/trellis/counts2.json"
    assert LabelCounts.from_json(shipped.read_bytes()) == counted
