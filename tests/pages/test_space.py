"""Key spaces: means and transforms that keys are coded in, and attention that takes its queries there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fibkv import kernels
from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.errors import ContractError, KernelError
from fibkv.policy import Policy
from fibkv.quarantine import Quarantine
from fibkv.regions import ProtectedRegions
from fibkv.sealing import LayerSettings
from fibkv.space import KeySpace
from tests.codecs.conformance import attend_error, native_implementations
from tests.pages.helpers import DIM, HEADS, coder, gaussian, layer_settings

IMPLEMENTATIONS = ["reference", *native_implementations()]
WITH_TRITON = [*IMPLEMENTATIONS, *(["triton"] if kernels.available()["triton"] == "yes" else [])]
# Far from zero, so that a mean that is not added back cannot go unnoticed.
MEAN = 3 * gaussian(HEADS, DIM, seed=70)


def transform(seed: int = 71) -> Tensor:
    return torch.eye(DIM) + 0.3 * gaussian(HEADS, DIM, DIM, seed=seed) / DIM**0.5


def settings_in(space: KeySpace | None, implementation: str, keys: str = "fib4", values: str = "fib4") -> LayerSettings:
    policy = Policy.per_token(ProtectedRegions(first_tokens_raw=4, last_tokens_raw=8, raw_heads=(1,)))
    if keys == "per_channel":
        channels = policy.model_copy(update={"strategy": "fib_quant_per_channel"})
        settings = replace(
            layer_settings(policy=policy, implementation=implementation),
            keys=coder("key", "fib4", channels, implementation=implementation),
        )
    else:
        settings = layer_settings(keys, values, policy, implementation=implementation)
    return replace(settings, keys=replace(settings.keys, space=space))


def filled(settings: LayerSettings, tokens: int = 120, batch: int = 2) -> tuple[LayerCache, Tensor]:
    empty = torch.zeros(batch, HEADS, 0, DIM)
    cache = LayerCache(settings, empty, empty, Quarantine())
    keys = gaussian(batch, HEADS, tokens, DIM) + MEAN.unsqueeze(1)
    cache.append(keys, gaussian(batch, HEADS, tokens, DIM, seed=1))
    return cache, keys


SPACES = {"mean": KeySpace.of(MEAN), "mean and transform": KeySpace.of(MEAN, transform())}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("keys", ["fib4", "fib3", "int8", "per_channel"])
def test_attention_equals_attention_on_the_decoded_cache(keys: str, space: KeySpace, implementation: str) -> None:
    cache, exact = filled(settings_in(space, implementation, keys))
    dense_keys, dense_values = cache.view().decode(torch.float32)
    assert float((dense_keys - exact).square().mean()) < 0.1, "the mean is back"
    mask = torch.rand(2, 4, 3, 120, generator=torch.Generator().manual_seed(2)) > 0.3
    for softcap, given in ((None, None), (20.0, mask)):
        query = gaussian(2, 4, 3, DIM, seed=3)
        scores = Scores(scale=0.125, softcap=softcap, mask=given)
        out, lse = attend(query, cache.view(), scores)
        logits = (query.double() @ dense_keys.double().repeat_interleave(2, 1).mT) * 0.125
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        seen = given if given is not None else torch.ones(3, 120, dtype=torch.bool).tril(117)
        logits = logits.masked_fill(~seen, -torch.inf)
        expected = torch.softmax(logits, -1) @ dense_values.double().repeat_interleave(2, 1)
        error = (out - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert float(error) <= attend_error(implementation, keys, "fib4")
        torch.testing.assert_close(lse.double(), torch.logsumexp(logits, -1), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("implementation", WITH_TRITON)
def test_pages_of_several_spaces_are_read_together(implementation: str) -> None:
    cache, _ = filled(settings_in(None, implementation), 60)
    for space in SPACES.values():
        cache.settings = settings_in(space, implementation)
        more = gaussian(2, HEADS, 40, DIM, seed=9) + MEAN.unsqueeze(1)
        cache.append(more, gaussian(2, HEADS, 40, DIM, seed=10))
    assert {segment.form.space for page in cache.pages() for segment in page.keys} == {None, *SPACES.values()}
    dense = [tensor.repeat_interleave(2, 1).double() for tensor in cache.view().decode(torch.float32)]
    query = gaussian(2, 4, 1, DIM, seed=3)
    out, _ = attend(query, cache.view(), Scores(scale=0.125))
    expected = torch.softmax(query.double() @ dense[0].mT * 0.125, -1) @ dense[1]
    error = (out - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) <= attend_error(implementation, "fib4")


@pytest.mark.parametrize("implementation", WITH_TRITON)
def test_kernels_add_the_mean_in_the_space_of_the_codes(implementation: str) -> None:
    codec = coder("key").compressing
    keys, values = (codec.encode(gaussian(3, 20, DIM, seed=seed)) for seed in (4, 5))
    query, mean = gaussian(3, 2, DIM, seed=6), gaussian(3, DIM, seed=7)
    out, lse = kernels.attend(
        kernels.rotate(query, codec.tables),
        keys,
        codec.tables,
        values,
        codec.tables,
        scale=0.125,
        key_mean=kernels.rotate(mean, codec.tables),
        implementation=implementation,
    )
    logits = query @ (codec.decode(keys) + mean.unsqueeze(1)).mT * 0.125
    expected = torch.softmax(logits, -1) @ codec.decode(values)
    error = (kernels.unrotate(out, codec.tables) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) <= attend_error(implementation, "fib4")
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1), rtol=1e-2, atol=1e-3)
    with pytest.raises(KernelError, match=r"key_mean: expected head_dim 64 of the keys, got shape \[3, 5\]"):
        kernels.attend(query, keys, codec.tables, values, codec.tables, scale=1.0, key_mean=mean[:, :5])


@pytest.mark.skipif(not native_implementations(), reason="the extension is not built")
def test_native_spaces_read_the_memory_that_is_counted() -> None:
    """They keep the tensors, and have no copies of their own: what would have to be copied is refused."""
    extension = pytest.importorskip("fibkv.kernels._native")
    mean, inverse = MEAN.clone(), transform()
    kept = [weakref.ref(tensor) for tensor in (mean, inverse)]
    space = extension.KeySpace(mean, inverse)
    for wrong in (inverse.double(), inverse.mT):
        with pytest.raises(TypeError):
            extension.KeySpace(mean, wrong)
    del mean, inverse, wrong
    gc.collect()
    assert all(tensor() is not None for tensor in kept)
    del space
    gc.collect()
    assert all(tensor() is None for tensor in kept)


def test_pages_are_bound_to_their_space_and_travel_with_it() -> None:
    plain, _ = filled(settings_in(None, "reference"))
    mean, transformed = (filled(settings_in(space, "reference"))[0] for space in SPACES.values())
    first = [cache.rows[0][1] for cache in (plain, mean, transformed)]
    assert len({page.key_profile for page in first}) == len({page.digest for page in first}) == 3
    assert len({page.value_profile for page in first}) == 1
    again = pickle.loads(pickle.dumps(transformed))
    copied = copy.deepcopy(transformed)
    assert copied.rows[0][1].keys[0].form.space is transformed.rows[0][1].keys[0].form.space
    for other in (again, copied):
        assert other.rows[0][1].keys[0].form.space == SPACES["mean and transform"]
        assert torch.equal(other.view().decode(torch.float32)[0], transformed.view().decode(torch.float32)[0])
    cropped = copy.deepcopy(transformed)
    cropped.crop(40)
    dense, shorter = (cache.view().decode(torch.float32)[0] for cache in (transformed, cropped))
    assert torch.equal(dense[:, :, :40], shorter)


def test_what_stays_raw_stays_as_it_is() -> None:
    cache, exact = filled(settings_in(SPACES["mean and transform"], "reference"))
    dense, _ = cache.view().decode(torch.float32)
    assert torch.equal(dense[:, :, :4], exact[:, :, :4])
    assert torch.equal(dense[:, 1], exact[:, 1]), "a protected head"
    assert [segment.form.space is None for segment in cache.rows[0][1].keys] == [False, True]


def test_entering_and_leaving_are_inverse() -> None:
    space = SPACES["mean and transform"]
    keys = gaussian(5, HEADS, 7, DIM, seed=8).to(torch.bfloat16)
    for heads in (slice(0, 2), slice(1, 2)):
        part = keys[:, heads]
        torch.testing.assert_close(space.leave(space.enter(part, heads), heads), part.float(), rtol=1e-4, atol=1e-4)
    query = gaussian(HEADS, 3, DIM, seed=9)
    inside = space.queries(query) @ (space.enter(keys[0]) + space.mean_inside().unsqueeze(1)).mT
    torch.testing.assert_close(inside, query @ keys[0].float().mT, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("mean", "matrix", "message"),
    [
        (MEAN, torch.zeros(HEADS, DIM, DIM), "expected invertible matrices"),
        (MEAN, transform()[:1], r"transform: expected shape \[2, 64, 64\], got \[1, 64, 64\]"),
        (MEAN / 0, None, "expected finite numbers"),
    ],
)
def test_spaces_are_checked(mean: Tensor, matrix: Tensor | None, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        KeySpace.of(mean, matrix)
