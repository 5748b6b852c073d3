from __future__ import annotations

from typing import Any

import pytest
import torch

from fibkv.bench_forms import PagedForm
from fibkv.bench_settings import (
    LEAST_CONTEXT,
    QUICK_KERNELS,
    QUICK_STEPS,
    KernelSettings,
    PrefillSettings,
    StepSettings,
    profile_choice,
)
from fibkv.contract import Contract
from fibkv.errors import ContractError


@pytest.mark.parametrize("settings", [KernelSettings(), StepSettings(), PrefillSettings(), QUICK_KERNELS, QUICK_STEPS])
def test_settings_round_trip_through_json(settings: Contract) -> None:
    assert type(settings).from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"query_heads": 12}, "query_heads: expected a multiple of 8 KV heads, got 12"),
        ({"contexts": (4096, 127)}, "contexts: expected numbers of tokens from 128 upwards"),
        ({"contexts": ()}, "contexts: expected numbers of tokens"),
        ({"profiles": ("fib4", "fib5")}, "profiles: expected different names of raw, int8"),
        ({"profiles": ("fib4", "fib4")}, "profiles: expected different names"),
        ({"profiles": ("fib4/fib2/fib2",)}, "profiles: expected different names"),
        ({"profiles": ()}, "profiles: expected different names"),
        (
            {"head_dim": 70, "profiles": ("fib4", "int8/fib2")},
            r"profiles: expected codecs whose block_dim divides head_dim 70, got \['fib2'\]",
        ),
        ({"implementations": ()}, 'implementations: expected "auto" or names'),
        ({"rounds": 0}, "rounds: expected greater than 0"),
    ],
)
def test_kernel_refusals(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ContractError, match=match):
        KernelSettings(**options)


@pytest.mark.parametrize("settings", [StepSettings, PrefillSettings])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"query_heads": 12}, "query_heads: expected a multiple of 8 KV heads, got 12"),
        ({"context": 127}, "context: expected at least 128 tokens, got 127"),
        ({"profiles": ("fib4/",)}, "profiles: expected different names"),
    ],
)
def test_model_refusals(settings: type[Contract], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ContractError, match=match):
        settings(**options)


def test_a_profile_is_a_name_or_a_pair() -> None:
    assert profile_choice("fib4") == "fib4"
    assert profile_choice("int8/fib4") == ("int8", "fib4")


def test_the_least_context_seals_a_page() -> None:
    """What the constant promises, from the default policy and the default page size."""

    vectors = torch.randn(1, 1, LEAST_CONTEXT, 64).bfloat16()
    assert len(PagedForm.fill(vectors, vectors, "int8", 1).first.rows[0]) == 1
    fewer = vectors[:, :, 1:]
    assert len(PagedForm.fill(fewer, fewer, "int8", 1).first.rows[0]) == 0
