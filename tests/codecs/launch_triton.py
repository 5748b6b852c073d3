"""Launches attention as on a device, of which only the driver's answers are needed: kernels are compiled and not run.

Every launch that goes round Triton's own call is compared with what that call launches for the same arguments. Prints
a line for each form of attention, and after each step of a layer that grows: how many launches there were, and how many
kernels there are.

``python -m tests.codecs.launch_triton``; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.kernels.triton_launch import Kernel
from fibkv.policy import Policy
from fibkv.regions import ProtectedRegions
from fibkv.view import Tail, View
from tests.codecs import no_device
from tests.codecs.conformance import gaussian
from tests.codecs.test_native import filled

STEPS = 20
# Keys and values, queries, and which mask.
FORMS = [
    ("fib4", "fib4", 1, "none"),
    ("key4", "int8", 3, "causal"),
    ("trellis2", "fp8", 2, "bool"),
    ("raw", "affine4", 1, "float"),
]

launches: list[tuple[str, tuple[Any, ...]]] = []
direct = Kernel.launch


def compared(self: Kernel, grid: Any, stream: int, tensors: Any, numbers: Any) -> None:
    """A launch, and the same one asked of Triton: nothing may differ but that tensors are given as addresses."""
    direct(self, grid, stream, tensors, numbers)
    self._function[grid](*tensors, *numbers, **self._constants, **self._options)
    (first, given), (second, asked) = launches[-2:]
    del launches[-1]
    assert first == second
    # Behind the grid, the stream, the function, metadata and hooks, which Triton makes anew.
    assert given[:5] == asked[:5]
    for mine, its in zip(given[9:], asked[9:], strict=True):
        address = its.data_ptr() if isinstance(its, Tensor) else its
        assert (mine.data_ptr() if isinstance(mine, Tensor) else mine) == address
        assert isinstance(its, Tensor) or type(mine) is type(its)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, from an address on that 16 bytes do not divide."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return room.copy_(tensor)


def attend_twice(query: Tensor, view: View, scores: Scores) -> None:
    """Once by the kernels that Triton is asked for, if there were none, and once by those that are known."""
    for _ in range(2):
        attend(query, view, scores, implementation="triton")


def attend_in_all_forms(key: str, value: str, queries: int, mask: str) -> None:
    """Pages and tails of these codes: with and without a softcap, and tensors at odd addresses."""
    policy = Policy.per_token(ProtectedRegions(raw_heads=(1,), first_tokens_raw=3, last_tokens_raw=5))
    view = filled((key, value), "reference", tokens=60, policy=policy).view()
    query = gaussian(2, 4, queries, 64)
    seen = torch.rand(2, 1, queries, 60) > 0.3
    given = {"bool": seen, "float": seen.float().log()}.get(mask)
    for softcap in (None, 2.0):
        attend_twice(query, view, Scores(0.125, softcap, given))
    attend_twice(shifted(query.half()), view, Scores(0.125, None, given))
    tail = Tail(shifted(view.tail.keys), shifted(view.tail.values), view.tail.length)
    attend_twice(query, View(view.rows, tail, view.length), Scores(1, None, given))


def grow(cache: LayerCache) -> None:
    """A layer that seals a page within the steps, and queries as in decoding."""
    sealed = len(cache.rows[0])
    for _ in range(STEPS):
        new = gaussian(1, 2, 1, 64)
        attend(gaussian(1, 4, 1, 64), cache.append(new, new), Scores(0.125), implementation="triton")
        kernels = len({kernel for kernel, _ in launches})
        print(cache.length, "tokens,", len(cache.rows[0]) - sealed, "pages more:", kernels, "kernels")


def main() -> None:
    """A layer that grows, then every form."""
    no_device.stand_in(lambda kernel, given: launches.append((kernel, given)), cuda=False)
    Kernel.launch = compared
    grow(filled(("fib4", "fib4"), "reference", batch=1, tokens=90))
    for form in FORMS:
        launches.clear()
        attend_in_all_forms(*form)
        print(*form, len(launches), "launches", len({kernel for kernel, _ in launches}), "kernels")


if __name__ == "__main__":
    main()
