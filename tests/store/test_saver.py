"""Saving beside the model: what is written is what was held then, nothing is lost, and nothing waits for a store."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

import fibkv
from fibkv import embedded
from fibkv.errors import ContractError, DigestMismatch, ModelError
from fibkv.hf_argument import with_cache
from fibkv.prefix_save import Saved
from fibkv.store import DirectoryStore, MemoryStore
from tests.hf.architectures import tiny
from tests.store.prefixes import FailingStore

IDS = torch.randint(0, 500, (1, 300), generator=torch.Generator().manual_seed(0))
NAME = "embedded"
GREEDY = {"max_new_tokens": 12, "do_sample": False}
ASKED = embedded.heldout_text()[:600]
PATIENCE = 60


class SlowStore(MemoryStore):
    """Writes nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = Event()
        self.goes_on = Event()

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.reached.set()
        assert self.goes_on.wait(PATIENCE)
        super().put(key, data)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return embedded.load()


@pytest.fixture
def model(loaded: tuple[Any, Any]) -> Any:
    return loaded[0]


def filled(model: Any, length: int, cache: fibkv.Cache | None = None) -> fibkv.Cache:
    """A cache with the first tokens, or one that goes on up to there."""
    cache = cache or fibkv.Cache(model)
    with torch.no_grad(), fibkv.attention(model):
        model(IDS[:, cache.get_seq_length() : length], **with_cache(cache))
    return cache


def objects(store: Any) -> dict[str, bytes]:
    return {entry.key: store.get(entry.key) for entry in store.list()}


def test_what_is_written_is_what_was_held_whatever_became_of_it(model: Any) -> None:
    slow, plain = SlowStore(), MemoryStore()
    cache = filled(model, 150)
    with fibkv.Saver(slow) as saver:
        ids = IDS[:, :150].clone()
        first = saver.save(cache, ids, name=NAME)
        assert slow.reached.wait(PATIENCE)
        expected = [cache.save(plain, IDS[:, :150], name=NAME)]
        ids.zero_()
        filled(model, 260, cache)
        second = saver.save(cache, IDS[:, :260], name=NAME)
        cache.crop_to(40)
        filled(model, 130, cache)
        assert not first.done()
        assert not saver.is_idle
        assert objects(slow) == {}
        slow.goes_on.set()
        assert second.result(PATIENCE).failure is None
    assert saver.is_idle
    assert saver.failures == []
    expected.append(filled(model, 260).save(plain, IDS[:, :260], name=NAME))
    # The second cache was computed anew, in one piece: its tail agrees to rounding, its names and sizes exactly.
    assert first.result() == expected[0]
    assert set(objects(slow)) == set(objects(plain))
    restored = fibkv.restore(model, IDS, slow, name=NAME)
    assert restored.restored is not None
    assert (restored.restored.tokens, restored.restored.failures) == (260, ())


def test_spans_and_ends_are_those_of_a_plain_save_bit_for_bit(model: Any) -> None:
    cache, plain, other = filled(model, 200), MemoryStore(), MemoryStore()
    saved = cache.save(plain, IDS[:, :200], name=NAME)
    with fibkv.Saver(other) as saver:
        assert saver.save(cache, IDS[:, :200], name=NAME).result(PATIENCE) == saved
    assert objects(other) == objects(plain)


def test_states_are_those_of_the_moment() -> None:
    model = tiny("Gemma3Text")
    ids = torch.randint(5, 60, (1, 100), generator=torch.Generator().manual_seed(1))
    slow, plain, cache = SlowStore(), MemoryStore(), fibkv.Cache(model, tokens_per_page=16)
    with torch.no_grad(), fibkv.attention(model), fibkv.Saver(slow) as saver:
        model(ids[:, :60], **with_cache(cache))
        saver.save(cache, ids[:, :60], name=NAME)
        cache.save(plain, ids[:, :60], name=NAME)
        model(ids[:, 60:], **with_cache(cache))
        slow.goes_on.set()
    assert saver.failures == []
    assert objects(slow) == objects(plain)


def test_few_wait_at_a_time(model: Any) -> None:
    slow, cache = SlowStore(), filled(model, 80)
    with fibkv.Saver(slow, most_waiting=2) as saver, ThreadPoolExecutor(1) as other:
        for _ in range(2):
            saver.save(cache, IDS[:, :80], name=NAME)
        third: Future[Future[Saved]] = other.submit(saver.save, cache, IDS[:, :80], name=NAME)
        with pytest.raises(NotYet):
            third.result(0.2)
        slow.goes_on.set()
        assert third.result(PATIENCE).result(PATIENCE).failure is None


def test_failures_are_told_and_do_not_stop_it(model: Any) -> None:
    failing = FailingStore(lambda operation, _: operation == "put")
    with fibkv.Saver(failing) as saver:
        results = [saver.save(filled(model, length), IDS[:, :length], name=NAME) for length in (80, 90)]
    assert [one.result().failure for one in results] == saver.failures
    assert len(saver.failures) == 2
    assert all("the disk is on fire" in failure for failure in saver.failures)


def test_a_page_that_is_damaged_meanwhile_is_not_written(model: Any) -> None:
    slow, cache = SlowStore(), filled(model, 200)
    with fibkv.Saver(slow) as saver, cache.corrupt_page(layer=0, row=0, page=1):
        future = saver.save(cache, IDS[:, :200], name=NAME)
        slow.goes_on.set()
        with pytest.raises(DigestMismatch):
            future.result(PATIENCE)
    assert "digest mismatch" in saver.failures[0]


def test_misuse_is_refused(model: Any) -> None:
    with pytest.raises(ContractError, match=r"Saver\.most_waiting"):
        fibkv.Saver(MemoryStore(), most_waiting=0)
    with pytest.raises(ContractError, match=r"Saver\.store: expected a store, .* got '~/kv'"):
        fibkv.Saver("~/kv")
    saver, cache = fibkv.Saver(MemoryStore()), filled(model, 80)
    with pytest.raises(ContractError, match="the ids of the 80 tokens held"):
        saver.save(cache, IDS[:, :79], name=NAME)
    with pytest.raises(ModelError, match="save"):
        saver.save(fibkv.Cache(model, pool=fibkv.Pool("1GiB")), IDS, name=NAME)
    saver.close()
    with pytest.raises(ContractError, match="one that is open"):
        saver.save(cache, IDS[:, :80], name=NAME)
    # One that was refused has not taken a place.
    assert saver.is_idle


PROGRAM = """
import sys, time, torch, fibkv
from fibkv import embedded
from fibkv.hf_argument import with_cache
from fibkv.store import DirectoryStore

class Slow(DirectoryStore):
    def put(self, key, data):
        time.sleep(0.1)
        super().put(key, data)

model = embedded.load()[0]
cache, ids = fibkv.Cache(model), torch.arange(3, 203)[None]
with torch.no_grad(), fibkv.attention(model):
    model(ids, **with_cache(cache))
fibkv.Saver(Slow(sys.argv[1])).save(cache, ids, name="embedded")
print("ends", flush=True)
"""


def test_a_process_that_ends_has_written_everything(model: Any, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "ends\n"
    assert "Error" not in done.stderr
    restored = fibkv.restore(model, torch.arange(3, 253)[None], DirectoryStore(tmp_path), name=NAME)
    assert restored.restored is not None
    assert (restored.restored.tokens, restored.restored.failures) == (200, ())


class Waits(StoppingCriteria):
    """Lets an answer go on from some token on only once a store has more spans than before."""

    def __init__(self, store: MemoryStore, tokens: int) -> None:
        self.store, self.tokens, self.spans = store, tokens, 0
        self.seen = Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        if input_ids.shape[1] == self.tokens:
            for _ in range(PATIENCE * 100):
                self.spans = len(list(self.store.list("spans")))
                if self.spans >= self.tokens // 64 - 2:
                    break
                self.seen.wait(0.01)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_session_saves_pages_while_it_answers(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    store, plain = MemoryStore(), MemoryStore()
    prompt = len(tokenizer(ASKED)["input_ids"])
    waits = Waits(store, prompt + 200)
    settings = {"max_new_tokens": 220, "min_new_tokens": 220, "do_sample": False}
    with fibkv.Session(model, tokenizer, store=store, name=NAME, background=True) as session:
        answer = session.ask(ASKED, stopping_criteria=[waits], **settings)
        assert waits.spans >= (prompt + 200) // 64 - 2 > prompt // 64
        second = session.ask("\n\nimport os", **GREEDY)
    assert session.failures == []
    other = fibkv.Session(model, tokenizer, store=plain, name=NAME)
    assert (answer, second) == (other.ask(ASKED, **settings), other.ask("\n\nimport os", **GREEDY))
    assert objects(store) == objects(plain)
    with pytest.raises(ContractError, match="a session that is open"):
        session.ask("x")


def test_a_session_answers_while_the_store_hangs_and_when_it_fails(loaded: tuple[Any, Any]) -> None:
    expected = fibkv.Session(*loaded).ask(ASKED, **GREEDY)
    slow = SlowStore()
    with fibkv.Session(*loaded, store=slow, name=NAME, background=True) as session:
        assert session.ask(ASKED, **GREEDY) == expected
        assert objects(slow) == {}
        slow.goes_on.set()
    assert session.failures == []
    assert len(objects(slow)) > 2
    with fibkv.Session(*loaded, store=FailingStore(lambda *_: True), name=NAME, background=True) as session:
        assert session.ask(ASKED, **GREEDY) == expected
    # Of restoring, of the pages of the prompt, and of the turn.
    assert len(session.failures) == 3
    assert all("the disk is on fire" in failure for failure in session.failures)
