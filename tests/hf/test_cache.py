"""The contract with transformers: layers, handles, reports, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fibkv
from fibkv.errors import ContractError, DecisionError, EncodingError, KernelError, ModelError, PageError
from fibkv.handle import Handle
from fibkv.hf_argument import with_cache
from fibkv.hf_attention import ATTENTION_NAME, attention_forward
from fibkv.hf_layer import CompressedLayer
from fibkv.parameters import FibParameters, RawParameters
from fibkv.space import KeySpace
from tests.hf.models import COMMON, build, prompt


def filled(**fields: object) -> tuple[tf.PreTrainedModel, fibkv.Cache]:
    """A model, and a cache of it with 100 tokens; results are compared with dense ones, so on reference kernels."""
    model = build("llama")
    cache = fibkv.Cache(model, **{"tokens_per_page": 16, "implementation": "reference", **fields})
    with torch.no_grad():
        model(prompt(), **with_cache(cache))
    return model, cache


def handles(cache: fibkv.Cache) -> tuple[Handle, Handle]:
    step = torch.ones(1, 2, 1, 32)
    return cache.update(step, step, 0)


class TestHandles:
    def test_they_look_like_the_dense_tensors(self) -> None:
        _, cache = filled()
        key, value = handles(cache)
        assert isinstance(key, Handle)
        assert isinstance(value, torch.Tensor)
        assert key.shape == (1, 2, 101, 32)
        assert (key.dtype, key.device.type) == (torch.float32, "cpu")
        assert "Handle(key, shape=[1, 2, 101, 32]" in repr(key)
        assert cache.report().materialized == 0

    def test_any_other_use_decodes_and_is_counted(self) -> None:
        _, cache = filled()
        key, value = handles(cache)
        dense_key, dense_value = cache.layers[0].store.view().decode(torch.float32)
        # The snapshot reads the newest tokens exactly, as does the tail here.
        assert torch.equal(key + 0, dense_key)
        assert torch.equal(torch.cat([value, value], 2)[:, :, 101:], dense_value)
        assert torch.equal(key[:, :, -1], torch.ones(1, 2, 32))
        assert torch.equal(copy.deepcopy(key), dense_key)
        assert cache.report().materialized == 1, "one decode serves both roles and all later uses"

    def test_they_outlive_the_call(self) -> None:
        _, cache = filled()
        key, _ = handles(cache)
        expected, _ = cache.layers[0].store.view().decode(torch.float32)
        more = torch.randn(1, 2, 40, 32, generator=torch.Generator().manual_seed(1))
        layer = cache.layers[0]
        layer.update(more, more)
        layer.crop(-90)
        layer.update(more, more)
        assert torch.equal(key + 0, expected)


class TestLayers:
    def test_stock_layers_are_left_alone_and_reported(self) -> None:
        config = tf.Gemma3TextConfig(
            **COMMON, head_dim=32, sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"]
        )
        model = tf.AutoModelForCausalLM.from_config(config).eval()
        cache = fibkv.Cache(model)
        with fibkv.attention(model):
            out = model.generate(prompt(), **with_cache(cache), max_new_tokens=5, do_sample=False)
        assert out.shape[1] == 105
        kinds = [type(layer) for layer in cache.layers]
        assert kinds == [DynamicSlidingWindowLayer, DynamicSlidingWindowLayer, CompressedLayer]
        report = cache.report()
        assert [layer.compressed for layer in report.layers] == [False, False, True]
        assert report.layers[0].reason == "a window of fixed size"
        window = cache.layers[0].keys
        assert report.layers[0].nbytes >= 2 * window.numel() * 4
        assert report.layers[0].elements == 2 * window.numel()
        assert "stock (a window of fixed size)" in str(report)

    def test_stock_classes_are_not_replaced(self) -> None:
        assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer

    def test_truths_about_the_cache(self) -> None:
        _, cache = filled()
        assert cache.get_seq_length() == 100
        assert cache.get_mask_sizes(7, 0) == (107, 0)
        assert cache.layers[0].get_max_length() == -1
        assert not cache.is_compileable
        assert cache.layers[0].is_croppable

    def test_crop_takes_what_transformers_passes(self) -> None:
        _, cache = filled()
        cache.crop(0)
        assert cache.get_seq_length() == 100
        cache.crop(-30)
        assert cache.get_seq_length() == 70
        with pytest.raises(ModelError, match="minus the number of tokens to remove, got 5"):
            cache.layers[0].crop(5)

    def test_offload_and_prefetch_keep_everything(self) -> None:
        _, cache = filled()
        before = cache.layers[0].store.view().decode(torch.float32)
        cache.layers[0].offload()
        cache.layers[0].prefetch()
        after = cache.layers[0].store.view().decode(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class TestAttention:
    def test_both_registries_know_the_name(self) -> None:
        assert ATTENTION_NAME in ALL_MASK_ATTENTION_FUNCTIONS
        assert ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS

    def test_it_is_switched_back(self) -> None:
        model = build("llama")
        before = model.config._attn_implementation
        with fibkv.attention(model):
            assert model.config._attn_implementation == ATTENTION_NAME
        assert model.config._attn_implementation == before

    def test_a_stock_cache_works_under_it(self) -> None:
        model = build("llama")
        expected = model.generate(prompt(), max_new_tokens=8, do_sample=False)
        with fibkv.attention(model):
            assert torch.equal(model.generate(prompt(), max_new_tokens=8, do_sample=False), expected)

    def test_what_would_change_the_result_is_refused(self) -> None:
        model, cache = filled()
        key, value = handles(cache)
        query = torch.ones(1, 4, 1, 32)
        module = model.model.layers[0].self_attn
        for keys, values in ((key, value), (key + 0, value + 0)):
            with pytest.raises(ModelError, match="does not handle 'position_bias': run the model without"):
                attention_forward(module, query, keys, values, None, position_bias=torch.ones(4))
        with pytest.raises(ModelError, match=r"no dropout, got 0.1: call model.eval\(\)"):
            attention_forward(module, query, key, value, None, dropout=0.1)

    def test_softcap_is_honored(self) -> None:
        config = tf.Gemma2Config(**COMMON, head_dim=32, layer_types=["full_attention"] * 3, attn_logit_softcapping=2.0)
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        expected, cache = (fibkv.Cache(model, tokens_per_page=16, implementation="reference") for _ in range(2))
        with torch.no_grad():
            prefill = model(prompt(), **with_cache(expected)).logits
            dense = model(prompt(1, 1, seed=1), **with_cache(expected)).logits
            with fibkv.attention(model):
                torch.testing.assert_close(model(prompt(), **with_cache(cache)).logits, prefill, rtol=1e-3, atol=1e-3)
                paged = model(prompt(1, 1, seed=1), **with_cache(cache)).logits
        assert cache.report().materialized == 0
        torch.testing.assert_close(paged, dense, rtol=1e-3, atol=1e-3)

    def test_sinks_are_honored(self) -> None:
        """gpt-oss: on the prefill's plain tensors, on pages, and on stock sliding layers."""
        config = tf.GptOssConfig(
            **{**COMMON, "initializer_range": 0.05},
            head_dim=32,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        )
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for layer in model.model.layers:
            layer.self_attn.sinks.data.fill_(2.0)
        expected, cache = (fibkv.Cache(model, profile="raw", tokens_per_page=16) for _ in range(2))
        with torch.no_grad():
            dense = [model(chunk, **with_cache(expected)).logits for chunk in prompt().split([80, 19, 1], 1)]
            with fibkv.attention(model):
                paged = [model(chunk, **with_cache(cache)).logits for chunk in prompt().split([80, 19, 1], 1)]
        for left, right in zip(paged, dense, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
        assert cache.report().materialized == 0

    def test_sub_configurations_get_their_own_attention_back(self) -> None:
        config = tf.Gemma3Config(
            text_config={**COMMON, "head_dim": 32},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        )
        model = tf.Gemma3ForConditionalGeneration(config)
        model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
        with fibkv.attention(model):
            assert model.config.text_config._attn_implementation == ATTENTION_NAME
        assert model.config.text_config._attn_implementation == "sdpa"
        assert model.config.vision_config._attn_implementation == "eager"

    def test_integer_masks_are_refused(self) -> None:
        model, cache = filled()
        mask = torch.ones(1, 1, 1, 101, dtype=torch.long)
        with torch.no_grad(), fibkv.attention(model), pytest.raises(KernelError, match=r"got torch\.int64"):
            model(prompt(1, 1), **with_cache(cache), attention_mask=mask)


class TestSettings:
    def test_bits_and_profiles(self) -> None:
        for fields, keys, values in (
            ({}, "key4", "value4"),
            ({"bits": 2}, "key2", "fib2"),
            ({"bits": 2.5}, "key2", "value3"),
            ({"bits": 3.5}, "key3", "value4"),
            ({"bits": 3.0}, "key3", "value3"),
            ({"bits": (8, 4)}, "int8", "value4"),
            ({"profile": ("fib4", "fp8")}, "fib4", "fp8"),
            ({"profile": FibParameters.of(32, 4, 16)}, "fib", "fib"),
        ):
            _, cache = filled(**fields)
            assert f"keys {keys}, values {values}" in cache.report().layers[0].reason
            assert cache.report().layers[0].pages == 2

    def test_raw_parameters_decide_their_dtype(self) -> None:
        _, cache = filled(profile=RawParameters(head_dim=32, dtype="f16"))
        page = next(cache.layers[0].store.pages())
        assert {segment.codes.values.dtype for segment in (*page.keys, *page.values)} == {torch.float16}
        with pytest.raises(ContractError, match=r"Cache\.profile\.head_dim: expected a head_dim of the model \(32\)"):
            filled(profile=RawParameters(head_dim=64, dtype="f16"))

    def test_raw_dtype_halves_the_pages_of_a_float32_model(self) -> None:
        _, full = filled(profile="raw")
        _, half = filled(profile="raw", raw_dtype="f16")
        assert half.report().nbytes < 0.9 * full.report().nbytes

    @pytest.mark.parametrize(
        ("fields", "error", "match"),
        [
            ({"bits": 5}, ContractError, r"Cache\.bits: expected one of 1, 2, 2.5, 3, 3.5, 4, 8, 16, or a pair"),
            ({"bits": (2.5, 4)}, ContractError, r"Cache\.bits: .*or a pair of whole ones, got \(2.5, 4\)"),
            ({"bits": True}, ContractError, r"Cache\.bits"),
            ({"bits": 4, "profile": "fib4"}, ContractError, "either bits or profile"),
            ({"profile": "fib9"}, ContractError, "one of raw, int8, fp8, fib4"),
            ({"bits": (4, 2, 1)}, ContractError, "Cache.bits: expected one choice, or a pair for keys and values"),
            ({"bits": "4"}, ContractError, "Cache.bits: expected one of"),
            ({"profile": 4}, ContractError, "Cache.profile: expected a name or codec parameters, or a pair, got 4"),
            ({"tokens_per_page": "a"}, ContractError, "Cache.tokens_per_page: expected a positive number, got 'a'"),
            ({"tokens_per_page": 0}, ContractError, r"Cache\.tokens_per_page: expected a positive number, got 0"),
            ({"raw_dtype": "f64"}, ContractError, r"Cache\.raw_dtype: expected one of f16, bf16, f32, got 'f64'"),
            ({"policy": "raw"}, ContractError, "Cache.policy: expected a fibkv.Policy, got 'raw'"),
            ({"implementation": "cuda"}, KernelError, r"expected one of auto, .*reference, got 'cuda'"),
        ],
    )
    def test_refusals(self, fields: dict[str, object], error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            fibkv.Cache(build("llama"), **fields)

    def test_policy_beyond_the_model_is_refused(self) -> None:
        regions = fibkv.ProtectedRegions(raw_layers=(3,))
        with pytest.raises(ContractError, match="raw_layers: expected indices below 3"):
            fibkv.Cache(build("llama"), policy=fibkv.Policy.per_token(regions))

        heads = fibkv.ProtectedRegions(raw_heads=(2,))
        with pytest.raises(ContractError, match="raw_heads: expected indices below 2"):
            fibkv.Cache(build("llama"), policy=fibkv.Policy.per_token(heads))

    def test_the_raw_policy_keeps_everything_raw(self) -> None:
        _, cache = filled(policy=fibkv.Policy.raw())
        assert dict(cache.report().layers[0].raw_vectors) == {"raw_strategy": 2 * 2 * 96}

    def test_tables_that_two_codecs_share_are_counted_once(self) -> None:
        _, both = filled(bits=(4, 2))
        # Two codebooks, and one rotation of 32 x 32.
        assert both.report().tables_nbytes == 4 * (256 * 2 + 256 * 4 + 32 * 32)

    def test_centered_and_plain_trellis_share_their_tables(self) -> None:
        reports = [filled(profile=profile)[1].report() for profile in ("trellis2", ("trelliskey2", "trellis2"))]
        assert reports[0].tables_nbytes == reports[1].tables_nbytes > 0
        assert "keys trelliskey2, values trellis2" in reports[1].layers[0].reason

    def test_models_that_cannot_be_served_are_refused(self) -> None:
        with pytest.raises(ModelError, match="expected a model of transformers or its configuration, got str"):
            fibkv.Cache("gpt2")
        with pytest.raises(ModelError, match="MambaConfig: it has no attention heads"):
            fibkv.Cache(tf.MambaConfig())
        with pytest.raises(ModelError, match="T5Config: encoder-decoder models are not supported"):
            fibkv.Cache(tf.T5Config())

    def test_a_codec_that_does_not_fit_the_head_dim_is_refused(self) -> None:
        with pytest.raises(ContractError, match=r"expected a head_dim of the model \(32\) for keys, got 64"):
            fibkv.Cache(build("llama"), profile=FibParameters.of(64, 2, 16))
        # A configuration may not say what its layers really hold: then the first token tells.
        cache = fibkv.Cache(tf.LlamaConfig(**COMMON), profile=FibParameters.of(32, 2, 16))
        wide = torch.ones(1, 2, 4, 64)
        with pytest.raises(ContractError, match=r"Profile\.codec\.head_dim: expected 64 of the shape, got 32"):
            cache.update(wide, wide, 0)

    def test_a_shape_that_the_codec_cannot_carry_is_kept_raw_and_said_so(self) -> None:
        config = tf.LlamaConfig(**{**COMMON, "head_dim": 36, "pad_token_id": None})
        keys = torch.randn(1, 2, 128, 36, generator=torch.Generator().manual_seed(0))
        cache = fibkv.Cache(config, bits=1)
        cache.update(keys, keys, 0)
        assert dict(cache.report().layers[0].raw_vectors) == {"protected_region": 16, "unsupported_shape": 2 * 2 * 60}
        strict = fibkv.Policy.per_token().model_copy(update={"allow_raw_fallback": False})
        with pytest.raises(DecisionError, match=r"keys: blocks of 8 do not divide a head_dim of the model \(36\)"):
            fibkv.Cache(config, bits=1, policy=strict)

    def test_raw_layers_and_heads(self) -> None:
        regions = fibkv.ProtectedRegions(raw_layers=(0,), raw_heads=(1,))
        model, cache = filled(policy=fibkv.Policy.per_token(regions))
        counts = [dict(layer.raw_vectors) for layer in cache.report().layers]
        assert counts == [{"protected_region": 2 * 2 * 96}, *[{"protected_region": 2 * 96}] * 2]
        with torch.no_grad(), fibkv.attention(model):
            paged = model(prompt(1, 1, seed=1), **with_cache(copy.deepcopy(cache))).logits
        with torch.no_grad():
            dense = model(prompt(1, 1, seed=1), **with_cache(cache)).logits
        torch.testing.assert_close(paged, dense, rtol=1e-4, atol=1e-3)


class TestModes:
    """A cache outlives the mode in which a call is made."""

    def test_inference_mode_and_back(self) -> None:
        model = build("llama")
        cache, expected = fibkv.Cache(model, tokens_per_page=16), fibkv.Cache(model, tokens_per_page=16)
        with fibkv.attention(model):
            with torch.inference_mode():
                model(prompt(), **with_cache(cache))
            outs = []
            for held in (cache, expected):
                if held is expected:
                    with torch.no_grad():
                        model(prompt(), **with_cache(held))
                outs.append(model(prompt(1, 1, seed=1), **with_cache(held)).logits)
            with torch.inference_mode():
                model(prompt(1, 1, seed=1), **with_cache(cache))
        assert torch.equal(*outs)
        assert outs[0].requires_grad

    def test_the_graph_of_a_call_is_not_kept(self) -> None:
        model = build("llama")
        cache = fibkv.Cache(model, tokens_per_page=16)
        model(prompt(), **with_cache(cache))
        for layer in cache.layers:
            assert not layer.store.tail.keys.requires_grad
            assert layer.store.tail.keys.grad_fn is None

    @pytest.mark.parametrize("profile", ["raw", "int8", "fp8", "fib4"])
    def test_autocast(self, profile: str) -> None:
        model = build("llama")
        results = []
        for context in (fibkv.attention(model), torch.no_grad()):
            cache = fibkv.Cache(model, profile=profile, tokens_per_page=16)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), context:
                model(prompt(), **with_cache(cache))
                results.append(model(prompt(1, 1, seed=1), **with_cache(cache)).logits.float())
        paged, dense = results
        assert (paged - dense).square().mean().sqrt() < 0.05 * dense.std()

    def test_pickling(self) -> None:
        model, cache = filled(profile=("fib4", "int8"))
        again = pickle.loads(pickle.dumps(cache))
        assert again.report() == cache.report()
        with torch.no_grad(), fibkv.attention(model):
            expected = model(prompt(1, 70, seed=1), **with_cache(cache)).logits
            assert torch.equal(model(prompt(1, 70, seed=1), **with_cache(again)).logits, expected)
            assert torch.isfinite(model(prompt(1, 1), **with_cache(again)).logits).all()

    def test_a_failed_step_is_noticed_and_can_be_mended(self) -> None:
        model, cache = filled()
        wrong = torch.ones(1, 1, 1, 7, dtype=torch.bool)
        with torch.no_grad(), fibkv.attention(model):
            expected = model(prompt(1, 1), **with_cache(copy.deepcopy(cache))).logits
            with pytest.raises(KernelError, match="attention mask: expected shape"):
                model(prompt(1, 1), **with_cache(cache), attention_mask=wrong)
            with pytest.raises(ModelError, match=r"layer 1 holds 100 tokens, expected 101; cache.crop_to\(100\) mends"):
                model(prompt(1, 1), **with_cache(cache))
            assert [layer.get_seq_length() for layer in cache.layers] == [101, 100, 100]
            cache.crop_to(100)
            assert torch.equal(model(prompt(1, 1), **with_cache(cache)).logits, expected)

    def test_a_failed_first_call_is_noticed(self) -> None:
        """The second layer cannot be sealed: the first one alone holds the prompt, and a retry must not double it."""
        cache = fibkv.Cache(tf.LlamaConfig(**COMMON), profile="raw", raw_dtype="f16")
        keys = torch.ones(1, 2, 140, 32)
        cache.update(keys, keys, 0)
        with pytest.raises(EncodingError, match=r"raw in f16: vectors exceed torch.float16"):
            cache.update(1e6 * keys, keys, 1)
        assert [layer.get_seq_length() for layer in cache.layers] == [140, 0, 0]
        with pytest.raises(ModelError, match=r"holds 0 tokens, expected 140; cache.crop_to\(0\) mends it"):
            cache.update(keys, keys, 0)
        cache.crop_to(0)
        for layer in range(3):
            cache.update(keys, keys, layer)
        assert cache.get_seq_length() == 140

    def test_large_float16_values_stay_finite(self) -> None:
        keys = torch.full((1, 2, 128, 32), 65504.0, dtype=torch.float16)
        for profile in ("int8", "fp8", "fib4"):
            cache = fibkv.Cache(tf.LlamaConfig(**COMMON), profile=profile)
            cache.update(keys, keys, 0)
            key, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
            assert torch.isfinite(key + 0).all()

    def test_an_emptied_cache_takes_another_batch(self) -> None:
        model, cache = filled()
        cache.crop(-100)
        with torch.no_grad():
            model(prompt(3), **with_cache(cache))
        assert cache.layers[0].store.batch == 3


class TestIntegrity:
    def test_a_damaged_page_is_quarantined_and_refused(self) -> None:
        model, cache = filled()
        assert cache.verify() == ()
        with cache.corrupt_page(layer=2, row=0, page=1):
            (record,) = cache.verify()
        assert "layer 2, tokens 16..31" in record.name
        with torch.no_grad(), pytest.raises(PageError, match="in quarantine"):
            model(prompt(1, 1), **with_cache(cache))

    def test_there_must_be_a_page_to_damage(self) -> None:
        _, cache = filled()
        with pytest.raises(ModelError, match="expected one of 1 rows x 2 pages, got 0, 9"):
            cache.corrupt_page(layer=0, row=0, page=9)
        with pytest.raises(ModelError, match="layer 7: expected a filled compressed layer"):
            cache.corrupt_page(layer=7, row=0, page=0)


class TestKeySpaces:
    def test_keys_of_a_layer_are_coded_in_its_space(self) -> None:
        mean = 5 * torch.ones(2, 32)
        _, plain = filled(profile="fib4")
        _, cache = filled(profile="fib4", key_spaces={0: KeySpace.of(mean)})
        spaces = [{form.space for page in layer.store.pages() for form in page.form.keys} for layer in cache.layers]
        assert KeySpace.of(mean) in spaces[0]
        assert all(found == {None} for found in spaces[1:])
        assert cache.report().tables_nbytes == plain.report().tables_nbytes + mean.nbytes

    def test_spaces_that_do_not_fit_are_refused(self) -> None:
        space = KeySpace.of(torch.zeros(3, 32))
        with pytest.raises(ContractError, match=r"key_spaces: expected KeySpaces of layers below 3, got .4,"):
            fibkv.Cache(build("llama"), key_spaces={4: space})
        with pytest.raises(ContractError, match=r"key_spaces\[1\]\.mean: expected shape \[2, 32\], got \[3, 32\]"):
            filled(key_spaces={1: space})
