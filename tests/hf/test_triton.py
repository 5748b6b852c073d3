"""A whole model on the Triton kernels, in Triton's interpreter: encoding, sealing, padding, steps of decoding."""

from __future__ import annotations

import pytest
import torch

import fibkv
from fibkv.hf_argument import with_cache
from fibkv.kernels import triton
from fibkv.regions import ProtectedRegions
from tests.codecs.conformance import HALVES
from tests.hf.models import build, prompt

pytestmark = pytest.mark.skipif(triton.why_not("cpu") != "yes", reason=f"triton: {triton.why_not('cpu')}")

POLICY = fibkv.Policy.per_token(ProtectedRegions(first_tokens_raw=4, last_tokens_raw=8))
PROMPT, PADDING, STEPS = 38, 11, 3


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize("sealed", ["at once", "offloaded"], indirect=True)
def test_steps_of_a_padded_batch() -> None:
    """The logits are those of the reference kernels, and so are the pages, of which one is sealed on the way."""
    model = build("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    ids = prompt(2, PROMPT + STEPS)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    caches, logits = {}, {}
    for implementation in ("reference", "triton"):
        cache = fibkv.Cache(model, profile="fib4", tokens_per_page=16, policy=POLICY, implementation=implementation)
        with fibkv.attention(model), torch.no_grad():
            model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], **with_cache(cache))
            steps = [
                model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], **with_cache(cache)).logits
                for at in range(PROMPT, PROMPT + STEPS)
            ]
        assert cache.report().layers[0].materialized == 0
        caches[implementation], logits[implementation] = cache, torch.cat(steps, 1)
    expected = logits["reference"]
    rms = float(expected.square().mean().sqrt())
    error = float((logits["triton"] - expected).square().mean().sqrt()) / rms
    assert error <= HALVES
    digests = [[page.digest for row in cache.layers[0].store.rows for page in row] for cache in caches.values()]
    assert len(digests[0]) == 4, "one page of each row is from the prompt, and one from a step"
    assert digests[0] == digests[1]
