from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "tools" / "train_reference_lm.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_reference_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sources_pass_the_filters(tool: ModuleType, tmp_path: Path) -> None:
    kept = ("json/decoder.py", "test/test_enum.py")
    dropped = (
        "site-packages/numpy/core.py",
        "lib2to3/main.py",
        "encodings/cp037.py",
        "pydoc_data/topics.py",
        "test/test_unicodedata.py",
        "test/test_codecmaps_jp.py",
    )
    for name in (*kept, *dropped, "short.py", "long.py", "latin.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * 400)
    (tmp_path / "short.py").write_text("x" * 399)
    (tmp_path / "long.py").write_text("x" * 400_001)
    (tmp_path / "latin.py").write_bytes(b"\xe9" * 500)
    assert tuple(dict(tool.library_sources(tmp_path))) == kept


def test_split_holds_out_what_the_card_says(tool: ModuleType) -> None:
    assert all(tool.is_held_out(name) for name in tool.HELDOUT_FILES)
    assert tool.is_held_out("test/test_builtin.py")
    assert not tool.is_held_out("json/decoder.py")
    share = sum(tool.is_held_out(f"module{number}.py") for number in range(5000)) / 5000
    assert share == pytest.approx(1 / 25, abs=0.01)


def test_sequences(tool: ModuleType, tokenizer: Any, text: str) -> None:
    sequences = tool.Sequences(tokenizer, [text[:60_000]], random.Random(0))
    batch = sequences.batch(12, 384)
    assert batch.shape == (12, 384)
    assert batch.dtype == torch.int64
    recalls = [tokenizer.decode(sequences.recall(384)) for _ in range(8)]
    for sequence in recalls:
        questions = re.findall(r"^assert \w+ == \S+$", sequence, flags=re.MULTILINE)
        planted = [line.removeprefix("assert ").replace(" == ", " = ") for line in questions]
        assert len(questions) >= 3
        assert all(f"{line}\n" in sequence for line in planted)


def test_schedule(tool: ModuleType) -> None:
    assert tool.learning_rate(0, 0.0) == pytest.approx(3e-5)
    assert tool.learning_rate(100, 0.0) == pytest.approx(3e-3)
    assert tool.learning_rate(5000, 0.5) == pytest.approx(3e-3 * 0.515)
    assert tool.learning_rate(9000, 1.0) == pytest.approx(9e-5)
    assert [tool.stage_shape(progress) for progress in (0.0, 0.7, 0.92, 0.999)] == [
        (16, 384),
        (6, 1024),
        (3, 2048),
        (3, 2048),
    ]


def test_tokenizer_and_model_have_the_embedded_geometry(tool: ModuleType, model: Any, text: str) -> None:
    tokenizer = tool.train_tokenizer([text[:50_000]])
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer) <= 2048
    assert tokenizer.decode(tokenizer("def f(x):\n    return 'é'").input_ids) == "def f(x):\n    return 'é'"
    fresh = tool.build_model()
    shapes = {name: parameter.shape for name, parameter in fresh.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}


def test_training_lowers_the_loss(tool: ModuleType, tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "STAGES", ((1.0, 2, 192),))
    monkeypatch.setattr(tool, "WARMUP_STEPS", 5)
    clock = iter(range(1000))
    monkeypatch.setattr(tool.time, "monotonic", lambda: float(next(clock)))
    torch.manual_seed(0)
    losses: list[float] = []
    sequences = tool.Sequences(tokenizer, [text[:60_000]], random.Random(0))
    # The clock ticks once per step, so half a minute is 29 steps.
    tool.train(tool.build_model(), sequences, 0.5, lambda step, progress, loss: losses.append(loss))
    assert len(losses) == 29
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
