"""Encoding and decoding in C++ (`csrc/encode.h`), on the CPU: the functions of `fibkv.kernels.reference`, same meaning.

Codes are bit for bit those of the reference, on every instruction set, except where ``codeword_search`` is ``table``:
Hadamard rotations are then computed in 16-bit integers, and a point may be taken for one of a cell next to its own, in
the same way on every instruction set. Decoded vectors agree to 1e-5. Rows are read, and vectors written, in their own
dtype; threads are torch's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fibkv.codes import ChannelCodes, Codes, FibCodes, RawCodes, ScaledCodes
from fibkv.errors import KernelError
from fibkv.kernels import native_klt, native_norms, reference
from fibkv.kernels.native_sides import MAX_EXACT_HADAMARD
from fibkv.kernels.native_sides import extension as native
from fibkv.kernels.refusals import mismatch, require_finite, require_norms
from fibkv.means import encode_means, means_in_place
from fibkv.rotation import hadamard_signs
from fibkv.tables import AffineTables, ChannelTables, FibTables, KltTables, RawTables, ScaledTables, Tables
from fibkv.trellis_search import REACH

Isa = Any
"""An instruction set: ``fibkv.kernels._native.Isa``."""

# The element types that C++ reads and writes, by their names there.
ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def encode(rows: Tensor, tables: Tables, *, isa: Isa | None = None) -> Codes:
    """Encodes vectors.

    Args:
        rows: ``[..., T, d]`` floating point, on the CPU.
        tables: what the codec made.
        isa: instruction set, by default the best one here.

    Returns:
        Codes with the same leading axes, newly allocated.

    Raises:
        EncodingError: a vector is not finite, or its norm or scale is out of the format's range.
        KernelError: rows are not on the CPU.
    """
    if isinstance(tables, RawTables | AffineTables):
        # Copies, ends of groups and roundings: torch makes them at the speed of memory.
        return reference.encode(rows, tables)
    _require_cpu(rows, "rows")
    rows = (rows if rows.dtype in ELEMENTS else rows.to(torch.float32)).contiguous()
    isa = isa or native.best_isa()
    match tables:
        case ScaledTables():
            return _encode_scaled(rows, tables, isa)
        case FibTables():
            return _encode_fib(rows, tables, isa)
        case KltTables():
            return native_klt.encode(rows, _element(rows), tables, isa)
        case ChannelTables():
            return _encode_channels(rows, tables, isa)


def decode(codes: Codes, tables: Tables, *, out: Tensor | None = None, isa: Isa | None = None) -> Tensor:
    """Decodes to vectors in their original space.

    Args:
        codes: what `encode` made with these tables.
        tables: the same tables.
        out: ``[..., T, d]`` of any floating dtype to write into; allocated as float32 if absent.
        isa: instruction set, by default the best one here.

    Returns:
        ``[..., T, d]``.

    Raises:
        KernelError: codes are of another codec than the tables, or not on the CPU, or ``out`` has another shape.
    """
    for name, tensor in codes.named():
        _require_cpu(tensor, name)
    if isinstance(tables, AffineTables):
        return reference.decode(codes, tables, out=out)
    codes = codes.map(torch.Tensor.contiguous)
    shape = _decoded_shape(codes, tables)
    if out is not None and out.shape != shape:
        raise KernelError(f"out: expected shape {list(shape)}, got {list(out.shape)}")
    isa = isa or native.best_isa()
    if out is not None and out.device.type == "cpu" and out.dtype in ELEMENTS and out.is_contiguous():
        _decode_into(out, codes, tables, isa)
        return out
    # Of the dtype that is wanted, so that C++ keeps large float16 values finite.
    vectors = torch.empty(shape, dtype=out.dtype if out is not None and out.dtype in ELEMENTS else torch.float32)
    _decode_into(vectors, codes, tables, isa)
    return vectors if out is None else out.copy_(vectors)


def _element(tensor: Tensor) -> Any:
    return getattr(native.Element, ELEMENTS[tensor.dtype])


def _require_cpu(tensor: Tensor, name: str) -> None:
    if tensor.device.type != "cpu":
        raise KernelError(f"{name}: expected a tensor on the CPU for the native kernels, got {tensor.device}")


def _decoded_shape(codes: Codes, tables: Tables) -> torch.Size:
    match codes, tables:
        case RawCodes(), RawTables():
            return codes.values.shape
        case ScaledCodes(), ScaledTables():
            return codes.values.shape
        case FibCodes(), FibTables() | KltTables():
            return torch.Size((*codes.norms.shape, tables.head_dim))
        case ChannelCodes(), ChannelTables():
            return _decoded_shape(codes.inner, tables.inner)
        case _:
            raise mismatch(codes, tables)


def _decode_into(out: Tensor, codes: Codes, tables: Tables, isa: Isa) -> None:
    """Decodes into ``out [..., T, d]``, contiguous and of a dtype in ELEMENTS."""
    if not out.numel():
        return
    match codes, tables:
        case RawCodes(), RawTables():
            reference.decode(codes, tables, out=out)
        case ScaledCodes(), ScaledTables():
            _decode_scaled(out, codes, isa)
        case FibCodes(), FibTables():
            _decode_fib(out, codes, tables, isa)
        case FibCodes(), KltTables():
            native_klt.decode_into(out, _element(out), codes, tables, isa)
        case ChannelCodes(), ChannelTables():
            _decode_channels(out, codes, tables, isa)


def _encode_scaled(rows: Tensor, tables: ScaledTables, isa: Isa) -> ScaledCodes:
    scales = torch.empty(rows.shape[:-1], dtype=torch.bfloat16)
    values = torch.empty(rows.shape, dtype=tables.dtype)
    kernel = native.encode_int8 if tables.dtype == torch.int8 else native.encode_e4m3
    finite = kernel(
        rows.data_ptr(),
        _element(rows),
        count=scales.numel(),
        dim=rows.shape[-1],
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    if not finite:
        require_finite(rows)
    return ScaledCodes(scales=scales, values=values)


def _decode_scaled(out: Tensor, codes: ScaledCodes, isa: Isa) -> None:
    kernel = native.decode_int8 if codes.values.dtype == torch.int8 else native.decode_e4m3
    kernel(
        codes.values.data_ptr(),
        codes.scales.data_ptr(),
        count=codes.scales.numel(),
        dim=out.shape[-1],
        out=out.data_ptr(),
        element=_element(out),
        threads=torch.get_num_threads(),
        isa=isa,
    )


def _encode_fib(rows: Tensor, tables: FibTables, isa: Isa) -> FibCodes:
    mean = torch.empty((*rows.shape[:-2], 0), dtype=torch.int8)
    if tables.centered:
        mean, rows = _subtract_means(rows, tables, isa)
    norms = torch.empty(rows.shape[:-1], dtype=torch.float64)
    indices = torch.empty((*norms.shape, tables.code_nbytes), dtype=torch.uint8)
    finite = native.encode_fib(
        _coder(tables),
        rows.data_ptr(),
        _element(rows),
        count=norms.numel(),
        codes=indices.data_ptr(),
        norms=norms.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    if not finite:
        require_finite(rows)
    if tables.norm_format == "f16":
        require_norms(norms, "f16")
        no_range = torch.empty((*norms.shape[:-1], 0), dtype=torch.float16)
        return FibCodes(mean=mean, norm_range=no_range, norms=norms.to(torch.float16), indices=indices)
    codes, norm_range = native_norms.encode(norms, isa)
    return FibCodes(mean=mean, norm_range=norm_range, norms=codes, indices=indices)


def _subtract_means(rows: Tensor, tables: FibTables, isa: Isa) -> tuple[Tensor, Tensor]:
    """The coded means of groups, and the rows without them in float32."""
    *lead, tokens, dim = rows.shape
    means = torch.empty((*lead, dim), dtype=torch.float64)
    extent = {"groups": means.numel() // dim, "tokens": tokens, "dim": dim}
    threads = torch.get_num_threads()
    native.mean_rows(rows.data_ptr(), _element(rows), **extent, means=means.data_ptr(), threads=threads, isa=isa)
    if not bool(torch.isfinite(means).all()):
        require_finite(rows)
    codes, taken = encode_means(means, tables.rotation.matrix)
    taken, centered = taken.contiguous(), torch.empty(rows.shape, dtype=torch.float32)
    native.subtract_from_rows(
        rows.data_ptr(),
        _element(rows),
        **extent,
        taken=taken.data_ptr(),
        out=centered.data_ptr(),
        threads=threads,
        isa=isa,
    )
    return codes, centered


def _decode_fib(out: Tensor, codes: FibCodes, tables: FibTables, isa: Isa) -> None:
    if tables.centered:
        vectors = torch.empty(out.shape, dtype=torch.float32)
        _decode_directions(vectors, codes, tables, isa)
        vectors += means_in_place(codes.mean, tables.rotation.matrix).unsqueeze(-2)
        reference.copy_vectors(vectors, out)
    else:
        _decode_directions(out, codes, tables, isa)


def _decode_directions(out: Tensor, codes: FibCodes, tables: FibTables, isa: Isa) -> None:
    """Vectors without their means."""
    norms = native_norms.decode(codes, isa)
    native.decode_fib(
        _coder(tables),
        codes.indices.data_ptr(),
        norms.data_ptr(),
        count=norms.numel(),
        out=out.data_ptr(),
        element=_element(out),
        threads=torch.get_num_threads(),
        isa=isa,
    )


def _encode_channels(rows: Tensor, tables: ChannelTables, isa: Isa) -> ChannelCodes:
    *lead, tokens, dim = rows.shape
    scales = torch.empty((*lead, dim), dtype=torch.bfloat16)
    divided = torch.empty(rows.shape, dtype=torch.float32)
    finite = native.divide_channels(
        rows.data_ptr(),
        _element(rows),
        groups=scales.numel() // dim,
        tokens=tokens,
        dim=dim,
        scales=scales.data_ptr(),
        divided=divided.data_ptr(),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    if not finite:
        require_finite(rows)
    return ChannelCodes(channel_scales=scales, inner=encode(divided, tables.inner, isa=isa))


def _decode_channels(out: Tensor, codes: ChannelCodes, tables: ChannelTables, isa: Isa) -> None:
    inner = torch.empty(out.shape, dtype=torch.float32)
    _decode_into(inner, codes.inner, tables.inner, isa)
    native.multiply_channels(
        inner.data_ptr(),
        codes.channel_scales.data_ptr(),
        groups=codes.channel_scales.numel() // out.shape[-1],
        tokens=out.shape[-2],
        dim=out.shape[-1],
        out=out.data_ptr(),
        element=_element(out),
        threads=torch.get_num_threads(),
        isa=isa,
    )


@lru_cache(maxsize=64)
def _coder(tables: FibTables) -> Any:
    """What C++ makes of tables, once: search structures and the signs of the transform."""
    rotation, decisions, trellis = tables.rotation, tables.decisions, tables.trellis
    exact = rotation.kind == "hadamard" and rotation.dim <= MAX_EXACT_HADAMARD
    # Held by names until the constructor has copied them.
    codewords = _plain(tables.codewords)
    matrix = _plain(rotation.matrix)
    signs = _plain(hadamard_signs(rotation.dim, rotation.seed)) if exact else None
    cells = None if decisions is None else _plain(decisions.cells)
    size, block_dim = codewords.shape
    common = {
        "dim": tables.head_dim,
        "bits": tables.bits,
        "gain_corrected": tables.gain_corrected,
        "codewords": codewords.data_ptr(),
        "matrix": matrix.data_ptr(),
        "signs": 0 if signs is None else signs.data_ptr(),
        "rounds": 0 if signs is None else signs.shape[0],
        "scales": list(tables.scales),
    }
    if trellis is not None:
        words = tables.word_rotation
        return native.FibCoder(
            **common,
            window=tables.window,
            overlap=trellis.overlap,
            cells_per_one=trellis.cells,
            word_length=0.0 if words is None else words.length,
            word_unit=0.0 if words is None else words.unit,
            reach=REACH,
            ways=trellis.ways,
            rows=trellis.search.columns.shape[2],
            columns=trellis.search.columns.data_ptr(),
            costs=trellis.search.costs.data_ptr(),
            label_columns=list(trellis.code.columns),
        )
    return native.FibCoder(
        **common,
        block=block_dim,
        size=size,
        decisions=0 if cells is None else cells.data_ptr(),
        side=0 if decisions is None else decisions.side,
        extent=0.0 if decisions is None else decisions.extent,
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous()
