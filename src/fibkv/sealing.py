"""From the raw tail to sealed pages: which tokens are due, what the policy says of them, and the encoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fibkv import kernels
from fibkv.blocks import Layout
from fibkv.coder import RoleCoder
from fibkv.codes import Codes
from fibkv.kernels.native import Native
from fibkv.ladder import Rung
from fibkv.packed import Stored
from fibkv.page import Page, Segment
from fibkv.page_form import PageForm
from fibkv.policy import Run
from fibkv.sampling import PageSampler
from fibkv.shape import KVShape, Role
from fibkv.slabs import Slabs
from fibkv.space import KeySpace
from fibkv.tables import Tables
from fibkv.view import Tail

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class LayerSettings:
    """How one layer is kept.

    Attributes:
        layer: its index.
        key_shape: fixed part of the keys' shape, all layers.
        value_shape: fixed part of the values' shape.
        keys: coder of the keys.
        values: coder of the values.
        tokens_per_page: tokens of a full page.
        read_through: attention reads even the newest tokens through the codec (for evaluation): every append is
            sealed at once, in a short page if need be.
        sampler: measures pages when they are sealed; None = none is.
        rung: of a pool's ladder that these settings stand for; None = pages stay as they are sealed.
    """

    layer: int
    key_shape: KVShape
    value_shape: KVShape
    keys: RoleCoder
    values: RoleCoder
    tokens_per_page: int
    read_through: bool = False
    rung: Rung | None = None
    sampler: PageSampler | None = None

    @property
    def last_tokens_raw(self) -> int:
        """Newest tokens that no page may hold yet."""
        return self.keys.policy.protected.last_tokens_raw

    def tables(self) -> tuple[Tables | KeySpace, ...]:
        """The tables behind the keys' and the values' codes, and the keys' space."""
        space = () if self.keys.space is None else (self.keys.space,)
        return self.keys.compressing.tables, self.values.compressing.tables, *space

    def __deepcopy__(self, memo: dict[int, object]) -> LayerSettings:
        return self  # immutable


def full_spans(settings: LayerSettings, tokens: int, length: int) -> list[Span]:
    """Which tokens of a tail are due, as spans of one page each, relative to the tail.

    Pages are full, except that a cache that is read through its codecs ends with a short one.

    Args:
        settings: of the layer.
        tokens: tokens of the tail.
        length: tokens of the layer.
    """
    if length < settings.keys.policy.protected.first_tokens_raw:
        return []  # everything is protected still
    due = tokens - settings.last_tokens_raw
    size = settings.tokens_per_page
    stop = due if settings.read_through else due - due % size
    return [(start, min(start + size, stop)) for start in range(0, max(stop, 0), size)]


def seal(
    settings: LayerSettings, tail: Tail, length: int, spans: Sequence[Span], start: int | None = None
) -> list[list[Page]]:
    """Seals spans of a tail.

    Args:
        settings: of the layer.
        tail: raw tokens ``[B, H, tokens, d]``.
        length: tokens of the layer, the tail's included.
        spans: page spans relative to the tail.
        start: first token of the tail; None = its tokens are the last ones of the layer.

    Returns:
        For each row its new pages, in order.

    Raises:
        EncodingError: a page can be neither encoded nor kept raw.
        DecisionError: the policy can neither compress nor keep raw.
    """
    rows: list[list[Page]] = [[] for _ in range(tail.keys.shape[0])]
    if not spans:
        return rows
    start = length - tail.length if start is None else start
    profiles = (settings.keys.profile_digest, settings.values.profile_digest)
    for same, key_runs, value_runs in alike(settings, length, spans, start):
        keys = settings.keys.seal(pages_of(tail.keys, same), key_runs)
        values = settings.values.seal(pages_of(tail.values, same), value_runs)
        # `pages_of` puts the pages of row 0 first, then those of row 1, and so on.
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            first, stop = same[index % len(same)]
            row = index // len(same)
            exact = (tail.keys[row, :, first:stop], tail.values[row, :, first:stop])
            sides = _within_budget(settings, start + first, exact, (key, value), (key_runs, value_runs))
            rows[row].append(Page.seal(settings.layer, (start + first, start + stop), *sides, profiles))
    return rows


def alike(
    settings: LayerSettings, length: int, spans: Sequence[Span], start: int
) -> Iterator[tuple[list[Span], tuple[Run, ...], tuple[Run, ...]]]:
    """Spans of equal length under equal decisions, with these decisions as token ranges relative to a page.

    Their pages are encoded together: one call for a whole prefill.

    Args:
        settings: of the layer.
        length: tokens of the layer.
        spans: page spans relative to a tail.
        start: first token of the tail.

    Raises:
        DecisionError: the policy can neither compress nor keep raw.
    """
    plans = _Plans(settings, length)
    for (keys, values), group in groupby(spans, key=lambda s: plans.runs(start + s[0], start + s[1])):
        yield list(group), keys, values


def _within_budget(
    settings: LayerSettings,
    start: int,
    exact: tuple[Tensor, Tensor],
    sealed: tuple[tuple[Segment, ...], tuple[Segment, ...]],
    runs: tuple[Sequence[Run], Sequence[Run]],
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The segments of a page; raw ones for a role that was measured and broke the quality budget."""
    if settings.sampler is None:
        return sealed
    broken = settings.sampler.broken(start // settings.tokens_per_page, start, exact, sealed)
    keys, values = sealed
    return (
        settings.keys.seal_raw(exact[0], runs[0]) if "key" in broken else keys,
        settings.values.seal_raw(exact[1], runs[1]) if "value" in broken else values,
    )


def resident(pages: Sequence[Page], implementation: str, slabs: Slabs, device: torch.device) -> list[Page]:
    """Pages with their codes as the kernels read them: on the CPU in place, neighbours in memory, or in canonical
    order; on a device in canonical order, each page in a block of its own.

    Args:
        pages: from any device.
        implementation: of the kernels.
        slabs: the memory of packed pages.
        device: where they are read.
    """
    placed: list[Page] = []
    for _, group in groupby(pages, key=lambda page: page.form):
        same = list(group)
        if device.type != "cpu":
            placed += in_blocks(same, device)
            continue
        same = [page.to(device) for page in same]
        kernels_ = kernels.resolve(implementation, device)
        if not isinstance(kernels_, Native):
            placed += [_read(page) for page in same]
            continue
        sides, held = _sides(same[0].form), [page.held for page in same]
        if kernels_.hold(sides, held):
            placed += same
            continue
        packed = kernels_.pack(sides, held, slabs)
        placed += [page.holding(codes) for page, codes in zip(same, packed, strict=True)]
    return placed


def in_blocks(pages: Sequence[Page], device: torch.device) -> list[Page]:
    """Pages of one form, each in a block of its own on a device; those that are there already stay.

    Args:
        pages: all on one device, maybe another one: they get there in one copy.
        device: where to.
    """
    if all(_is_block(page, device) for page in pages):
        return list(pages)
    codes = [[held.canonical() for held in page.held] for page in pages]
    layout, before = Layout.of(codes[0]), codes[0][0].device
    pinned = before.type == "cpu" and device.type == "cuda"
    here = torch.empty(len(pages), layout.nbytes, dtype=torch.uint8, device=before, pin_memory=pinned)
    layout.write([type(column[0]).stack(column) for column in zip(*codes, strict=True)], here)
    there = here.to(device, non_blocking=True)
    blocks = [torch.empty(layout.nbytes, dtype=torch.uint8, device=device) for _ in pages]
    torch._foreach_copy_(blocks, list(there.unbind(0)))
    return [page.holding(layout.read(block, codes[0])) for page, block in zip(pages, blocks, strict=True)]


def _is_block(page: Page, device: torch.device) -> bool:
    held = [codes for codes in page.held if isinstance(codes, Codes)]
    if page.device != device or len(held) < len(page.held):
        return False
    memory = {tensor.untyped_storage().data_ptr() for codes in held for _, tensor in codes.named() if tensor.numel()}
    return len(memory) == 1


def _read(page: Page) -> Page:
    """The page with codes in memory of their own, if it has some that are still as they were stored."""
    if not any(isinstance(codes, Stored) for codes in page.held):
        return page
    return page.holding([codes.canonical() if isinstance(codes, Stored) else codes for codes in page.held])


def _sides(form: PageForm) -> list[tuple[Tables, Role]]:
    keys: list[tuple[Tables, Role]] = [(one.codec.tables, "key") for one in form.keys]
    return [*keys, *((one.codec.tables, "value") for one in form.values)]


class _Plans:
    """The policies' plans for both roles at one length of the cache."""

    def __init__(self, settings: LayerSettings, length: int) -> None:
        self.layer = settings.layer
        self.keys = settings.keys.plan(settings.key_shape.with_tokens(length))
        self.values = settings.values.plan(settings.value_shape.with_tokens(length))

    def runs(self, start: int, stop: int) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """The runs of keys and of values for one page, with token ranges relative to it."""
        keys, values = (plan.clip(self.layer, start, stop) for plan in (self.keys, self.values))
        return tuple(run.relative_to(start) for run in keys), tuple(run.relative_to(start) for run in values)


def pages_of(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """``[B, H, tokens, d]`` to ``[B * P, H, T, d]``, row by row, for spans of equal length."""
    return torch.stack([tensor[:, :, start:stop] for start, stop in spans], 1).flatten(0, 1)
