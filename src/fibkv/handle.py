"""Tensor-like handles: what a cache layer returns in place of dense keys and values.

A handle has the shape, dtype and device of the dense tensor and no data. Attention on pages recognizes it and reads
the snapshot behind it; any other operation decodes the snapshot first, gives the right result, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fibkv.view import View

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """Keeps a function out of what `torch.compile` traces: handles and page tables have no static form."""
    eager: Function = torch.compiler.disable(function)
    return eager


class Source:
    """What the two handles of one update share: the snapshot, and its dense form once something asked for it."""

    def __init__(self, view: View, dtype: torch.dtype, count: Callable[[], None]) -> None:
        self.view = view
        self.dtype = dtype
        self._count = count
        self._dense: tuple[Tensor, Tensor] | None = None

    @outside_graphs
    def dense(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values ``[B, H, length, d]``, decoded at the first call and counted then."""
        if self._dense is None:
            self._count()
            with torch.autocast(self.view.tail.keys.device.type, enabled=False):
                self._dense = self.view.decode(self.dtype)
        return self._dense


class Handle(Tensor):
    """Keys or values ``[B, H, length, d]`` of one layer, on compressed pages."""

    source: Source
    role: Literal["key", "value"]

    @staticmethod
    def __new__(cls, source: Source, role: Literal["key", "value"]) -> Handle:
        """A handle on one side of a source."""
        tail = source.view.tail.keys if role == "key" else source.view.tail.values
        shape = (*tail.shape[:2], source.view.length, tail.shape[3])
        handle: Handle = Tensor._make_wrapper_subclass(cls, shape, dtype=source.dtype, device=tail.device)
        handle.source = source
        handle.role = role
        return handle

    def __init__(self, source: Source, role: Literal["key", "value"]) -> None:
        pass

    # Operations go straight to __torch_dispatch__, where plain tensors replace the handles.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates it without its first argument
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs any operation on the dense tensors."""
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return f"Handle({self.role}, shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def dense(self) -> Tensor:
        """The dense tensor."""
        return self.source.dense()[0 if self.role == "key" else 1]


def _plain(value: Any) -> Any:
    return value.dense() if isinstance(value, Handle) else value
