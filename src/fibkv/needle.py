"""The needle task: values planted in long text and asked for at the end (rank 0, pure Python).

A prompt is filler text (source code, or anything with lines) in which lines ``name = value`` are strewn at
random places. It closes with one line ``assert name == value`` per planted pair, in random order. A model that
reads its cache knows each value when it has read ``assert name ==``; a model whose cache is damaged does not.
Names and values are drawn anew for each prompt, and a name that already stands in the filler is drawn again,
so nothing can be answered from memory of the text.

The same generator makes the recall sequences of ``tools/train_reference_lm.py`` and the prompts of ``fibkv demo``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fibkv.errors import ContractError

# fmt: off
VERBS = (
    "load", "save", "read", "write", "open", "parse", "find", "get", "set", "add", "check", "make", "run", "send",
    "split", "join", "map", "encode", "merge",
)
NOUNS = (
    "file", "path", "name", "key", "node", "list", "dict", "token", "line", "page", "cache", "table", "row", "column",
    "field", "packet", "buffer", "queue", "event", "state", "option", "index", "image", "user", "header",
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """One planted pair: an identifier, and the literal that stands on the right of its ``=``."""

    name: str
    value: str

    @property
    def planted_line(self) -> str:
        """The line that is strewn into the filler, with its line end."""
        return f"{self.name} = {self.value}\n"

    @property
    def question(self) -> str:
        """What stands before the value in the closing line."""
        return f"assert {self.name} == "


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallPrompt:
    """Text with planted values, and where the values that must be recalled stand.

    Attributes:
        text: filler with the planted lines, then the closing lines.
        spans: ``(start, stop)`` in characters of each value in the closing lines, in the order of the text.
    """

    text: str
    spans: tuple[tuple[int, int], ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The values that must be recalled, in the order of the text."""
        return tuple(self.text[start:stop] for start, stop in self.spans)


def draw_needles(rng: random.Random, num_needles: int, *, filler: str) -> tuple[Needle, ...]:
    """Draw pairs whose names and values are all different, and whose names do not stand in the filler.

    Args:
        rng: source of all randomness.
        num_needles: how many pairs, 1 to 100.
        filler: text that the names must not occur in.

    Raises:
        ContractError: ``num_needles`` is out of range.
    """
    if not 1 <= num_needles <= 100:
        raise ContractError("num_needles", "1 to 100", num_needles)
    needles: dict[str, Needle] = {}
    values: set[str] = set()
    while len(needles) < num_needles:
        needle = Needle(name=_draw_name(rng), value=_draw_value(rng))
        # Two values for one name, or a name that the filler uses too, would make the question ambiguous.
        if needle.name not in needles and needle.value not in values and needle.name not in filler:
            needles[needle.name] = needle
            values.add(needle.value)
    return tuple(needles.values())


def plant(rng: random.Random, needles: tuple[Needle, ...], *, filler: str) -> RecallPrompt:
    """Strew the needles between the lines of the filler and close with the questions in random order.

    Args:
        rng: source of the places and of the order of the questions.
        needles: the pairs to plant.
        filler: text of which every line is kept, in order.
    """
    # Not splitlines: it would also cut at form feeds, which Python sources hold inside their lines.
    lines = [f"{line}\n" for line in filler.removesuffix("\n").split("\n")]
    places = sorted((rng.randint(0, len(lines)) for _ in needles), reverse=True)
    # From the back, so that an insertion does not move the places that are still to come.
    for place, needle in zip(places, needles, strict=True):
        lines.insert(place, needle.planted_line)
    text = "".join(lines)
    spans = []
    for needle in rng.sample(needles, len(needles)):
        start = len(text) + len(needle.question)
        spans.append((start, start + len(needle.value)))
        text += f"{needle.question}{needle.value}\n"
    return RecallPrompt(text=text, spans=tuple(spans))


def _draw_name(rng: random.Random) -> str:
    """``verb_noun``: half of them plain, a quarter in upper case, a quarter with a number below 100."""
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    kind = rng.random()
    if kind < 0.5:
        return name
    return name.upper() if kind < 0.75 else f"{name}_{rng.randrange(100)}"


def _draw_value(rng: random.Random) -> str:
    """60 % integers of 3 to 6 digits, 25 % quoted ``noun-number`` strings, 15 % hex literals below 2^20."""
    kind = rng.random()
    if kind < 0.60:
        digits = rng.randint(3, 6)
        return str(rng.randrange(10 ** (digits - 1), 10**digits))
    if kind < 0.85:
        return f"'{rng.choice(NOUNS)}-{rng.randrange(1000)}'"
    return hex(rng.randrange(2**20))
