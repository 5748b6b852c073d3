"""What a user does with a filled cache: forks, rows, turns, crops, hooks."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers as tf
from torch import Tensor

import fibkv
from fibkv.errors import ModelError, PageError
from fibkv.hf_argument import with_cache
from fibkv.hf_layer import CompressedLayer
from tests.hf.architectures import COMMON, WINDOWED, tiny
from tests.hf.calls import cache_for, generate, ids
from tests.hf.oracle import dequantized_cache

STEP = {"max_new_tokens": 10}


def filled(model: tf.PreTrainedModel, tokens: Tensor) -> fibkv.Cache:
    cache = cache_for(model)
    with torch.no_grad():
        model(tokens, **with_cache(cache))
    return cache


class TestForks:
    def test_a_fork_shares_its_pages_and_outlives_the_original(self) -> None:
        cache = filled(tiny("Llama"), ids())
        fork = cache.fork()
        pages = [list(held.layers[0].store.pages()) for held in (cache, fork)]
        assert len(pages[0]) == 6
        assert all(ours is theirs for ours, theirs in zip(*pages, strict=True))
        held = weakref.ref(pages[0][0])
        del pages, cache
        gc.collect()
        assert held() is not None, "the fork refers to it"
        fork.crop(-60)
        assert held() is None, "nobody does any more"

    def test_a_fork_and_its_original_do_not_see_each_other(self) -> None:
        model = tiny("Llama")
        cache = filled(model, ids())
        before = [page.digest for page in cache.layers[1].store.pages()]
        fork = cache.fork()
        with torch.no_grad(), fibkv.attention(model):
            model(ids(1, 40, seed=1), **with_cache(fork))
            fork.crop(-70)
        assert [page.digest for page in cache.layers[1].store.pages()] == before
        assert (cache.get_seq_length(), fork.get_seq_length()) == (60, 30)

    def test_shared_pages_are_counted_once(self) -> None:
        cache = filled(tiny("Llama"), ids())
        one, four = cache.report(), cache.fork(4).report()
        assert [layer.pages for layer in four.layers] == [layer.pages for layer in one.layers]
        tails = sum(2 * layer.store.tail.keys.nbytes for layer in cache.layers)
        entries = sum(8 * layer.pages for layer in one.layers)
        assert four.nbytes == one.nbytes + 3 * tails + 3 * entries

    @pytest.mark.parametrize("options", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
    @pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "Qwen3Next", "DeepseekV3"])
    def test_many_sequences_from_one_filled_cache(self, name: str, options: dict[str, object]) -> None:
        """The rows of a filled cache are repeated by `fork`, in transformers' layers too."""
        model = tiny(name)
        prompt = ids(1, 61)
        dense = dequantized_cache(model, "fib4")
        with torch.no_grad():
            model(prompt[:, :60].repeat(3, 1), **with_cache(dense))
        cache = filled(model, prompt[:, :60])
        request = {**STEP, **options, "inputs": prompt}
        expected = generate(model, dense, request)
        with fibkv.attention(model):
            assert torch.equal(generate(model, cache.fork(3), request), expected)
            assert torch.equal(generate(model, cache.fork(3), request), expected), "the original is as it was"

    def test_the_wrong_number_of_rows_says_what_to_do(self) -> None:
        model = tiny("Llama")
        cache = filled(model, ids())
        message = r"layer 0: expected 1 rows, which the cache holds, got 3; for beams .* pass cache.fork\(3\)"
        with pytest.raises(ModelError, match=message):
            generate(model, cache, {"inputs": ids(1, 61), "num_return_sequences": 3, "do_sample": True})
        two = filled(model, ids(2))
        with pytest.raises(ModelError, match=r"expected 2 rows, which the cache holds, got 3$"):
            two.update(torch.ones(3, 2, 1, 16), torch.ones(3, 2, 1, 16), 0)
        with pytest.raises(PageError, match=r"layer 0: expected rows of 0\.\.1, got \[0, 2\]"):
            two.reorder_cache(torch.tensor([0, 2]))
        with pytest.raises(ModelError, match="expected at least 1, got 0"):
            two.batch_repeat_interleave(0)


class TestCrops:
    def test_full_windows_need_a_recorded_past(self) -> None:
        model = tiny("Gemma3Text")
        cache = filled(model, ids())
        with pytest.raises(ModelError, match=r"crop: layer 0 cannot lose 3 tokens: its window of 16 tokens is full"):
            cache.crop(-3)
        with pytest.raises(ModelError, match=r"activate_past_recording\(\) before the tokens come"):
            cache.crop_to(57)
        assert [layer.get_seq_length() for layer in cache.layers] == [60, 60], "nothing was cut"
        cache.crop(0)
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids(1, 5, seed=1), **with_cache(cache))
        with pytest.raises(ModelError, match="its window of 16 tokens recorded only 5 tokens more"):
            cache.crop(-6)
        cache.crop(-5)
        expected = filled(model, ids())
        step = ids(1, 1, seed=2)
        with torch.no_grad():
            left, right = (model(step, **with_cache(held)).logits for held in (cache, expected))
        torch.testing.assert_close(left, right)

    def test_windows_that_are_not_full_are_cropped(self) -> None:
        cache = filled(tiny("Gemma3Text"), ids(1, 12))
        cache.crop_to(9)
        assert [layer.get_seq_length() for layer in cache.layers] == [9, 9]

    def test_states_cannot_be_taken_back(self) -> None:
        for name in ("Qwen3Next", "FalconH1"):
            cache = filled(tiny(name), ids())
            assert not cache.is_croppable
            cache.crop(0)
            with pytest.raises(ModelError, match="the state of linear attention cannot be taken back"):
                cache.crop(-1)
            with pytest.raises(ModelError, match=r"crop_to: layer 0: the state of .* cannot be cut"):
                cache.crop_to(10)
            assert cache.get_seq_length() == 60

    def test_convolutions_need_a_recorded_past(self) -> None:
        model = tiny("Lfm2")
        cache = filled(model, ids())
        with pytest.raises(ModelError, match="its convolution recorded no past"):
            cache.crop(-1)

    def test_layers_that_hold_nothing_are_no_hindrance(self) -> None:
        cache = fibkv.Cache(tiny("Qwen3Next"))
        cache.crop(-3)
        cache.crop_to(0)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0]))
        assert cache.get_seq_length() == 0

    def test_what_it_says_of_itself(self) -> None:
        for name, is_croppable in (("Llama", True), ("DeepseekV3", True), ("Qwen3Next", False)):
            cache = fibkv.Cache(tiny(name))
            assert cache.is_croppable is is_croppable
            assert not cache.is_compileable
            assert cache.get_max_length() == -1
            assert not any(cache.is_sliding)


class TestPromptsThatAreHeldAlready:
    @pytest.mark.parametrize("longer", [0, 5])
    def test_they_are_refused_with_the_length_to_crop_to(self, longer: int) -> None:
        """`generate` would feed the prompt again, without an error, and go on from the doubled prompt."""
        model = tiny("Llama")
        prompt = ids()
        expected = generate(model, cache_for(model), {"inputs": prompt, **STEP})
        cache = filled(model, torch.cat([prompt, ids(1, longer, seed=3)], 1))
        with fibkv.attention(model):
            with pytest.raises(ModelError, match=r"the cache holds 6\d tokens .* cache\.crop_to\(59\) first"):
                generate(model, cache, {"inputs": prompt, **STEP})
            cache.crop_to(59)
            actual = generate(model, cache, {"inputs": prompt, **STEP})
        assert actual.shape == expected.shape

    def test_new_tokens_alone_are_not_mistaken_for_it(self) -> None:
        """A turn as long as the cache, with a mask over everything, is what it says."""
        model = tiny("Llama")
        cache = filled(model, ids())
        request = {"inputs": ids(1, 60, seed=1), "attention_mask": torch.ones(1, 120, dtype=torch.long)}
        with fibkv.attention(model):
            assert generate(model, cache, {**request, **STEP}).shape == (1, 70)

    def test_masks_that_cover_neither_are_refused(self) -> None:
        model = tiny("Llama")
        request = {"inputs": ids(1, 61), "attention_mask": torch.ones(1, 70, dtype=torch.long)}
        with fibkv.attention(model), pytest.raises(ModelError, match=r"over 61 tokens .* or over 121 .*; got 70"):
            generate(model, filled(model, ids()), request)

    def test_assisted_decoding_starts_with_an_empty_cache(self) -> None:
        """transformers would feed the whole prompt again, whatever the cache holds."""
        model = tiny("Llama")
        request = {"inputs": ids(1, 61), "prompt_lookup_num_tokens": 4, **STEP}
        with fibkv.attention(model), pytest.raises(ModelError, match="assisted decoding feeds the whole prompt again"):
            generate(model, filled(model, ids()), request)

    def test_the_check_ends_with_the_context(self) -> None:
        model = tiny("Llama")
        with fibkv.attention(model), fibkv.attention(model):
            assert "generate" in vars(model)
        assert "generate" not in vars(model)


class TestHooks:
    def test_early_initialization_takes_the_first_tokens_as_they_come(self) -> None:
        model = tiny("Llama")
        cache = cache_for(model)
        cache.early_initialization(batch_size=4, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
        assert cache.is_initialized
        assert cache.get_seq_length() == 0
        expected = generate(model, cache_for(model), {"inputs": ids(), **STEP})
        assert torch.equal(generate(model, cache, {"inputs": ids(), **STEP}), expected)

    @pytest.mark.parametrize("name", ["FalconH1", "Gemma3Text", "Lfm2"])
    def test_offload_and_reset_reach_every_layer(self, name: str) -> None:
        model = tiny(name)
        cache = filled(model, ids())
        expected = generate(model, cache.fork(), {"inputs": ids(1, 61), **STEP})
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        assert torch.equal(generate(model, cache.fork(), {"inputs": ids(1, 61), **STEP}), expected)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = generate(model, cache, {"inputs": ids(), **STEP})
        assert torch.equal(again, generate(model, cache_for(model), {"inputs": ids(), **STEP}))

    def test_the_state_beside_the_pages_is_counted(self) -> None:
        cache = filled(tiny("FalconH1"), ids())
        layer = cache.layers[0]
        assert isinstance(layer, CompressedLayer)
        states = sum(t.numel() for t in (*layer.conv_states.values(), *layer.recurrent_states.values()))
        report = layer.report()
        assert report.nbytes == layer.store.nbytes + 4 * states
        assert report.elements == 2 * 2 * 60 * 32 + states
        assert "its state of fixed size is left as it is" in report.reason

    def test_turns_on_one_cache_with_windows(self) -> None:
        config = tf.Qwen2Config(**COMMON, **WINDOWED, use_sliding_window=True)
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).eval()
        dense, cache = dequantized_cache(model, "fib4"), cache_for(model)
        turn = ids(1, 30)
        for seed in range(3):
            expected = generate(model, dense, {"inputs": turn, **STEP})
            with fibkv.attention(model):
                assert torch.equal(generate(model, cache, {"inputs": turn, **STEP}), expected)
            turn = torch.cat([expected, ids(1, 20, seed=seed)], 1)
        assert cache.report().materialized == 0
