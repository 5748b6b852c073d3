"""Hugging Face transformers: a drop-in cache, and attention on its pages.

    cache = fibkv.Cache(model, bits=4)
    with fibkv.attention(model):
        model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24

Layers of full attention, and the latents of multi-head latent attention, are kept in compressed pages. Windows,
states and everything else stay in transformers' own classes; `Cache.report` says which and why.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache as StockCache
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

from fibkv.budget import enforce_budget, sampled
from fibkv.calibration_file import Calibration
from fibkv.errors import BudgetError, ContractError, ModelError
from fibkv.handle import outside_graphs
from fibkv.hf_cut import cut, cut_to
from fibkv.hf_hybrid import CompressedHybridLayer
from fibkv.hf_identity import Origin
from fibkv.hf_layer import CompressedLayer
from fibkv.hf_model import LayerPlan, model_digest, plan_model
from fibkv.hf_pool import Membership
from fibkv.hf_prefix import snapshot
from fibkv.hf_steps import check_layer, check_rows, check_step
from fibkv.hf_stock import nbytes_of, num_rows, report_of
from fibkv.hf_warm import warm_up
from fibkv.inventory import Inventory
from fibkv.ladder import Choice
from fibkv.page_memory import PageMemories
from fibkv.policy import Policy
from fibkv.pool import Pool
from fibkv.prefix import TokenIds
from fibkv.prefix_load import Restored
from fibkv.prefix_save import Saved, write_prefix
from fibkv.quarantine import Quarantine
from fibkv.regions import QualityBudget
from fibkv.report import BudgetViolation, CacheReport
from fibkv.settings import CacheSettings, calibrated, recommended
from fibkv.space import KeySpace
from fibkv.store.base import Store, check_store


class Cache(StockCache):
    """A cache for ``model.generate(cache=...)`` or for direct calls of a model.

    Everything that can be done with transformers' DynamicCache can be done with it: turns, chunks, beams, crops,
    assisted decoding, `copy.deepcopy`. Shapes are not static. Under `torch.compile` of the model's forward, cache and
    attention run outside the compiled graphs, so ``fullgraph=True`` is refused by torch.

    Args:
        model: a causal language model of transformers, or its configuration.
        bits: 1, 2, 2.5, 3, 3.5, 4 (FibQuant), 8 (int8) or 16 (raw), or a pair of whole ones for keys and values. The
            codecs behind them are `fibkv.choices.NAMES_BY_BITS`. Default 4.
        profile: instead of bits: a name of `fibkv.parameters.PARAMETER_NAMES`, codec parameters, or a pair of either.
            With a calibration the keys may also have a name of `fibkv.allocation.KLT_BITS`.
        policy: what is compressed. Default: all of it per token, except the first 4 and the last 64 tokens.
        tokens_per_page: tokens of a sealed page.
        raw_dtype: of protected vectors and raw pages: "f16", "bf16" or "f32"; default: the model's.
        read_through: attention reads even the newest tokens through the codec, and the policy protects nothing
            unless one is given: for honest evaluation, not for use.
        implementation: of the kernels: "auto" or a name of `fibkv.kernels.available`.
        key_spaces: by layer index, what its keys go through before they are coded: a mean and a transform per KV head,
            from a calibration. Attention takes the queries there, so that nothing is undone per token.
        layer_profiles: by layer index, a pair of codecs for keys and values in place of ``bits`` or ``profile``.
        calibration: what `fibkv calibrate` wrote for this model. Without bits, profile and layer_profiles its
            recommended codecs are taken; with bits, klt codes for the keys where they measured better; and in any case,
            without key_spaces, the key spaces that measured best with the codecs of the keys.
        pool: that the cache shares memory with others in. Without bits, profile, layer_profiles and calibration the
            pool's ladder says how pages are kept: precision falls as the pool fills.
        budget: instead of a pool: a pool for this cache alone, see `fibkv.Pool`.
        offloading: compressed layers keep their pages in pinned host memory; while one attends, those of the next one
            are copied to the device. For a model on a CUDA device, and not in a pool.
        sealing: "immediate", or "deferred": on the CPU a worker thread seals pages, and the model reads their tokens
            raw until they are there. When that is, and so what a step reads, depends on the machine; the pages do not.
        quality_budget: bounds that each layer's codecs must keep by the calibration's measurements; a role of a layer
            that breaks one is kept raw, or the cache is refused, by the budget's fallback.
        sample_pages: beside both, the page of every so many that is also measured when it is sealed (1 = all): of one
            that breaks a bound the role stays raw, or the append is refused. Not with the codecs of a pool's ladder.

    Raises:
        ModelError: the model cannot be served: what it is, and what to do instead.
        ContractError: settings that contradict each other or the model.
    """

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        *,
        bits: float | tuple[int, int] | None = None,
        profile: Choice | tuple[Choice, Choice] | None = None,
        policy: Policy | None = None,
        tokens_per_page: int = 64,
        raw_dtype: str | None = None,
        read_through: bool = False,
        implementation: str = "auto",
        key_spaces: Mapping[int, KeySpace] | None = None,
        layer_profiles: Mapping[int, tuple[Choice, Choice]] | None = None,
        calibration: Calibration | Path | str | None = None,
        quality_budget: QualityBudget | None = None,
        sample_pages: int | None = None,
        pool: Pool | None = None,
        budget: int | str | None = None,
        offloading: bool = False,
        sealing: Literal["immediate", "deferred"] = "immediate",
    ) -> None:
        if sealing not in ("immediate", "deferred"):
            raise ContractError("Cache.sealing", "immediate or deferred", sealing)
        if offloading and (pool is not None or budget is not None):
            raise ContractError("Cache.offloading", "False in a pool or with a budget: they count one memory", True)
        if pool is not None and not isinstance(pool, Pool):
            raise ContractError("Cache.pool", "a fibkv.Pool", pool)
        if pool is not None and budget is not None:
            raise ContractError("Cache.budget", "either a pool or a budget", budget)
        self.pool = Pool(budget) if pool is None and budget is not None else pool
        chosen = (bits, profile, layer_profiles, calibration)
        self.plan = plan_model(model)
        if calibration is not None:
            calibration = calibration if isinstance(calibration, Calibration) else Calibration.load(Path(calibration))
            calibration.check_model(model_digest(model.config if isinstance(model, PreTrainedModel) else model))
            if profile is None:
                profile, layer_profiles = recommended(
                    calibration, bits, layer_profiles, in_its_spaces=key_spaces is None
                )
                bits = None
        self.settings = CacheSettings.of(
            bits=bits,
            profile=profile,
            policy=policy,
            tokens_per_page=tokens_per_page,
            raw_dtype=raw_dtype,
            read_through=read_through,
            implementation=implementation,
            layers=len(self.plan.layers),
            kv_heads=self.plan.kv_heads,
            query_heads=self.plan.query_heads,
            key_spaces=key_spaces,
            layer_profiles=layer_profiles,
        )
        bounds = quality_budget or QualityBudget.unavailable()
        self.settings, self.budget_violations = enforce_budget(self.settings, bounds, calibration)
        self._sampled_violations: list[BudgetViolation] = []
        self.settings = sampled(self.settings, bounds, calibration, sample_pages, self._sampled_violations)
        if calibration is not None and key_spaces is None:
            self.settings = calibrated(self.settings, calibration)
        self.settings.check_head_dims(self.plan.head_dims)
        self.origin = Origin(model)
        self.restored: Restored | None = None
        self._membership = Membership.of(self.pool)
        if self._membership is not None and self.pool is not None and all(choice is None for choice in chosen):
            self.settings = self.settings.on_ladder(self.pool.ladder, self._membership.rungs)
        self.quarantine = Quarantine()
        self.inventory = Inventory() if self.pool is None else self.pool.inventory
        self._memories = PageMemories(self.inventory, offloading=offloading, deferred=sealing == "deferred")
        super().__init__(layers=[self._layer(index, layer) for index, layer in enumerate(self.plan.layers)])

    def _layer(self, index: int, layer: LayerPlan) -> Any:
        if layer.why_stock is not None:
            return copy.deepcopy(layer.stock)  # the plan's own stays empty, for `reset`
        if isinstance(layer.stock, LinearAttentionAndFullAttentionLayer):
            return CompressedHybridLayer(index, self.settings, self.quarantine, self._memories, layer.stock)
        return CompressedLayer(index, self.settings, self.quarantine, self._memories, self.plan.latent_widths)

    @outside_graphs
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens to one layer; returns what attention reads.

        Raises:
            ModelError: an earlier call failed between two layers, so that they hold different numbers of tokens; the
                call has another number of rows than the cache; or the cache was made for a model of fewer layers.
            BudgetError: the step does not fit into the pool's budget. The cache is as it was before the step; where
                it has recurrent states too, these are a step ahead: `reserve` before the step refuses in time.
        """
        check_layer(self.layers, layer_idx)
        check_rows(self.layers, layer_idx, key_states.shape[0])
        check_step(self.layers, layer_idx, key_states.shape[-2])
        layer = self.layers[layer_idx]
        if self._membership is None or not isinstance(layer, CompressedLayer):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values
        self._make_room(self._membership, layer, key_states, value_states)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._membership.after(layer)
        return keys, values

    def _make_room(self, member: Membership, layer: CompressedLayer, keys: Tensor, values: Tensor) -> None:
        was_empty = layer.get_seq_length() == 0
        try:
            member.before(self.layers, layer, keys, values)
        except BudgetError:
            # In a first step layers before this one may have been filled: it promised less than came.
            if was_empty:
                self.reset()
            raise

    def reserve(self, tokens: int) -> None:
        """Sets aside what the next step takes, ahead of the computation: for schedulers of a pool with a budget.

        Without a budget, and before the first step, whose shapes are not known, it does nothing.

        Args:
            tokens: of the step, per row.

        Raises:
            BudgetError: the step does not fit now. Nothing has changed.
        """
        if self._membership is not None and any(layer.store is not None for layer in self._compressed()):
            self._membership.reserve(self.layers, tokens)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes the newest ``-tokens_to_remove`` tokens (0 or negative, as transformers calls it).

        Raises:
            ModelError: a positive number, or a layer that is left to transformers cannot take them back. The cache is
                as it was before the call.
        """
        # Assisted decoding of older releases counts in a tensor.
        remove = -operator.index(tokens_to_remove)
        if remove < 0:
            raise ModelError(f"crop: expected 0 or minus the number of tokens to remove, got {-remove}")
        cut(self.layers, [remove] * len(self.layers))

    def crop_to(self, length: int) -> None:
        """Keeps the first ``length`` tokens of every layer, whatever each of them holds.

        Raises:
            ModelError: a negative length, or a layer that is left to transformers cannot be cut alike. The cache is as
                it was before.
        """
        cut_to(self.layers, length)

    def reset(self) -> None:
        """Empties the cache."""
        for index, (layer, plan) in enumerate(zip(self.layers, self.plan.layers, strict=True)):
            if isinstance(layer, CompressedLayer):
                layer.reset()
            else:
                # Some of transformers' layers only put zeros into what they hold, and go on from there.
                self.layers[index] = copy.deepcopy(plan.stock)

    def fork(self, repeats: int = 1) -> Cache:
        """An independent copy that shares the sealed pages, every row ``repeats`` times.

        Hand ``generate`` a fork to keep this cache as it is, and ``fork(n)`` with ``num_return_sequences=n`` or
        ``num_beams=n``: it repeats the rows of the prompt, but not those of a filled cache.

        Raises:
            BudgetError: the copies of the raw tails do not fit into the pool's budget.
        """
        with self._room_for_tails(1):
            copied = copy.deepcopy(self)
        if repeats != 1:
            copied.batch_repeat_interleave(repeats)
        return copied

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, next to one another; pages are shared.

        Raises:
            ModelError: fewer than one time.
            BudgetError: the copies of the raw tails do not fit into the pool's budget.
        """
        if repeats < 1:
            raise ModelError(f"batch_repeat_interleave: expected at least 1, got {repeats}")
        # Not every layer of transformers repeats and selects; all of them reorder, and that is the same.
        if rows := self._num_rows():
            with self._room_for_tails(repeats):
                self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))  # type: ignore[arg-type]

    def room_for(self, nbytes: int) -> AbstractContextManager[None]:
        """Sets bytes of the pool aside while the context lasts; without a budget it does nothing.

        Raises:
            BudgetError: they do not fit. Raised on entering.
        """
        return nullcontext() if self._membership is None else self._membership.room(nbytes)

    def _room_for_tails(self, copies: int) -> AbstractContextManager[None]:
        """Room in the pool for copies of all that is not in pages."""
        tails = sum(layer.store.tail.nbytes for layer in self._compressed() if layer.store is not None)
        stock = sum(nbytes_of(layer) for layer in self.layers if not isinstance(layer, CompressedLayer))
        return self.room_for(copies * (tails + stock))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that ``indices [rows]`` (or a boolean mask) name."""
        if rows := self._num_rows():
            self.reorder_cache(torch.arange(rows)[indices.cpu()])  # type: ignore[arg-type]  # of type long

    def _num_rows(self) -> int:
        """Rows of the first layer that holds any, else 0."""
        counts = (layer.num_rows if isinstance(layer, CompressedLayer) else num_rows(layer) for layer in self.layers)
        return next((rows for rows in counts if rows), 0)

    def warm_up(self, model: PreTrainedModel, *, rows: int = 1) -> None:
        """Has a device compile and load what steps of this kind take, so that nothing is compiled while a user waits.

        The model runs a few hundred tokens over a cache like this one, which stays as it is; inside of
        `fibkv.attention` if later calls will be. In a pool only the codecs of its present level are run.

        Args:
            model: that the cache is for.
            rows: of later batches; several are also run with padding.

        Raises:
            BudgetError: the tokens do not fit into the pool's budget.
        """
        warm_up(model, self, rows)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop`, after `activate_past_recording`, puts the whole cache back as it was."""
        # Layers of older releases do not say.
        return all(getattr(layer, "is_croppable", False) for layer in self.layers)

    def report(self) -> CacheReport:
        """Bytes counted, per layer: what is compressed, what is left raw and why."""
        compressed = list(self._compressed())
        tables = (table for layer in compressed if layer.store for table in layer.store.tables())
        shared = {id(tensor): tensor.nbytes for table in tables for tensor in table.tensors}
        layers = tuple(
            layer.report()
            if isinstance(layer, CompressedLayer)
            else report_of(index, layer, self.plan.layers[index].why_stock or "")
            for index, layer in enumerate(self.layers)
        )
        offloaded = [layer.store.offloaded() for layer in compressed if layer.store]
        host_slack = sum(allocated - used for used, allocated in offloaded)
        return CacheReport(
            layers=layers,
            tables_nbytes=sum(shared.values()),
            slack_nbytes=self.inventory.slabs.slack_nbytes + host_slack,
            buffer_nbytes=self._memories.buffer_nbytes,
            budget_violations=(*self.budget_violations, *self._sampled_violations),
        )

    def verify(self) -> tuple[Any, ...]:
        """Checks every page against its digest; returns the records of those now in quarantine.

        A cache with a page in quarantine refuses to be read.
        """
        for layer in self._compressed():
            if layer.store is not None:
                layer.store.verify()
        return tuple(self.quarantine.records)

    def save(self, store: Store, token_ids: TokenIds | Tensor, *, name: str | None = None) -> Saved:
        """Saves what the cache holds of one row, for `fibkv.restore` to find it by the tokens.

        Args:
            store: where to. A store that fails does not raise; the result says so.
            token_ids: ``[t]`` or ``[1, t]``: the tokens that the cache holds, and maybe some behind them, such as the
                one that ``generate`` has sampled last.
            name: of the model's weights, instead of a digest of all of them; see `fibkv.hf_identity.identify`.

        Raises:
            ModelError: a layer is left to transformers, or the model is gone.
            ContractError: no store; the cache is empty or has several rows; or fewer ids are given than it holds.
        """
        check_store("save.store", store)
        return write_prefix(store, snapshot(self, token_ids, name))

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

    def _compressed(self) -> Iterator[CompressedLayer]:
        return (layer for layer in self.layers if isinstance(layer, CompressedLayer))
