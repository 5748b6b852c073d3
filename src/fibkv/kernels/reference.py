"""The reference kernels: plain torch, on any device, written for reading. They define the meaning.

Faster implementations offer the same functions and are held to these by the conformance suite. Inputs are
validated by `fibkv.kernels` before they come here. Shapes: ``...`` leading axes such as ``[rows, pages, heads]``,
``T`` tokens, ``Q`` queries (grouped query heads included), ``d`` head_dim, ``m`` = d / k blocks.

Everything is computed in float32, except for what decides a code before rounding (norms, rotation, logarithms):
that is float64, so that codes depend neither on batch size nor on the order in which a machine adds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fibkv.codes import AffineChannelCodes, AffineCodes, ChannelCodes, Codes, FibCodes, RawCodes, ScaledCodes
from fibkv.constants import constant
from fibkv.errors import EncodingError
from fibkv.kernels import reference_klt, reference_trellis
from fibkv.kernels.nearest import nearest
from fibkv.kernels.reference_norms import decode_norms, encode_norms
from fibkv.kernels.refusals import FLOAT16_MAX, mismatch, refuse_if, require_finite
from fibkv.means import decode_means, subtract_means
from fibkv.packing import pack, unpack
from fibkv.tables import AffineTables, ChannelTables, FibTables, KltTables, RawTables, ScaledTables, Tables


def encode(rows: Tensor, tables: Tables) -> Codes:
    """Encodes vectors.

    Args:
        rows: ``[..., T, d]`` floating point.
        tables: what the codec made.

    Returns:
        Codes with the same leading axes, newly allocated.

    Raises:
        EncodingError: a vector is not finite, or its norm or scale is out of the format's range.
    """
    match tables:
        case RawTables():
            return _encode_raw(rows, tables)
        case ScaledTables():
            return _encode_scaled(rows, tables)
        case AffineTables():
            return _encode_affine(rows, tables)
        case FibTables():
            return _encode_fib(rows, tables)
        case KltTables():
            return _encode_klt(rows, tables)
        case ChannelTables():
            return _encode_channels(rows, tables)


def decode(codes: Codes, tables: Tables, *, out: Tensor | None = None) -> Tensor:
    """Decodes to vectors in their original space.

    Args:
        codes: what `encode` made with these tables.
        tables: the same tables.
        out: ``[..., T, d]`` of any floating dtype to write into; allocated as float32 if absent.

    Returns:
        ``[..., T, d]``.
    """
    vectors = unrotate(_vectors(codes, tables), tables)
    if out is None:
        return vectors
    return out.copy_(vectors) if isinstance(tables, RawTables) else copy_vectors(vectors, out)


def copy_vectors(vectors: Tensor, out: Tensor) -> Tensor:
    """Copies decoded vectors to ``out`` of any floating dtype; returns it."""
    if out.dtype == torch.float16:
        # A code may decode a little above the vector it stands for: not to infinity.
        vectors = vectors.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return out.copy_(vectors)


def rotate(query: Tensor, tables: Tables) -> Tensor:
    """Takes queries ``[..., Q, d]`` to the space of the codes: once per step and head, not per token."""
    query = query.to(torch.float32)
    return query if tables.rotation is None else tables.rotation.apply(query)


def unrotate(out: Tensor, tables: Tables) -> Tensor:
    """Takes attention outputs ``[..., Q, d]`` back from the space of the codes: the inverse of `rotate`."""
    return out if tables.rotation is None else tables.rotation.invert(out)


def logits(query: Tensor, codes: Codes, tables: Tables, mean: Tensor | None = None) -> Tensor:
    """Inner products of rotated queries with coded keys.

    Args:
        query: ``[..., Q, d]`` float32, in the codes' space (`rotate`); broadcast over leading axes.
        codes: keys, ``[..., T]`` vectors.
        tables: of the keys' codec.
        mean: ``[..., d]`` float32 in the codes' space, what every key has beside its code; None = nothing.

    Returns:
        ``[..., Q, T]`` float32, not scaled.
    """
    if mean is not None:
        return logits(query, codes, tables) + query @ mean.unsqueeze(-1)
    if isinstance(tables, ChannelTables):
        assert isinstance(codes, ChannelCodes)
        # <q, s * k> = <s * q, k>: the group's scales go to the query.
        scaled = query * codes.channel_scales.unsqueeze(-2).to(torch.float32)
        return logits(rotate(scaled, tables.inner), codes.inner, tables.inner)
    return query @ _vectors(codes, tables).transpose(-1, -2)


def mix(weights: Tensor, codes: Codes, tables: Tables) -> Tensor:
    """Weighted sums of coded values.

    Args:
        weights: ``[..., Q, T]`` float32.
        codes: values, ``[..., T]`` vectors.
        tables: of the values' codec.

    Returns:
        ``[..., Q, d]`` float32 in the codes' space: `unrotate` it after the last part has been added.
    """
    if isinstance(tables, ChannelTables):
        assert isinstance(codes, ChannelCodes)
        inner = unrotate(mix(weights, codes.inner, tables.inner), tables.inner)
        return inner * codes.channel_scales.unsqueeze(-2).to(torch.float32)
    return weights @ _vectors(codes, tables)


def attend(
    query: Tensor,
    key_codes: Codes,
    key_tables: Tables,
    value_codes: Codes,
    value_tables: Tables,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    key_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of rotated queries on one part of a cache: logits -> softmax -> mix.

    Args:
        query: ``[..., Q, d]`` float32, in the keys' space.
        key_codes: keys of ``T`` tokens.
        key_tables: of the keys' codec.
        value_codes: values of the same tokens.
        value_tables: of the values' codec.
        scale: factor of the logits, usually 1/sqrt(d).
        mask: broadcastable to ``[..., Q, T]``: bool (True = attend) or float32 (added to the logits).
        softcap: c of c * tanh(logits / c), or None.
        key_mean: ``[..., d]`` float32 in the keys' space, see `logits`.

    Returns:
        ``out [..., Q, d_value]`` float32 in the values' space and ``lse [..., Q]`` float32, the log of the softmax's
        denominator. A query that may attend to nothing here has lse -inf and out 0.
    """
    scores = logits(query, key_codes, key_tables, key_mean) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    # A row without any key has lse -inf; exp(-inf - 0) = 0 keeps it free of NaN.
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return mix(weights, value_codes, value_tables), lse


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention over parts into attention over their union, by log-sum-exp.

    Args:
        outs: ``[P, ..., Q, d]`` float32, one entry per part, all in one space.
        lses: ``[P, ..., Q]`` float32.

    Returns:
        ``out [..., Q, d]`` and ``lse [..., Q]`` as `attend` over all parts at once would have given.
    """
    lse = torch.logsumexp(lses, dim=0)
    shares = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0))
    return (outs * shares.unsqueeze(-1)).sum(0), lse


def _vectors(codes: Codes, tables: Tables) -> Tensor:
    """Decodes to ``[..., T, d]`` float32 in the codes' own (rotated) space."""
    match codes, tables:
        case RawCodes(), RawTables():
            return codes.values.to(torch.float32)
        case ScaledCodes(), ScaledTables():
            return codes.values.to(torch.float32) * codes.scales.to(torch.float32).unsqueeze(-1)
        case AffineCodes(), AffineTables():
            low, step = _grids(codes.grid, tables).unbind(-1)
            return low + step * unpack(codes.values, tables.head_dim, tables.bits)
        case FibCodes(), FibTables():
            indices = unpack(codes.indices, tables.num_blocks, tables.bits)
            vectors = _directions(indices, tables) * decode_norms(codes.norms, codes.norm_range).unsqueeze(-1)
            return vectors + decode_means(codes.mean).unsqueeze(-2) if tables.centered else vectors
        case FibCodes(), KltTables():
            reference_klt.require_heads(codes.indices.shape, tables)
            quantized = reference_klt.directions(reference_klt.unpack(codes.indices, tables), tables)
            return quantized * decode_norms(codes.norms, codes.norm_range).unsqueeze(-1)
        case ChannelCodes(), ChannelTables():
            inner = unrotate(_vectors(codes.inner, tables.inner), tables.inner)
            return inner * codes.channel_scales.unsqueeze(-2).to(torch.float32)
        case _:
            raise mismatch(codes, tables)


def _encode_raw(rows: Tensor, tables: RawTables) -> RawCodes:
    values = rows.to(tables.dtype, copy=True).contiguous()
    refuse_if(
        (torch.isinf(values) & torch.isfinite(rows)).any(),
        lambda: EncodingError(f"vectors exceed {tables.dtype}: largest magnitude {float(rows.abs().max()):.4g}"),
    )
    return RawCodes(values=values)


def _encode_scaled(rows: Tensor, tables: ScaledTables) -> ScaledCodes:
    rows = rows.to(torch.float32)
    require_finite(rows)
    scales = _round_up_bfloat16(rows.abs().amax(-1) / tables.limit)
    divisor = scales.to(torch.float32)
    scaled = rows / divisor.masked_fill(divisor == 0, 1.0).unsqueeze(-1)
    values = scaled.round() if tables.dtype == torch.int8 else scaled
    return ScaledCodes(scales=scales, values=values.clamp(-tables.limit, tables.limit).to(tables.dtype))


def _round_up_bfloat16(positive: Tensor) -> Tensor:
    """Rounds float32 >= 0 to bfloat16 towards +infinity, so that nothing exceeds the scaled range; finite stays so."""
    bits = positive.view(torch.int32)
    raised = ((bits + 0xFFFF) >> 16).clamp(max=0x7F7F)
    return raised.to(torch.int16).view(torch.bfloat16)


def _encode_affine(rows: Tensor, tables: AffineTables) -> AffineCodes:
    rows = rows.to(torch.float32)
    require_finite(rows)
    peak = rows.abs().max()
    refuse_if(
        peak > FLOAT16_MAX,
        lambda: EncodingError(f"numbers must be at most {FLOAT16_MAX:g} for grids in float16, got {float(peak):.6g}"),
    )
    most = 2**tables.bits - 1
    if tables.per_channel:
        low, high = rows.amin(-2), rows.amax(-2)
    else:
        parts = rows.split(tables.group, -1)
        low, high = (torch.stack([end(part, -1) for part in parts], -1) for end in (torch.amin, torch.amax))
    low = low.to(torch.float16)
    step = ((high - low.to(torch.float32)) / most).to(torch.float16)
    grid = torch.stack([low, step], -1)
    lows, steps = _grids(grid, tables).unbind(-1)
    # A group of equal elements has step 0: its lowest says it all.
    numbers = ((rows - lows) / steps.masked_fill(steps == 0, 1.0)).round().clamp(0, most)
    kind = AffineChannelCodes if tables.per_channel else AffineCodes
    return kind(grid=grid, values=pack(numbers.to(torch.int32), tables.bits))


def _grids(grid: Tensor, tables: AffineTables) -> Tensor:
    """Grids for each element, ``[..., T or 1, d, 2]`` float32."""
    wide = grid.to(torch.float32)
    if tables.per_channel:
        return wide.unsqueeze(-3)
    return wide.repeat_interleave(tables.group, -2)[..., : tables.head_dim, :]


def _encode_fib(rows: Tensor, tables: FibTables) -> FibCodes:
    rows = rows.to(torch.float32)
    require_finite(rows)
    mean = rows.new_empty((*rows.shape[:-2], 0), dtype=torch.int8)
    if tables.centered:
        mean, rows = subtract_means(rows, tables.rotation.matrix)
    rotated, length = _rotate_units(rows, tables) if tables.word_rotation is None else tables.word_rotation.apply(rows)
    indices = _search(rotated, tables)
    norms = length.squeeze(-1)
    if tables.gain_corrected:
        norms = norms * _optimal_gain(rotated, _directions(indices, tables))
    packed_norms, norm_range = encode_norms(norms, tables.norm_format)
    return FibCodes(mean=mean, norm_range=norm_range, norms=packed_norms, indices=pack(indices, tables.bits))


def _rotate_units(rows: Tensor, tables: FibTables) -> tuple[Tensor, Tensor]:
    """Rotated unit vectors ``[..., d]`` float32 of ``rows [..., d]``, and the rows' lengths ``[..., 1]`` float64."""
    # The squares of float32 numbers neither overflow nor vanish in float64.
    wide = rows.to(torch.float64)
    length = wide.square().sum(-1, keepdim=True).sqrt()
    unit = wide / length.masked_fill(length == 0, 1.0)
    return (unit @ constant(tables.rotation.matrix, unit.device, torch.float64).T).to(torch.float32), length


def _encode_klt(rows: Tensor, tables: KltTables) -> FibCodes:
    rows = rows.to(torch.float32)
    require_finite(rows)
    reference_klt.require_heads(rows.shape, tables)
    unit, length = reference_klt.units(rows, tables)
    found = reference_klt.search(unit, tables)
    norms, norm_range = encode_norms(length * reference_klt.gain(found), "log8")
    mean = rows.new_empty((*rows.shape[:-2], 0), dtype=torch.int8)
    return FibCodes(mean=mean, norm_range=norm_range, norms=norms, indices=reference_klt.pack(found.indices, tables))


def _search(rotated: Tensor, tables: FibTables) -> Tensor:
    """Indices ``[..., m]`` int32 of codewords for rotated unit vectors ``[..., d]`` float32.

    A scale search quantizes the vector times each factor and keeps, vector by vector, the codes whose direction makes
    the smallest angle with it (the first of equals): a centroid code errs less at another length than 1.
    """
    first, *others = tables.scales
    best = _codewords(rotated * first, tables)
    if not others:
        return best
    cosine = _cosine(rotated, _directions(best, tables))
    for scale in others:
        indices = _codewords(rotated * scale, tables)
        found = _cosine(rotated, _directions(indices, tables))
        better = found > cosine
        best = torch.where(better.unsqueeze(-1), indices, best)
        cosine = torch.where(better, found, cosine)
    return best


def _codewords(vectors: Tensor, tables: FibTables) -> Tensor:
    """Indices ``[..., m]`` int32 of one codeword per block of ``vectors [..., d]`` float32."""
    if tables.trellis is not None:
        return reference_trellis.symbols(vectors, tables.trellis)
    blocks = vectors.unflatten(-1, (tables.num_blocks, -1))
    flat = blocks.reshape(-1, blocks.shape[-1])
    if tables.decisions is not None:
        return tables.decisions.look_up(flat).view(blocks.shape[:-1])
    return nearest(flat, constant(tables.codewords, vectors.device)).view(blocks.shape[:-1])


def _directions(indices: Tensor, tables: FibTables) -> Tensor:
    """The vectors ``[..., d]`` float32 that indices ``[..., m]`` stand for, before their norms."""
    if tables.trellis is not None:
        indices = reference_trellis.windows(indices, tables.trellis.code)
    return embedding(indices, constant(tables.codewords, indices.device)).flatten(-2)


def _cosine(unit: Tensor, quantized: Tensor) -> Tensor:
    """Cosines of the angles between unit vectors and what they were quantized to, ``[...]`` float64; 0 for zero."""
    unit, quantized = unit.to(torch.float64), quantized.to(torch.float64)
    energy = quantized.square().sum(-1)
    return (unit * quantized).sum(-1) / energy.masked_fill(energy == 0, 1.0).sqrt()


def _optimal_gain(unit: Tensor, quantized: Tensor) -> Tensor:
    """The g that minimizes |u - g q|^2: <u, q> / <q, q> (notes in docs/DESIGN.md), ``[...]`` float64."""
    unit, quantized = unit.to(torch.float64), quantized.to(torch.float64)
    energy = quantized.square().sum(-1)
    gain = (unit * quantized).sum(-1) / energy.masked_fill(energy == 0, 1.0)
    # A norm is not negative: where the nearest codewords point away (coarse books, zero vectors) zero is best.
    return gain.clamp(min=0.0)


def _encode_channels(rows: Tensor, tables: ChannelTables) -> ChannelCodes:
    scales, divided = divide_channels(rows)
    return ChannelCodes(channel_scales=scales, inner=encode(divided, tables.inner))


def divide_channels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The channel scales ``[..., d]`` bfloat16 of a group ``rows [..., T, d]``, and the rows divided by them, float32.

    Raises:
        EncodingError: an element is not finite.
    """
    rows = rows.to(torch.float32)
    require_finite(rows)
    peak = rows.abs().amax(-2)
    # Root mean square over the group's tokens, with the peak taken out so that no square leaves the range.
    spread = (rows / peak.masked_fill(peak == 0, 1.0).unsqueeze(-2)).to(torch.float64).square().mean(-2).sqrt()
    scales = _round_up_bfloat16((peak * spread).to(torch.float32))
    # A channel that is zero in every token has scale 0: it decodes to zero, whatever the inner code says of it.
    divisor = scales.to(torch.float32).masked_fill(scales == 0, 1.0)
    return scales, rows / divisor.unsqueeze(-2)
