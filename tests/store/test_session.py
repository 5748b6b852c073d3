"""Conversations: a turn computes what is new, a new session goes on where the last one ended."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

import fibkv
from fibkv import embedded
from fibkv.errors import ContractError
from fibkv.hf_argument import with_cache
from fibkv.store import MemoryStore
from tests.store.prefixes import FailingStore

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = embedded.heldout_text()[:600]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return embedded.load()


@pytest.fixture(scope="module")
def chat(loaded: tuple[Any, Any]) -> tuple[Any, Any]:
    model, tokenizer = loaded
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def test_turns_go_on_from_one_another(loaded: tuple[Any, Any]) -> None:
    session = fibkv.Session(*loaded)
    first = session.ask(ASKED, **GREEDY)
    assert session.reused_tokens == 0
    held = session.cache.get_seq_length()
    session.ask("\n\ndef main(", **GREEDY)
    assert session.reused_tokens == held
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    assert session.messages[1]["content"] == first != ""
    assert session.failures == []


def test_a_chat_repeats_its_template_and_computes_the_rest(chat: tuple[Any, Any]) -> None:
    session = fibkv.Session(*chat, system="You write Python.")
    session.ask(ASKED, **GREEDY)
    prompt_tokens = len(chat[1].apply_chat_template(session.messages[:2], add_generation_prompt=True)["input_ids"])
    session.ask("And now?", **GREEDY)
    assert session.reused_tokens >= prompt_tokens


@pytest.mark.parametrize("kind", ["loaded", "chat"])
def test_a_new_session_goes_on_where_the_last_one_ended(kind: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = request.getfixturevalue(kind)
    store = MemoryStore()
    first = fibkv.Session(model, tokenizer, store=store)
    answers = [first.ask(text, **GREEDY) for text in (ASKED, "\n\nimport os")]
    again = fibkv.Session(model, tokenizer, store=store)
    assert [again.ask(text, **GREEDY) for text in (ASKED, "\n\nimport os")] == answers
    assert again.restored is not None
    assert again.restored.tokens >= 64
    assert again.failures == first.failures == []
    alone = fibkv.Session(model, tokenizer)
    assert alone.ask(ASKED, **GREEDY) == answers[0]
    assert alone.restored is None


def test_a_store_that_fails_costs_no_answer(loaded: tuple[Any, Any]) -> None:
    session = fibkv.Session(*loaded, store=FailingStore(lambda *_: True))
    assert session.ask(ASKED, **GREEDY) == fibkv.Session(*loaded).ask(ASKED, **GREEDY)
    assert len(session.failures) == 2
    assert all("the disk is on fire" in failure for failure in session.failures)


def test_a_turn_that_fails_leaves_the_session_usable(loaded: tuple[Any, Any]) -> None:
    session = fibkv.Session(*loaded)
    session.ask(ASKED, **GREEDY)
    with pytest.raises(ValueError, match="unknown_option"):
        session.ask("x", unknown_option=1)
    assert len(session.messages) == 2
    assert session.ask("\n\nimport os", **GREEDY) != ""
    assert session.reused_tokens == 0


def test_what_cannot_be_saved_does_not_fail(loaded: tuple[Any, Any]) -> None:
    config = MistralConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    session = fibkv.Session(MistralForCausalLM(config).eval(), loaded[1], store=MemoryStore())
    session.ask(ASKED, **GREEDY)
    session.ask("And?", **GREEDY)
    assert session.failures
    assert all("no layer is kept in pages" in failure for failure in session.failures)


def test_misuse_is_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ContractError, match=r"Session\.system: expected a tokenizer with a chat template"):
        fibkv.Session(*loaded, system="Hello")
    with pytest.raises(ContractError, match=r"Session\.ask: expected one row"):
        fibkv.Session(*loaded).ask("x", num_beams=2)
    with pytest.raises(ContractError, match=r"Session\.ask: expected one row"):
        fibkv.Session(*loaded).ask("x", generation_config=GenerationConfig(num_beams=2))
    with pytest.raises(ContractError, match=r"Session\.ask: expected no cache beside its own"):
        fibkv.Session(*loaded).ask("x", **with_cache(fibkv.Cache(loaded[0])))
    with pytest.raises(ContractError, match=r"Session\.store: expected a store, .* got '~/kv'"):
        fibkv.Session(*loaded, store="~/kv")


def test_an_answer_may_come_with_its_scores(loaded: tuple[Any, Any]) -> None:
    expected = fibkv.Session(*loaded).ask(ASKED, **GREEDY)
    session = fibkv.Session(*loaded)
    assert session.ask(ASKED, **GREEDY, return_dict_in_generate=True, output_scores=True) == expected
    session.ask("And?", **GREEDY)
    assert session.reused_tokens > 0
