"""The demonstration of memory pressure: many sequences of one model arrive into a pool that is too small for them.

Each brings a prompt and then takes its next tokens one by one, all of them from held-out text, so that what its cache
loses can be measured against one dense pass over the same tokens.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fibkv.errors import BudgetError, ContractError
from fibkv.hf import Cache
from fibkv.hf_argument import with_cache
from fibkv.hf_attention import attention
from fibkv.ladder import Ladder
from fibkv.machine import process_nbytes
from fibkv.policy import Policy
from fibkv.pool import Pool
from fibkv.pressure_result import PressureResult, PressureSettings, SequenceRow, Tick
from fibkv.quality import CausalLM, poison_filled
from fibkv.quality_result import PoisonOutcome
from fibkv.regions import ProtectedRegions
from fibkv.threads import torch_threads

# Many short sequences: pages and raw tails must be small beside them.
PAGE_TOKENS = 32
PROTECTED = ProtectedRegions(first_tokens_raw=4, last_tokens_raw=8)
# Old pages can afford the slow encoder of trellis codes: at two bits their KL is two thirds of FibQuant's.
LADDER = Ladder(q2=("trelliskey2", "trellis2"))

OnTick = Callable[[Tick], None]


def run_pressure(
    model: CausalLM, tokenizer: Any, text: str, *, name: str, settings: PressureSettings, on_tick: OnTick
) -> PressureResult:
    """Lets sequences arrive, and measures.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        text: that the sequences are cut from.
        name: of the model, for the result.
        settings: how many of what.
        on_tick: told of each tick.

    Raises:
        ContractError: the text is shorter than a sequence.
    """
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    if len(ids) < settings.tokens:
        raise ContractError("text", f"at least {settings.tokens} tokens", len(ids))
    with torch_threads(settings.num_threads), torch.no_grad():
        return _Run(model, ids, name, settings, on_tick).result()


class _Sequence:
    """One sequence, from its arrival on."""

    def __init__(self, index: int, ids: Tensor) -> None:
        self.index = index
        self.ids = ids
        self.cache: Cache | None = None
        self.logits: list[Tensor] = []
        self.materialized = 0

    def begin(self, model: CausalLM, pool: Pool, prompt_tokens: int) -> None:
        """Reads the prompt into a cache of the pool.

        Raises:
            BudgetError: there is no room; it holds nothing then.
        """
        policy = Policy.per_token(PROTECTED)
        cache = Cache(model, pool=pool, tokens_per_page=PAGE_TOKENS, policy=policy)
        out = model(self.ids[None, :prompt_tokens], **with_cache(cache), logits_to_keep=1)
        self.cache, self.logits = cache, [out.logits[0, -1]]

    def advance(self, model: CausalLM) -> None:
        """Takes one token.

        Raises:
            BudgetError: there is no room; the sequence is as it was.
        """
        self.filled.reserve(1)
        length = self.filled.get_seq_length()
        self.logits.append(model(self.ids[None, length : length + 1], **with_cache(self.filled)).logits[0, -1])

    @property
    def filled(self) -> Cache:
        """The cache of a live sequence."""
        assert self.cache is not None
        return self.cache

    @property
    def is_done(self) -> bool:
        """Whether it has all of its tokens."""
        return self.cache is not None and self.cache.get_seq_length() == len(self.ids)

    def end(self) -> None:
        """Gives its cache up."""
        if self.cache is not None:
            self.materialized = self.cache.report().materialized
        self.cache = None

    def row(self, model: CausalLM, finished: bool) -> SequenceRow:
        """What became of it."""
        if not finished:
            return SequenceRow(index=self.index, finished=False, kl=None, top1=None, materialized=self.materialized)
        got = torch.stack(self.logits).double().log_softmax(-1)
        dense = model(self.ids[None], use_cache=False, logits_to_keep=len(got)).logits[0].double().log_softmax(-1)
        kl = (dense.exp() * (dense - got)).sum(-1).mean()
        top1 = (dense.argmax(-1) == got.argmax(-1)).double().mean()
        return SequenceRow(
            index=self.index, finished=True, kl=float(kl), top1=float(top1), materialized=self.materialized
        )


class _Run:
    def __init__(self, model: CausalLM, ids: Tensor, name: str, settings: PressureSettings, on_tick: OnTick) -> None:
        self.model, self.name, self.settings, self.on_tick = model, name, settings, on_tick
        chance = random.Random(settings.seed)
        starts = [chance.randrange(len(ids) - settings.tokens + 1) for _ in range(settings.sequences)]
        self.coming = deque(_Sequence(i, ids[start : start + settings.tokens]) for i, start in enumerate(starts))
        self.waiting: deque[_Sequence] = deque()
        self.live: list[_Sequence] = []
        self.done: list[_Sequence] = []
        self.refused: list[_Sequence] = []
        self.ticks: list[Tick] = []
        self.step_seconds: list[float] = []
        self.stalled = 0
        self.poison: PoisonOutcome | None = None
        dense_nbytes, self.page_nbytes, self.layers = _sizes(model)
        self.pool = Pool(settings.fits * settings.tokens * dense_nbytes, ladder=LADDER)

    def result(self) -> PressureResult:
        started = perf_counter()
        with attention(self.model):
            while self.coming or self.waiting or self.live:
                self._tick()
                self._note(perf_counter() - started)
        rows = [one.row(self.model, finished=True) for one in self.done]
        rows += [one.row(self.model, finished=False) for one in self.refused]
        budget = self.pool.stats().budget
        assert budget is not None
        return PressureResult(
            model=self.name,
            settings=self.settings,
            budget=budget,
            page_nbytes=self.page_nbytes,
            layers=self.layers,
            sequences=tuple(sorted(rows, key=lambda row: row.index)),
            ticks=tuple(self.ticks),
            step_seconds=median(self.step_seconds) if self.step_seconds else 0.0,
            seconds=perf_counter() - started,
            poison=self.poison,
        )

    def _tick(self) -> None:
        arrived = int((len(self.ticks) + 1) * self.settings.arrivals) - int(len(self.ticks) * self.settings.arrivals)
        for _ in range(min(arrived, len(self.coming))):
            self.waiting.append(self.coming.popleft())
        moved = self._admit()
        self.stalled = 0
        for sequence in list(self.live):
            moved |= self._advance(sequence)
        if not moved and self.live and not self.coming:
            # All wait for each other. The last one to come gives way: it starts again, or is refused.
            self._give_way(self.live.pop())
        elif not moved and not self.live and not self.coming and self.waiting:
            self.refused.append(self.waiting.popleft())  # it does not even fit alone

    def _admit(self) -> bool:
        """Begins those that wait, in order, as far as they fit; returns whether any has begun."""
        begun = False
        while self.waiting:
            sequence = self.waiting.popleft()
            try:
                sequence.begin(self.model, self.pool, self.settings.prompt_tokens)
            except BudgetError:
                self._give_way(sequence)
                if self.settings.waits:
                    break
            else:
                self.live.append(sequence)
                begun = True
        return begun

    def _advance(self, sequence: _Sequence) -> bool:
        started = perf_counter()
        try:
            sequence.advance(self.model)
        except BudgetError:
            self.stalled += 1
            return False
        self.step_seconds.append(perf_counter() - started)
        if sequence.is_done:
            if self.live == [sequence] and not self.waiting and not self.coming:
                # The last one: its forks have room, and cost no other sequence a page.
                self.poison = poison_filled(self.model, sequence.filled, sequence.ids[-1:])
            sequence.end()
            self.live.remove(sequence)
            self.done.append(sequence)
        return True

    def _give_way(self, sequence: _Sequence) -> None:
        sequence.end()
        if self.settings.waits:
            self.waiting.appendleft(sequence)
        else:
            self.refused.append(sequence)

    def _note(self, seconds: float) -> None:
        tick = Tick(
            tick=len(self.ticks),
            seconds=seconds,
            live=len(self.live),
            waiting=len(self.waiting),
            finished=len(self.done),
            refused=len(self.refused),
            stalled=self.stalled,
            process_nbytes=process_nbytes(),
            pool=self.pool.stats(),
        )
        self.ticks.append(tick)
        self.on_tick(tick)


def _sizes(model: CausalLM) -> tuple[int, int, int]:
    """At 16 bits, bytes of one token in all layers and of one page in one layer; and the number of layers."""
    cache = Cache(model, bits=16, raw_dtype="f16")
    model(torch.zeros(1, 1, dtype=torch.long), **with_cache(cache))
    report = cache.report()
    per_token = 2 * report.elements
    layers = sum(layer.compressed for layer in report.layers)
    return per_token, PAGE_TOKENS * per_token // layers, layers
