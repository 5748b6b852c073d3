"""One block of bytes per page: how the tensors of its codes lie in it.

On a device, and in host memory that pages are offloaded to, a page is one tensor: it is allocated, copied and freed
at once. The tensors of its codes are views of it, so kernels and codecs read it like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from fibkv.codes import Codes

# What torch's allocator hands out on a device is a multiple of it.
ROUNDING = 512
# The widest load of one thread of a kernel, in bytes.
ALIGNMENT = 16

Form = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of one tensor."""


def rounded(nbytes: int) -> int:
    """What a block with ``nbytes`` of codes takes."""
    return -(-nbytes // ROUNDING) * ROUNDING


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of one page lie in its block.

    Attributes:
        places: first byte, byte behind the last one, dtype and shape of each tensor, in canonical order. A tensor
            starts at a multiple of the largest power of two, up to `ALIGNMENT`, that divides its size, and nothing lies
            between them: those of the evenest sizes come first.
        nbytes: of the block.
    """

    places: tuple[tuple[int, int, torch.dtype, tuple[int, ...]], ...]
    nbytes: int

    @classmethod
    def of(cls, codes: Sequence[Codes]) -> Layout:
        """The layout of a page with these codes ``[heads, T, ...]``."""
        return layout_of(tuple((tensor.dtype, tuple(tensor.shape)) for one in codes for _, tensor in one.named()))

    def write(self, codes: Sequence[Codes], blocks: Tensor) -> None:
        """Writes pages that are alike.

        Args:
            codes: of P pages side by side, ``[P, heads, T, ...]``.
            blocks: ``[P, nbytes]`` uint8, contiguous, on their device.
        """
        tensors = (tensor for one in codes for _, tensor in one.named())
        for (start, stop, _, _), tensor in zip(self.places, tensors, strict=True):
            if start < stop:
                blocks[:, start:stop] = tensor.contiguous().view(len(tensor), -1).view(torch.uint8)

    def read(self, block: Tensor, like: Sequence[Codes]) -> list[Codes]:
        """The codes of one page as views.

        Args:
            block: ``[nbytes]`` uint8.
            like: codes of the same form.
        """
        tensors = (block[start:stop].view(dtype).view(shape) for start, stop, dtype, shape in self.places)
        return [one.map(lambda _: next(tensors)) for one in like]

    def parts(self, octets: memoryview) -> list[memoryview]:
        """The canonical bytes of all codes, tensor by tensor, of the block's bytes."""
        return [octets[start:stop] for start, stop, _, _ in self.places]


def _evenness(nbytes: int) -> int:
    return min(ALIGNMENT, nbytes & -nbytes) if nbytes else ALIGNMENT


# The pages of a cache have a handful of forms.
@lru_cache(maxsize=256)
def layout_of(forms: tuple[Form, ...]) -> Layout:
    """The layout of a page with tensors of these forms, in canonical order."""
    sizes = [prod(shape) * dtype.itemsize for dtype, shape in forms]
    starts, end = [0] * len(forms), 0
    for index in sorted(range(len(forms)), key=lambda index: -_evenness(sizes[index])):
        starts[index] = end
        end += sizes[index]
    stops = (start + size for start, size in zip(starts, sizes, strict=True))
    places = tuple((start, stop, *form) for start, stop, form in zip(starts, stops, forms, strict=True))
    return Layout(places, rounded(end))
