"""`fibkv.Session`: a conversation whose cache is kept between turns and, with a store, between processes."""

from __future__ import annotations

from typing import Any, Self

import torch

from fibkv.errors import ContractError, ModelError
from fibkv.hf import Cache
from fibkv.hf_argument import cache_in, with_cache
from fibkv.hf_attention import attention
from fibkv.hf_restore import restore
from fibkv.hf_saver import Saver, SavesPages
from fibkv.prefix_load import Restored
from fibkv.store.base import Store, check_store

_ROWS = ("num_beams", "num_return_sequences")


class Session:
    """A conversation with a model, one turn after another. A turn computes only what no turn before it has computed.

    With a store, every turn is saved, and the first turn of a new session begins with what any session with an equal
    beginning has left there: a conversation that is taken up again, a system prompt that others share. A store that
    fails costs time, never an answer: see `failures`.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: of the model. With a chat template, texts are the user's messages; without, they are appended to
            what was said before as they are.
        system: a first message of the system; needs a chat template.
        store: where turns are saved; None = nowhere.
        name: of the model's weights, see `Cache.save`.
        background: turns are saved by a worker (`fibkv.Saver`), full pages while the answer is still being generated.
            `close`, or the end of a ``with`` block, waits for it; so does the end of the process.
        settings: of `fibkv.Cache`.

    Attributes:
        messages: roles and contents of the conversation.
        cache: of the newest turn; None before the first and after one that failed.
        reused_tokens: of the newest turn's prompt, how many were not computed.
        restored: what the store had for the first turn.
        failures: what the store could not do, one line each.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        store: Store | None = None,
        name: str | None = None,
        background: bool = False,
        **settings: Any,
    ) -> None:
        if store is not None:
            check_store("Session.store", store)
        if system is not None and not tokenizer.chat_template:
            raise ContractError("Session.system", "a tokenizer with a chat template", type(tokenizer).__name__)
        self.model = model
        self.tokenizer = tokenizer
        self.store = store
        self.name = name
        self.settings = settings
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.cache: Cache | None = None
        self.reused_tokens = 0
        self.restored: Restored | None = None
        self._saver = Saver(store) if background and store is not None else None
        self.failures: list[str] = [] if self._saver is None else self._saver.failures
        # All that was said, prompt and answers, as the model saw it.
        self._ids: list[int] = []

    def ask(self, text: str, **generation: Any) -> str:
        """One turn: the model's answer to a text.

        Args:
            text: the user's message.
            **generation: for ``model.generate``; one sequence at a time.

        Raises:
            ContractError: settings that ask for several rows, or that `fibkv.Cache` refuses; the session is closed.
            ModelError: a model that `fibkv.Cache` refuses.
        """
        config = generation.get("generation_config") or self.model.generation_config
        if any((generation.get(name, getattr(config, name, None)) or 1) != 1 for name in _ROWS):
            raise ContractError("Session.ask", f"one row: {', '.join(_ROWS)} of 1", generation)
        if cache_in(generation) is not None:
            raise ContractError("Session.ask", "no cache beside its own", sorted(generation))
        if self._saver is not None and self._saver.is_closed:
            raise ContractError("Session.ask", "a session that is open", "one that is closed")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages, text)
        cache, self.cache = self._begin(prompt), None  # what a failed turn leaves in it is not known
        self.reused_tokens = cache.get_seq_length()
        if self._saver is not None:
            following = SavesPages(self._saver, cache, self.name)
            generation["stopping_criteria"] = [*generation.get("stopping_criteria", ()), following]
        ids = torch.tensor([prompt], device=self.model.device)
        with torch.no_grad(), attention(self.model):
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **with_cache(cache), **generation)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        self.cache, self._ids = cache, sequences[0].tolist()
        answer = str(self.tokenizer.decode(self._ids[len(prompt) :], skip_special_tokens=True))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._save(cache)
        return answer

    def close(self) -> None:
        """Waits until all turns are saved; one that saves them in the background takes no more."""
        if self._saver is not None:
            self._saver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prompt(self, messages: list[dict[str, str]], text: str) -> list[int]:
        if self.tokenizer.chat_template:
            found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            return list(found["input_ids"])
        return [*self._ids, *self.tokenizer(text, add_special_tokens=not self._ids)["input_ids"]]

    def _begin(self, prompt: list[int]) -> Cache:
        """The cache that a turn goes on with: that of the last one as far as the prompt repeats it, or a stored one."""
        if self.cache is not None:
            held = self.cache.get_seq_length()
            common = next((i for i, (a, b) in enumerate(zip(self._ids[:held], prompt, strict=False)) if a != b), held)
            try:
                self.cache.crop_to(min(common, len(prompt) - 1))
            except ModelError:
                # States cannot be taken back.
                return Cache(self.model, **self.settings)
            return self.cache
        if self.store is None:
            return Cache(self.model, **self.settings)
        cache = restore(self.model, prompt, self.store, name=self.name, **self.settings)
        self.restored = cache.restored
        self.failures += self.restored.failures if self.restored else ()
        return cache

    def _save(self, cache: Cache) -> None:
        if self.store is None:
            return
        try:
            if self._saver is not None:
                self._saver.save(cache, self._ids, name=self.name)
            elif (failure := cache.save(self.store, self._ids, name=self.name).failure) is not None:
                self.failures.append(failure)
        except ModelError as error:  # windows and states
            self.failures.append(str(error))
