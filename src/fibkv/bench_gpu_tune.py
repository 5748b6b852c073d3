"""Finds how attention is launched fastest on a device: every candidate is tried on one layer of each profile."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from statistics import median

import torch

from fibkv.bench_gpu_clock import Clock
from fibkv.bench_gpu_forms import CodedLayer
from fibkv.bench_settings import GpuSettings
from fibkv.errors import KernelError
from fibkv.kernels.triton import Triton, device_name
from fibkv.kernels.triton_tuning import DEFAULT, Tuning, Tunings

CANDIDATES = tuple(
    Tuning(tokens=tokens, warps=warps, stages=stages, programs=programs)
    for tokens, warps, stages, programs in product((32, 64, 128), (4, 8), (2, 3), (2, 4, 8))
)


def tuned(settings: GpuSettings, clock: Clock, step: Callable[[str], None]) -> Tunings:
    """The fastest launches in Triton for each profile's keys, at the size with the most tokens.

    What is read in CUDA C++ on the device has nothing to tune.

    Args:
        settings: of the benchmark.
        clock: of the device.
        step: told before each profile.
    """
    device = clock.device
    head_dim, batch, context = max(settings.sizes(), key=lambda size: (size[1] * size[2], size[0]))
    generator = torch.Generator(device).manual_seed(settings.seed)
    shape = (batch, settings.query_heads, 1, head_dim)
    query = torch.randn(shape, generator=generator, device=device).bfloat16()
    name = device_name(device)
    found: dict[str, Tuning] = {}
    for profile in settings.profiles:
        step(f"tuning {profile}")
        layer = CodedLayer(
            profile,
            batch=batch,
            heads=settings.kv_heads,
            head_dim=head_dim,
            context=context,
            tokens_per_page=settings.tokens_per_page,
            generator=generator,
        )
        if _read_in_cuda(layer, settings):
            continue
        seconds = {
            candidate: _seconds(layer, name, candidate, clock, query, settings.rounds) for candidate in CANDIDATES
        }
        best = min(seconds, key=seconds.__getitem__, default=DEFAULT)
        found.setdefault(layer.kind, best)
    return Tunings(device=name, found=tuple(found.items()))


def _read_in_cuda(layer: CodedLayer, settings: GpuSettings) -> bool:
    from fibkv.kernels import cuda_attend, triton_plan  # noqa: PLC0415 - these import triton

    group = triton_plan.Group.of_run(layer.run())
    queries = settings.query_heads // settings.kv_heads
    return cuda_attend.reading(group, "none", softcap=False, queries=queries) is not None


def _seconds(
    layer: CodedLayer, device: str, candidate: Tuning, clock: Clock, query: torch.Tensor, rounds: int
) -> float:
    """Median seconds of a call under a candidate; infinite where the device has no room for it."""
    tunings = Tunings(device=device, found=((layer.kind, candidate),), cuda=False)
    call = layer.attention(Triton(clock.device.type, tunings), query)
    try:
        call()  # compiles
    except KernelError:
        return float("inf")
    return median(clock.seconds(call) for _ in range(rounds))
