"""Layers of random codes on a device: what `fibkv bench gpu` attends to without encoding anything first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fibkv.codecs import Codec, codec_for
from fibkv.codecs.base import Field
from fibkv.codes import Codes
from fibkv.kernels.runs import InPlace, Run, Scores
from fibkv.kernels.triton_sides import Side
from fibkv.parameters import named_parameters

# e4m3 has no infinity, and one code of each sign that is no number.
NOT_A_NUMBER = 0x7F
# Means have coordinates up to 1.
MEAN_EXPONENT = -7


class CodedLayer:
    """Keys and values of one layer as pages of random codes, every page with memory of its own.

    Attributes:
        nbytes: of all codes.
        elements: of keys and values that they stand for.
    """

    def __init__(
        self,
        profile: str,
        *,
        batch: int,
        heads: int,
        head_dim: int,
        context: int,
        tokens_per_page: int,
        generator: torch.Generator,
    ) -> None:
        """Args:
        profile: codec name, or ``keys/values``.
        batch: B.
        heads: H, KV heads.
        head_dim: d.
        context: tokens, a multiple of `tokens_per_page`.
        tokens_per_page: T.
        generator: of the codes, on the device that they are to be on.
        """
        names = profile.split("/") if "/" in profile else [profile, profile]
        self._codecs = [codec_for(named_parameters(name, head_dim, "bf16")) for name in names]
        axes = (batch, context // tokens_per_page, heads)
        self._codes = [_random_codes(codec, axes, tokens_per_page, generator) for codec in self._codecs]
        self._tokens_per_page = tokens_per_page
        self.nbytes = sum(codes.nbytes for codes in self._codes)
        self.elements = 2 * batch * heads * context * head_dim

    @property
    def kind(self) -> str:
        """What a tuning for these keys is kept for."""
        return Side.of(self._codecs[0].tables).kind

    def run(self) -> Run:
        """The pages as kernels are told of them."""
        (key, value), (keys, values) = self._codecs, self._codes
        batch, _, heads = keys.axes[:3]
        return Run(
            rows=(0, batch),
            heads=(0, heads),
            start=0,
            tokens=self._tokens_per_page,
            key_tables=key.tables,
            keys=_pages(keys),
            value_tables=value.tables,
            values=_pages(values),
        )

    def attention(self, kernels: InPlace, query: Tensor) -> Callable[[], Tensor]:
        """One decode step's attention of ``query [B, Hq, 1, d]`` on the layer, with its plan made."""
        plan = kernels.plan([self.run()])
        batch, spans, heads = self._codes[0].axes[:3]
        context, dim = spans * self._tokens_per_page, query.shape[-1]
        nothing = query.new_empty(batch, heads, 0, dim)
        scores = Scores(dim**-0.5)

        def attend() -> Tensor:
            tail = (nothing, nothing, 0)
            return kernels.attend_plan(query, plan, tail, scores, length=context)[0]

        return attend

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, context, d]`` float32, decoded by the reference kernels."""
        keys, values = (
            codec.decode(codes, implementation="reference").transpose(1, 2).flatten(2, 3)
            for codec, codes in zip(self._codecs, self._codes, strict=True)
        )
        return keys, values

    @contextmanager
    def damaged(self) -> Iterator[None]:
        """Puts the keys of the middle page of row 0 in reverse order while the context lasts."""
        page = _at(self._codes[0], 0, self._codes[0].axes[1] // 2)
        payload = list(page.named())[-1][1].view(torch.uint8)
        before = payload.clone()
        payload.copy_(before.flip(1))
        try:
            yield
        finally:
            payload.copy_(before)


def _pages(codes: Codes) -> list[list[Codes]]:
    """Codes ``[B, P, ...]`` row by row and page by page."""
    rows = zip(*(tensor.unbind() for _, tensor in codes.named()), strict=True)
    return [[_of(codes, views) for views in zip(*(row.unbind() for row in parts), strict=True)] for parts in rows]


def _of(codes: Codes, tensors: Iterable[Tensor]) -> Codes:
    following = iter(tensors)
    return codes.map(lambda _: next(following))


def _at(codes: Codes, row: int, span: int) -> Codes:
    return codes.map(lambda tensor: tensor[row, span])


def _random_codes(codec: Codec, axes: tuple[int, ...], tokens: int, generator: torch.Generator) -> Codes:
    return codec.assemble({field.name: _random(field, axes, generator) for field in codec.layout(tokens)})


def _random(field: Field, axes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers that an encoder could have made of vectors whose norms are from 6 to 23."""
    shape, device = (*axes, *field.shape), generator.device
    if field.name == "norm_range":
        return torch.tensor([2.5, 1 / 128], dtype=field.dtype, device=device)[: shape[-1]].expand(shape).contiguous()
    if field.dtype == torch.uint8:
        return torch.randint(1, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    if field.dtype == torch.int8:
        numbers = torch.randint(-127, 128, shape, dtype=torch.int8, device=device, generator=generator)
        if field.name == "mean":
            numbers[..., :1] = MEAN_EXPONENT
        return numbers
    if field.dtype == torch.float8_e4m3fn:
        octets = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
        return octets.masked_fill_(octets & NOT_A_NUMBER == NOT_A_NUMBER, 0).view(field.dtype)
    if field.name in ("norms", "scales"):
        top = 23.0 if field.name == "norms" else 1 / 64
        return (torch.rand(shape, device=device, generator=generator) * top).to(field.dtype)
    numbers = torch.randn(shape, device=device, generator=generator)
    # Steps of a grid are not negative.
    return (numbers.abs() if field.name == "grid" else numbers).to(field.dtype)
