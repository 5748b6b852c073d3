"""Pages as bytes: docs/FORMAT.md, rule by rule."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from mmap import ACCESS_READ, mmap
from pathlib import Path

import pytest
import torch

from fibkv.cache import LayerCache
from fibkv.container import MAGIC, MAX_HEADER_NBYTES, Container, pack
from fibkv.digest import canonical_json
from fibkv.errors import ContractError, DigestMismatch, PageError
from fibkv.page import Page
from fibkv.page_draft import page_to_bytes
from fibkv.policy import Policy
from fibkv.quarantine import Quarantine
from fibkv.sealing import LayerSettings
from fibkv.space import KeySpace
from fibkv.wire import PageReader, load_pages
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings, protecting
from tests.store.damage import check_damage_is_seen


def load(data: bytes, settings: LayerSettings) -> Page:
    return load_pages([PageReader(settings).open(data)])[0]


def pages_of(settings: LayerSettings, tokens: int = 33) -> list[Page]:
    empty = torch.zeros(1, HEADS, 0, DIM)
    cache = LayerCache(settings, empty, empty, Quarantine())
    cache.append(gaussian(1, HEADS, tokens, DIM), gaussian(1, HEADS, tokens, DIM, seed=1))
    return list(cache.rows[0])


SETTINGS = layer_settings(policy=protecting(first_tokens_raw=4, raw_heads=(1,)))
PAGE = pages_of(SETTINGS)[0]
DATA = page_to_bytes(PAGE)
ROLE_AWARE = Policy.role_aware_baseline()


@pytest.mark.parametrize(
    "settings",
    [
        *(layer_settings(name, name) for name in ("raw", "int8", "fp8", "fib1", "fib2", "fib3", "fib4", "scalar3")),
        layer_settings("int8", "fib2", ROLE_AWARE),
        layer_settings(implementation="auto"),
        SETTINGS,
    ],
    ids=lambda settings: f"{settings.keys.profile.profile_id}-{settings.keys.axis}-{settings.keys.implementation}",
)
def test_a_page_comes_back_as_it_was(settings: LayerSettings) -> None:
    for page in pages_of(settings):
        data = page_to_bytes(page)
        assert len(data) % 64 == 0
        stored = PageReader(settings).open(data)
        (back,) = load_pages([stored])
        assert (back.digest, back.header()) == (page.digest, page.header())
        assert back.compute_digest() == page.digest
        assert page_to_bytes(back) == data
        for role, segments in (("key", back.keys), ("value", back.values)):
            dense = torch.empty(HEADS, page.tokens, DIM)
            for segment in segments:
                heads, tokens = (slice(*span) for span in (segment.form.heads, segment.form.tokens))
                segment.decode(dense[heads, tokens], implementation="reference")
            for head, token in ((0, 0), (1, page.tokens - 1), (HEADS - 1, 7)):
                # One vector at a time may be decoded by other instructions than a segment.
                torch.testing.assert_close(stored.vector(role, head, token), dense[head, token], rtol=1e-5, atol=1e-6)


def test_keys_come_back_to_their_space() -> None:
    space = KeySpace.of(gaussian(HEADS, DIM, seed=5), torch.linalg.qr(gaussian(HEADS, DIM, DIM, seed=6)).Q)
    plain = layer_settings(policy=protecting(first_tokens_raw=4))
    settings = _with_space(plain, space)
    page = pages_of(settings)[0]
    back = load(page_to_bytes(page), settings)
    assert [form.space for form in back.form.keys] == [form.space for form in page.form.keys] == [None, space]
    vector = PageReader(settings).open(page_to_bytes(page)).vector("key", 1, 9)
    dense = torch.empty(HEADS, page.tokens - 4, DIM)
    page.keys[1].decode(dense)
    torch.testing.assert_close(vector, dense[1, 5], rtol=1e-5, atol=1e-5)
    with pytest.raises(DigestMismatch, match="key_profile"):
        PageReader(plain).open(page_to_bytes(page))


def test_a_fallback_comes_back_as_one() -> None:
    settings = layer_settings()
    keys, values = (gaussian(1, HEADS, 16, DIM, seed=seed) for seed in (0, 1))
    keys[0, 0, 3, 0] = 3e38
    keys[0, 0, 3, 1] = 3e38
    empty = torch.zeros(1, HEADS, 0, DIM)
    cache = LayerCache(settings, empty, empty, Quarantine())
    cache.append(keys, values)
    (page,) = cache.rows[0]
    assert page.keys[0].codec.name == "raw"
    back = load(page_to_bytes(page), settings)
    assert torch.equal(back.keys[0].codes.values, keys[0])  # type: ignore[attr-defined]


def test_a_vector_is_read_from_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_bytes(DATA)
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
        stored = PageReader(SETTINGS).open(memoryview(mapped))
        expected = PageReader(SETTINGS).open(DATA).vector("value", 0, 9)
        assert torch.equal(stored.vector("value", 0, 9), expected)
        del stored
    with pytest.raises(ContractError, match=r"StoredPage\.vector: expected a head and a token below 16"):
        PageReader(SETTINGS).open(DATA).vector("key", 0, 16)


def test_a_damaged_page_gets_no_stored_form() -> None:
    page = pages_of(layer_settings())[0].copied()
    page.keys[0].codes.norms[0, 0] ^= 1  # type: ignore[attr-defined]
    with pytest.raises(DigestMismatch, match=r"Page\(layer=1, start=0\)"):
        page_to_bytes(page)


def _with_space(settings: LayerSettings, space: KeySpace) -> LayerSettings:
    return replace(settings, keys=replace(settings.keys, space=space))


# Hostile files. Each is otherwise sound, its digest included: only the rule at hand refuses it.


def head(offset: int, form: str, value: int) -> bytes:
    data = bytearray(DATA)
    struct.pack_into(form, data, offset, value)
    return bytes(data)


def number(offset: int, form: str) -> int:
    return int(struct.unpack_from(form, DATA, offset)[0])


def filled(where: Callable[[bytes], int]) -> bytes:
    data = bytearray(DATA)
    assert data[where(DATA)] == 0
    data[where(DATA)] = 1
    return bytes(data)


def behind_header(data: bytes) -> int:
    return 64 + 8 * number(12, "<I") + number(16, "<Q")


def behind_codes(data: bytes) -> int:
    offset = -(-behind_header(data) // 64) * 64
    for section in Container.parse(data).sections:
        if len(section) % 64:
            return offset + len(section)
        offset += len(section)
    raise AssertionError("every section of the example ends on a boundary")


def test_filling_exists_where_the_tests_put_ones() -> None:
    assert behind_header(DATA) % 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected at least 64 bytes, got 0"),
        (DATA[:63], "expected at least 64 bytes, got 63"),
        (b"\x89fibkv\n\n" + DATA[8:], "marker"),
        (b"PK\x03\x04" + DATA[4:], "marker"),
        (head(8, "<H", 2), "version: expected 1, got 2"),
        (head(10, "<H", 0), "kind: expected page, got 0"),
        (head(10, "<H", 99), "kind: expected page, got 99"),
        (DATA[:-1], "truncated"),
        (DATA[:64], "truncated"),
        (DATA + bytes(64), "trailing bytes"),
        (head(24, "<Q", 2**64 - 1), "truncated"),
        (head(12, "<I", 2**32 - 1), "header of at most"),
        (head(16, "<Q", 2**64 - 1), "header of at most"),
        (head(16, "<Q", MAX_HEADER_NBYTES + 1), "header of at most"),
        (head(64, "<Q", 2**64 - 1), "by its sections"),
        (head(64, "<Q", number(64, "<Q") + 64), "by its sections"),
        (filled(behind_header), "expected zeros"),
        (filled(behind_codes), "expected zeros"),
    ],
)
def test_what_is_no_container_is_refused_by_its_sizes(data: bytes, message: str) -> None:
    with pytest.raises(PageError, match=message):
        PageReader(SETTINGS).open(data)


def forged(change: Callable[[dict], object], sections: Callable[[list], object] = lambda _: None) -> bytes:
    """The page with another header, or other sections, and the digest that belongs to them."""
    container = Container.parse(DATA)
    fields, parts = json.loads(container.header), list(container.sections)
    change(fields)
    sections(parts)
    return pack("page", canonical_json(fields).encode(), parts)


def put(path: str, value: object) -> Callable[[dict], object]:
    *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))

    def change(fields: dict) -> None:
        for step in steps:
            fields = fields[step]
        fields[last] = value

    return change


def spaced() -> bytes:
    container = Container.parse(DATA)
    return pack("page", json.dumps(json.loads(container.header)).encode(), container.sections)


OTHER = "blake3:" + "0" * 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (forged(put("page.layer", 2)), "expected layer 1, got 2"),
        (forged(put("page.key_profile", OTHER)), "key_profile: digest mismatch"),
        (forged(put("page.value_profile", OTHER)), "value_profile: digest mismatch"),
        (forged(put("page.extra", 1)), "only the fields"),
        (forged(put("page.start", -1)), "PageHeader.start|page.start"),
        (forged(put("page.tokens", 17)), "cover 2 heads x 17 tokens"),
        (forged(put("page.tokens", 2**62)), "cover 2 heads"),
        (forged(put("page.tokens", 15)), "within 2 heads x 15 tokens"),
        (forged(put("segments.0.heads", [0, 3])), "within 2 heads"),
        (forged(put("segments.0.heads", [1, 1])), "within 2 heads"),
        (forged(put("segments.0.heads", [-1, 0])), "within 2 heads"),
        (forged(put("segments.0.tokens", [4, 8])), "cover|expected segments"),
        (forged(put("segments.0.codec", "int8")), "segment|expected heads"),
        (forged(put("segments.1.axis", "per_channel")), "axis"),
        (forged(put("segments.1.reasons", ["whatever"])), "reasons"),
        (forged(put("segments.1.action", "quarantine")), "expected a segment that is compressed or raw"),
        (forged(put("segments.0.nbytes", 5)), "sections of"),
        (forged(lambda fields: fields["segments"].pop()), "sections of"),
        (forged(lambda fields: fields["segments"].pop(), lambda parts: parts.pop()), "two roles alike"),
        (forged(lambda fields: fields["segments"].clear(), lambda parts: parts.clear()), "cover"),
        (forged(lambda _: None, lambda parts: parts.reverse()), "sections of"),
        (pack("page", b"[]", []), "page header: expected canonical JSON"),
        (pack("page", b'{"page":' * 1500 + b',"segments":', []), "JSON"),
        (pack("page", b"\xff", []), "JSON"),
        (spaced(), "canonical"),
    ],
)  # fmt: skip
def test_what_is_no_page_of_this_layer_is_refused(data: bytes, message: str) -> None:
    Container.read(data, "page")  # sound as a container
    with pytest.raises((PageError, ContractError), match=message):
        PageReader(SETTINGS).open(data)


def test_codes_that_no_encoder_makes_are_refused() -> None:
    settings = layer_settings("fib3", "fib3")  # 64 codewords in 6 bits, 32 blocks: no index is out of range
    page = pages_of(settings)[0]
    container = Container.parse(page_to_bytes(page))
    broken = bytearray(container.sections[0])
    broken[0:2] = struct.pack("<e", float("nan"))  # the lowest norm of the range
    data = pack("page", container.header, [bytes(broken), *container.sections[1:]])
    with pytest.raises(PageError, match="norm_range"):
        load(data, settings)


def test_overlapping_segments_are_refused() -> None:
    # Two rectangles of one head each, both head 0: the area is right, the cover is not.
    container = Container.parse(page_to_bytes(pages_of(layer_settings())[0]))
    fields = json.loads(container.header)
    halves, parts = [], []
    for segment, section in zip(fields["segments"], container.sections, strict=True):
        half = {**segment, "heads": [0, 1], "nbytes": segment["nbytes"] // 2}
        halves += [half, half]
        parts += [section[: half["nbytes"]]] * 2
    data = pack("page", canonical_json({**fields, "segments": halves}).encode(), parts)
    with pytest.raises(PageError, match="once"):
        PageReader(layer_settings()).open(data)


def test_headers_beyond_the_limit_are_not_written() -> None:
    with pytest.raises(PageError, match="page header: expected at most 1048576 bytes"):
        pack("page", bytes(MAX_HEADER_NBYTES + 1), [])
    assert DATA.startswith(MAGIC)


def test_no_random_damage_goes_unseen_or_takes_memory() -> None:
    check_damage_is_seen(DATA, lambda broken: load(broken, SETTINGS), count=1500)
