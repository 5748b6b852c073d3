"""Random changes that know what they change: JSON by its values, stored bytes by their form."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy

from tests.fuzz.forms import BROKEN, NO_DIGEST, Form

MutateBytes = Callable[[bytes], bytes]

VALUES: tuple[object, ...] = (
    *(0, 1, -1, 2, 7, 16, 63, 64, 65, 2**16, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), True, False, None),
    *(
        "",
        "0",
        "a",
        "\ud800",
        "\0",
        "é",
        "😀" * 9,
        "x" * 300,
        NO_DIGEST,
        "none:raw",
        "name:x",
        "raw",
        "fib",
        "f16",
        "bf16",
    ),
    *([], {}, [0], [[0, 1]], [0, 2**40], [-1, 1], [None], [[[[[[[[]]]]]]]]),
)


def mutate(form: Form, data: bytes, rng: random.Random, mutate_bytes: MutateBytes) -> bytes:
    """One to three changes, anywhere in the bytes or in what they consist of."""
    if rng.random() < 0.25:
        return mutate_bytes(data)
    try:
        text, parts = form.split(data)
        for _ in range(rng.choice((1, 1, 2, 3))):
            text = _change(form, text, parts, rng, mutate_bytes)
        return form.join(text, parts)
    except BROKEN:
        return mutate_bytes(data)


def _change(form: Form, text: bytes, parts: list[bytes], rng: random.Random, mutate_bytes: MutateBytes) -> bytes:
    """Changes one of the parts in place, or returns another text."""
    kind = rng.random() if parts else 1.0
    index = rng.randrange(len(parts)) if parts else 0
    if kind < 0.4 and form.inner is not None:
        parts[index] = mutate(form.inner, parts[index], rng, mutate_bytes)
    elif kind < 0.4:
        changed = mutate_bytes(parts[index])
        # Mostly of the old size, or it would be refused for that alone.
        parts[index] = changed[: len(parts[index])].ljust(len(parts[index]), b"\0") if rng.random() < 0.8 else changed
    elif kind < 0.5:
        other = rng.randrange(len(parts))
        match rng.randrange(3):
            case 0:
                parts[index], parts[other] = parts[other], parts[index]
            case 1:
                parts.insert(other, parts[index])
            case _:
                del parts[index]
    else:
        return mutate_bytes(text) if rng.random() < 0.1 else mutate_json(text, rng)
    return text


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Another JSON text, with one value or name changed."""
    holder: list[object] = [json.loads(text)]
    places = _places(holder)
    parent, key = places[rng.randrange(len(places))]
    match rng.randrange(6):
        case 0:
            other, name = places[rng.randrange(len(places))]
            parent[key] = deepcopy(other[name])
        case 1 if parent is not holder:
            del parent[key]
        case 2 if isinstance(parent, list):
            parent.insert(key, deepcopy(parent[key]))
        case 3 if isinstance(parent[key], int | float):
            parent[key] += rng.choice((-64, -1, 1, 64))
        case 4 if isinstance(parent, dict):
            parent[rng.choice((*parent, "x", "digest"))] = parent[key]
        case _:
            parent[key] = deepcopy(rng.choice(VALUES))
    # Lone surrogates have no bytes but as escapes; escapes alone are another spelling of the same text.
    escaped = rng.random() < 0.05 or "\ud800" in str(holder)
    return json.dumps(holder[0] if holder else None, separators=(",", ":"), ensure_ascii=escaped).encode()


def _places(value: list[object] | dict[str, object]) -> list[tuple[list | dict, int | str]]:
    """Every value of a JSON value: what holds it, and where."""
    found: list[tuple[list | dict, int | str]] = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(item, list | dict):
            found += _places(item)
    return found
