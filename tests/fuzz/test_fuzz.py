"""The seeds of the fuzzer, random changes of them without its guidance, and all that it has ever found."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from fibkv import container
from fibkv.errors import PageError
from tests.fuzz.__main__ import MAX_LENGTH
from tests.fuzz.check import check
from tests.fuzz.forms import NO_DIGEST
from tests.fuzz.mutations import mutate
from tests.fuzz.targets import NAMES, target

BOMBS = ("[]", "{}", "0", '""', '{"a":0}', "[[0]]", f'"{NO_DIGEST}"', str(2**64))
CRASHERS = sorted((Path(__file__).parent / "crashers").iterdir())


@pytest.fixture(scope="module", autouse=True)
def _traced() -> Iterator[None]:
    """Other tests need not pay for counting memory."""
    yield
    tracemalloc.stop()


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_read_and_changes_are_read_or_refused(name: str) -> None:
    one, rng = target(name), random.Random(0)
    assert check(name, one.seed)
    assert len(one.seed) < MAX_LENGTH
    text, parts = one.form.split(one.seed)
    assert check(name, one.form.join(text, parts))
    changed = [mutate(one.form, one.seed, rng, lambda data: flip(data, rng)) for _ in range(60)]
    assert len(set(changed)) > 40
    assert not all(list(map(partial(check, name), changed)))


@pytest.mark.parametrize("path", CRASHERS, ids=lambda path: path.name)
def test_what_was_found_stays_mended(path: Path) -> None:
    check(path.name.rpartition("-")[0], path.read_bytes())


def packed(name: str, text: bytes, sections: list[bytes]) -> bytes:
    """A container that fibkv would not write."""
    kind = target(name).form.kind
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "_require_affordable", lambda *_: None)
        return container.pack(kind, text, sections)


@pytest.mark.parametrize("name", ["page-fib", "root", "span", "end", "chunk"])
def test_what_grows_in_memory_is_refused_before_it_does(name: str) -> None:
    header = container.Container.parse(target(name).seed).header
    start = header.index(b'":[') + 3
    for count in (1000, 3000, 10000):
        for bomb in BOMBS:
            items = ",".join([bomb] * count).encode()
            for text in (b"[%b]" % items, b"%b%b,%b" % (header[:start], items, header[start:])):
                check(name, packed(name, text, []))
        check(name, packed(name, b'{"x":"%b"}' % ("😀" + "x" * count).encode(), []))
        check(name, packed(name, b"{%b}" % b",".join(b'"%d":0' % number for number in range(count)), []))
        check(name, packed(name, header, [b""] * count))
    with pytest.raises(PageError, match="in memory"):
        container.Container.parse(packed(name, header, [b""] * 5000))
    with pytest.raises(PageError, match="in memory"):
        container.pack(target(name).form.kind, b"[%b0]" % (b"{}," * 5000), [])
