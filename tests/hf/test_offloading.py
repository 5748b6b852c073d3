"""A cache whose pages lie in host memory: the model generates as if they were on its device, and bytes are counted."""

from __future__ import annotations

import copy

import pytest
import torch

import fibkv
from fibkv.errors import ContractError
from fibkv.hf_argument import with_cache
from fibkv.offload import LEAST_REGION
from fibkv.store import MemoryStore
from tests.hf.models import build, prompt
from tests.pages.streams import LateStream

OPTIONS = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fibkv.page_memory.side_stream", lambda device: LateStream())


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("way", WAYS)
def test_generation_is_the_same(way: str) -> None:
    model = build("llama")
    logits = []
    for offloading in (False, True):
        cache = fibkv.Cache(model, bits=4, tokens_per_page=16, implementation="reference", offloading=offloading)
        with fibkv.attention(model):
            made = model.generate(prompt(1, 150), **with_cache(cache), **OPTIONS, **WAYS[way])
        logits.append(torch.stack(made.logits))
        assert cache.report().materialized == 0
    assert torch.equal(*logits)


@pytest.mark.usefixtures("streams")
def test_the_report_says_where_bytes_are() -> None:
    model = build("llama")
    cache = fibkv.Cache(model, bits=4, implementation="reference", offloading=True)
    plain = fibkv.Cache(model, bits=4, implementation="reference")
    for one in (cache, plain):
        with fibkv.attention(model), torch.no_grad():
            model(prompt(1, 300), **with_cache(one))
            model(prompt(1, 1), **with_cache(one))
    report, same = cache.report(), plain.report()
    raw = sum(layer.tail_tokens for layer in report.layers)
    assert raw
    assert 0 < report.host_nbytes < sum(layer.nbytes for layer in report.layers)
    assert report.buffer_nbytes >= 2 * max(layer.host_nbytes for layer in report.layers)
    assert report.host_nbytes + report.slack_nbytes == len(report.layers) * LEAST_REGION
    fork = cache.fork().report()
    assert (fork.host_nbytes, fork.buffer_nbytes) == (report.host_nbytes, 0)
    assert sum(layer.nbytes for layer in report.layers) <= sum(layer.nbytes for layer in same.layers)
    assert "KiB of codes in host memory" in str(report)
    assert (same.host_nbytes, same.buffer_nbytes) == (0, 0)


@pytest.mark.usefixtures("streams")
def test_forks_crops_and_stores() -> None:
    model = build("llama")
    cache = fibkv.Cache(model, bits=4, tokens_per_page=16, implementation="reference", offloading=True)
    ids = prompt(1, 200)
    with fibkv.attention(model), torch.no_grad():
        model(ids[:, :190], **with_cache(cache))
        fork = cache.fork()
        expected = model(ids[:, 190:], **with_cache(cache)).logits
        assert torch.equal(model(ids[:, 190:], **with_cache(fork)).logits, expected)
        fork.crop_to(190)
        store = MemoryStore()
        assert fork.save(store, ids[:, :190]).failure is None
        restored = fibkv.restore(
            model, ids, store, bits=4, tokens_per_page=16, implementation="reference", offloading=True
        )
        assert restored.report().host_nbytes
    assert restored.get_seq_length() == 190
    pages = [[page.digest for page in layer.store.rows[0]] for layer in (cache.layers[1], restored.layers[1])]
    assert pages[0][: len(pages[1])] == pages[1]
    assert copy.deepcopy(cache).verify() == ()


def test_offloading_needs_a_device_and_one_memory() -> None:
    model = build("llama")
    with pytest.raises(ContractError, match="offloading: expected False, or a model on a CUDA device, got 'cpu'"):
        model(prompt(1, 10), **with_cache(fibkv.Cache(model, offloading=True)))
    with pytest.raises(ContractError, match="offloading: expected False in a pool"):
        fibkv.Cache(model, offloading=True, budget="1GiB")
