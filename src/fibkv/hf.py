"""Hugging Face transformers: a drop-in cache, and attention on its pages.

    cache = fibkv.Cache(model, bits=4)
    with fibkv.attention(model):
        model.generate(**inputs, past_key_values=cache)

Layers of full attention are kept in compressed pages. Sliding-window, linear and shared layers, and layers whose
cache is not keys and values (multi-head latent attention), stay in the stock classes; `Cache.report` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache as StockCache
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fibkv.attend import Scores, attend
from fibkv.cache import LayerCache
from fibkv.errors import ModelError
from fibkv.handle import Handle, Source
from fibkv.policy import Policy
from fibkv.quarantine import Quarantine
from fibkv.report import CacheReport, LayerReport
from fibkv.settings import CacheSettings, Choice
from fibkv.view import Tail, View

ATTENTION_NAME = "fibkv"


class CompressedLayer(CacheLayerMixin):
    """A layer of full attention in compressed pages.

    The first update of an empty layer returns the tensors it was given: prefill attends exactly. Later ones return
    handles: the past as stored, the new tokens exactly (all through the codec with ``read_through``).
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, index: int, settings: CacheSettings, quarantine: Quarantine) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.settings = settings
        self.quarantine = quarantine
        self.materialized = 0
        self.store: LayerCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the store for tensors like ``key_states [B, H, t, d]`` and ``value_states [B, H, t, d_value]``."""
        settings = self.settings.for_layer(self.index, key_states, value_states)
        self.store = LayerCache(settings, key_states, value_states, self.quarantine)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002 - older releases pass a dict, none of it is needed
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens; returns what attention reads."""
        if self.store is None or self.store.length == 0:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        was_empty = self.store.length == 0
        view = self.store.append(key_states, value_states)
        if was_empty and not self.settings.read_through:
            return key_states, value_states
        source = Source(view, key_states.dtype, self._count)
        return Handle(source, "key"), Handle(source, "value")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length with the coming queries, offset 0): all tokens are kept."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self.store is None else self.store.length

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens (0 or negative, as transformers calls it)."""
        # Assisted decoding of older releases counts in a tensor.
        remove = int(tokens_to_remove)
        if remove > 0:
            raise ModelError(f"crop: expected 0 or minus the number of tokens to remove, got {remove}")
        if self.store is not None:
            self.store.crop(max(0, self.store.length + remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes row ``beam_idx[i]``."""
        if self.store is not None:
            self.store.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; pages are shared."""
        if self.store is not None:
            self.store.select([row for row in range(self.store.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that ``indices`` (or a boolean mask) name."""
        if self.store is not None:
            rows = torch.arange(self.store.batch)[indices.cpu()]
            self.store.select(rows.tolist())

    def reset(self) -> None:
        """Empties the layer."""
        self.store = None
        self.is_initialized = False

    def offload(self) -> None:
        """Moves the layer to the CPU."""
        if self.store is not None:
            self.store.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Moves the layer back to the device of its model."""
        if self.store is not None:
            self.store.to(self.device)

    def report(self) -> LayerReport:
        """What the layer holds."""
        store = self.store
        if store is None:
            return _empty_report(self.index, self, "empty")
        elements = sum(t.shape[0] * t.shape[1] * t.shape[3] for t in (store.tail.keys, store.tail.values))
        return LayerReport(
            layer=self.index,
            kind=type(self).__name__,
            compressed=True,
            reason=f"keys {self.settings.key_name}, values {self.settings.value_name}",
            tokens=store.length,
            pages=sum(1 for _ in store.pages()),
            elements=elements * store.length,
            nbytes=store.nbytes,
            raw_vectors=tuple(sorted(store.raw_reasons().items())),
            tail_tokens=store.tail.length,
        )

    def _count(self) -> None:
        self.materialized += 1


class Cache(StockCache):
    """A cache for ``model.generate(past_key_values=...)`` or for direct calls of a model.

    Args:
        model: a causal language model of transformers, or its configuration.
        bits: 1, 2, 3, 4 (FibQuant), 8 (int8) or 16 (raw), or a pair for keys and values. Default 4.
        profile: instead of bits: a name of `fibkv.parameters.PARAMETER_NAMES`, codec parameters, or a pair of either.
        policy: what is compressed. Default: all of it per token, except the first 4 and the last 64 tokens.
        tokens_per_page: tokens of a sealed page.
        raw_dtype: of protected vectors and raw pages: "f16", "bf16" or "f32"; default: the model's.
        read_through: attention reads even the newest tokens through the codec, and the policy protects nothing
            unless one is given: for honest evaluation, not for use.
        implementation: of the kernels: "auto" or a name of `fibkv.kernels.available`.

    Raises:
        ModelError: the model cannot be served: what it is, and what to do instead.
        ContractError: settings that contradict each other or the model.
    """

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        *,
        bits: int | tuple[int, int] | None = None,
        profile: Choice | tuple[Choice, Choice] | None = None,
        policy: Policy | None = None,
        tokens_per_page: int = 64,
        raw_dtype: str | None = None,
        read_through: bool = False,
        implementation: str = "auto",
    ) -> None:
        if not isinstance(model, PreTrainedModel | PretrainedConfig):
            raise ModelError(
                f"Cache: expected a model of transformers or its configuration, got {type(model).__name__}"
            )
        config = model if isinstance(model, PretrainedConfig) else model.config
        if config.is_encoder_decoder:
            raise ModelError(
                f"{type(config).__name__}: encoder-decoder models are not supported; use EncoderDecoderCache"
            )
        text = config.get_text_config(decoder=True)
        if getattr(text, "num_attention_heads", None) is None:
            raise ModelError(f"{type(text).__name__}: it has no attention heads, so there is nothing to compress")
        stock = DynamicCache(config=config).layers
        self.settings = CacheSettings.of(
            bits=bits,
            profile=profile,
            policy=policy,
            tokens_per_page=tokens_per_page,
            raw_dtype=raw_dtype,
            read_through=read_through,
            implementation=implementation,
            layers=len(stock),
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            query_heads=text.num_attention_heads,
        )
        self.quarantine = Quarantine()
        # Multi-head latent attention keeps (latent, rotary key) in the places of (keys, values).
        self.latent = getattr(text, "kv_lora_rank", None) is not None
        # Cross-attention (mllama) reads its layers' tensors directly.
        crossing = getattr(text, "cross_attention_layers", None) or ()
        layers = [
            CompressedLayer(index, self.settings, self.quarantine)
            if type(layer) is DynamicLayer and not self.latent and index not in crossing
            else layer
            for index, layer in enumerate(stock)
        ]
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens to one layer; returns what attention reads.

        Raises:
            ModelError: an earlier call failed between two layers, so that they hold different numbers of tokens.
        """
        self._check_step(layer_idx, key_states.shape[-2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def _check_step(self, layer_idx: int, tokens: int) -> None:
        """Layers are filled in turn: the first one leads by `tokens` while the others follow."""
        filled = [layer for layer in self._compressed() if layer.store is not None]
        layer = self.layers[layer_idx]
        if layer not in filled:
            return
        ahead = tokens if layer is not filled[0] else 0
        expected = filled[0].get_seq_length() - ahead
        behind = filled if not ahead else [layer]
        for other in behind:
            if (held := other.get_seq_length()) != expected:
                least = min(one.get_seq_length() for one in filled)
                raise ModelError(
                    f"cache out of step after a failed call: layer {other.index} holds {held} tokens, "
                    f"expected {expected}; cache.crop_to({least}) mends it"
                )

    def crop_to(self, length: int) -> None:
        """Keeps the first ``length`` tokens of every compressed layer, whatever each of them holds.

        Raises:
            ModelError: a layer that is left to transformers holds tokens too, and cannot be cut alike.
        """
        for layer in self.layers:
            if not isinstance(layer, CompressedLayer) and getattr(layer, "is_initialized", False):
                raise ModelError(f"crop_to: {type(layer).__name__} cannot be cut to a length; start with a new cache")
        for compressed in self._compressed():
            if compressed.store is not None:
                compressed.store.crop(length)

    def report(self) -> CacheReport:
        """Bytes counted, per layer: what is compressed, what is left raw and why."""
        compressed = list(self._compressed())
        tables = (table for layer in compressed if layer.store for table in layer.store.settings.tables())
        shared = {id(tensor): tensor.nbytes for table in tables for tensor in table.tensors}
        return CacheReport(
            layers=tuple(
                layer.report() if isinstance(layer, CompressedLayer) else _empty_report(index, layer, self._why(layer))
                for index, layer in enumerate(self.layers)
            ),
            tables_nbytes=sum(shared.values()),
            materialized=sum(layer.materialized for layer in compressed),
        )

    def verify(self) -> tuple[Any, ...]:
        """Checks every page against its digest; returns the records of those now in quarantine.

        A cache with a page in quarantine refuses to be read.
        """
        for layer in self._compressed():
            if layer.store is not None:
                layer.store.verify()
        return tuple(self.quarantine.records)

    def corrupt_page(self, *, layer: int, row: int, page: int) -> AbstractContextManager[None]:
        """For poison tests: damages one page in memory while the context lasts, then restores it exactly.

        Raises:
            ModelError: there is no such page.
        """
        held = self.layers[layer] if layer < len(self.layers) else None
        if not isinstance(held, CompressedLayer) or held.store is None:
            raise ModelError(f"layer {layer}: expected a filled compressed layer, got {held}")
        rows = held.store.rows
        if row >= len(rows) or page >= len(rows[row]):
            raise ModelError(
                f"layer {layer}: expected one of {len(rows)} rows x {len(rows[0])} pages, got {row}, {page}"
            )
        return held.store.corrupted(row, page)

    def _why(self, layer: Any) -> str:
        """Why a layer is left to transformers."""
        if type(layer) is DynamicLayer and self.latent:
            return "latent attention, left to transformers' DynamicLayer"
        return f"left to transformers' {type(layer).__name__}"

    def _compressed(self) -> Iterator[CompressedLayer]:
        return (layer for layer in self.layers if isinstance(layer, CompressedLayer))


def _empty_report(index: int, layer: Any, reason: str) -> LayerReport:
    """The report of a layer that fibkv holds nothing of: stock ones, and compressed ones before their first token."""
    tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    states = [t for name in ("keys", "values") if isinstance(t := getattr(layer, name, None), Tensor)]
    return LayerReport(
        layer=index,
        kind=type(layer).__name__,
        compressed=isinstance(layer, CompressedLayer),
        reason=reason,
        tokens=layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else 0,
        pages=0,
        elements=sum(t.numel() for t in states),
        nbytes=sum(t.numel() * t.element_size() for t in tensors),
    )


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: on pages for handles, `sdpa` for plain tensors.

    Args:
        module: the attention module.
        query: ``[B, Hq, Q, d]``.
        key: handle or tensor ``[B, H, L, d]``.
        value: handle or tensor ``[B, H, L, d_value]``.
        attention_mask: ``[B, 1, Q, L]`` bool or floating, or None.
        dropout: must be 0, except on plain tensors without softcap and sinks.
        scaling: factor of the logits; default 1/sqrt(d).
        is_causal: without a mask, whether queries see only their own past; default: what the module says.
        **kwargs: ``softcap`` and the sinks ``s_aux [Hq]`` are honored, ``position_bias`` is refused.

    Returns:
        ``[B, Q, Hq, d_value]`` in the query's dtype, and None for the weights.

    Raises:
        ModelError: an argument that changes the result and is not handled.
    """
    if kwargs.get("position_bias") is not None:
        raise ModelError("fibkv.attention does not handle 'position_bias': run the model without it")
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if isinstance(key, Handle):
        view = key.source.view
    elif softcap is None and sinks is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out, None
    else:
        # `sdpa` knows neither softcap nor sinks: plain tensors are a cache that is all tail.
        view = View(((),) * key.shape[0], Tail(key, value, key.shape[2]), key.shape[2])
    if dropout:
        raise ModelError(f"fibkv.attention has no dropout, got {dropout}: call model.eval()")
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        mask=attention_mask,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
    )
    out, lse = attend(query, view, scores, implementation=view.implementation)
    if sinks is not None:
        # A sink is one more logit that carries no value: it takes its share of the softmax.
        out = out * torch.sigmoid(lse - sinks.float()[:, None]).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


# Both registries: a name that only the first one knows gets no mask at all, silently.
AttentionInterface.register(ATTENTION_NAME, attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Switches a model to attention on compressed pages while the context lasts.

    Without it a `Cache` works too: whatever attention the model uses then decodes the layer at every step, and
    `Cache.report` counts that.

    Args:
        model: a model of transformers. One that does not follow its attention interface keeps its own attention.
    """
    config = model.config
    subs = {name: getattr(config, name) for name in config.sub_configs}
    before = {"": config._attn_implementation}
    before |= {name: part._attn_implementation for name, part in subs.items() if part is not None}
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
