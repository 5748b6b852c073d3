"""Trying again what a network may have spoiled for a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

Answer = TypeVar("Answer")

# Pauses are random, up to 50 ms at first, then up to twice as much, never longer than this.
LONGEST_PAUSE_SECONDS = 1.0


class Retries:
    """Calls a function until it answers, a few times at most.

    Args:
        attempts: at most, the first one included.
        is_transient: whether an error is worth another attempt; others are raised at once, and so is the last one.
    """

    def __init__(self, attempts: int, is_transient: Callable[[BaseException], bool]) -> None:
        self._retrying = Retrying(
            stop=stop_after_attempt(attempts),
            wait=wait_random_exponential(multiplier=0.05, max=LONGEST_PAUSE_SECONDS),
            # An interrupt is no error of the store.
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and is_transient(error)),
            reraise=True,
        )

    def __call__(self, function: Callable[..., Answer], *args: object) -> Answer:
        """The function's answer."""
        return self._retrying.copy()(function, *args)
