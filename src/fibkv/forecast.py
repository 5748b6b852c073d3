"""What one layer's cache holds after a prompt, counted without a single vector.

The decisions are those of the policy, the sizes those of the codecs and of the kernels' order in memory, and the spans
those of `fibkv.sealing`: a test holds the sums to the bytes that real caches report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch

from fibkv import kernels
from fibkv.blocks import rounded
from fibkv.cache import LayerCache
from fibkv.codecs.raw import TORCH_DTYPES
from fibkv.coder import RoleCoder
from fibkv.kernels.native import Native
from fibkv.kernels.native_sides import side_of
from fibkv.page import METADATA_NBYTES
from fibkv.policy import Run
from fibkv.ranges import SMALL_GRAIN, Ranges
from fibkv.sealing import LayerSettings, full_spans
from fibkv.shape import Role
from fibkv.slabs import block_nbytes


@dataclass(frozen=True, slots=True)
class LayerForecast:
    """What a layer will hold.

    Attributes:
        pages: sealed pages of all rows.
        nbytes: of pages, their metadata, and the tail with its slack.
        raw_elements: elements kept raw: protected ones and the tail.
        raw_nbytes: bytes of these, the tail's unused room included.
        tail_tokens: newest tokens, raw.
        raw_vectors: vectors inside pages that are kept raw, by reason.
    """

    pages: int
    nbytes: int
    raw_elements: int
    raw_nbytes: int
    tail_tokens: int
    raw_vectors: Counter[str]


@dataclass(frozen=True, slots=True)
class Growth:
    """What an append takes, at most.

    Attributes:
        kept: bytes more that the layer holds afterwards; negative if it holds fewer.
        passing: bytes more than that while it is at work.
    """

    kept: int
    passing: int


NO_GROWTH = Growth(0, 0)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Pages:
    """Consecutive pages of one row that are alike: how many, and of one its bytes, its block, what of it is raw."""

    count: int
    nbytes: int
    block_nbytes: int
    raw_elements: int
    raw_nbytes: int
    raw_vectors: Counter[str]


def forecast_layer(settings: LayerSettings, batch: int, tokens: int, blocks: Ranges) -> LayerForecast:
    """What a layer holds after one append of ``tokens`` tokens to an empty cache of ``batch`` rows on the CPU.

    Args:
        settings: of the layer.
        batch: rows.
        tokens: of every row.
        blocks: address space behind packed pages, shared by the layers of a cache in their order.

    Raises:
        DecisionError: the policy can neither compress nor keep raw.
    """
    spans = full_spans(settings, tokens, tokens)
    row = list(_pages(settings, tokens, spans, CPU))
    for _ in range(batch):
        for pages in row:
            if pages.block_nbytes:
                blocks.take(pages.block_nbytes * pages.count)
    raw: Counter[str] = Counter()
    for pages in row:
        for reason, vectors in pages.raw_vectors.items():
            raw[reason] += batch * pages.count * vectors
    tail = tokens - (spans[-1][1] if spans else 0)
    # Room to fill the next page; an empty tail takes no memory.
    capacity = max(settings.tokens_per_page + settings.last_tokens_raw, tail + 1) if tail else 0
    shapes = (settings.key_shape, settings.value_shape)
    tail_elements = tail * sum(shape.kv_heads * shape.head_dim for shape in shapes)
    # The tail is in the model's dtype, whatever pages keep raw vectors in.
    room = capacity * sum(s.kv_heads * s.head_dim * TORCH_DTYPES[s.dtype].itemsize for s in shapes)
    return LayerForecast(
        pages=batch * sum(pages.count for pages in row),
        nbytes=batch * (sum(pages.count * pages.nbytes for pages in row) + room),
        raw_elements=batch * (sum(pages.count * pages.raw_elements for pages in row) + tail_elements),
        raw_nbytes=batch * (sum(pages.count * pages.raw_nbytes for pages in row) + room),
        tail_tokens=tail,
        raw_vectors=raw,
    )


def forecast_append(store: LayerCache, settings: LayerSettings, tokens: int, hold_back: int = 0) -> Growth:
    """What `LayerCache.append` takes if it seals with ``settings``.

    Args:
        store: the layer as it is.
        settings: to seal with.
        tokens: to append to every row.
        hold_back: as for `LayerCache.append`.
    """
    tail = store.tail
    length = store.length + tokens
    recent = tail.length + tokens
    if not hold_back and recent < tail.keys.shape[2] and not full_spans(settings, recent, length):
        return NO_GROWTH  # nearly every step of a decoder
    per_token = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in (tail.keys, tail.values))
    # What was held back comes first, then what the new tokens fill.
    due = full_spans(settings, tail.length, store.length)
    done = due[-1][1] if due else 0
    recent -= done
    more = full_spans(settings, recent - (0 if settings.read_through else hold_back), length)
    left = recent - (more[-1][1] if more else 0)
    start = store.length - tail.length
    spans = [(start + a, start + b) for a, b in (*due, *((a + done, b + done) for a, b in more))]
    held = tail.keys.shape[2]
    in_place = not due and recent <= held
    if in_place and not more and recent < held:
        return NO_GROWTH
    capacity = max(settings.tokens_per_page + settings.last_tokens_raw, left + 1) if left else 0
    pages = store.batch * _sealed_nbytes(settings, length, spans, tail.keys.device)
    # The old tail, the working copy, pages and the new tail exist beside each other for a moment.
    return Growth(pages + per_token * (capacity - held), per_token * (held if in_place else held + recent))


def _sealed_nbytes(settings: LayerSettings, length: int, spans: list[tuple[int, int]], device: torch.device) -> int:
    """What the pages of one row take at most, the grains that they only touch included."""
    return sum(
        pages.count * (METADATA_NBYTES + max(pages.block_nbytes, pages.nbytes - METADATA_NBYTES)) + 2 * SMALL_GRAIN
        for pages in _pages(settings, length, spans, device)
    )


@lru_cache(maxsize=1024)
def page_nbytes(settings: LayerSettings, start: int, tokens: int, device: torch.device) -> int:
    """Bytes of one page of old tokens on a device, as `fibkv.page.Page.nbytes` counts them."""
    length = start + tokens + settings.last_tokens_raw
    return next(_pages(settings, length, [(start, start + tokens)], device)).nbytes


def _pages(
    settings: LayerSettings, tokens: int, spans: list[tuple[int, int]], device: torch.device
) -> Iterator[_Pages]:
    if not spans:
        return  # the policy is not asked either: its regions may be longer than a short prompt
    sizes = _Sizes(settings, tokens, device)
    first = settings.keys.policy.protected.first_tokens_raw
    # Behind the first protected tokens, pages of one length are alike: the last ones are in no page yet.
    alike = groupby(spans, key=lambda span: (span if span[0] < first else None, span[1] - span[0]))
    described = ((sizes.form(group[0]), group) for _, group in ((key, list(group)) for key, group in alike))
    for form, same in groupby(described, key=lambda pair: pair[0]):
        yield sizes.of(form, sum(len(group) for _, group in same))


_Form = tuple[int | None, tuple[tuple[Role, Run], ...]]


class _Sizes:
    def __init__(self, settings: LayerSettings, tokens: int, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._plans = {
            "key": settings.keys.plan(settings.key_shape.with_tokens(tokens)),
            "value": settings.values.plan(settings.value_shape.with_tokens(tokens)),
        }
        resolved = kernels.resolve(settings.keys.implementation, device)
        self._native = resolved if isinstance(resolved, Native) else None

    def form(self, span: tuple[int, int]) -> _Form:
        """What must be equal for neighbours to be placed together, as `fibkv.page.Page.run_key`."""
        start, stop = span
        roles: tuple[Role, ...] = ("key", "value")
        runs = tuple(
            (role, run.relative_to(start))
            for role in roles
            for run in self._plans[role].clip(self._settings.layer, start, stop)
        )
        whole = all(run.tokens == (0, stop - start) for _, run in runs)
        return (None if whole else start), runs

    def of(self, form: _Form, count: int) -> _Pages:
        """``count`` pages of a form."""
        nbytes = block = raw_elements = raw_nbytes = 0
        raw: Counter[str] = Counter()
        for role, run in form[1]:
            heads, length = run.heads[1] - run.heads[0], run.tokens[1] - run.tokens[0]
            held = self._held(role, run, heads, length)
            nbytes += held
            block += block_nbytes(held)
            if run.decision.action != "compress":
                raw[run.decision.reasons[0]] += heads * length
                raw_elements += heads * length * self._coder(role).raw.head_dim
                raw_nbytes += held
        nbytes = nbytes if self._device.type == "cpu" else rounded(nbytes)
        return _Pages(count, METADATA_NBYTES + nbytes, block if self._native else 0, raw_elements, raw_nbytes, raw)

    def _held(self, role: Role, run: Run, heads: int, tokens: int) -> int:
        codec = self._coder(role).codec_of(run.decision, run.heads)
        if self._native is None:
            return codec.encoded_nbytes(heads, tokens)
        return int(side_of(codec.tables, role, self._native.isa).nbytes(heads, tokens))

    def _coder(self, role: Role) -> RoleCoder:
        return self._settings.keys if role == "key" else self._settings.values
