"""Triton: reading codes. Device functions that the decoding and the attention kernels share.

Everything is widened right after it was loaded, by integer arithmetic where the type is not float16 or float32: no
kernel computes in bfloat16 or e4m3, which older devices lack and Triton's interpreter gets wrong.

A ``SIDE`` (`fibkv.kernels.triton_sides.Side`) says how vectors lie; what is handed on of it is named first, since
Triton before 3.8 takes a field for a constant only by its name. Letters as everywhere: ``T`` tokens, ``D`` head_dim
rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_floats(start, offsets, mask, FORM: tl.constexpr):
    """Elements of a ``f32``, ``f16`` or ``bf16`` array of bytes at ``start``, float32; 0 where masked."""
    if FORM == "f32":
        floats = tl.load(start.to(tl.pointer_type(tl.float32)) + offsets, mask, other=0.0)
    elif FORM == "f16":
        floats = tl.load(start.to(tl.pointer_type(tl.float16)) + offsets, mask, other=0.0).to(tl.float32)
    else:
        halves = tl.load(start.to(tl.pointer_type(tl.uint16)) + offsets, mask, other=0)
        floats = (halves.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return floats


@triton.jit
def store_floats(start, offsets, numbers, mask, FORM: tl.constexpr):
    """Writes float32 numbers to a ``f32``, ``f16`` or ``bf16`` array at ``start``, rounded to the nearest."""
    if FORM == "f32":
        tl.store(start.to(tl.pointer_type(tl.float32)) + offsets, numbers, mask)
    elif FORM == "f16":
        tl.store(start.to(tl.pointer_type(tl.float16)) + offsets, numbers.to(tl.float16), mask)
    else:
        bits = numbers.to(tl.int32, bitcast=True)
        # To even where two are as near. What is no number stays none.
        halves = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        tl.store(start.to(tl.pointer_type(tl.int16)) + offsets, halves.to(tl.int16), mask)


@triton.jit
def load_eights(start, offsets, mask, FORM: tl.constexpr):
    """Elements of an ``int8`` or ``fp8`` (e4m3, no NaN) array at ``start``, float16, which holds them exactly."""
    if FORM == "int8":
        numbers = tl.load(start.to(tl.pointer_type(tl.int8)) + offsets, mask, other=0).to(tl.float16)
    else:
        octets = tl.load(start.to(tl.pointer_type(tl.uint8)) + offsets, mask, other=0).to(tl.uint16)
        # Sign, exponent and mantissa in their places of a float16, whose exponent is biased by 8 more.
        halves = ((octets & 0x80) << 8) | ((octets & 0x7F) << 7)
        numbers = halves.to(tl.float16, bitcast=True) * 256.0
    return numbers


@triton.jit
def load_indices(start, vectors, blocks, mask, SIDE: tl.constexpr):
    """Codeword indices, int32, of ``blocks`` of ``vectors`` (broadcast)."""
    octets = start.to(tl.pointer_type(tl.uint8)) + vectors * SIDE.nbytes
    if SIDE.bits == 8:
        indices = tl.load(octets + blocks, mask, other=0).to(tl.int32)
    else:
        # From the oldest bit; windows of a trellis wrap around their vector, which whole bytes fill.
        place = (blocks + 1) * SIDE.bits - SIDE.window
        first = (place + 8 * SIDE.nbytes) // 8
        offset = (place + 8 * SIDE.nbytes) % 8
        indices = tl.load(octets + first % SIDE.nbytes, mask, other=0).to(tl.int32) >> offset
        # How many more bytes an index may reach into; behind the last one of a vector there is none of its bits.
        for byte in tl.static_range(1, (SIDE.window + 14) // 8):
            more = tl.load(octets + (first + byte) % SIDE.nbytes, mask, other=0).to(tl.int32)
            indices |= (more << (8 * byte)) >> offset
        indices &= (1 << SIDE.window) - 1
    return indices


@triton.jit
def _as_half(numbers):
    """The low 16 bits as float16."""
    return (numbers & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _look_up(codewords, indices, k: tl.constexpr, SIDE: tl.constexpr):
    """Codewords ``[T, m, k]`` float16 of indices ``[T, m]``, from a copy of the table in shared memory.

    A codeword of two or four coordinates is one number of 32 or 64 bits: one read of shared memory each.
    """
    places = tl.arange(0, 1 << SIDE.window)
    flat = tl.reshape(indices, [indices.shape[0] * indices.shape[1]])
    if k == 2:
        words = tl.gather(tl.load(codewords.to(tl.pointer_type(tl.int32)) + places), flat, 0)
        found = tl.join(_as_half(words), _as_half(words >> 16))
    else:
        words = tl.gather(tl.load(codewords.to(tl.pointer_type(tl.int64)) + places), flat, 0)
        even = tl.join(_as_half(words), _as_half(words >> 32))
        found = tl.join(even, tl.join(_as_half(words >> 16), _as_half(words >> 48)))
    return tl.reshape(found, [indices.shape[0], indices.shape[1], k])


@triton.jit
def load_directions(start, grids, codewords, vectors, groups, mask, SIDE: tl.constexpr):
    """Coded vectors before their norms or scales, ``[T, D]``, in the codes' space.

    Args:
        start: address of the codes.
        grids: address of ``[vectors or groups, .., 2]`` float16, (lowest, step) (``affine``).
        codewords: ``[N, k]`` of the codebook, whose dtype the result has (``fib``); in float16, N is a power of two.
        vectors: ``[T]``, which.
        groups: ``[T]``, the group of each (``affine``).
        mask: ``[T]``; vectors outside it are 0, and so are coordinates from ``d`` upwards.
        SIDE: how they lie.
    """
    width: tl.constexpr = SIDE.width
    form: tl.constexpr = SIDE.form
    axis = tl.arange(0, width)
    if form == "fib":
        k: tl.constexpr = SIDE.block
        if k & (k - 1):
            # Codewords of an odd length straddle lanes: every coordinate looks its own up.
            inside = mask[:, None] & (axis < SIDE.dim)[None, :]
            indices = load_indices(start, vectors[:, None], (axis // k)[None, :], inside, SIDE)
            directions = tl.load(codewords + indices * k + (axis % k)[None, :], inside, other=0.0)
        else:
            block = tl.arange(0, width // k)
            inside = mask[:, None] & (block < SIDE.dim // k)[None, :]
            indices = load_indices(start, vectors[:, None], block[None, :], inside, SIDE)
            if (k == 2 or k == 4) and SIDE.window <= 8 and codewords.dtype.element_ty == tl.float16:  # noqa: PLR1714
                found = tl.where(inside[:, :, None], _look_up(codewords, indices, k, SIDE), 0.0)
            else:
                # One load per codeword: its coordinates lie side by side.
                entries = codewords + indices[:, :, None] * k + tl.arange(0, k)[None, None, :]
                found = tl.load(entries, inside[:, :, None], other=0.0)
            directions = tl.reshape(found, [vectors.shape[0], width])
    elif form == "affine":
        inside = mask[:, None] & (axis < SIDE.dim)[None, :]
        if SIDE.group:
            places = vectors[:, None] * ((SIDE.dim + SIDE.group - 1) // SIDE.group) + (axis // SIDE.group)[None, :]
        else:
            places = groups[:, None] * SIDE.dim + axis[None, :]
        pairs = grids.to(tl.pointer_type(tl.float16)) + places * 2
        lowest = tl.load(pairs, inside, other=0.0).to(tl.float32)
        step = tl.load(pairs + 1, inside, other=0.0).to(tl.float32)
        numbers = load_indices(start, vectors[:, None], axis[None, :], inside, SIDE)
        directions = lowest + numbers.to(tl.float32) * step
    else:
        inside = mask[:, None] & (axis < SIDE.dim)[None, :]
        offsets = vectors[:, None] * SIDE.dim + axis[None, :]
        if form == "int8" or form == "fp8":  # noqa: PLR1714 - Triton knows no `in`
            directions = load_eights(start, offsets, inside, form)
        else:
            directions = load_floats(start, offsets, inside, form)
    return directions


@triton.jit
def load_norms(norms, ranges, vectors, groups, mask, SIDE: tl.constexpr):
    """What directions are multiplied by, ``[T]`` float32: norms or scales, or 1; 0 where masked.

    Args:
        norms: address of norms or scales.
        ranges: address of ``[groups, 2]`` float16, (lowest log2 norm, step) (``log8``).
        vectors: ``[T]``, which.
        groups: ``[T]``, the group of each (``log8``).
        mask: ``[T]``.
        SIDE: how they lie.
    """
    if SIDE.norm == "none":
        values = tl.where(mask, 1.0, 0.0)
    elif SIDE.norm == "log8":
        codes = tl.load(norms.to(tl.pointer_type(tl.uint8)) + vectors, mask, other=0).to(tl.float32)
        pairs = ranges.to(tl.pointer_type(tl.float16)) + groups * 2
        low = tl.load(pairs, mask, other=0.0).to(tl.float32)
        step = tl.load(pairs + 1, mask, other=0.0).to(tl.float32)
        values = tl.where(codes > 0.0, tl.exp2(low + (codes - 1.0) * step), 0.0)
    else:
        form: tl.constexpr = SIDE.norm
        values = load_floats(norms, vectors, mask, form)
    return values


# Decided when the functions above were decorated, by TRITON_INTERPRET in the environment.
INTERPRETED = not isinstance(load_norms, triton.JITFunction)
