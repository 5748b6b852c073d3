"""What layers hold beside pages, windows and states of fixed size, as bytes in the end of a stored prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod

import torch
from torch import Tensor

from fibkv.codecs.raw import TORCH_DTYPES
from fibkv.contract import Contract, Total
from fibkv.errors import PageError
from fibkv.shape import Dtype
from fibkv.view import DTYPE_NAMES


class TensorForm(Contract):
    """A tensor without its elements."""

    name: str
    dtype: Dtype
    shape: tuple[Total, ...]

    @property
    def nbytes(self) -> int:
        """Of the elements."""
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class StateForm(Contract):
    """A layer's state without its tensors' elements.

    Attributes:
        layer: index of the layer.
        kind: name of its class.
        numbers: by name.
        tensors: in order.
    """

    layer: Total
    kind: str
    numbers: tuple[tuple[str, int], ...]
    tensors: tuple[TensorForm, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """What a layer holds beside pages: numbers and tensors by name."""

    layer: int
    kind: str
    numbers: dict[str, int]
    tensors: dict[str, Tensor]

    def form(self) -> StateForm:
        """The state without the elements."""
        tensors = (
            TensorForm(name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        )
        return StateForm(layer=self.layer, kind=self.kind, numbers=tuple(self.numbers.items()), tensors=tuple(tensors))


def states_from_bytes(forms: Sequence[StateForm], sections: Sequence[memoryview]) -> tuple[LayerState, ...]:
    """States from their forms and the bytes of their tensors, one section each.

    Raises:
        PageError: sections of other numbers or sizes.
    """
    expected = [tensor.nbytes for form in forms for tensor in form.tensors]
    if expected != [len(section) for section in sections]:
        raise PageError(f"end, states: expected sections of {expected} bytes, got {[len(one) for one in sections]}")
    rest = iter(sections)
    return tuple(
        LayerState(
            form.layer,
            form.kind,
            dict(form.numbers),
            {
                tensor.name: raw_tensor(section, tensor.dtype, tensor.shape)
                for tensor, section in zip(form.tensors, islice(rest, len(form.tensors)), strict=True)
            },
        )
        for form in forms
    )


def raw_tensor(data: memoryview, dtype: Dtype, shape: Sequence[int]) -> Tensor:
    """A tensor from a copy of its bytes."""
    if not len(data):
        return torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype])
    # bytearray: torch must own memory that it may write to.
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype]).view(tuple(shape))
