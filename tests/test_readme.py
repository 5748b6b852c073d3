"""README's promises: its commands are those of the check, its example runs."""

from __future__ import annotations

import re
from pathlib import Path

from fibkv.hf_argument import cache_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_check_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for block in _blocks("sh")[:2]:
        install, command = block.strip().split(" && ")
        assert install.replace("pip install", "pip install --quiet") in script
        assert f"\n{command}\n" in script


def test_both_installs_use_the_constraints() -> None:
    for block in _blocks("sh")[:2]:
        assert "-c constraints.txt" in block


def test_the_examples_run(capsys) -> None:  # type: ignore[no-untyped-def]
    scope: dict[str, object] = {}
    for block in _blocks("python"):
        # Written for the newest release of transformers.
        code = block.replace("cache=cache", f"{cache_name()}=cache")
        exec(compile(code, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "bits per element" in printed
    assert "0 materialized" in printed
    assert scope["part"].shape == (1, 1, 2, 40, 64)
    assert scope["part"].equal(scope["values"][:, 2:3, :, 100:140])
