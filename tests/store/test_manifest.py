"""Roots, spans and ends: docs/FORMAT.md, rule by rule."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from fibkv.container import Container, pack
from fibkv.digest import canonical_json
from fibkv.errors import ContractError, DigestMismatch, PageError
from fibkv.manifest import Binding, EndHeader, end_from_bytes, root_from_bytes, span_to_bytes, spans_from_bytes
from fibkv.prefix_load import PrefixLoader
from fibkv.prefix_save import save_prefix
from fibkv.states import LayerState
from fibkv.store import MemoryStore
from fibkv.wire import PageReader
from tests.pages.helpers import gaussian
from tests.store.damage import check_damage_is_seen
from tests.store.prefixes import binding, fed, layers_settings

IDS = list(range(70))
SETTINGS = layers_settings()
READERS = [PageReader(layer) for layer in SETTINGS]
STORE = MemoryStore()
LAYERS = fed(IDS)
for one in LAYERS:  # one span, then a shortened page, one behind it, and a raw tail
    one.crop(24)
    keys, values = (tensor[:, :, :30] for tensor in (fed(IDS)[0].view().decode(one.tail.keys.dtype)))
    one.append(keys, values)
save_prefix(STORE, binding(), LAYERS, IDS[:54])
STATEFUL = MemoryStore()
WINDOW = {"keys": gaussian(1, 2, 7, 8), "values": gaussian(1, 2, 7, 8).to(torch.bfloat16)}
STATE_HELD = LayerState(5, "DynamicSlidingWindowLayer", {"cumulative_length": 70}, WINDOW)
save_prefix(STATEFUL, binding(), fed(IDS), IDS, [STATE_HELD])


def stored(kind: str, store: MemoryStore = STORE) -> bytes:
    (entry,) = store.list(kind)
    return store.get(entry.key) or b""


ROOT, SPAN, END, STATES = *(stored(kind) for kind in ("roots", "spans", "ends")), stored("ends", STATEFUL)


def fields_of(data: bytes) -> dict:
    return json.loads(Container.parse(data).header)


def read_states(data: bytes) -> object:
    place = tuple(fields_of(STATES)[name] for name in ("name", "previous", "start", "length"))
    return end_from_bytes(data, place, READERS)


PLACE = tuple(fields_of(SPAN)[name] for name in ("name", "previous", "start", "tokens"))
END_PLACE = tuple(fields_of(END)[name] for name in ("name", "previous", "start", "length"))


def read_root(data: bytes) -> object:
    return root_from_bytes(data, binding())


def read_span(data: bytes) -> object:
    return spans_from_bytes([data], [PLACE], READERS)


def read_end(data: bytes) -> object:
    return end_from_bytes(data, END_PLACE, READERS)


def forged(data: bytes, change: Callable[[dict, list], object]) -> bytes:
    """The object with another header or other sections, and the digest that belongs to them."""
    container = Container.parse(data)
    fields, sections = json.loads(container.header), list(container.sections)
    change(fields, sections)
    return pack(container.kind, canonical_json(fields).encode(), sections)


def put(name: str, value: object) -> Callable[[dict, list], object]:
    return lambda fields, _: fields.update({name: value})


def with_state(state: dict) -> Callable[[dict, list], object]:
    return lambda fields, _: fields["states"].append(state)


def test_the_example_has_everything() -> None:
    end = fields_of(END)
    assert (PLACE[2:], end["start"], end["boundaries"], end["length"]) == ((0, 16), 16, [24, 40], 54)
    assert (len(fields_of(SPAN)["pages"]), len(end["pages"]), len(Container.parse(END).sections)) == (2, 4, 8)
    loader = PrefixLoader(STORE, binding(), IDS)
    assert loader.root() is not None
    assert loader.load(SETTINGS).length == 54


def test_a_span_of_other_tokens_is_refused_though_its_header_is_right() -> None:
    name, previous, start, _ = PLACE
    pages = [layer.rows[0][1] for layer in fed(IDS)]
    assert (pages[0].start, pages[0].tokens) == (16, 16)
    data = forged(bytes(span_to_bytes(name, previous, pages)), put("start", start))
    assert fields_of(data)["start"] == 0
    for readers in (
        READERS,
        [PageReader(layer) for layer in SETTINGS],
    ):  # know the form, or do not
        with pytest.raises(PageError, match=r"expected \(start, tokens\) \(0, 16\), got \(16, 16\)"):
            spans_from_bytes([data], [PLACE], readers)


STATE = {"layer": 5, "kind": "X", "numbers": [["n", 1]], "tensors": [{"name": "a", "dtype": "f32", "shape": [2, 3]}]}
HUGE = {**STATE, "tensors": [{"name": "a", "dtype": "f32", "shape": [2**60, 2**60, 2**60]}]}
OTHER = "blake3:" + "0" * 64


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (read_root, SPAN, "kind: expected root, got span"),
        (read_span, END, "kind: expected span, got end"),
        (read_end, ROOT, "kind: expected end, got root"),
        (read_root, forged(ROOT, lambda fields, _: fields["binding"].update(tokens_per_page=32)), "root: expected"),
        (read_root, forged(ROOT, lambda fields, _: fields["binding"]["model"].update(weights="nobody")), "weights"),
        (read_root, forged(ROOT, lambda fields, _: fields["binding"]["model"].update(rope_state="pre_rope")), "rope"),
        (read_root, forged(ROOT, lambda _, sections: sections.append(b"x")), "root"),
        (read_span, forged(SPAN, put("name", OTHER)), "span: expected"),
        (read_span, forged(SPAN, put("previous", OTHER)), "span: expected"),
        (read_span, forged(SPAN, put("start", 16)), "span: expected"),
        (read_span, forged(SPAN, put("tokens", 8)), "span: expected"),
        (read_span, forged(SPAN, put("tokens", 0)), "SpanHeader.tokens"),
        (read_span, forged(SPAN, put("extra", 0)), "only the fields"),
        (read_span, forged(SPAN, put("pages", [OTHER, OTHER])), "page of layer 0: digest mismatch"),
        (read_span, forged(SPAN, put("pages", [OTHER])), "expected 2 pages, got 1 digests and 2 sections"),
        (read_span, forged(SPAN, lambda _, sections: sections.pop()), "expected 2 pages, got 2 digests and 1 sections"),
        (read_span, forged(SPAN, lambda _, sections: sections.append(b"")), "and 3 sections"),
        (read_span, forged(SPAN, lambda fields, sections: (fields["pages"].reverse(), sections.reverse())), "layer"),
        (read_span, forged(SPAN, lambda _, sections: sections.__setitem__(0, sections[0][:-64])), "truncated"),
        (read_end, forged(END, put("name", OTHER)), "end: expected"),
        (read_end, forged(END, put("previous", OTHER)), "end: expected"),
        (read_end, forged(END, put("length", 55)), "end: expected"),
        (read_end, forged(END, put("boundaries", [40, 24])), "boundaries: expected ascending"),
        (read_end, forged(END, put("boundaries", [24, 55])), "boundaries: expected ascending"),
        (read_end, forged(END, put("boundaries", [16, 40])), "boundaries: expected ascending"),
        (read_end, forged(END, put("boundaries", [25, 40])), r"expected \(start, tokens\)"),
        (read_end, forged(END, put("boundaries", [24])), "end: expected 2 pages, got 4 digests"),
        (read_end, forged(END, put("boundaries", list(range(17, 54)))), "end: expected 74 pages"),
        (read_end, forged(END, put("pages", [OTHER] * 4)), "digest mismatch"),
        (read_end, forged(END, lambda _, sections: sections.pop()), "end: expected at least 8 sections, got 7"),
        (read_end, forged(END, lambda _, sections: sections.append(b"")), r"states: expected sections of \[\] bytes"),
        (read_end, forged(END, lambda _, sections: sections.__setitem__(7, sections[7][:-4])), "raw values: expected"),
        (read_end, forged(END, with_state(STATE)), r"states: expected sections of \[24\]"),
        (read_end, forged(END, with_state({**STATE, "layer": -1})), "layer"),
        (read_end, forged(END, with_state(HUGE)), r"states: expected sections of \[\d+\]"),
    ],
)  # fmt: skip
def test_what_is_not_what_it_must_be_is_refused(read: Callable[[bytes], object], data: bytes, message: str) -> None:
    Container.read(data)  # sound as a container
    with pytest.raises((PageError, ContractError), match=message):
        read(data)


def test_damage_inside_a_page_of_a_span_is_the_pages_to_find() -> None:
    container = Container.parse(SPAN)
    page = bytearray(container.sections[1])
    page[-70] ^= 1
    data = pack("span", container.header, [container.sections[0], bytes(page)])
    Container.read(data)
    with pytest.raises((DigestMismatch, PageError)):
        read_span(data)


@pytest.mark.parametrize(
    ("read", "data"), [(read_root, ROOT), (read_span, SPAN), (read_end, END), (read_states, STATES)]
)
def test_no_random_damage_goes_unseen_or_takes_memory(read: Callable[[bytes], object], data: bytes) -> None:
    check_damage_is_seen(data, read, count=200)


def test_bindings_and_ends_survive_json() -> None:
    assert Binding.from_json(binding().to_json()) == binding()
    assert EndHeader.from_json(Container.parse(END).header).tail_start == 40
