"""What the benchmarks are asked for: plain data with a JSON form. All defaults of `fibkv bench` stand here."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from fibkv.contract import Contract, Count, Total
from fibkv.errors import ContractError
from fibkv.parameters import PARAMETER_NAMES, named_block_dim

LEAST_CONTEXT = 128
"""Tokens of which a cache with the default policy seals its first page; with none, there would be nothing to damage."""

PROFILES = ("fib4", "fib2", "int8", "fp8", "raw")
"""Codecs that the benchmarks compare by default."""


def _check_heads(query_heads: int, kv_heads: int) -> None:
    if query_heads % kv_heads:
        raise ContractError("query_heads", f"a multiple of {kv_heads} KV heads", query_heads)


def _check_profiles(profiles: tuple[str, ...], head_dim: int) -> None:
    known = all(name in PARAMETER_NAMES for profile in profiles for name in profile.split("/", 1))
    if not profiles or not known or len(set(profiles)) < len(profiles):
        expected = f"different names of {', '.join(PARAMETER_NAMES)}, or pairs of them with a slash between"
        raise ContractError("profiles", expected, profiles)
    # A cache would keep these raw, and the row would be called by the codec's name.
    names = dict.fromkeys(name for profile in profiles for name in profile.split("/"))
    if unfit := [name for name in names if head_dim % named_block_dim(name)]:
        raise ContractError("profiles", f"codecs whose block_dim divides head_dim {head_dim}", unfit)


class KernelSettings(Contract):
    """What `fibkv bench kernels` measures: one layer's attention, of one query token or of a chunk.

    Attributes:
        queries: query tokens, each of which sees all that is cached.
        query_heads: query heads, a multiple of the KV heads.
        kv_heads: KV heads.
        head_dim: d.
        batch: rows.
        contexts: cached tokens, one table each; at least 128, so that a page is sealed.
        profiles: codec names as in `fibkv.Cache`, or ``keys/values``.
        implementations: of the kernels; "auto" or names of `fibkv.kernels.available`.
        num_threads: CPU threads of torch; None = as torch has it.
        rounds: in each, every contender is called once.
        cache_bytes: that are read before an operand comes up again; None = twice the last-level cache.
        seed: of keys, values and query.
    """

    queries: Count = 1
    query_heads: Count = 32
    kv_heads: Count = 8
    head_dim: Count = 128
    batch: Count = 1
    contexts: tuple[int, ...] = (4096, 32768)
    profiles: tuple[str, ...] = PROFILES
    implementations: tuple[str, ...] = ("auto",)
    num_threads: Count | None = None
    rounds: Count = 20
    cache_bytes: Total | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.query_heads, self.kv_heads)
        _check_profiles(self.profiles, self.head_dim)
        if not self.contexts or min(self.contexts) < LEAST_CONTEXT:
            raise ContractError("contexts", f"numbers of tokens from {LEAST_CONTEXT} upwards", self.contexts)
        if not self.implementations:
            raise ContractError("implementations", '"auto" or names of fibkv.kernels.available', self.implementations)
        return self


class GpuSettings(Contract):
    """What `fibkv bench gpu` measures: one query token, many rows, short and long contexts.

    Attributes:
        device: of torch: "cuda", or "cpu" where Triton's interpreter runs the kernels.
        query_heads: query heads, a multiple of the KV heads.
        kv_heads: KV heads.
        head_dims: d, each with a table of its own.
        batches: rows.
        contexts: cached tokens of each row, multiples of `tokens_per_page`.
        profiles: codec names as in `fibkv.Cache`, or ``keys/values``.
        most_tokens: batches and contexts are combined up to so many tokens of all rows together.
        tokens_per_page: tokens of a page.
        rounds: in each, every contender is called once.
        flushed_bytes: that are written before each call, so that no cache holds its operands.
        tune: first find the launches that are fastest on this device, use them, and keep them for later processes.
        seed: of all random numbers.
    """

    device: str = "cuda"
    query_heads: Count = 32
    kv_heads: Count = 8
    head_dims: tuple[int, ...] = (64, 128)
    batches: tuple[int, ...] = (1, 8, 32, 64)
    contexts: tuple[int, ...] = (4096, 32768, 131072, 262144)
    profiles: tuple[str, ...] = ("key4/value4", "fib4", "fib2", "trelliskey2/trellis2", "int8", "fp8")
    most_tokens: Count = 1 << 20
    tokens_per_page: Count = 64
    rounds: Count = 20
    flushed_bytes: Count = 256 << 20
    tune: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.query_heads, self.kv_heads)
        for head_dim in self.head_dims:
            _check_profiles(self.profiles, head_dim)
        if not self.contexts or any(context <= 0 or context % self.tokens_per_page for context in self.contexts):
            raise ContractError("contexts", f"multiples of {self.tokens_per_page} tokens", self.contexts)
        if not self.sizes():
            raise ContractError("most_tokens", "room for at least one batch and context", self.most_tokens)
        return self

    def sizes(self) -> list[tuple[int, int, int]]:
        """(head_dim, batch, context) of all tables' rows, in order."""
        pairs = [(batch, context) for batch in self.batches for context in self.contexts]
        fitting = [(batch, context) for batch, context in pairs if batch * context <= self.most_tokens]
        return [(head_dim, *pair) for head_dim in self.head_dims for pair in fitting]


class ModelSettings(Contract):
    """What the benchmarks of a whole model have in common: a random-weight Llama in bfloat16, and its caches.

    Attributes:
        layers: decoder layers.
        hidden_size: width of the residual stream; the feed-forward layer is 3.5 times as wide, as in Llama 3.
        query_heads: query heads, a multiple of the KV heads.
        kv_heads: KV heads.
        head_dim: d.
        context: cached tokens at the start of decoding, or tokens of the prompt.
        profiles: of the compressed caches, codec names as in `fibkv.Cache`, or ``keys/values``.
        implementation: of the kernels: "auto" or a name of `fibkv.kernels.available`.
        num_threads: CPU threads of torch; None = as torch has it.
        rounds: in each, every cache takes its turn.
        seed: of weights, keys, values and prompt.
    """

    layers: Count
    hidden_size: Count
    query_heads: Count = 32
    kv_heads: Count = 8
    head_dim: Count = 128
    context: Count
    profiles: tuple[str, ...] = PROFILES
    implementation: str = "auto"
    num_threads: Count | None = None
    rounds: Count
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.query_heads, self.kv_heads)
        _check_profiles(self.profiles, self.head_dim)
        if self.context < LEAST_CONTEXT:
            raise ContractError("context", f"at least {LEAST_CONTEXT} tokens", self.context)
        return self


class StepSettings(ModelSettings):
    """What `fibkv bench steps` measures: decode steps of a whole model.

    The model is narrow, so that a step is mostly attention, as with a long context or a large batch on a large model;
    hidden_size 4096 has the proportions of Llama 3 8B at batch 1.

    Attributes:
        tokens: timed tokens per turn; one more is decoded first and not counted.
        cache_bytes: that are read between two steps; None = twice the last-level cache.
    """

    layers: Count = 4
    hidden_size: Count = 512
    context: Count = 16384
    rounds: Count = 8
    tokens: Count = 8
    cache_bytes: Total | None = None


class PrefillSettings(ModelSettings):
    """What `fibkv bench prefill` measures: one pass of a prompt through a whole model.

    The model has the proportions of one layer of Llama 3 8B, so that the share of the encoding is that model's.

    Attributes:
        cached: tokens that the cache holds before the prompt: those of earlier turns, or of a restored prefix.
    """

    layers: Count = 1
    hidden_size: Count = 4096
    context: Count = 8192
    cached: Total = 0
    rounds: Count = 3


def profile_choice(profile: str) -> str | tuple[str, str]:
    """What `fibkv.Cache` takes as its profile: one name for both roles, or the pair of ``keys/values``."""
    keys, _, values = profile.partition("/")
    return (keys, values) if values else keys


_TINY: dict[str, Any] = {"layers": 1, "hidden_size": 64, "query_heads": 4, "kv_heads": 2, "head_dim": 64}
QUICK_KERNELS = KernelSettings(
    query_heads=4, kv_heads=2, head_dim=64, contexts=(128, 256), rounds=2, num_threads=1, cache_bytes=1 << 20
)
QUICK_STEPS = StepSettings(**_TINY, context=256, rounds=2, tokens=2, num_threads=1, cache_bytes=1 << 20)
QUICK_PREFILL = PrefillSettings(**_TINY, context=256, rounds=2, num_threads=1)
QUICK_GPU = GpuSettings(
    device="cpu",
    query_heads=4,
    kv_heads=2,
    head_dims=(64,),
    batches=(1, 2),
    contexts=(48,),
    profiles=("fib4", "int8"),
    tokens_per_page=16,
    rounds=1,
    flushed_bytes=1 << 10,
)
