"""The caches that an evaluation compares: fibkv's, scalar codes at the same bits, and other people's quantizers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache

from fibkv.allocation import KLT_RUNGS
from fibkv.bench_caches import held_tensors_nbytes
from fibkv.calibration_file import Calibration
from fibkv.errors import ContractError
from fibkv.eval_result import Kind
from fibkv.hf import Cache
from fibkv.hf_attention import attention
from fibkv.hf_model import plan_model
from fibkv.policy import Policy
from fibkv.quality import CacheVariant, CausalLM
from fibkv.regions import ProtectedRegions
from fibkv.shape import Role
from fibkv.simulated import Kivi, PerToken, Quantizer, SimulatedCache

PROFILES: tuple[tuple[str, str], ...] = (
    ("int8", "int8"),
    ("fp8", "fp8 e4m3"),
    ("trellis4", "trellis 4"),
    ("fib4", "FibQuant 4"),
    ("scalar4", "scalar (TurboQuant) 4"),
    ("trellis3", "trellis 3"),
    ("fib3", "FibQuant 3"),
    ("scalar3", "scalar (TurboQuant) 3"),
    ("trellis2", "trellis 2"),
    ("fib2", "FibQuant 2"),
    ("scalar2", "scalar (TurboQuant) 2"),
)
"""Plain codecs by name. Scalar and trellis codes have the same norms and gains as FibQuant, hence the same bits."""

WHOLE_BITS = (4, 3, 2)
DEFAULT_BITS = (4, 3.5, 3, 2.5, 2)
"""What ``bits=`` gives, the recipes."""

TRELLIS_RECIPES: tuple[tuple[str, tuple[str, str]], ...] = tuple(
    (f"trellis bits={bits}", (f"trelliskey{bits}", f"trellis{bits}")) for bits in WHOLE_BITS
)
"""The recipes on trellis codes: for whoever has time to encode."""

KLT_TRELLIS = (("klt2", "trellis2"), ("klt3", "trellis3"))
"""The same with klt keys, of a calibration."""

SIMULATED: tuple[tuple[str, str, Quantizer], ...] = (
    ("kivi4", "KIVI-4 g32", Kivi(4)),
    ("kivi3", "KIVI-3 g32", Kivi(3)),
    ("kivi2", "KIVI-2 g32", Kivi(2)),
    ("token4", "int4 per token g64", PerToken(4)),
    ("token2", "int2 per token g64", PerToken(2)),
)
"""Quantizers of our own making after their publications."""

_BACKENDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("tf-fp8", "transformers fp8", {"backend": "fp8"}),
    ("quanto4", "quanto int4 g64", {"backend": "quanto", "nbits": 4}),
    ("quanto2", "quanto int2 g64", {"backend": "quanto", "nbits": 2}),
    # The axis that transformers recommends for hqq.
    ("hqq4", "hqq int4 g64", {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}),
    ("hqq2", "hqq int2 g64", {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalVariant(CacheVariant):
    """A cache under test, and whose it is."""

    kind: Kind


class StockQuantizer:
    """One of transformers' quantized layers, of which only the quantizer is used: it would read new tokens exactly."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, rows: Tensor, role: Role) -> tuple[Tensor, int]:
        """See `fibkv.simulated.Quantizer`. In float16, so that scales are counted, and are, of that width."""
        tokens = rows.shape[2]
        # hqq packs four rows of groups to a byte at 2 bits; a last page that is short is filled up, and counted so.
        filled = torch.nn.functional.pad(rows.to(torch.float16), (0, 0, 0, -tokens % 4), mode="replicate")
        halves = filled.contiguous()
        self._layer.keys = halves  # hqq takes dtype and device from there
        self._layer.dtype = halves.dtype
        options = {"axis": getattr(self._layer, f"axis_{role}")} if hasattr(self._layer, f"axis_{role}") else {}
        codes = self._layer._quantize(halves, **options)
        decoded = self._layer._dequantize(codes).to(rows.dtype).reshape(halves.shape)[:, :, :tokens]
        return decoded, held_tensors_nbytes(codes)


def eval_variants(
    model: CausalLM,
    protected: ProtectedRegions,
    names: tuple[str, ...] | None = None,
    calibration: Calibration | None = None,
) -> tuple[tuple[EvalVariant, ...], tuple[tuple[str, str], ...]]:
    """The caches of a run, and those that cannot be made here, each with the reason.

    Args:
        model: the model; simulated caches need one whose layers are all compressed by fibkv.
        protected: sinks and newest tokens that every cache keeps raw.
        names: of the wanted ones; default: all.
        calibration: of the model, made from other text; adds rows that use it.

    Raises:
        ContractError: a name that no cache has.
    """
    variants = [*_fibkv_variants(protected), *_calibrated_variants(protected, calibration)]
    skipped: list[tuple[str, str]] = []
    plan = plan_model(model)
    whole = plan.latent_widths is None and all(layer.why_stock is None for layer in plan.layers)
    stock, missing = _stock_quantizers(model)
    skipped += missing
    for kind, quantizers in (("simulated", SIMULATED), ("transformers", stock)):
        for name, title, quantizer in quantizers:
            if whole:
                variants.append(_simulated(name, title, kind, len(plan.layers), quantizer, protected))  # type: ignore[arg-type]
            else:
                skipped.append((name, "the model has layers that are not plain full attention"))
    known = [variant.name for variant in variants] + [name for name, _ in skipped]
    if names is None:
        return tuple(variants), tuple(skipped)
    if unknown := [name for name in names if name not in known]:
        raise ContractError("caches", f"some of {', '.join(known)}", unknown)
    return (
        tuple(variant for variant in variants if variant.name in names),
        tuple(pair for pair in skipped if pair[0] in names),
    )


def fibkv_variant(name: str, title: str, protected: ProtectedRegions, **options: Any) -> EvalVariant:
    """A cache of fibkv with ``options``, read by attention on pages."""
    policy = Policy.per_token(protected)
    return EvalVariant(
        name=name,
        title=title,
        kind="fibkv",
        make_cache=partial(Cache, policy=policy, **options),
        attention=attention,
    )


def _fibkv_variants(protected: ProtectedRegions) -> list[EvalVariant]:
    recipes = [fibkv_variant(f"bits{bits}", f"fibkv bits={bits}", protected, bits=bits) for bits in DEFAULT_BITS]
    recipes += [fibkv_variant(pair[0], title, protected, profile=pair) for title, pair in TRELLIS_RECIPES]
    return [*recipes, *(fibkv_variant(name, title, protected, profile=name) for name, title in PROFILES)]


def _calibrated_variants(protected: ProtectedRegions, calibration: Calibration | None) -> list[EvalVariant]:
    if calibration is None:
        return []
    by_bits = [
        fibkv_variant(f"cal{bits}", f"calibrated bits={bits}", protected, bits=bits, calibration=calibration)
        for bits in DEFAULT_BITS
    ]
    by_klt = [
        fibkv_variant("-".join(pair), ", ".join(pair), protected, profile=pair, calibration=calibration)
        for pair in (*KLT_RUNGS, *KLT_TRELLIS)
    ]
    return [*by_bits, *by_klt, fibkv_variant("calmix", "calibrated, per layer", protected, calibration=calibration)]


def _simulated(
    name: str, title: str, kind: Kind, layers: int, quantizer: Quantizer, protected: ProtectedRegions
) -> EvalVariant:
    def make(model: CausalLM, *, read_through: bool) -> SimulatedCache:  # noqa: ARG001 - a factory's signature
        return SimulatedCache(layers, quantizer, protected, read_through=read_through)

    plain: Callable[[CausalLM], AbstractContextManager[object]] = lambda _: nullcontext()  # noqa: E731
    return EvalVariant(name=name, title=title, kind=kind, make_cache=make, attention=plain)


def _stock_quantizers(model: CausalLM) -> tuple[list[tuple[str, str, Quantizer]], list[tuple[str, str]]]:
    found: list[tuple[str, str, Quantizer]] = []
    missing = []
    for name, title, options in _BACKENDS:
        try:
            layer = QuantizedCache(config=model.config, **options).layers[0]
        except (ImportError, ValueError) as error:  # not installed, or unknown to an older transformers
            missing.append((name, str(error).split(". ", 1)[0]))
        else:
            found.append((name, title, StockQuantizer(layer)))
    return found, missing
