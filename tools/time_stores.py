"""Times prefixes in a directory store: saving, restoring, and what restoring saves.

    python tools/time_stores.py [--tokens 32768] [--threads 1] [--runs 5] [--only bandwidth|embedded|processes]

Three parts, each the best of so many runs with the files in the page cache:

* bandwidth: keys and values as of a model with 32 layers, 8 KV heads and head_dim 128, 4 bits, bfloat16;
* embedded: the prompt of the embedded model computed, against restored;
* processes: one process computes a prompt of 8000 tokens and saves it; another one, with the same beginning and a
  question of its own behind it, takes it up. Random weights in the shape of SmolLM2-135M (30 layers, 3 KV heads of
  64), whose context is 8192 tokens; the digest of the weights is part of the second one's time.

Times are of the wall, and of the CPU for the whole process: under other load only these say something. Saving makes
and writes on two threads, restoring asks for memory on a second one, whatever ``--threads`` gives to torch.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

import fibkv
from fibkv import embedded
from fibkv.cache import LayerCache
from fibkv.hf_argument import with_cache
from fibkv.inventory import Inventory
from fibkv.machine import Conditions
from fibkv.manifest import Binding, ModelIdentity
from fibkv.prefix_load import PrefixLoader
from fibkv.prefix_save import save_prefix
from fibkv.quarantine import Quarantine
from fibkv.settings import CacheSettings
from fibkv.store import DirectoryStore

LAYERS, HEADS, HEAD_DIM, PAGE = 32, 8, 128, 64
EMBEDDED_TOKENS = 4000

PROCESS = """
import sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
role, place, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True, eos_token_id=None,
)).eval()
shared = torch.randint(49152, (1, 8000))
torch.manual_seed(len(role))
ids = torch.cat([shared, torch.randint(49152, (1, 32))], 1)
wall, cpu = time.perf_counter(), time.process_time()
import fibkv
from fibkv.hf_argument import with_cache
from fibkv.store import DirectoryStore
store = DirectoryStore(place)
cache = fibkv.restore(model, ids, store)
with fibkv.attention(model), torch.no_grad():
    model.generate(ids, **with_cache(cache), max_new_tokens=1, do_sample=False)
print(time.perf_counter() - wall, time.process_time() - cpu, cache.restored.tokens)
if role == "first":
    assert cache.save(store, ids).failure is None
"""


def best(runs: int, *tries: Callable[[], object]) -> list[tuple[float, float]]:
    """Of each of the tries, seconds of the wall and of the CPU: each the least of the runs, which take turns.

    What a try returns is given up when its time is taken.
    """
    seen: list[list[tuple[float, float]]] = [[] for _ in tries]
    for _ in range(runs):
        for attempt, times in zip(tries, seen, strict=True):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            kept = attempt()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
            del kept
    return [(min(walls), min(cpus)) for walls, cpus in (zip(*times, strict=True) for times in seen)]


class Folder:
    """A directory for as long as this object."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp()

    def __del__(self) -> None:
        shutil.rmtree(self.path)


def bandwidth(tokens: int, runs: int) -> None:
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

    def empty(inventory: Inventory) -> list[LayerCache]:
        made = (settings.for_layer(index, none, none) for index in range(LAYERS))
        return [LayerCache(layer, none, none, Quarantine(), inventory) for layer in made]

    layers, rows = empty(Inventory()), torch.randn(1, HEADS, tokens, HEAD_DIM).to(torch.bfloat16)
    for layer in layers:
        layer.append(rows, rows)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_prefix(DirectoryStore(folder), binding, layers, ids)

        def save() -> Folder:
            # To a directory of its own: what a store has is not written again.
            other = Folder()
            assert save_prefix(DirectoryStore(other.path), binding, layers, ids).nbytes == saved.nbytes
            return other

        def load() -> list[LayerCache]:
            inventory = Inventory()
            fresh = empty(inventory)
            loader = PrefixLoader(DirectoryStore(folder), binding, ids)
            loader.root()
            prefix = loader.load([layer.settings for layer in fresh], slabs=inventory.slabs)
            assert prefix.length == tokens
            assert prefix.tails is not None
            for index, layer in enumerate(fresh):
                layer.adopt(prefix.pages[index], *prefix.tails[index])
            return fresh

        nbytes = saved.nbytes
        for name, (wall, cpu) in zip(("save", "restore"), best(runs, save, load), strict=True):
            print(f"{name}: {nbytes / wall / 1e9:.3f} GB/s, {nbytes / cpu / 1e9:.3f} GB/s of CPU time ({wall:.2f} s)")
        dense = 4 * LAYERS * HEADS * HEAD_DIM * tokens
        print(f"{tokens} tokens: {nbytes / 1e6:.1f} MB, {dense / nbytes:.2f} times less than in bfloat16")


def embedded_model(runs: int) -> None:
    model, tokenizer = embedded.load()
    ids = tokenizer(embedded.heldout_text(), return_tensors="pt").input_ids[:, :EMBEDDED_TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        store, cache = DirectoryStore(folder), fibkv.Cache(model)

        def compute() -> None:
            with fibkv.attention(model), torch.no_grad():
                model(ids, **with_cache(fibkv.Cache(model)), logits_to_keep=1)

        def restore() -> fibkv.Cache:
            return fibkv.restore(model, ids, store, name="embedded")

        def first_token(start: fibkv.Cache) -> None:
            with fibkv.attention(model), torch.no_grad():
                model.generate(ids, **with_cache(start), max_new_tokens=1, do_sample=False)

        first_token(cache)
        cache.save(store, ids, name="embedded")
        names = ("prefix computed", "prefix restored", "first token, computed", "first token, restored")
        tries = (compute, restore, lambda: first_token(fibkv.Cache(model)), lambda: first_token(restore()))
        for name, (wall, cpu) in zip(names, best(runs, *tries), strict=True):
            print(f"embedded, {EMBEDDED_TOKENS} tokens, {name}: {wall * 1e3:.1f} ms, {cpu * 1e3:.1f} ms of CPU time")


def processes(threads: int, runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for role, times in (("first", 1), ("second", runs)):
            seen = [process(role, folder, threads) for _ in range(times)]
            wall, cpu, tokens = (min(column) for column in zip(*seen, strict=True))
            print(f"{role} process, first token: {wall:.3f} s, {cpu:.3f} s of CPU time, {tokens:.0f} tokens restored")


def process(role: str, place: str, threads: int) -> tuple[float, ...]:
    run = [sys.executable, "-c", PROCESS, role, place, str(threads)]
    shown = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    return tuple(map(float, shown))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=32768)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--only", choices=("bandwidth", "embedded", "processes"))
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    print(Conditions.now(given.threads))
    if given.only in (None, "bandwidth"):
        bandwidth(given.tokens, given.runs)
    if given.only in (None, "embedded"):
        embedded_model(given.runs)
    if given.only in (None, "processes"):
        processes(given.threads, given.runs)


if __name__ == "__main__":
    main()
