"""Which attention a model uses while contexts last, nested or side by side in threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from weakref import WeakKeyDictionary

from transformers import PretrainedConfig, PreTrainedModel


@dataclass(eq=False, slots=True)
class _Context:
    """One context that lasts, with the attention that it asked for."""

    name: str


@dataclass(slots=True)
class _Switched:
    """A model in at least one context: its configurations as they were before, and the contexts, the newest last."""

    before: list[tuple[PretrainedConfig, str | None]]
    contexts: list[_Context] = field(default_factory=list)


_LOCK = RLock()
_SWITCHED: WeakKeyDictionary[PreTrainedModel, _Switched] = WeakKeyDictionary()


@contextmanager
def switched(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switches a model and its parts to the attention registered under a name while the context lasts.

    Of several contexts the one that was entered last decides. When the last one ends the model is as it was before
    the first.
    """
    context = _Context(name)
    with _LOCK:
        held = _SWITCHED.setdefault(model, _Switched([(one, one._attn_implementation) for one in _configs(model)]))
        held.contexts.append(context)
    try:
        with _LOCK:
            model.set_attn_implementation(name)
        yield
    finally:
        with _LOCK:
            held.contexts.remove(context)
            _settle(model, held)


def _settle(model: PreTrainedModel, held: _Switched) -> None:
    """Gives a model the attention of its newest context, or the one that it had before all of them."""
    if held.contexts:
        model.set_attn_implementation(held.contexts[-1].name)
        return
    del _SWITCHED[model]
    # Wholes come before their parts: setting one sets its parts too.
    for config, implementation in held.before:
        config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Every configuration that the switch may touch, wholes before their parts."""
    modules = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    found = {id(config): config for module in modules for config in _with_parts(module.config)}
    return list(found.values())


def _with_parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _with_parts(part)
