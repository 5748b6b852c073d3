from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fibkv import embedded


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The embedded model's tensors are so small that on a busy machine threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    """The embedded model and its tokenizer."""
    return embedded.load()


@pytest.fixture(scope="session")
def model(loaded: tuple[Any, Any]) -> Any:
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


@pytest.fixture(scope="session")
def text() -> str:
    return embedded.heldout_text()
