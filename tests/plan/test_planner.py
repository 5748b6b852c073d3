"""What fits is held to the memory it was asked about; weights, configurations and options, and their refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fibkv import embedded
from fibkv.cli import app
from fibkv.errors import ContractError, FibkvError, ModelError
from fibkv.plan_result import MAX_BATCH, PlanResult, PlanSettings
from fibkv.plan_view import render_plan
from fibkv.planner import plan_memory
from tests.hf.architectures import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of transformers with a tiny hybrid of windows and full attention."""
    path = tmp_path_factory.mktemp("model")
    tiny("Gemma2", torch.bfloat16).save_pretrained(path)
    return path


def test_a_context_that_fits_fits_and_the_next_one_does_not(directory: Path) -> None:
    free = plan_memory(directory, PlanSettings(memory_nbytes=1 << 40, contexts=(300,), batches=(2,)))
    for row in free.rows:
        memory = free.weights_nbytes + row.cache_nbytes
        asked = free.settings.model_copy(update={"memory_nbytes": memory, "profiles": (row.profile,)})
        (exact,) = plan_memory(directory, asked).rows
        assert exact.fits
        assert exact.largest_context >= 300
        assert exact.largest_batch == 2
        (less,) = plan_memory(directory, asked.model_copy(update={"memory_nbytes": memory - 1})).rows
        assert not less.fits
        assert less.largest_context < 300
        assert less.largest_batch == 1
    assert [row.largest_batch for row in free.rows] == [MAX_BATCH] * 5
    by_codec = {row.profile: row.cache_nbytes for row in free.rows}
    assert by_codec["raw"] > by_codec["int8"] > by_codec["key4/value4"]


def test_nothing_fits_beside_weights_that_do_not_fit(directory: Path) -> None:
    result = plan_memory(directory, PlanSettings(memory_nbytes=1000))
    assert {(row.fits, row.largest_context, row.largest_batch) for row in result.rows} == {(False, 0, 0)}


def test_where_the_weights_come_from(directory: Path, tmp_path: Path) -> None:
    settings = PlanSettings(memory_nbytes=1 << 30, contexts=(64,), batches=(1,), profiles=("fib4",))

    def weights(model: Path, **changed: object) -> tuple[int, str]:
        result = plan_memory(model, settings.model_copy(update=changed))
        return result.weights_nbytes, result.weights_source

    stored = (directory / "model.safetensors").stat().st_size
    assert weights(directory) == (stored, "size of the safetensors files")
    assert weights(directory, weights_nbytes=12345) == (12345, "as given")
    counted, source = weights(directory / "config.json")
    assert source == "counted from the configuration"
    assert 0 < stored - counted < 16_000  # the header of the file
    assert weights(directory, dtype="float32")[0] == pytest.approx(2 * counted, rel=1e-3)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {"total_size": 777}, "weight_map": {}}')
    assert weights(tmp_path) == (777, "as model.safetensors.index.json says")
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match=r"index\.json: expected metadata\.total_size"):
        weights(tmp_path)


def test_the_layers_say_what_becomes_of_them(directory: Path) -> None:
    result = plan_memory(directory, PlanSettings(memory_nbytes=1 << 30))
    assert [(kind.count, kind.compressed, kind.reason) for kind in result.layers] == [
        (1, True, "keys raw, values raw"),
        (1, False, "a window of fixed size"),
    ]
    assert result.settings.contexts == (512,)  # the model's longest
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render_plan(result))
    text = capture.get()
    assert "1 x DynamicSlidingWindowLayer: as it is (a window of fixed size)" in text
    assert re.search(r"Longest context that fits.* q4 +key4/value4 +512\* ", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"profiles": ("fib5",)}, r"parameters name: expected one of raw, .*, got 'fib5'"),
        ({"dtype": "float8"}, r"PlanSettings\.dtype: expected float32, bfloat16 or float16, got 'float8'"),
        ({"implementation": "abacus"}, "abacus"),
    ],
)
def test_unknown_settings_are_refused(directory: Path, changed: dict[str, object], message: str) -> None:
    settings = PlanSettings(memory_nbytes=1 << 30)
    with pytest.raises(FibkvError, match=message):
        plan_memory(directory, settings.model_copy(update=changed))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    settings = PlanSettings(memory_nbytes=1 << 30)
    with pytest.raises(ModelError, match=r"expected a configuration of transformers, or a directory with config\.json"):
        plan_memory(tmp_path, settings)
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(ModelError, match=r"config\.json: not a configuration of transformers"):
        plan_memory(tmp_path, settings)


def test_the_command(tmp_path: Path) -> None:
    found = tmp_path / "plan.json"
    arguments = ["plan", str(embedded.model_dir()), "--memory", "64MiB", "--bits", "16,3.5", "--batch", "1,2"]
    done = CliRunner().invoke(app, [*arguments, "--context", "1024", "--json", str(found)])
    assert done.exit_code == 0, done.output
    assert "Longest context that fits" in done.output
    result = PlanResult.from_json(found.read_text())
    assert [(row.profile, row.batch) for row in result.rows] == [
        ("raw", 1),
        ("raw", 2),
        ("key3/value4", 1),
        ("key3/value4", 2),
    ]
    assert json.loads(found.read_text())["settings"]["memory_nbytes"] == 64 << 20
    refused = CliRunner().invoke(app, [*arguments[:2], "--memory", "lots"])
    assert isinstance(refused.exception, ContractError)
    assert str(refused.exception).startswith("--memory: expected a size such as 2GiB")
