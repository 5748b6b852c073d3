"""What says where stored pages belong: roots, spans and ends, docs/FORMAT.md.

A *root* says which model and which settings a chain of prefixes is bound to. A *span* holds the pages of all layers
for one page of tokens, under the name of the prefix that it ends. An *end* holds what lies behind the last span: the
raw tail, and pages that a crop has shortened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import StringConstraints, model_validator
from torch import Tensor

from fibkv.codecs.base import tensor_bytes
from fibkv.codecs.raw import TORCH_DTYPES
from fibkv.container import Bytes, Container, Draft, canonical, pack
from fibkv.contract import Contract, Count, Total
from fibkv.digest import Digest, require_digest
from fibkv.errors import ContractError, PageError
from fibkv.page import Page
from fibkv.page_draft import PageDraft, write_pages
from fibkv.policy import Policy
from fibkv.prefix import root
from fibkv.sealing import LayerSettings
from fibkv.shape import Dtype, KVShape
from fibkv.states import LayerState, StateForm, raw_tensor, states_from_bytes
from fibkv.wire import Packing, PageReader, StoredPage, load_pages

Weights = Annotated[str, StringConstraints(pattern=r"^(blake3:[0-9a-f]{64}|name:[^\x00-\x1f]{1,200})$")]


class ModelIdentity(Contract):
    """Whose keys and values these are.

    Attributes:
        config: digest of the configuration, rotary settings included.
        weights: digest of the weights, or ``name:`` and a name that the user vouches for.
        dtype: that the model computes in.
        rope_state: keys are stored after rotation, at the positions 0, 1, 2, ...
    """

    config: Digest
    weights: Weights
    dtype: str
    rope_state: Literal["post_rope"] = "post_rope"


class Binding(Contract):
    """What must agree for prefixes to be shared: the first link of their chain.

    Attributes:
        model: whose they are.
        tokens_per_page: of a full page.
        read_through: even the newest tokens were read through the codec.
        raw_dtype: of what is kept raw; None = the model's.
        policy: what is compressed; None = the default.
        codecs: by layer, of keys and values: a name, or the digest of parameters.
        spaces: by layer, digest of the keys' space; None = they are coded as they are.
    """

    model: ModelIdentity
    tokens_per_page: Count
    read_through: bool
    raw_dtype: Dtype | None
    policy: Policy | None
    codecs: tuple[tuple[str, str], ...]
    spaces: tuple[Digest | None, ...]

    @property
    def name(self) -> str:
        """Of the empty prefix."""
        return root(self)


class LayerForm(Contract):
    """The tensors of a compressed layer, and the profiles that its pages bear."""

    layer: Total
    kv_heads: Count
    key_dim: Count
    value_dim: Count
    dtype: Dtype
    key_profile: Digest
    value_profile: Digest

    @classmethod
    def of(cls, settings: LayerSettings) -> Self:
        """The form of a layer with these settings."""
        return cls(
            layer=settings.layer,
            kv_heads=settings.key_shape.kv_heads,
            key_dim=settings.key_shape.head_dim,
            value_dim=settings.value_shape.head_dim,
            dtype=settings.key_shape.dtype,
            key_profile=settings.keys.profile_digest,
            value_profile=settings.values.profile_digest,
        )


class Root(Contract):
    """A binding, and the layers that are stored under it, in order."""

    binding: Binding
    layers: tuple[LayerForm, ...]


class SpanHeader(Contract):
    """Tokens ``start`` to ``start + tokens`` of a prefix, and the digests of their pages, layer by layer."""

    name: Digest
    previous: Digest
    start: Total
    tokens: Count
    pages: tuple[Digest, ...]


class EndHeader(Contract):
    """What lies behind the last span of a prefix of ``length`` tokens.

    Attributes:
        name: of the prefix with its end.
        previous: of the prefix up to ``start``.
        start: where the last span stops.
        length: tokens in all.
        boundaries: where pages stop that are in no span, ascending; behind the last one (or ``start``) all is raw.
        pages: digests of these pages: for the first boundary layer by layer, then for the next.
        states: what layers hold beside pages; such a prefix can be taken up at this length only.
    """

    name: Digest
    previous: Digest
    start: Total
    length: Total
    boundaries: tuple[Total, ...]
    pages: tuple[Digest, ...]
    states: tuple[StateForm, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        stops = (self.start, *self.boundaries)
        if any(a >= b for a, b in pairwise(stops)) or stops[-1] > self.length:
            raise ContractError("EndHeader.boundaries", f"ascending from {self.start} to {self.length}", stops)
        return self

    @property
    def tail_start(self) -> int:
        """Where the raw tokens begin."""
        return self.boundaries[-1] if self.boundaries else self.start


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """A loaded end.

    Attributes:
        length: tokens in all.
        layers: for each layer in pages its further ones, and its raw keys and values ``[1, H, t, d]``.
        states: what layers hold beside pages.
    """

    length: int
    layers: tuple[tuple[tuple[Page, ...], Tensor, Tensor], ...]
    states: tuple[LayerState, ...]


def root_to_bytes(root: Root) -> bytes:
    """The container of a root."""
    return pack("root", root.to_json().encode(), [])


def root_from_bytes(data: Bytes, binding: Binding) -> Root:
    """The root of a binding.

    Raises:
        PageError, ContractError: it is none, or of another binding.
    """
    container = Container.read(data, "root")
    found = canonical(container, Root)
    if found.binding != binding or container.sections:
        raise PageError(f"root: expected that of {binding.name}, got that of {found.binding.name}")
    return found


def span_to_bytes(name: str, previous: str, pages: Sequence[Page]) -> memoryview:
    """The container of one span.

    Args:
        name: of the prefix that it ends.
        previous: of the prefix before it.
        pages: of all layers, for the same tokens.
    """
    header = SpanHeader(
        name=name,
        previous=previous,
        start=pages[0].start,
        tokens=pages[0].tokens,
        pages=tuple(page.digest for page in pages),
    )
    drafts = [PageDraft.of(page) for page in pages]
    draft = Draft("span", header.to_json().encode(), [page.nbytes for page in drafts])
    write_pages(drafts, draft.sections)
    draft.finish()
    return draft.data


Place = tuple[str, str, int, int]
"""Of a span: name, name before, first token and number of tokens. Of an end: name, name before, start and length."""


def spans_from_bytes(
    spans: Sequence[Bytes], places: Sequence[Place], readers: Sequence[PageReader], pack: Packing | None = None
) -> list[tuple[Page, ...]]:
    """The pages of some spans, one per layer, all checked.

    Args:
        spans: the containers.
        places: of each what it must have.
        readers: of the layers.
        pack: see `fibkv.wire.load_pages`.

    Raises:
        DigestMismatch, PageError, ContractError: one is not what it must be.
    """
    opened = [_open_span(data, place, readers) for data, place in zip(spans, places, strict=True)]
    # Layer by layer, as they are read: those of a layer get neighbouring memory.
    pages = load_pages([page for column in zip(*opened, strict=True) for page in column], pack)
    return [tuple(pages[index :: len(spans)]) for index in range(len(spans))]


def _open_span(data: Bytes, place: Place, readers: Sequence[PageReader]) -> list[StoredPage]:
    container = Container.read(data, "span")
    if len(container.sections) == len(readers):
        pages = [reader.open(section, place[2]) for reader, section in zip(readers, container.sections, strict=True)]
        # Its header can only be this one then, which is faster to write than to parse.
        text = _span_text(place, [page.container.digest for page in pages])
        if text == container.header and all((page.start, page.form.tokens) == place[2:] for page in pages):
            return pages
    header = canonical(container, SpanHeader)
    if (header.name, header.previous, header.start, header.tokens) != place:
        raise PageError(f"span: expected (name, previous, start, tokens) {place}, got {header}")
    _require_count("span", len(readers), header.pages, container.sections)
    pairs = zip(readers, header.pages, container.sections, strict=True)
    return [_open(section, digest, place[2:], reader) for reader, digest, section in pairs]


def _span_text(place: Place, pages: Sequence[str]) -> bytes:
    """The header of a span as canonical JSON."""
    name, previous, start, tokens = place
    listed = '","'.join(pages)
    return (
        f'{{"name":"{name}","previous":"{previous}","start":{start},"tokens":{tokens},"pages":["{listed}"]}}'
    ).encode()


def end_to_bytes(
    header: EndHeader,
    pages: Sequence[Page],
    tails: Sequence[tuple[Tensor, Tensor]],
    states: Sequence[LayerState],
) -> memoryview:
    """The container of an end.

    Args:
        header: with the pages' digests and the states' forms.
        pages: as in the header.
        tails: for each layer raw keys and values ``[1, H, t, d]``.
        states: as in the header.
    """
    held = [tensor for state in states for tensor in state.tensors.values()]
    raw = [tensor_bytes(tensor) for tensor in (*(tensor for pair in tails for tensor in pair), *held)]
    drafts = [PageDraft.of(page) for page in pages]
    draft = Draft("end", header.to_json().encode(), [*(page.nbytes for page in drafts), *map(len, raw)])
    write_pages(drafts, draft.sections[: len(pages)])
    for place, held_bytes in zip(draft.sections[len(pages) :], raw, strict=True):
        place[:] = held_bytes
    draft.finish()
    return draft.data


def end_from_bytes(data: Bytes, place: Place, readers: Sequence[PageReader]) -> End:
    """An end, checked.

    Args:
        data: the container.
        place: name, previous name, start and length that it must have.
        readers: of the layers.

    Raises:
        DigestMismatch, PageError, ContractError: it is not what it must be.
    """
    container = Container.read(data, "end")
    header = canonical(container, EndHeader)
    if (header.name, header.previous, header.start, header.length) != place:
        raise PageError(f"end: expected (name, previous, start, length) {place}, got {header}")
    count = len(readers) * len(header.boundaries)
    _require_count("end", count, header.pages, container.sections[:count])
    behind = count + 2 * len(readers)
    if len(container.sections) < behind:
        raise PageError(f"end: expected at least {behind} sections, got {len(container.sections)}")
    states = states_from_bytes(header.states, container.sections[behind:])
    spans = [(start, stop - start) for start, stop in pairwise((header.start, *header.boundaries))]
    places = [(span, reader) for span in spans for reader in readers]
    stored = zip(places, header.pages, container.sections[:count], strict=True)
    pages = load_pages([_open(section, digest, span, reader) for (span, reader), digest, section in stored])
    tokens = header.length - header.tail_start
    raw = zip(readers, container.sections[count:behind:2], container.sections[count + 1 : behind : 2], strict=True)
    layers = (
        (tuple(pages[layer :: len(readers)]), *_tails(reader.settings, keys, values, tokens))
        for layer, (reader, keys, values) in enumerate(raw)
    )
    return End(header.length, tuple(layers), states)


def _open(data: memoryview, digest: str, span: tuple[int, int], reader: PageReader) -> StoredPage:
    stored = reader.open(data, span[0])
    if (stored.start, stored.form.tokens) != span:
        actual = (stored.start, stored.form.tokens)
        raise PageError(f"page of layer {stored.layer}: expected (start, tokens) {span}, got {actual}")
    require_digest(f"page of layer {stored.layer}", digest, stored.container.digest)
    return stored


def _tails(settings: LayerSettings, keys: memoryview, values: memoryview, tokens: int) -> tuple[Tensor, Tensor]:
    return _tail(keys, settings.key_shape, tokens), _tail(values, settings.value_shape, tokens)


def _tail(data: memoryview, shape: KVShape, tokens: int) -> Tensor:
    """Raw keys or values ``[1, H, t, d]`` from their bytes."""
    expected = shape.kv_heads * tokens * shape.head_dim * TORCH_DTYPES[shape.dtype].itemsize
    if len(data) != expected:
        raise PageError(f"end, raw {shape.role}s: expected {expected} bytes, got {len(data)}")
    return raw_tensor(data, shape.dtype, (1, shape.kv_heads, tokens, shape.head_dim))


def _require_count(what: str, expected: int, digests: Sequence[str], sections: Sequence[memoryview]) -> None:
    if len(digests) != expected or len(sections) != expected:
        raise PageError(f"{what}: expected {expected} pages, got {len(digests)} digests and {len(sections)} sections")
