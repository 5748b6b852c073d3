"""Triton: the kernels of attention on codes, split over the context, and of the merge of the splits.

A program takes the queries of one KV head and one row (grouped heads and several tokens are rows of one matrix) over a
range of tiles. Operands of the matrix unit are float16 where codes have 8 bits or fewer: queries and weights are
divided by their largest magnitude first, norms and scales go to the float32 logits and weights. 16-bit codes are
widened to float32 and multiplied as TF32, affine ones as three products of TF32, 32-bit ones as float32. Sums are
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fibkv.kernels.triton_load import load_directions, load_floats, load_norms

# Columns of a table of addresses.
CODES, NORMS, RANGES, MEANS, CHANNELS, COLUMNS = (tl.constexpr(column) for column in range(6))


@triton.jit
def _halves(numbers):
    """``[R, X]`` float32 as float16 numbers of at most 1, and the float32 factors ``[R]`` they were divided by."""
    peaks = tl.max(tl.abs(numbers), 1)
    factors = tl.where(peaks > 0.0, peaks, 1.0)
    return (numbers / factors[:, None]).to(tl.float16), factors


@triton.jit
def _product(left, right, OPERAND: tl.constexpr):
    """``left [R, X]`` float32 times ``right [X, Y]``, float32."""
    if OPERAND == "f16":
        halves, factors = _halves(left)
        product = tl.dot(halves, right.to(tl.float16)) * factors[:, None]
    else:
        product = tl.dot(left, right, input_precision=OPERAND)
    return product


@triton.jit
def _address(entry, COLUMN: tl.constexpr):
    return tl.load(entry + COLUMN).to(tl.pointer_type(tl.uint8))


@triton.jit
def _load_means(entry, head, SIDE: tl.constexpr):
    """The mean ``[D]`` float32 of a head's vectors in the codes' space; see `fibkv.codes.FibCodes`."""
    start = _address(entry, MEANS).to(tl.pointer_type(tl.int8)) + head * (1 + SIDE.dim)
    axis = tl.arange(0, SIDE.width)
    numbers = tl.load(start + 1 + axis, axis < SIDE.dim, other=0).to(tl.float32)
    # 2 ** exponent by its bits: exponents are those of normal numbers.
    return numbers * ((tl.load(start).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_channels(entry, head, SIDE: tl.constexpr):
    """The channel scales ``[D]`` float32 of a head."""
    axis = tl.arange(0, SIDE.width)
    return load_floats(_address(entry, CHANNELS), head * SIDE.dim + axis, axis < SIDE.dim, "bf16")


@triton.jit
def _load_rotation(rotation, SIDE: tl.constexpr):
    """``[D, D]`` float32, filled with zeros."""
    axis = tl.arange(0, SIDE.width)
    inside = (axis < SIDE.dim)[:, None] & (axis < SIDE.dim)[None, :]
    return tl.load(rotation + axis[:, None] * SIDE.dim + axis[None, :], inside, other=0.0)


@triton.jit
def _load_tile(entry, start, codewords, head, vectors, inside, SIDE: tl.constexpr, PAGED: tl.constexpr):
    """Directions ``[T, D]`` and norms ``[T]`` of a tile: of a page, or of a tail that starts at ``start``."""
    codes = tl.multiple_of(_address(entry, CODES), PAGED) if PAGED else start
    norms, ranges = start, start
    if SIDE.norm != "none" or SIDE.form == "affine":
        norms = _address(entry, NORMS)
    if SIDE.norm == "log8":
        ranges = _address(entry, RANGES)
    groups = tl.zeros_like(vectors) + head
    directions = load_directions(codes, norms, codewords, vectors, groups, inside, SIDE)
    return directions, load_norms(norms, ranges, vectors, groups, inside, SIDE)


@triton.jit
def _logits(
    query,
    entry,
    start,
    codewords,
    rotation,
    head,
    vectors,
    inside,
    SIDE: tl.constexpr,
    PAGED: tl.constexpr,
):
    """``[R, T]`` float32: products of queries with the coded keys ``vectors`` of ``head``, not scaled."""
    directions, norms = _load_tile(entry, start, codewords, head, vectors, inside, SIDE, PAGED)
    if SIDE.channels:
        # <q, s * k> = <s * q, k>: the group's scales go to the query.
        query = query * _load_channels(entry, head, SIDE)[None, :]
        if SIDE.rotated_channels:
            query = tl.dot(query, tl.trans(_load_rotation(rotation, SIDE)), input_precision="ieee")
    operand: tl.constexpr = SIDE.operand
    logits = _product(query, tl.trans(directions), operand)
    if SIDE.norm != "none":
        logits *= norms[None, :]
    if SIDE.centered:
        logits += tl.sum(query * _load_means(entry, head, SIDE)[None, :], 1)[:, None]
    return logits


@triton.jit
def _mix(
    weights,
    entry,
    start,
    codewords,
    rotation,
    head,
    vectors,
    inside,
    SIDE: tl.constexpr,
    PAGED: tl.constexpr,
):
    """``[R, D]`` float32: sums of the coded values ``vectors`` of ``head``, weighted by ``weights [R, T]``."""
    directions, norms = _load_tile(entry, start, codewords, head, vectors, inside, SIDE, PAGED)
    shares = weights
    if SIDE.norm != "none":
        shares = weights * norms[None, :]
    operand: tl.constexpr = SIDE.operand
    sums = _product(shares, directions, operand)
    if SIDE.centered:
        sums += tl.sum(weights, 1)[:, None] * _load_means(entry, head, SIDE)[None, :]
    if SIDE.channels:
        if SIDE.rotated_channels:
            sums = tl.dot(sums, _load_rotation(rotation, SIDE), input_precision="ieee")
        sums *= _load_channels(entry, head, SIDE)[None, :]
    return sums


@triton.jit
def _bent(logits, softcap):
    """``softcap * tanh(logits / softcap)``; beyond 15 tanh is 1 in float32."""
    power = tl.exp(2.0 * tl.minimum(tl.maximum(logits / softcap, -15.0), 15.0))
    return softcap * (1.0 - 2.0 / (power + 1.0))


@triton.jit
def _masked(logits, token, seen, newest, mask_starts, MASK: tl.constexpr):
    """``logits [R, T]`` with -inf where they are not ``seen``, or hidden by the mask."""
    if MASK == "causal":
        seen = seen & (token[None, :] <= newest[:, None])
    elif MASK == "bool":
        seen = seen & (tl.load(mask_starts[:, None] + token[None, :], seen, other=0) != 0)
    elif MASK == "float":
        logits += tl.load(mask_starts[:, None] + token[None, :], seen, other=0.0)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _load_queries(query, bias, queries, used, SIDE: tl.constexpr, BIASED: tl.constexpr):
    """``[R, D]`` float32: queries, zero where they are not ``used``; and what their bias adds, ``[R]``."""
    axis = tl.arange(0, SIDE.width)
    inside = used[:, None] & (axis < SIDE.dim)[None, :]
    turned = tl.load(query + queries[:, None] * SIDE.dim + axis[None, :], inside, 0.0)
    added = tl.zeros([used.shape[0]], tl.float32)
    if BIASED:
        added = tl.load(bias + queries, used, other=0.0)
    return turned, added


@triton.jit
def _weighed(logits, peak):
    """Weights ``[R, T]`` of logits, what sums of weights so far decay by, and the risen peak, both ``[R]``."""
    risen = tl.maximum(peak, tl.max(logits, 1))
    # Queries that have seen nothing yet: exp(-inf - 0) is 0, and no NaN.
    level = tl.where(risen == float("-inf"), 0.0, risen)
    return tl.exp(logits - level[:, None]), tl.exp(peak - level), risen


@triton.jit
def _store_split(out, lse, into, used, peak, total, sums, SIDE: tl.constexpr):
    """Writes the output and log-sum-exp of queries to rows ``into``."""
    divisor = tl.where(total > 0.0, total, 1.0)
    # log(1) + -inf where nothing was seen.
    tl.store(lse + into, peak + tl.log(divisor), used)
    axis = tl.arange(0, SIDE.width)
    wanted = used[:, None] & (axis < SIDE.dim)[None, :]
    tl.store(out + into[:, None] * SIDE.dim + axis[None, :], sums / divisor[:, None], wanted)


# What changes from step to step must not make a new kernel, and `triton_launch` counts on that for all numbers.
PLACE = ["row0", "head0", "run_heads", "rows", "heads", "num_queries", "length"]
SPANS = ["start", "spans", "tokens", "capacity", "tiles", "slot"]
MASKING = ["past", "mask_row", "mask_head", "mask_query"]


@triton.jit(do_not_specialize=[*PLACE, *SPANS, *MASKING])
def attend_splits(
    query,
    bias,
    addresses,
    tail_keys,
    tail_values,
    key_codewords,
    key_rotation,
    value_codewords,
    value_rotation,
    mask,
    out,
    lse,
    row0,
    head0,
    run_heads,
    rows,
    heads,
    num_queries,
    length,
    start,
    spans,
    tokens,
    capacity,
    tiles,
    slot,
    past,
    mask_row: tl.int64,
    mask_head: tl.int64,
    mask_query: tl.int64,
    scale,
    softcap,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    PAGED: tl.constexpr,
    BIASED: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Attention of the queries of each KV head on ``tiles`` tiles of TOKENS tokens of a run per split.

    Grid: (splits, KV heads of the run x blocks of QUERIES queries, rows of the run). Letters: ``B`` rows, ``H`` KV
    heads, ``G`` query heads of each, ``Q`` query tokens; queries are rows ``g * Q + q`` of a matrix.

    Args:
        query: ``[B, H, G * Q, d]`` float32, in the space of the keys' codes.
        bias: ``[B, H, G * Q]`` float32, added to the products before the scale (if BIASED).
        addresses: ``[rows of the run, spans, 2, COLUMNS]`` int64, of keys and values (if PAGED).
        tail_keys: ``[B, H, capacity, d]`` raw (unless PAGED).
        tail_values: ``[B, H, capacity, d_value]`` raw (unless PAGED).
        key_codewords: ``[N, k]`` float16; ``value_codewords`` likewise.
        key_rotation: ``[d, d]`` float32, of codes behind channel scales; ``value_rotation`` likewise.
        mask: bool or float32, at the three strides given and 1.
        out: ``[S, B, H, G * Q, d_value]`` float32, in the space of the values' codes; split s goes to ``slot + s``.
        lse: ``[S, B, H, G * Q]`` float32; -inf where a query sees nothing.
        row0: first row of the run, ``head0`` its first KV head, ``run_heads`` how many it has.
        rows: B.
        heads: H.
        num_queries: G * Q.
        length: Q.
        start: token of the first span.
        spans: P of a row.
        tokens: T of a span.
        capacity: tokens that the codes of two heads are apart.
        tiles: of a split.
        slot: where splits go.
        past: tokens before the first query.
        mask_row: stride; ``mask_head`` and ``mask_query`` likewise.
        scale: of the logits.
        softcap: of the logits (if SOFTCAP).
        KEY: a `fibkv.kernels.triton_sides.Side`; ``VALUE`` likewise.
        PAGED: 0 for a tail, else a power of two that divides every address of codes.
        MASK: ``none``, ``causal``, ``bool`` or ``float``.
    """
    blocks = tl.cdiv(num_queries, QUERIES)
    head = tl.program_id(1) // blocks
    row = tl.program_id(2)
    places = (tl.program_id(1) % blocks) * QUERIES + tl.arange(0, QUERIES)
    used = places < num_queries
    # Of the whole layer: the matrix of a row and a head, its queries, and where their mask starts.
    matrix = (row0 + row).to(tl.int64) * heads + head0 + head
    queries = matrix * num_queries + places
    query_heads = (head0 + head) * (num_queries // length) + places // length
    mask_starts = mask + (row0 + row).to(tl.int64) * mask_row + query_heads * mask_head + (places % length) * mask_query
    newest = past + places % length
    turned, added = _load_queries(query, bias, queries, used, KEY, BIASED)

    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    value_width: tl.constexpr = VALUE.width
    sums = tl.zeros([QUERIES, value_width], tl.float32)
    tiles_of_span = tl.cdiv(tokens, TOKENS)
    first_tile = tl.program_id(0) * tiles
    tail = row.to(tl.int64) * run_heads * capacity
    for tile in range(first_tile, tl.minimum(first_tile + tiles, spans * tiles_of_span)):
        span = tile // tiles_of_span
        within = (tile % tiles_of_span) * TOKENS + tl.arange(0, TOKENS)
        inside = within < tokens
        vectors = head.to(tl.int64) * capacity + within
        entry = addresses + (row * spans + span) * (2 * COLUMNS)
        keys = tail_keys + tail * KEY.nbytes
        logits = _logits(turned, entry, keys, key_codewords, key_rotation, head, vectors, inside, KEY, PAGED)
        logits = (logits + added[:, None]) * scale
        if SOFTCAP:
            logits = _bent(logits, softcap)
        token = start + span * tokens + within
        seen = inside[None, :] & used[:, None]
        logits = _masked(logits, token, seen, newest, mask_starts, MASK)
        weights, decay, peak = _weighed(logits, peak)
        total = total * decay + tl.sum(weights, 1)
        values = tail_values + tail * VALUE.nbytes
        mixed = _mix(
            weights, entry + COLUMNS, values, value_codewords, value_rotation, head, vectors, inside, VALUE, PAGED
        )
        sums = sums * decay[:, None] + mixed

    into = (slot + tl.program_id(0)).to(tl.int64) * rows * heads * num_queries + queries
    _store_split(out, lse, into, used, peak, total, sums, VALUE)
