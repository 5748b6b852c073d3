"""The clock of `fibkv bench gpu`: seconds of calls on a device, with its caches flushed before."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor


class Clock:
    """Times calls on a device, with its caches flushed."""

    def __init__(self, device: torch.device, flushed_bytes: int) -> None:
        self.device = device
        self._flush = torch.empty(flushed_bytes, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        self._flush.zero_()
        if self.device.type != "cuda":
            started = perf_counter()
            call()
            return perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def captured(self, call: Callable[[], Tensor]) -> Callable[[], object] | None:
        """The call as a CUDA graph, of which a replay launches everything at once; None on a CPU."""
        if self.device.type != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay
