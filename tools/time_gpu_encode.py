"""Times encoding on a GPU: one layer's keys and values of a prefill, beside the layer of a transformer that made them.

    python tools/time_gpu_encode.py [--quick] [--json FILE]

First it compares codes with those of the reference kernels. Calls are timed on the device, its caches flushed before:
replayed as a CUDA graph, launched from Python, and with the look at what was refused, for which Python waits. The layer
is one of Llama 3 8B in bfloat16, its attention torch's.
``--quick`` takes tiny sizes on the CPU, in Triton's interpreter (TRITON_INTERPRET=1), to see that it runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fibkv.bench_gpu_clock import Clock
from fibkv.codecs import Codec, codec_for
from fibkv.codes import Codes
from fibkv.kernels import reference, triton_codes, triton_fib, triton_means, triton_rotate
from fibkv.kernels.refusals import checked_later
from fibkv.kernels.triton import device_name
from fibkv.kernels.triton_sides import on_device
from fibkv.parameters import named_parameters
from fibkv.tables import FibTables

PROFILES = ("key4/value4", "key3/value3", "fib4/fib4", "fib2/fib2", "int8/int8", "fp8/fp8")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is encoded and prefilled: the proportions of Llama 3 8B by default."""

    device: str = "cuda"
    tokens: int = 8192
    tokens_per_page: int = 64
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    feed_forward: int = 14336
    profiles: tuple[str, ...] = PROFILES
    checked_pages: int = 4
    rounds: int = 20
    flushed_bytes: int = 256 << 20


QUICK = Sizes("cpu", 32, 16, 4, 2, 32, 64, 128, ("key4/value4", "int8/fp8"), 1, 1, 1 << 10)


class Layer(nn.Module):
    """A decoder layer without its rotary embedding: a prefill of one row."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, heads = sizes.hidden, sizes.query_heads + 2 * sizes.kv_heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.inputs = nn.Linear(width, heads * sizes.head_dim, bias=False)
        self.output = nn.Linear(sizes.query_heads * sizes.head_dim, width, bias=False)
        self.up = nn.Linear(width, 2 * sizes.feed_forward, bias=False)
        self.down = nn.Linear(sizes.feed_forward, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """``states [T, hidden]``."""
        sizes = self.sizes
        heads = self.inputs(self.norms[0](states)).unflatten(-1, (-1, sizes.head_dim)).transpose(0, 1)[None]
        query, key, value = heads.split((sizes.query_heads, sizes.kv_heads, sizes.kv_heads), 1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        states = states + self.output(mixed[0].transpose(0, 1).flatten(1))
        gate, up = self.up(self.norms[1](states)).chunk(2, -1)
        return states + self.down(functional.silu(gate) * up)


def vectors(sizes: Sizes, biased: bool) -> Tensor:
    """``[pages, heads, T, d]`` bfloat16; keys share a mean in each head."""
    generator = torch.Generator(sizes.device).manual_seed(int(biased))
    shape = (sizes.tokens // sizes.tokens_per_page, sizes.kv_heads, sizes.tokens_per_page, sizes.head_dim)
    rows = torch.randn(shape, generator=generator, device=sizes.device)
    if biased:
        rows += 2 * torch.randn(1, *shape[1:2], 1, shape[3], generator=generator, device=sizes.device)
    return rows.to(torch.bfloat16)


def equal_share(codec: Codec, rows: Tensor) -> dict[str, float]:
    """By field of the codes, the share of bytes that are the reference's."""
    found = triton_codes.encode(rows, codec.tables)
    expected = reference.encode(rows.cpu(), codec.tables)
    shares = {}
    for (name, made), (_, right) in zip(found.named(), expected.named(), strict=True):
        if right.numel():
            same = made.cpu().contiguous().view(torch.uint8) == right.contiguous().view(torch.uint8)
            shares[name] = float(same.double().mean())
    return shares


def microseconds(clock: Clock, call: Callable[[], object], rounds: int) -> float:
    """Median of a call, which was made before."""
    return median(clock.seconds(call) for _ in range(rounds)) * 1e6


def stages(clock: Clock, codec: Codec, rows: Tensor, rounds: int) -> dict[str, float]:
    """Microseconds of the parts of one role's FibQuant encoding, each with cold caches."""
    tables = codec.tables
    if not isinstance(tables, FibTables):
        return {}
    device_tables = on_device(tables, rows.device)
    groups, refused = rows.flatten(0, 1), torch.zeros((), dtype=torch.bool, device=rows.device)
    _, taken = triton_means.coded_means(groups, device_tables)
    centered = groups - taken.unsqueeze(1) if tables.centered else groups
    rotated, lengths = triton_rotate.unit_vectors(centered, device_tables, refused)
    codes = codec.encode(rows, implementation="triton").named()
    packed = dict(codes)["indices"].clone().view(len(lengths), -1)
    norms = torch.empty_like(lengths)
    parts: dict[str, Callable[[], object]] = {
        "rotation": lambda: triton_rotate.unit_vectors(centered, device_tables, refused),
        "search": lambda: triton_fib._search(rotated, lengths, tables, device_tables, packed, norms),
        "norms": lambda: triton_rotate.stored_norms(lengths.view(groups.shape[:-1]), tables.norm_format, refused),
    }
    if tables.centered:
        parts["means"] = lambda: triton_means.coded_means(groups, device_tables)
        parts["subtraction"] = lambda: groups - taken.unsqueeze(1)
    return {name: microseconds(clock, part, rounds) for name, part in parts.items()}


def measure(sizes: Sizes, clock: Clock, profile: str) -> dict[str, Any]:
    """One profile's figures."""
    codecs = [codec_for(named_parameters(name, sizes.head_dim, "bf16")) for name in profile.split("/")]
    sides = [(codec, vectors(sizes, biased=not role)) for role, codec in enumerate(codecs)]

    def encode() -> list[Codes]:
        return [triton_codes.encode(rows, codec.tables) for codec, rows in sides]

    def launch() -> Tensor:
        with checked_later() as checks:
            encode()
        return checks.any()

    started = perf_counter()
    encode()
    first_call = perf_counter() - started
    shares = [equal_share(codec, rows[: sizes.checked_pages]) for codec, rows in sides]
    replay = clock.captured(launch)
    return {
        "profile": profile,
        "first call s": first_call,
        "equal bytes": shares,
        "called us": microseconds(clock, launch, sizes.rounds),
        "graph us": microseconds(clock, replay or launch, sizes.rounds),
        "waiting us": microseconds(clock, encode, sizes.rounds),
        "stages us": [stages(clock, codec, rows, sizes.rounds) for codec, rows in sides],
    }


def layer_microseconds(sizes: Sizes, clock: Clock) -> float:
    """A prefill of one layer of the model."""
    torch.manual_seed(0)
    with torch.device(clock.device):
        layer, states = Layer(sizes).to(torch.bfloat16), torch.randn(sizes.tokens, sizes.hidden).to(torch.bfloat16)
    for _ in range(3):
        layer(states)
    return microseconds(clock, lambda: layer(states), sizes.rounds)


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    started = perf_counter()
    clock = Clock(torch.device(sizes.device), sizes.flushed_bytes)
    with torch.inference_mode():
        layer = layer_microseconds(sizes, clock)
        print(f"{device_name(clock.device)}; {sizes.tokens} tokens; a layer takes {layer:.0f} us")
        print(f"{'profile':14}{'graph us':>10}{'of layer':>10}{'called us':>11}{'waiting us':>12}  equal bytes")
        rows = []
        for profile in sizes.profiles:
            row = measure(sizes, clock, profile)
            rows.append(row)
            least = min(share for side in row["equal bytes"] for share in side.values())
            times = f"{row['graph us']:10.0f}{row['graph us'] / layer:10.2%}{row['called us']:11.0f}"
            print(f"{profile:14}{times}{row['waiting us']:12.0f}  {least:.7f}", flush=True)
            for side in row["stages us"]:
                print("".join(f"{name:>24} {part:.0f} us" for name, part in side.items()))
    result = {"sizes": asdict(sizes), "device": device_name(clock.device), "layer us": layer, "rows": rows}
    result["seconds"] = perf_counter() - started
    print(f"{result['seconds']:.0f} s in all")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
