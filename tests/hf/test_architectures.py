"""Every architecture: generation on pages gives the tokens of the dequantized dense cache, in every way to generate.

`docs/MODELS.md` says what becomes of each of them; it is held to what is found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

import fibkv
from fibkv.regions import ProtectedRegions
from tests.hf.architectures import ARGUMENTS, is_known, tiny
from tests.hf.oracle import FIRST, LAST, PAGE, dequantized_cache

TABLE = Path(__file__).parents[2] / "docs" / "MODELS.md"
POLICY = fibkv.Policy.per_token(ProtectedRegions(first_tokens_raw=FIRST, last_tokens_raw=LAST))
# Sparse attention by an index: refused under `fibkv.attention`, served without it.
WITHOUT_ATTENTION = {"DeepseekV32", "GlmMoeDsa"}
NEW = 14

Options = dict[str, object]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cache_for(model: tf.PreTrainedModel, implementation: str = "reference", profile: str = "fib4") -> fibkv.Cache:
    return fibkv.Cache(model, profile=profile, policy=POLICY, tokens_per_page=PAGE, implementation=implementation)


def on_pages(name: str, model: tf.PreTrainedModel) -> AbstractContextManager[None]:
    return nullcontext() if name in WITHOUT_ATTENTION else fibkv.attention(model)


def ids(batch: int = 1, tokens: int = 60, seed: int = 0) -> Tensor:
    """Token ids ``[batch, tokens]``, none of them the padding token."""
    return torch.randint(2, 199, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded() -> Options:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :23] = 0
    return {"inputs": ids(2) * mask, "attention_mask": mask}


def ways() -> dict[str, Options]:
    """Names the ways to generate, with what `generate` is called with."""
    return {
        "greedy": {"inputs": ids(), "prefill_chunk_size": 33},
        "padded": left_padded(),
        "beams": {**left_padded(), "num_beams": 3},
        "sampled": {"inputs": ids(), "do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
        # Repetition gives the look-up something to draft from, right and wrong.
        "assisted": {"inputs": ids(1, 12).repeat(1, 5), "prompt_lookup_num_tokens": 5},
    }


def generate(model: tf.PreTrainedModel, cache: object, options: Options) -> Tensor:
    torch.manual_seed(5)
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, **options}, past_key_values=cache)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_tokens_are_those_of_the_dequantized_dense_cache(name: str) -> None:
    if not is_known(name):
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    model = tiny(name)
    for way, options in ways().items():
        if way == "assisted" and model._is_stateful:
            continue  # transformers refuses it: states cannot be taken back
        expected = generate(model, dequantized_cache(model, "fib4"), options)
        cache = cache_for(model)
        with on_pages(name, model):
            actual = generate(model, cache, options)
        assert torch.equal(actual, expected), way
    assert row(name, model, cache) in TABLE.read_text().splitlines()


def row(name: str, model: tf.PreTrainedModel, cache: fibkv.Cache) -> str:
    """The architecture's line in `docs/MODELS.md`, from the report of a cache that was used."""
    layers = [layer for layer in cache.report().layers if layer.nbytes]
    compressed = [layer for layer in layers if layer.compressed]
    what = "latents" if any("latents" in layer.reason for layer in compressed) else "keys and values"
    where = "all layers" if len(compressed) == len(layers) else "the full-attention layers"
    reads = "decoded at every step" if any(layer.materialized for layer in compressed) else "on pages"
    cells = (
        f"`{model.config.model_type}`",
        f"{what} of {where}" if compressed else "nothing",
        reads if compressed else "transformers' own",
        "; ".join({layer.reason: None for layer in layers if not layer.compressed}) or "-",
    )
    return f"| {' | '.join(cells)} |"
