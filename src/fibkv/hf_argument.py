"""What this release of transformers calls a model's cache: `cache`, or `past_key_values` before 5.24.

From 5.24 on the old name is answered with a warning, before it the new one with an error.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

_OLD_NAME = "past_key_values"


@cache
def cache_name() -> str:
    """The argument by which a model and its ``generate`` take a cache, and the field of their outputs."""
    # Not at the top: what measures caches is used without transformers too.
    from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: PLC0415

    return "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else _OLD_NAME


def with_cache(held: object) -> dict[str, Any]:
    """The argument that hands a cache to a model or to its ``generate``."""
    return {cache_name(): held}


def cache_in(options: dict[str, Any]) -> Any:
    """The cache among the arguments of such a call, by either name, else None."""
    return options.get(cache_name(), options.get(_OLD_NAME))


def cache_of(output: Any) -> Any:
    """The cache that a model returned."""
    return getattr(output, cache_name())
