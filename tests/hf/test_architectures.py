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

import fibkv
from fibkv import kernels
from fibkv.hf_argument import cache_name
from tests.hf.architectures import ARGUMENTS, is_known, tiny
from tests.hf.calls import Options, cache_for, generate, ids, logits_along
from tests.hf.oracle import dequantized_cache

# GPTBigCode in older releases.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TABLE = Path(__file__).parents[2] / "docs" / "MODELS.md"
# Sparse attention by an index, and position bias: refused under `fibkv.attention`, served without it.
WITHOUT_ATTENTION = {"DeepseekV32", "GlmMoeDsa", "Inkling2LoopText"}
# Before transformers 5.24 these had attention of their own, which decoded at every step.
NEWLY_ON_PAGES = {"CodeGen", "GPTJ"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_pages(name: str, model: tf.PreTrainedModel) -> AbstractContextManager[None]:
    return nullcontext() if name in WITHOUT_ATTENTION else fibkv.attention(model)


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


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if is_known(name)])
def test_tokens_are_those_of_the_dequantized_dense_cache(name: str) -> None:
    model = tiny(name)
    for way, options in ways().items():
        if way == "assisted" and model._is_stateful:
            continue  # transformers refuses it: states cannot be taken back
        expected = generate(model, dequantized_cache(model, "fib4"), options)
        cache = cache_for(model)
        with on_pages(name, model):
            actual = generate(model, cache, options)
        assert torch.equal(actual, expected), way
    found = row(model, cache)
    if name in NEWLY_ON_PAGES and cache_name() != "cache":
        found = found.replace("decoded at every step", "on pages")
    assert found in TABLE.read_text().splitlines()


@pytest.mark.parametrize("implementation", [name for name, reason in kernels.available().items() if reason == "yes"])
@pytest.mark.parametrize("name", ["DeepseekV3", "FalconH1", "Gemma2", "Gemma4Text", "GptOss", "Llama"])
def test_logits_of_every_kernel_implementation(name: str, implementation: str) -> None:
    """Along the same tokens. Integer arithmetic may differ by about 1 % of the attention's output."""
    model = tiny(name)
    steps = 2 if implementation == "triton" else 20  # in the interpreter a step takes seconds
    chunks = list(ids(1, 60 + steps).split([50, 10, *[1] * steps], 1))
    expected = logits_along(model, chunks, dequantized_cache(model, "fib4"))
    cache = cache_for(model, implementation)
    with fibkv.attention(model):
        actual = logits_along(model, chunks, cache)
    exact = logits_along(model, chunks, tf.DynamicCache(config=model.config))
    error, lost = ((other - expected).square().mean().sqrt() / expected.std() for other in (actual, exact))
    assert error < (1e-5 if implementation == "reference" else 0.03)
    assert lost > 5 * error, "the double has lost what the codec loses"


def row(model: tf.PreTrainedModel, cache: fibkv.Cache) -> str:
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
