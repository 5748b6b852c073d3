"""What is forecast from a configuration is what a real cache reports after a prompt, in every field."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers as tf

import fibkv
from fibkv.errors import ModelError
from fibkv.forecast import page_nbytes
from fibkv.hf_argument import with_cache
from fibkv.hf_forecast import CacheForecast, ShapeProbe
from fibkv.parameters import FibParameters
from fibkv.policy import Policy
from fibkv.regions import ProtectedRegions
from tests.hf.architectures import ARGUMENTS, is_known, tiny
from tests.pages.helpers import HEADS, layer_settings

# GPTBigCode in older releases.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

# Full attention; windows and chunks; shared layers; latents; an index; states beside and inside attention layers.
ARCHITECTURES = [
    "Llama", "GPTBigCode", "Qwen3Moe", "Falcon", "Gemma2", "GptOss", "Llama4Text", "Gemma3nText", "Gemma4Text",
    "DeepseekV3", "DeepseekV32", "Bamba", "FalconH1", "Lfm2", "Qwen3Next", "Zamba2",
]  # fmt: skip
CASES = [(1, 10), (2, 64), (1, 129), (3, 333)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(model: object, batch: int, tokens: int, **options: object) -> None:
    probe = ShapeProbe(model.config, model.dtype)  # type: ignore[attr-defined]
    forecast = CacheForecast(fibkv.Cache(model.config, **options), probe)  # type: ignore[arg-type, attr-defined]
    cache = fibkv.Cache(model, **options)  # type: ignore[arg-type]
    prompt = torch.randint(2, 199, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        model(prompt, **with_cache(cache), use_cache=True)  # type: ignore[operator]
    assert forecast.report(batch, tokens) == cache.report()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if is_known(name)])
def test_every_field_of_the_report_is_forecast(name: str) -> None:
    model = tiny(name)
    for batch, tokens in CASES:
        check(model, batch, tokens, profile="fib4")
    check(model, 2, 200, profile=("int8", "fib2"), implementation="reference")


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if is_known(name) and name not in ARCHITECTURES])
def test_the_other_architectures(name: str) -> None:
    check(tiny(name), 2, 150, profile="fib4")


CENTERED = FibParameters.of(16, 2, 64, centered=True)


PROFILES = ("raw", "int8", "fp8", "fib4", "fib3", "fib2", "trellis2", ("fib4", "raw"), (CENTERED, "fib3"))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_every_level(profile: object, implementation: str) -> None:
    model = tiny("Llama", torch.bfloat16)
    for batch, tokens in CASES:
        check(model, batch, tokens, profile=profile, implementation=implementation)


@pytest.mark.parametrize(
    "protected",
    [
        ProtectedRegions(),
        ProtectedRegions(first_tokens_raw=100, last_tokens_raw=5),
        ProtectedRegions(first_tokens_raw=4, last_tokens_raw=64, raw_layers=(1,), raw_heads=(0,)),
    ],
)
def test_protected_regions_count(protected: ProtectedRegions) -> None:
    model = tiny("Llama")
    for strategy in ("fib_quant_per_token", "fib_quant_per_channel"):
        policy = Policy.per_token(protected).model_copy(update={"strategy": strategy})
        for batch, tokens in CASES:
            check(model, batch, tokens, profile="fib4", policy=policy, tokens_per_page=32)


def test_grains_that_are_not_full_are_slack() -> None:
    model = tiny("Llama", num_hidden_layers=3)
    check(model, 40, 192, profile="fib4")
    check(model, 40, 192, profile="raw")


def test_weights_are_those_of_the_model() -> None:
    for name in ("Llama", "Gemma2"):
        model = tiny(name)
        tensors = (*model.parameters(), *model.buffers())
        expected = sum(t.nbytes for t in {id(t): t for t in tensors}.values())
        assert ShapeProbe(model.config, torch.float32).weights_nbytes == expected


def test_a_model_that_needs_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: object, input_ids: torch.Tensor, **kwargs: object) -> object:
        return input_ids.max().item()

    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", forward)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: its forward needs data, .* load it .*item\(\)"):
        ShapeProbe(tiny("Llama").config)


def test_the_configuration_is_left_as_it_was() -> None:
    config = tiny("GPT2").config
    before = config.to_dict()
    ShapeProbe(config, torch.bfloat16)
    assert config.to_dict() == before


def test_a_page_on_a_device_fills_a_block() -> None:
    settings = layer_settings("fib4", "int8")
    codes = sum(coder.compressing.encoded_nbytes(HEADS, 16) for coder in (settings.keys, settings.values))
    assert codes % 512
    on_cpu, elsewhere = (page_nbytes(settings, 64, 16, torch.device(name)) for name in ("cpu", "meta"))
    assert on_cpu == 64 + codes
    assert elsewhere == 64 + -(-codes // 512) * 512
