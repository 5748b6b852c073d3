"""Times prefixes in a directory store: saving, restoring, and what restoring saves.

    python tools/time_stores.py [--tokens 4096] [--threads 1]

Three parts, each the best of RUNS with the files in the page cache:

* bandwidth: keys and values as of a model with 32 layers, 8 KV heads and head_dim 128, 4 bits, bfloat16;
* the embedded model: its prompt computed, against restored, to the first token;
* a second process, from its start to the first token, without and with the store.

Times are of the wall unless they say CPU; CPU times are those of the whole process, so that other load counts little.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

import fibkv
from fibkv import embedded
from fibkv.cache import LayerCache
from fibkv.machine import Conditions
from fibkv.manifest import Binding, ModelIdentity
from fibkv.prefix_load import PrefixLoader
from fibkv.prefix_save import save_prefix
from fibkv.quarantine import Quarantine
from fibkv.settings import CacheSettings
from fibkv.store import DirectoryStore

RUNS = 3
LAYERS, HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
PROMPT_TOKENS = 2000

SECOND_PROCESS = f"""
import sys, time
began = time.perf_counter()
import torch, fibkv
from fibkv import embedded
from fibkv.store import DirectoryStore
torch.set_num_threads(int(sys.argv[2]))
model, tokenizer = embedded.load()
ids = tokenizer(embedded.heldout_text(), return_tensors="pt").input_ids[:, :{PROMPT_TOKENS}]
ready = time.perf_counter()
store = DirectoryStore(sys.argv[1]) if sys.argv[1] else None
cache = fibkv.restore(model, ids, store, name="embedded") if store else fibkv.Cache(model)
with fibkv.attention(model), torch.no_grad():
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
print(ready - began, time.perf_counter() - ready)
"""


def best(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the wall and of the CPU, each the least of RUNS."""
    walls, cpus = [], []
    for _ in range(RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def bandwidth(tokens: int) -> None:
    settings = CacheSettings.of(
        bits=4, profile=None, policy=None, tokens_per_page=PAGE, raw_dtype=None, read_through=False,
        implementation="auto", layers=LAYERS, kv_heads=HEADS, query_heads=4 * HEADS,
    )  # fmt: skip
    model = ModelIdentity(config=f"blake3:{'0' * 64}", weights="name:random", dtype="torch.bfloat16")
    binding = Binding(
        model=model, tokens_per_page=PAGE, read_through=False, raw_dtype=None, policy=None,
        codecs=(("fib4", "fib4"),) * LAYERS, spaces=(None,) * LAYERS,
    )  # fmt: skip
    ids, none = range(tokens), torch.empty(1, HEADS, 0, HEAD_DIM, dtype=torch.bfloat16)

    def empty() -> list[LayerCache]:
        return [LayerCache(settings.for_layer(index, none, none), none, none, Quarantine()) for index in range(LAYERS)]

    layers, rows = empty(), torch.randn(1, HEADS, tokens, HEAD_DIM).to(torch.bfloat16)
    for layer in layers:
        layer.append(rows, rows)
    with tempfile.TemporaryDirectory() as folder:
        store, saved = DirectoryStore(folder), []

        def save() -> None:
            # Under another name each time: what a store has is not written again.
            other = replace_weights(binding, f"name:run-{len(saved)}")
            saved.append(save_prefix(store, other, layers, ids))

        def load() -> None:
            loader = PrefixLoader(store, replace_weights(binding, "name:run-0"), ids)
            loader.root()
            fresh = empty()
            prefix = loader.load([layer.settings for layer in fresh])
            assert prefix.length == tokens
            assert prefix.tails is not None
            for index, layer in enumerate(fresh):
                layer.adopt(prefix.pages[index], *prefix.tails[index])

        nbytes = 0
        for name, run in (("save", save), ("restore", load)):
            wall, cpu = best(run)
            nbytes = saved[0].nbytes
            print(f"{name}: {nbytes / wall / 1e9:.3f} GB/s, {nbytes / cpu / 1e9:.3f} GB/s of CPU time ({wall:.2f} s)")
        dense = 4 * LAYERS * HEADS * HEAD_DIM * tokens
        print(f"{tokens} tokens: {nbytes / 1e6:.1f} MB, {dense / nbytes:.2f} times less than in bfloat16")


def replace_weights(binding: Binding, weights: str) -> Binding:
    return binding.model_copy(update={"model": binding.model.model_copy(update={"weights": weights})})


def embedded_model(threads: int) -> None:
    model, tokenizer = embedded.load()
    ids = tokenizer(embedded.heldout_text(), return_tensors="pt").input_ids[:, :PROMPT_TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        store, cache = DirectoryStore(folder), fibkv.Cache(model)

        def first_token(start: fibkv.Cache) -> None:
            with fibkv.attention(model), torch.no_grad():
                model.generate(ids, past_key_values=start, max_new_tokens=1, do_sample=False)

        first_token(cache)
        cache.save(store, ids, name="embedded")
        computed = best(lambda: first_token(fibkv.Cache(model)))
        restored = best(lambda: first_token(fibkv.restore(model, ids, store, name="embedded")))
        for name, (wall, cpu) in (("computed", computed), ("restored", restored)):
            print(f"first token of {PROMPT_TOKENS}, {name}: {wall * 1e3:.0f} ms, {cpu * 1e3:.0f} ms of CPU time")
        for name, place in (("without a store", ""), ("with the store", folder)):
            times = [second_process(place, threads) for _ in range(RUNS)]
            ready, token = (min(column) for column in zip(*times, strict=True))
            print(f"second process {name}: ready in {ready:.2f} s, first token {token * 1e3:.0f} ms later")


def second_process(place: str, threads: int) -> tuple[float, float]:
    run = [sys.executable, "-c", SECOND_PROCESS, place, str(threads)]
    shown = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    return float(shown[0]), float(shown[1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    print(Conditions.now(given.threads))
    bandwidth(given.tokens)
    embedded_model(given.threads)


if __name__ == "__main__":
    main()
