"""What cannot be right is refused before the first token, with what to do instead; what cannot be known is noticed."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf

import fibkv
from fibkv.errors import ContractError, DecisionError, ModelError
from fibkv.handle import Handle
from fibkv.hf_argument import with_cache
from fibkv.hf_attention import ATTENTION_NAME, attention_forward
from fibkv.parameters import FibParameters
from tests.hf.architectures import COMMON, tiny
from tests.hf.calls import cache_for, generate, ids, logits_along
from tests.hf.oracle import dequantized_cache


class TestAtConstruction:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        config = tf.LlamaConfig(**COMMON, dtype=dtype)
        with pytest.raises(ModelError, match=rf"LlamaConfig: expected float16, .* got {dtype}; convert it"):
            fibkv.Cache(config)

    def test_the_dtype_of_a_model_is_that_of_its_weights(self) -> None:
        model = tiny("Llama", torch.float64)
        with pytest.raises(ModelError, match=r"LlamaForCausalLM: expected .* got torch\.float64"):
            fibkv.Cache(model)
        assert fibkv.Cache(model.to(torch.float16)).get_seq_length() == 0

    def test_head_dims(self) -> None:
        with pytest.raises(ContractError, match=r"a head_dim of the model \(16\) for keys, got 128"):
            fibkv.Cache(tiny("Llama"), profile=FibParameters.of(128, 2, 16))
        # The latents of DeepSeek are as wide as their rank, not as a head.
        latent = FibParameters.of(32, 2, 16)
        assert fibkv.Cache(tiny("DeepseekV3"), profile=(latent, "raw")).get_seq_length() == 0
        strict = fibkv.Policy.per_token().model_copy(update={"allow_raw_fallback": False})
        with pytest.raises(DecisionError, match="keys: blocks of 8 do not divide a head_dim"):
            fibkv.Cache(tf.LlamaConfig(**{**COMMON, "head_dim": 20}), bits=1, policy=strict)

    def test_unknown_layer_kinds(self) -> None:
        config = tiny("Llama").config
        config.layer_types = ["full_attention", "telepathy"]
        with pytest.raises(ModelError, match="layer kind 'telepathy' has no cache class in this release"):
            fibkv.Cache(config)

    def test_models_with_a_cache_of_their_own(self) -> None:
        config = tf.MiniMaxConfig(
            **{**COMMON, "head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1},
            layer_types=["linear_attention", "full_attention"],
        )
        model = tf.AutoModelForCausalLM.from_config(config)
        with pytest.raises(ModelError, match="MiniMaxForCausalLM: it works with a cache class of its own only"):
            fibkv.Cache(model)

    def test_heads_of_a_latent_layer(self) -> None:
        regions = fibkv.ProtectedRegions(raw_heads=(1,))
        with pytest.raises(ContractError, match="raw_heads: expected indices below 1"):
            fibkv.Cache(tiny("DeepseekV3"), policy=fibkv.Policy.per_token(regions))

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"pool": "64MiB"}, r"Cache\.pool: expected a fibkv\.Pool, got '64MiB'"),
            ({"layer_profiles": [("fib4", "fib4")]}, r"Cache\.layer_profiles: expected pairs of codecs by layer index"),
            ({"calibration": "/"}, "calibration /: expected a safetensors file, got 'a directory'"),
        ],
    )
    def test_settings_of_another_type(self, settings: dict[str, object], match: str) -> None:
        with pytest.raises(ContractError, match=match):
            fibkv.Cache(tiny("Llama"), **settings)

    def test_a_wrapped_model_says_how_to_unwrap_it(self) -> None:
        class Adapted(torch.nn.Module):
            def get_base_model(self) -> torch.nn.Module:
                raise NotImplementedError

        with pytest.raises(ModelError, match=r"got Adapted; unwrap it by its get_base_model\(\)"):
            fibkv.Cache(Adapted())


class TestSteps:
    def test_a_model_of_more_layers(self) -> None:
        cache, larger = fibkv.Cache(tiny("Llama")), tiny("Llama", num_hidden_layers=3)
        with pytest.raises(ModelError, match="cache of 2 layers: got keys of layer 2: it was made for another model"):
            larger(ids(), **with_cache(cache))

    @pytest.mark.parametrize(("length", "error"), [(-1, ModelError), (2.5, TypeError), ("3", TypeError)])
    def test_a_length_that_is_none(self, length: object, error: type[Exception]) -> None:
        cache = fibkv.Cache(tiny("Llama"))
        states = torch.ones(1, 2, 5, 16)
        for index in range(2):
            cache.update(states, states, index)
        with pytest.raises(error):
            cache.crop_to(length)  # type: ignore[arg-type]
        with pytest.raises(error):
            cache.crop(length if error is TypeError else 1)  # type: ignore[arg-type]
        assert cache.get_seq_length() == 5


class TestLayersThatStay:
    def test_classes_that_fibkv_does_not_know_are_left_alone(self) -> None:
        """A model's own subclass of DynamicLayer may mean something else by its keys, or add state."""

        class Peculiar(tf.cache_utils.DynamicLayer):
            _layer_type = "peculiar"

        try:
            config = tiny("Llama").config
            config.layer_types = ["full_attention", "peculiar"]
            report = fibkv.Cache(config).report()
        finally:
            del tf.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["peculiar"]
        assert [layer.compressed for layer in report.layers] == [True, False]
        assert report.layers[1].reason == "a cache class of the model's own"

    def test_their_crop_is_trusted_only_if_it_is_theirs(self) -> None:
        class Stateful(tf.cache_utils.DynamicLayer):
            pass

        cache = fibkv.Cache(tiny("Llama"))
        cache.layers[1] = Stateful()
        states = torch.ones(1, 2, 5, 16)
        for index in range(2):
            cache.update(states, states, index)
        with pytest.raises(ModelError, match="Stateful keeps state that its crop does not know of"):
            cache.crop(-1)
        assert [layer.get_seq_length() for layer in cache.layers] == [5, 5]

    def test_latents_are_compressed_and_rotary_keys_kept(self) -> None:
        model = tiny("DeepseekV3")
        cache = cache_for(model)
        with torch.no_grad():
            model(ids(), **with_cache(cache))
            model(ids(1, 1), **with_cache(cache))
        layer = cache.layers[0].store
        assert (layer.tail.keys.shape[-1], layer.tail.values.shape[-1]) == (32, 8)
        page = layer.rows[0][-1]
        assert [segment.codec.name for segment in page.keys] == ["fib"]
        assert [segment.codec.name for segment in page.values] == ["raw"]
        report = cache.report().layers[0]
        assert report.reason == "latents fib4, rotary keys raw; the model expands them at every step"
        assert report.materialized == 1
        assert "decoded 1 times" in str(cache.report())
        assert report.elements == 61 * (32 + 8)

    def test_full_keys_of_a_latent_model_are_ordinary_ones(self) -> None:
        """Some models and releases cache what they expanded: then the widths are others, and values are coded too."""
        cache = fibkv.Cache(tiny("DeepseekV3"), bits=8)
        cache.update(torch.ones(1, 4, 130, 24), torch.ones(1, 4, 130, 24), 0)
        assert cache.report().layers[0].reason == "keys int8, values int8"


class TestAttention:
    def test_sparse_attention_by_an_index_is_refused(self) -> None:
        """The model hands over its index only to what it does not know; ignored, the result would be dense."""
        model = tiny("DeepseekV32")
        with (
            fibkv.attention(model),
            pytest.raises(ModelError, match="does not handle 'indices': run the model without"),
        ):
            generate(model, cache_for(model), {"inputs": ids()})

    def test_handles_of_which_one_was_changed_are_decoded(self) -> None:
        """DiffLlama attends with halves of its values: the pages do not hold those."""
        cache = cache_for(tiny("Llama"))
        states = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
        cache.update(states, states, 0)
        key, value = cache.update(states[:, :, :1], states[:, :, :1], 0)
        query = torch.ones(1, 4, 1, 16)
        module = tiny("Llama").model.layers[0].self_attn
        on_pages, _ = attention_forward(module, query, key, value, None)
        doubled, _ = attention_forward(module, query, key, 2 * value, None)
        turned, _ = attention_forward(module, query, key.flip(-2), value, None)
        torch.testing.assert_close(doubled, 2 * on_pages)
        assert not torch.allclose(turned, on_pages)
        assert isinstance(key, Handle)
        assert cache.report().materialized == 1

    def test_only_models_are_switched(self) -> None:
        with (
            pytest.raises(ModelError, match=r"fibkv\.attention: expected a model of transformers, got LlamaConfig"),
            fibkv.attention(tiny("Llama").config),
        ):
            pass

    @pytest.mark.parametrize("name", ["Mpt", "Llama"])
    def test_every_configuration_gets_its_own_back(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        """Also one that has none, as the attention settings of MPT."""
        model = tiny(name)

        def implementations() -> list[str | None]:
            parts = [getattr(model.config, part) for part in model.config.sub_configs]
            return [config._attn_implementation for config in (model.config, *parts)]

        before = implementations()
        with caplog.at_level(logging.ERROR, "transformers"), fibkv.attention(model):
            assert ATTENTION_NAME in implementations()
        assert implementations() == before


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="transformers' own code compiles from torch 2.7 on"
)
class TestCompilation:
    """`torch.compile` of the forward is right: cache and attention run outside the graphs."""

    @pytest.mark.parametrize("is_fused", [True, False])
    def test_the_logits_are_those_without(self, is_fused: bool) -> None:
        model = tiny("Llama", num_hidden_layers=1)
        chunks = list(ids(1, 48).split([40, *[1] * 8], 1))
        expected = logits_along(model, chunks, dequantized_cache(model, "fib4"))
        cache = cache_for(model)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        if is_fused:
            with fibkv.attention(model):
                actual = logits_along(compiled, chunks, cache)
        else:
            actual = logits_along(compiled, chunks, cache)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert cache.report().materialized == (0 if is_fused else 8)

    def test_one_graph_is_refused_by_torch(self) -> None:
        model = tiny("Llama", num_hidden_layers=1)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
            compiled(ids(1, 8), **with_cache(cache_for(model)))
