"""Short soaks; `tests/pool/soak.py` runs longer ones."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import fibkv
from fibkv import embedded
from fibkv.hf_argument import with_cache
from fibkv.hf_attention import attention
from fibkv.page import METADATA_NBYTES
from fibkv.pool import Pool
from tests.pool.soak import Soak, Worker, check_bytes


@pytest.mark.parametrize("seed", range(2))
def test_one_thread_against_the_model(seed: int) -> None:
    """Random appends, crops, forks and drops: contents and every byte agree with lists of tokens, nothing grows."""
    soak = Soak(1_200_000, seed)
    worker = Worker(soak, random.Random(seed))
    slack = []
    for step in range(1000):
        worker.step()
        if step % 40 == 0:
            check_bytes(soak, [*worker.streams, *soak.handed_on])
            slack.append(soak.pool.stats().slack)
    # Parts of grains beside pages: they come and go with pages, and do not add up.
    assert max(slack) < 0.1 * 1_200_000
    assert {"append", "crop", "fork", "drop"} <= set(soak.counts)
    worker.streams.clear()
    soak.handed_on.clear()
    del worker
    stats = soak.pool.stats()
    assert stats.allocated == stats.tables
    assert stats.recoded_pages > 0


def test_eight_threads() -> None:
    """No leak, no deadlock, and every page is what one thread makes of the same tokens."""
    soak = Soak(1_000_000, 5)
    soak.run(threads=8, steps=120)
    stats = soak.pool.stats()
    assert stats.allocated == stats.tables
    assert (stats.slack, stats.claimed, stats.layers) == (0, 0, 0)
    assert stats.recoded_pages > 0
    assert stats.peak <= 1_000_000 + 16384 + METADATA_NBYTES, "no more than the page that is being re-encoded"


def test_tokens_of_threads_are_those_of_one_thread() -> None:
    model, tokenizer = embedded.load()
    text = embedded.heldout_text()
    prompts = [tokenizer(text[900 * i : 900 * i + 700], return_tensors="pt").input_ids for i in range(8)]
    pool = Pool("64MiB")
    found: dict[int, list[int]] = {}

    def generate(index: int, caches: Pool | None) -> list[int]:
        cache = fibkv.Cache(model, bits=4, pool=caches)
        with torch.no_grad():
            out = model.generate(prompts[index], **with_cache(cache), max_new_tokens=24, do_sample=False)
        return out[0].tolist()

    with attention(model):
        threads = [threading.Thread(target=lambda i=index: found.update({i: generate(i, pool)})) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {index: generate(index, None) for index in range(8)}
    stats = pool.stats()
    assert stats.allocated == stats.tables
