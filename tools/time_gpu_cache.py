"""What a cache costs a model on a GPU: prefill, steps of decoding, offloading; against transformers' DynamicCache.

    python tools/time_gpu_cache.py [--layers 4] [--context 8192] [--rows 1] [--bits 4] [--device cuda] [-o FILE]

A random-weight Llama in bfloat16, 32 query and 8 KV heads, head_dim 128. Caches take turns in rounds; figures are the
least of them, in milliseconds of wall time with the device waited for before and after. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers as tf

import fibkv
from fibkv.hf_argument import with_cache

ROUNDS, STEPS = 3, 40


def llama(layers: int, device: str) -> tf.PreTrainedModel:
    """The model."""
    config = tf.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 18,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return tf.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def wait(device: str) -> None:
    """Until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measured(model: tf.PreTrainedModel, cache: Any, ids: torch.Tensor, device: str) -> dict[str, float]:
    """Times of one prefill, of steps that read it, and the longest of these: one that seals, or the first."""
    is_ours = isinstance(cache, fibkv.Cache)
    with torch.no_grad(), fibkv.attention(model) if is_ours else nullcontext():
        wait(device)
        started = perf_counter()
        model(ids, **with_cache(cache), logits_to_keep=1)
        wait(device)
        prefill = perf_counter() - started
        times = []
        for step in range(STEPS):
            started = perf_counter()
            model(ids[:, step : step + 1], **with_cache(cache))
            wait(device)
            times.append(perf_counter() - started)
    return {"prefill": 1e3 * prefill, "step": 1e3 * sorted(times[2:])[STEPS // 2], "longest_step": 1e3 * max(times[2:])}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    model = llama(options.layers, options.device)
    ids = torch.randint(32000, (options.rows, options.context), device=options.device)
    makers: dict[str, Callable[[], Any]] = {
        "dynamic": lambda: tf.DynamicCache(config=model.config),
        "fibkv": lambda: fibkv.Cache(model, bits=options.bits),
    }
    if options.device.startswith("cuda"):
        makers["fibkv_offloading"] = lambda: fibkv.Cache(model, bits=options.bits, offloading=True)
    with fibkv.attention(model):
        makers["fibkv"]().warm_up(model, rows=options.rows)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    reports = {}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            cache = make()
            rounds[name].append(measured(model, cache, ids, options.device))
            if isinstance(cache, fibkv.Cache):
                report = cache.report()
                reports[name] = {
                    "nbytes": report.nbytes,
                    "host_nbytes": report.host_nbytes,
                    "buffer_nbytes": report.buffer_nbytes,
                    "slack_nbytes": report.slack_nbytes,
                    "materialized": report.materialized,
                }
            del cache
            gc.collect()
    best = {name: {key: min(one[key] for one in done) for key in done[0]} for name, done in rounds.items()}
    where = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu"
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"device": where, "torch": torch.__version__, **settings, "milliseconds": best, "bytes": reports}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
