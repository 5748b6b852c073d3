"""Prompts of `generate` on a filled cache: two kinds that transformers takes without an error and answers wrongly.

It slices what the cache holds off a prompt. Where nothing is left, it feeds the whole prompt again, behind itself.
And assisted decoding does not slice at all. Neither a cache nor an attention function can tell such a call from a
right one, since only `generate` knows the prompt: so this is where it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fibkv.errors import ModelError
from fibkv.hf_argument import cache_in
from fibkv.hf_layer import CompressedLayer

_LOCK = Lock()
_ASSISTANCE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@contextmanager
def checked_prompts(model: PreTrainedModel) -> Iterator[None]:
    """Has `check_prompt` look at every ``model.generate`` while the context lasts. A model may have none."""
    if not hasattr(model, "generate"):
        yield
        return
    with _LOCK:
        checked = vars(model).get("generate")
        if not isinstance(checked, _CheckedGenerate):
            checked = _CheckedGenerate(model)
            # On this object only: the class, and other models of it, are as they were.
            vars(model)["generate"] = checked
        checked.contexts += 1
    try:
        yield
    finally:
        with _LOCK:
            checked.contexts -= 1
            if not checked.contexts:
                checked.leave()


class _CheckedGenerate:
    """In place of ``model.generate`` while at least one context lasts: they may overlap in threads."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.contexts = 0
        self._model = model
        self._inherited: Any = model.generate
        self._replaced = vars(model).get("generate")

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        check_prompt(self._model, inputs, kwargs)
        return self._inherited(inputs, *args, **kwargs)

    def leave(self) -> None:
        """Gives the model back what it had."""
        del vars(self._model)["generate"]
        if self._replaced is not None:
            vars(self._model)["generate"] = self._replaced


def check_prompt(model: PreTrainedModel, inputs: Tensor | None, options: dict[str, Any]) -> None:
    """Refuses a prompt that a filled cache cannot go on with.

    Args:
        model: whose ``generate`` is called.
        inputs: its first argument, token ids ``[B, tokens]``.
        options: its further arguments.

    Raises:
        ModelError: what is wrong, and what to do instead.
    """
    held = max(
        (
            layer.get_seq_length()
            for layer in getattr(cache_in(options), "layers", ())
            if isinstance(layer, CompressedLayer)
        ),
        default=0,
    )
    tokens = _num_tokens(inputs, options)
    if not held or tokens is None:
        return
    if _is_assisted(model, options):
        raise ModelError(
            f"generate: the cache holds {held} tokens, but assisted decoding feeds the whole prompt again: "
            "give it an empty cache"
        )
    mask = options.get("attention_mask")
    covered = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else tokens
    if covered == tokens and tokens <= held:
        raise ModelError(
            f"generate: the cache holds {held} tokens and the prompt has {tokens}: nothing is left to compute; "
            f"cache.crop_to({tokens - 1}) first, or pass new tokens with a mask over old and new ones"
        )
    if covered not in (tokens, held + tokens):
        raise ModelError(
            f"generate: expected an attention mask over {tokens} tokens of a whole prompt, or over {held + tokens} for "
            f"new ones behind the {held} of the cache; got {covered}"
        )


def _num_tokens(inputs: Tensor | None, options: dict[str, Any]) -> int | None:
    given = (inputs, options.get("inputs"), options.get("input_ids"), options.get("inputs_embeds"))
    return next((tensor.shape[1] for tensor in given if isinstance(tensor, Tensor)), None)


def _is_assisted(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    config = options.get("generation_config") or model.generation_config
    return any(options.get(name, getattr(config, name, None)) is not None for name in _ASSISTANCE)
