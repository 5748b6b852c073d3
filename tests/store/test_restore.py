"""Prefixes of the embedded model: what is restored goes on as what was saved."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, MistralConfig, MistralForCausalLM, PreTrainedModel

import fibkv
from fibkv import embedded
from fibkv.container import Container, pack
from fibkv.digest import canonical_json
from fibkv.errors import ContractError, ModelError
from fibkv.hf_argument import with_cache
from fibkv.hf_identity import identify, weights_digest
from fibkv.policy import Policy
from fibkv.space import KeySpace
from fibkv.store import DirectoryStore, MemoryStore
from tests.hf.architectures import is_known, tiny
from tests.store.prefixes import FailingStore


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return embedded.load()[0]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 500, (1, 300), generator=torch.Generator().manual_seed(0))


def filled(model: PreTrainedModel, ids: Tensor, **settings: object) -> fibkv.Cache:
    cache = fibkv.Cache(model, **settings)
    with torch.no_grad(), fibkv.attention(model):
        model(ids, **with_cache(cache))
    return cache


def logits(model: PreTrainedModel, ids: Tensor, cache: fibkv.Cache) -> Tensor:
    with torch.no_grad(), fibkv.attention(model):
        return model(ids, **with_cache(cache)).logits


def test_a_path_is_no_store_and_a_configuration_no_model(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"save\.store: expected a store, such as fibkv\.store\.DirectoryStore"):
        filled(model, ids).save(tmp_path, ids)
    with pytest.raises(ContractError, match=r"restore\.store: expected a store"):
        fibkv.restore(model, ids, str(tmp_path))
    with pytest.raises(ModelError, match="restore: expected a model, whose weights count, got LlamaConfig"):
        fibkv.restore(model.config, ids, MemoryStore())


@pytest.mark.parametrize(
    "settings", [{}, {"bits": (8, 2)}, {"bits": 16}, {"policy": Policy.per_token()}, {"read_through": True}]
)
def test_what_is_restored_goes_on_as_what_was_saved(model: PreTrainedModel, ids: Tensor, settings: dict) -> None:
    store, cache = MemoryStore(), filled(model, ids[:, :250], **settings)
    assert cache.save(store, ids[:, :250], name="embedded").failure is None
    restored = fibkv.restore(model, ids, store, name="embedded", **settings)
    assert restored.restored is not None
    if "read_through" in settings:
        assert restored.restored.tokens == 250
    assert restored.restored.failures == ()
    cache.crop_to(restored.restored.tokens)
    rest = ids[:, restored.restored.tokens :]
    assert torch.equal(logits(model, rest, restored), logits(model, rest, cache))
    assert restored.report().nbytes > 0


def test_generation_computes_only_what_is_missing(model: PreTrainedModel, ids: Tensor) -> None:
    store = MemoryStore()
    with torch.no_grad(), fibkv.attention(model):
        first = model.generate(ids, **with_cache(cache := fibkv.Cache(model)), max_new_tokens=6, do_sample=False)
    # The last sampled token was not fed to the model: its id is one more than the cache holds.
    assert cache.save(store, first).tokens == 305
    restored = fibkv.restore(model, first, store)
    assert restored.get_seq_length() == 305
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad(), fibkv.attention(model):
        ours = model.generate(first, **with_cache(restored), max_new_tokens=6, do_sample=False)
        handle.remove()
        theirs = model.generate(first, **with_cache(cache), max_new_tokens=6, do_sample=False)
    assert seen == [1] * 6
    assert torch.equal(ours, theirs)


def test_at_least_one_token_is_left_to_compute(model: PreTrainedModel, ids: Tensor) -> None:
    store = MemoryStore()
    filled(model, ids).save(store, ids)
    assert fibkv.restore(model, ids, store).get_seq_length() == 299
    assert fibkv.restore(model, ids[:, :128], store).get_seq_length() == 127
    assert fibkv.restore(model, ids[:, :1], store).get_seq_length() == 0


def test_a_miss_is_an_empty_cache_that_works(model: PreTrainedModel, ids: Tensor) -> None:
    store = MemoryStore()
    filled(model, ids).save(store, ids)
    for cache in (
        fibkv.restore(model, ids.flip(1), store),
        fibkv.restore(model, ids, store, bits=2),
        fibkv.restore(model, ids, store, name="another"),
        fibkv.restore(model, ids, FailingStore(lambda *_: True)),
    ):
        assert cache.restored is not None
        assert cache.restored.tokens == cache.get_seq_length() == 0
        assert torch.equal(logits(model, ids, cache), logits(model, ids, fibkv.Cache(model)))
    assert "the disk is on fire" in cache.restored.failures[0]
    assert "the disk is on fire" in str(filled(model, ids).save(FailingStore(lambda *_: True), ids).failure)


def test_key_spaces_bind_prefixes(model: PreTrainedModel, ids: Tensor) -> None:
    layers, heads, dim = model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim
    spaces = {layer: KeySpace.of(torch.full((heads, dim), 0.5)) for layer in range(layers)}
    store, cache = MemoryStore(), filled(model, ids, key_spaces=spaces)
    cache.save(store, ids)
    assert fibkv.restore(model, ids, store).get_seq_length() == 0
    restored = fibkv.restore(model, ids, store, key_spaces=spaces)
    cache.crop_to(299)
    assert torch.equal(logits(model, ids[:, 299:], restored), logits(model, ids[:, 299:], cache))


def test_other_weights_find_nothing(model: PreTrainedModel, ids: Tensor) -> None:
    store, other = MemoryStore(), copy.deepcopy(model)
    before = weights_digest(other)
    assert before == weights_digest(model)
    filled(model, ids).save(store, ids)
    assert fibkv.restore(other, ids, store).get_seq_length() == 299
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    assert weights_digest(other) != before
    assert fibkv.restore(other, ids, store).get_seq_length() == 0
    assert identify(model, name="mine").weights == "name:mine"
    assert identify(copy.deepcopy(model).to(torch.bfloat16), name="mine") != identify(model, name="mine")
    with pytest.raises(ContractError, match="weights"):
        identify(model, name="")


def test_unchanged_weights_are_read_once(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    weights_digest(model)
    monkeypatch.setattr("fibkv.hf_identity._tensor_digest", lambda _: pytest.fail("read again"))
    weights_digest(model)


def test_what_cannot_be_stored_is_refused_and_not_found(model: PreTrainedModel, ids: Tensor) -> None:
    config = MistralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=16,
    )  # fmt: skip
    windowed, store = MistralForCausalLM(config).eval(), MemoryStore()
    with pytest.raises(ModelError, match="save: no layer is kept in pages"):
        filled(windowed, ids).save(store, ids)
    cache = fibkv.restore(windowed, ids, store)
    assert cache.restored is not None
    assert "no layer is kept in pages" in cache.restored.failures[0]
    with pytest.raises(ModelError, match="layer 0: what DynamicIndexedLayer holds beside pages cannot be stored"):
        fibkv.Cache(tiny("DeepseekV32")).save(store, ids)
    with pytest.raises(ModelError, match="whose model is alive"):
        fibkv.Cache(AutoConfig.from_pretrained(embedded.model_dir())).save(store, ids)
    revived = pickle.loads(pickle.dumps(filled(model, ids)))
    with pytest.raises(ModelError, match="whose model is alive"):
        revived.save(store, ids)
    with pytest.raises(ContractError, match=r"token_ids: expected whole numbers"):
        fibkv.restore(model, ids.expand(2, -1), store)
    with pytest.raises(ContractError, match=r"token_ids: expected whole numbers"):
        fibkv.restore(model, ids.float(), store)


STATEFUL = ("Gemma3Text", "GptOss", "Lfm2", "Qwen3Next", "FalconH1", "Bamba", "NemotronH", "Zamba2", "Gemma3nText")


@pytest.mark.parametrize("name", [*STATEFUL, "DeepseekV3", "Llama4Text"])
def test_windows_states_and_latents_come_back(name: str) -> None:
    if not is_known(name):
        pytest.skip("not in this release of transformers")
    model, ids = tiny(name), torch.randint(2, 199, (1, 160), generator=torch.Generator().manual_seed(1))
    store, cache = MemoryStore(), filled(model, ids[:, :150], tokens_per_page=16)
    assert cache.save(store, ids[:, :150], name=name).failure is None
    restored = fibkv.restore(model, ids, store, name=name, tokens_per_page=16)
    assert restored.restored is not None
    assert (restored.restored.tokens, restored.restored.failures) == (150, ())
    for start in (150, 151):
        rest = ids[:, start : start + (1 if start == 150 else 9)]
        assert torch.equal(logits(model, rest, restored), logits(model, rest, cache))


@pytest.mark.parametrize("name", ["GptOss", "FalconH1"])
def test_states_are_taken_up_where_they_were_saved_and_nowhere_else(name: str) -> None:
    model, ids = tiny(name), torch.randint(2, 199, (1, 160), generator=torch.Generator().manual_seed(1))
    store, cache = MemoryStore(), filled(model, ids[:, :100], tokens_per_page=16)
    for length in (100, 120):
        if length > 100:
            logits(model, ids[:, 100:length], cache)
        cache.save(store, ids[:, :length], name=name)

    def found(prompt: Tensor) -> int:
        return fibkv.restore(model, prompt, store, name=name, tokens_per_page=16).get_seq_length()

    assert [found(ids[:, :length]) for length in (99, 100, 101, 120, 121, 160)] == [0, 0, 100, 100, 120, 120]
    # Another prompt that has the longer one's spans, and leaves it before its end.
    assert found(torch.cat([ids[:, :118], ids[:, :20]], 1)) == 100
    for entry in list(store.list("ends")):
        store.put(entry.key, (store.get(entry.key) or b"")[:-1])
    restored = fibkv.restore(model, ids, store, name=name, tokens_per_page=16)
    assert restored.get_seq_length() == 0
    assert "truncated" in restored.restored.failures[0]
    assert torch.equal(logits(model, ids, restored), logits(model, ids, fibkv.Cache(model, tokens_per_page=16)))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(kind="LinearAttentionLayer"),
        lambda state: state.update(numbers=[["cumulative_length", 99]]),
        lambda state: state.update(numbers=[]),
        lambda state: state["tensors"][0]["shape"].__setitem__(0, 2) or state["tensors"][0]["shape"].__setitem__(1, 1),
        lambda state: state["tensors"][0].update(name="other"),
        lambda state: state.update(layer=1),
        lambda state: state.update(layer=7),
    ],
)
def test_states_of_other_layers_or_tokens_are_a_miss(change: Callable[[dict], object]) -> None:
    model, ids = tiny("GptOss"), torch.randint(2, 199, (1, 60), generator=torch.Generator().manual_seed(1))
    store = MemoryStore()
    filled(model, ids[:, :50], tokens_per_page=16).save(store, ids[:, :50], name="x")
    (entry,) = store.list("ends")
    container = Container.parse(store.get(entry.key) or b"")
    fields = json.loads(container.header)
    change(fields["states"][0])
    store.put(entry.key, pack("end", canonical_json(fields).encode(), container.sections))
    cache = fibkv.restore(model, ids, store, name="x", tokens_per_page=16)
    assert cache.restored is not None
    assert (cache.restored.tokens, len(cache.restored.failures)) == (0, 1)
    assert torch.equal(logits(model, ids, cache), logits(model, ids, fibkv.Cache(model, tokens_per_page=16)))


def test_a_pool_without_room_is_not_filled(model: PreTrainedModel, ids: Tensor) -> None:
    store, cache = MemoryStore(), filled(model, ids, bits=4)
    cache.save(store, ids)
    nbytes = cache.report().nbytes
    pool = fibkv.Pool(nbytes // 2)
    restored = fibkv.restore(model, ids, store, bits=4, pool=pool)
    assert restored.get_seq_length() == 0
    assert "budget" in restored.restored.failures[0]
    assert pool.inventory.meter.peak <= nbytes // 2
    pool = fibkv.Pool(nbytes * 2)
    restored = fibkv.restore(model, ids, store, bits=4, pool=pool)
    assert (restored.get_seq_length(), restored.restored.failures) == (299, ())
    assert pool.inventory.meter.peak <= nbytes * 2
    on_ladder = fibkv.restore(model, ids, store, pool=pool)
    assert "ladder" in on_ladder.restored.failures[0]
    with pytest.raises(ModelError, match="ladder"):
        on_ladder.save(store, ids)


def test_another_process_goes_on(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    cache = filled(model, ids)
    assert cache.save(DirectoryStore(tmp_path), ids).failure is None
    code = (
        "import sys, torch, fibkv; from fibkv import embedded; from fibkv.store import DirectoryStore\n"
        "from fibkv.hf_argument import with_cache\n"
        "model = embedded.load()[0]\n"
        "ids = torch.randint(0, 500, (1, 300), generator=torch.Generator().manual_seed(0))\n"
        "cache = fibkv.restore(model, ids, DirectoryStore(sys.argv[1]))\n"
        "with torch.no_grad(), fibkv.attention(model):\n"
        "    logits = model(ids[:, cache.get_seq_length():], **with_cache(cache)).logits\n"
        "print(cache.restored.tokens, logits.double().sum().item().hex())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout.split()
    cache.crop_to(299)
    assert shown == ["299", logits(model, ids[:, 299:], cache).double().sum().item().hex()]
