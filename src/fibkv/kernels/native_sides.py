"""How codes of each codec lie in the memory of native kernels: the descriptions that C++ reads, and packing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch

from fibkv.codes import Codes
from fibkv.label_counts import label_frequencies
from fibkv.packed import Held, Packed, PackedForm, Stored
from fibkv.packing import packed_nbytes
from fibkv.rotation import Rotation, hadamard_signs
from fibkv.shape import Role
from fibkv.space import KeySpace
from fibkv.tables import AffineTables, ChannelTables, FibTables, KltTables, RawTables, ScaledTables, Tables, trellis_of

# Beyond, the float32 matrix of a Hadamard rotation is not the transform itself, and the matrix is what counts.
MAX_EXACT_HADAMARD = 256
# The compiled module, or None where it was built without a compiler or left out on request.
extension: Any = None
WHY_NOT = "yes"
try:
    extension = import_module("fibkv.kernels._native")
except ImportError as missing:
    WHY_NOT = f"not built ({missing})"


def side_of(tables: Tables, role: Role, isa: Any, rotated: bool = True) -> Any:
    """The native description of one side, one object per process and setting: pages are compared by it.

    Args:
        tables: of a codec.
        role: keys and values stand in different orders.
        isa: instruction set; without byte products codes stay in rows.
        rotated: see `fibkv.kernels.runs.Run`.
    """
    # With every argument in its place: the cache takes a default and the same value given for two settings.
    return _side(tables, role, isa, rotated)


# Without a limit: pages are known by their side, and a second one for the same codec would make them look foreign.
@cache
def _side(tables: Tables, role: Role, isa: Any, rotated: bool) -> Any:
    if isinstance(tables, KltTables):
        return _klt_side(tables, role)
    inner = tables.inner if isinstance(tables, ChannelTables) else tables
    settings: dict[str, Any] = {
        "is_key": role == "key",
        "tiled": isa in _tiling_isas(inner),
        "dim": tables.head_dim,
        "channels": isinstance(tables, ChannelTables) or (isinstance(tables, AffineTables) and tables.per_channel),
        "centered": isinstance(inner, FibTables) and inner.centered,
        # A space per group needs the inner rotation in any case.
        "rotation": _rotation(inner.rotation) if inner.rotation and (rotated or tables is not inner) else None,
    }
    forms = extension.Form
    coding: dict[str, Any]
    nothing: dict[str, Any] = {
        "block": 0,
        "size": 0,
        "bits": 0,
        "window": 0,
        "log_norms": False,
        "codewords": None,
        "labels": None,
        "frequencies": None,
    }
    match inner:
        case RawTables():
            form = {torch.float32: forms.f32, torch.float16: forms.f16, torch.bfloat16: forms.bf16}[inner.dtype]
            coding = {"form": form, "code_bytes": inner.head_dim * inner.dtype.itemsize, "norm_bytes": 0, **nothing}
        case ScaledTables():
            form = forms.int8 if inner.dtype == torch.int8 else forms.fp8
            coding = {"form": form, "code_bytes": inner.head_dim, "norm_bytes": 2, **nothing}
        case AffineTables():
            coding = {
                **nothing,
                "form": forms.affine,
                "code_bytes": packed_nbytes(inner.head_dim, inner.bits),
                "norm_bytes": 0 if inner.per_channel else 4 * inner.groups,
                "block": inner.group,
                "bits": inner.bits,
            }
        case FibTables():
            log8 = inner.norm_format == "log8"
            coding = {
                "form": forms.fib,
                "code_bytes": inner.code_nbytes,
                "norm_bytes": 1 if log8 else 2,
                "block": inner.codewords.shape[1],
                "size": inner.codewords.shape[0],
                "bits": inner.bits,
                "window": inner.window,
                "log_norms": log8,
                "codewords": inner.codewords.contiguous(),
                "labels": None if inner.trellis is None else inner.trellis.labels.contiguous(),
                "frequencies": None if inner.trellis is None else label_frequencies(inner.trellis.code),
            }
    return extension.Side(**settings, **coding)


def _klt_side(tables: KltTables, role: Role) -> Any:
    return extension.Side.klt(
        is_key=role == "key",
        dim=tables.head_dim,
        code_bytes=tables.code_nbytes,
        codewords=tables.codewords.contiguous(),
        widths=tables.bits.contiguous(),
    )


def _tiling_isas(tables: Tables) -> tuple[Any, ...]:
    """Instruction sets that attend to codes in integers, where the code allows it."""
    isas = extension.Isa
    return (isas.avx512,) if trellis_of(tables) else (isas.avx512, isas.avx2)


@lru_cache(maxsize=64)
def _rotation(rotation: Rotation) -> Any:
    is_transform = rotation.kind == "hadamard" and rotation.dim <= MAX_EXACT_HADAMARD
    signs = hadamard_signs(rotation.dim, rotation.seed) if is_transform else torch.empty(0, rotation.dim)
    return extension.Rotation(rotation.matrix.contiguous(), signs.to(torch.float32))


@lru_cache(maxsize=256)
def native_space(space: KeySpace) -> Any:
    """The native form of a key space, one object per space: plans are compared by it."""
    return extension.KeySpace(space.mean, space.inverse)


def fill_all(held: Sequence[Held], places: Sequence[Packed]) -> None:
    """Writes codes of equal rectangles to their places; stored ones by one call."""
    stored = [codes.data for codes in held if isinstance(codes, Stored)]
    if len(stored) == len(held):
        fill_bytes(stored, places)
        return
    for codes, place in zip(held, places, strict=True):
        if isinstance(codes, Packed) and codes.side is place.side:
            place.data.copy_(codes.data)
        else:
            place.store(codes.canonical())


def fill_bytes(runs: Sequence[memoryview], places: Sequence[Packed]) -> None:
    """Writes the canonical bytes of equal rectangles to their places, by one call."""
    form = places[0].form
    form.side.pack_runs(form.heads, form.tokens, runs, [place.address for place in places])


def packed_codes(codes: Held, tables: Tables, side: Any) -> Packed:
    """Codes in the order of a side: themselves if they are in it, else a copy."""
    if isinstance(codes, Packed) and codes.side is side:
        return codes
    heads, tokens = extent(codes)
    form = PackedForm(0, heads, tokens, tables, side)
    copy = Packed(torch.empty(form.nbytes, dtype=torch.uint8), form)
    fill_all([codes], [copy])
    return copy


def extent(codes: Held) -> tuple[int, int]:
    """(heads, tokens) of the codes ``[heads, tokens, ...]`` of a rectangle."""
    if not isinstance(codes, Codes):
        return codes.heads, codes.tokens
    heads, tokens = codes.axes
    return heads, tokens
