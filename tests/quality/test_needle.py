from __future__ import annotations

import ast
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibkv.errors import ContractError
from fibkv.needle import Needle, draw_needles, plant

FILLER = "def first():\n    return 1\n\n\ndef second():\n    return 2\x0c\n"


def _prompt(seed: int, num_needles: int, filler: str):
    rng = random.Random(seed)
    needles = draw_needles(rng, num_needles, filler=filler)
    return needles, plant(rng, needles, filler=filler)


@given(st.integers(0, 2**32), st.integers(1, 20), st.text(alphabet="ab =\n\x0c", max_size=80))
def test_spans_mark_the_values_and_the_filler_is_kept(seed: int, num_needles: int, filler: str) -> None:
    needles, prompt = _prompt(seed, num_needles, filler)
    assert sorted(prompt.answers) == sorted(needle.value for needle in needles)
    by_value = {needle.value: needle for needle in needles}
    for (start, stop), value in zip(prompt.spans, prompt.answers, strict=True):
        assert prompt.text[:start].endswith(f"\n{by_value[value].question}")
        assert prompt.text[stop] == "\n"
    body = prompt.text[: prompt.spans[0][0] - len(by_value[prompt.answers[0]].question)]
    for needle in needles:
        assert body.count(needle.planted_line) == 1
        body = body.replace(needle.planted_line, "", 1)
    assert body == filler.removesuffix("\n") + "\n"


def test_same_seed_same_prompt_other_seed_other_prompt() -> None:
    assert _prompt(7, 5, FILLER) == _prompt(7, 5, FILLER)
    assert _prompt(7, 5, FILLER)[1].text != _prompt(8, 5, FILLER)[1].text


def test_names_and_values_are_different_and_names_are_new_to_the_filler() -> None:
    filler = "load_path = save_file = 1\n"
    for seed in range(50):
        needles, _ = _prompt(seed, 14, filler)
        assert len({needle.name for needle in needles}) == len({needle.value for needle in needles}) == 14
        assert not any(needle.name in filler for needle in needles)


def test_shares_of_the_kinds_of_names_and_values() -> None:
    needles = [needle for seed in range(200) for needle in draw_needles(random.Random(seed), 10, filler="")]
    values = Counter(
        "int" if re.fullmatch(r"\d{3,6}", needle.value)
        else "hex" if re.fullmatch(r"0x[0-9a-f]{1,5}", needle.value)
        else "string" if re.fullmatch(r"'[a-z]+-\d{1,3}'", needle.value)
        else "other"
        for needle in needles
    )  # fmt: skip
    assert values["other"] == 0
    assert values["int"] == pytest.approx(0.60 * len(needles), rel=0.1)
    assert values["string"] == pytest.approx(0.25 * len(needles), rel=0.1)
    plain = sum(re.fullmatch(r"[a-z]+_[a-z]+", needle.name) is not None for needle in needles)
    assert plain == pytest.approx(0.5 * len(needles), rel=0.1)
    assert all(isinstance(ast.literal_eval(needle.value), int | str) for needle in needles)


def test_questions_come_in_another_order_than_the_planted_lines() -> None:
    needles, prompt = _prompt(3, 10, FILLER)
    planted = sorted(needles, key=lambda needle: prompt.text.index(needle.planted_line))
    assert [needle.value for needle in planted] != list(prompt.answers)


def test_lines_of_a_needle() -> None:
    needle = Needle(name="load_path", value="0x1f")
    assert needle.planted_line == "load_path = 0x1f\n"
    assert needle.question == "assert load_path == "


@pytest.mark.parametrize("count", [0, 101])
def test_refuses_a_count_out_of_range(count: int) -> None:
    with pytest.raises(ContractError, match=f"num_needles: expected 1 to 100, got {count}"):
        draw_needles(random.Random(0), count, filler="")


def test_imports_without_torch() -> None:
    code = "import sys, fibkv.needle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
