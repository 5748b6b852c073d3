"""What a decode step on a GPU costs the host in Python, measured without a GPU.

    python -m tools.time_gpu_host [--profiles key4/value4,fib4,int8] [--rows 1,8] [--context 1024]

Everything that fibkv and Triton do in Python for one layer and step, with tensors on the CPU: the launches themselves
are left out (tests/codecs/no_device.py), and what torch does to tensors is a CPU's. So the figures are what Python
adds, and not how long a step takes. 32 query and 8 KV heads of 128, bfloat16, pages of 64 tokens.

Prints microseconds of CPU time, the least of many rounds: of the update, of attention, and of the first attention
after a page was sealed.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from time import process_time

import torch
import transformers as tf
from tests.codecs import no_device

import fibkv
from fibkv.hf_attention import attention_forward
from fibkv.hf_layer import CompressedLayer
from fibkv.view import PageRows

QUERY_HEADS, HEADS, DIM = 32, 8, 128
ROUNDS, STEPS, AGAIN = 40, 30, 4


def filled(profile: str, rows: int, context: int) -> CompressedLayer:
    """A layer of a cache that holds a prompt."""
    config = tf.LlamaConfig(
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=64,
        vocab_size=64,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
    )
    keys, _, values = profile.partition("/")
    cache = fibkv.Cache(tf.LlamaForCausalLM(config).to(torch.bfloat16), profile=(keys, values or keys))
    cache.layers[0].update(*new(rows, context))
    return cache.layers[0]


def move(layer: CompressedLayer) -> None:
    """From now on the layer is read as on a device, where codes lie in canonical order."""
    store = layer.store
    store.settings = replace(store.settings, keys=replace(store.settings.keys, implementation="triton"))
    store._map_pages(lambda page: replace(page, held=tuple(codes.canonical() for codes in page.held)))


def new(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(rows, HEADS, tokens, DIM).to(torch.bfloat16) for _ in range(2))


def measured(layer: CompressedLayer, rows: int) -> tuple[float, float, float, float]:
    """(update, attention, first attention after a page, launches) of a step; seconds."""
    length, module = layer.store.length, torch.nn.Module()
    module.is_causal = True
    query = torch.randn(rows, QUERY_HEADS, 1, DIM).to(torch.bfloat16)
    tokens = new(rows, 1)
    best = [float("inf")] * 3
    for _ in range(ROUNDS):
        layer.crop(length - layer.store.length)
        handles = [layer.update(*tokens)]
        began = process_time()
        handles += [layer.update(*tokens) for _ in range(STEPS)]
        updated = process_time()
        attention_forward(module, query, *handles[0], None)
        launches.clear()
        ready = process_time()
        for _ in range(AGAIN):
            for handle in handles[1:]:
                attention_forward(module, query, *handle, None)
        attended = process_time()
        view = handles[0][0].source.view
        sealed = replace(view, rows=PageRows(view.rows))
        object.__setattr__(handles[0][0].source, "view", sealed)
        count = len(launches) / STEPS / AGAIN
        first = process_time()
        attention_forward(module, query, *handles[0], None)
        last = process_time()
        found = ((updated - began) / STEPS, (attended - ready) / STEPS / AGAIN, last - first)
        best = [min(pair) for pair in zip(best, found, strict=True)]
    return *best, count


launches: list[str] = []


def main() -> None:
    """Prints a line for each profile and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", default="key4/value4,fib4,int8")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    layers = {
        (profile, rows): filled(profile, rows, options.context)
        for profile in options.profiles.split(",")
        for rows in map(int, options.rows.split(","))
    }
    no_device.stand_in(lambda name, _: launches.append(name), cuda=True)
    for (profile, rows), layer in layers.items():
        move(layer)
        with torch.no_grad():
            update, attention, first, count = measured(layer, rows)
        print(
            f"{profile}, {rows} rows: update {update * 1e6:.1f} us, attention {attention * 1e6:.1f} us in {count:g} "
            f"launches, {first * 1e6:.0f} us the first time after a page"
        )


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "what is timed is not the interpreter"
    main()
