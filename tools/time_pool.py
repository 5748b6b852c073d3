"""What a pool costs a decode step at rest, and what its parts cost, on the embedded model.

    python tools/time_pool.py

Rounds of steps with and without a pool take turns in one process, one thread; the ratio is taken within each round.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

import fibkv
from fibkv import embedded
from fibkv.hf_argument import with_cache

ROUNDS, STEPS, PROMPT = 41, 24, 1024


def step_seconds(model: torch.nn.Module, ids: torch.Tensor, cache: fibkv.Cache) -> float:
    """Mean time of a step of one token. The cache is put back as it was."""
    length = cache.get_seq_length()
    started = perf_counter()
    for step in range(STEPS):
        model(ids[:, length + step : length + step + 1], **with_cache(cache))
    seconds = (perf_counter() - started) / STEPS
    cache.crop_to(length)
    return seconds


def main() -> None:
    """Prints the figures."""
    torch.set_num_threads(1)
    model, tokenizer = embedded.load()
    ids = tokenizer(embedded.heldout_text(), return_tensors="pt", verbose=False).input_ids[:, : PROMPT + STEPS]
    pool = fibkv.Pool("1GiB")
    others = [fibkv.Cache(model, pool=pool) for _ in range(31)]
    caches = [fibkv.Cache(model, profile="raw", raw_dtype="f16"), fibkv.Cache(model, pool=pool)]
    with torch.no_grad(), fibkv.attention(model):
        for index, cache in enumerate([*others, *caches]):
            model(ids[:, index : PROMPT - 40 + index] if cache in others else ids[:, :PROMPT], **with_cache(cache))
        rounds = [[step_seconds(model, ids, cache) for cache in caches] for _ in range(ROUNDS)]
        ratio = median(pooled / alone for alone, pooled in rounds)
        alone, pooled = (median(column) for column in zip(*rounds, strict=True))
        started = perf_counter()
        for _ in range(2000):
            pool.governor.step()
        governor = (perf_counter() - started) / 2000
        controller = fibkv.PressureController()
        started = perf_counter()
        for _ in range(100_000):
            controller.observe(0.5)
        observe = (perf_counter() - started) / 100_000
    pages = sum(row.pages for row in pool.stats().rungs)
    print(f"a step of the embedded model at {PROMPT} tokens, raw pages: {1e3 * alone:.3f} ms")
    print(f"the same in a pool of 32 sequences, {pages} pages, at rest: {1e3 * pooled:.3f} ms, ratio {ratio:.4f}")
    print(f"governor.step at rest: {1e6 * governor:.2f} us; PressureController.observe: {1e6 * observe:.3f} us")


if __name__ == "__main__":
    main()
