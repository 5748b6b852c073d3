"""Triton: reading codes. Device functions that the decoding and the attention kernels share.

Everything is widened right after it was loaded, by integer arithmetic where the type is not float16 or float32: no
kernel computes in bfloat16 or e4m3, which older devices lack and Triton's interpreter gets wrong.

``FORM`` says how vectors lie: ``f32``, ``f16``, ``bf16``, ``int8``, ``fp8``, or ``fib``. Letters as everywhere: ``T``
tokens, ``D`` head_dim rounded up to a power of two.
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
def load_indices(start, vectors, blocks, mask, NBYTES: tl.constexpr, BITS: tl.constexpr):
    """Codeword indices, int32, of ``blocks`` of ``vectors`` (broadcast); ``NBYTES`` are those of a vector's codes."""
    octets = start.to(tl.pointer_type(tl.uint8)) + vectors * NBYTES
    if BITS == 8:
        indices = tl.load(octets + blocks, mask, other=0).to(tl.int32)
    else:
        place = blocks * BITS
        first = place // 8
        indices = tl.load(octets + first, mask, other=0).to(tl.int32) >> (place % 8)
        # How many more bytes an index may reach into.
        for byte in tl.static_range(1, (BITS + 14) // 8):
            inside = mask & (first + byte < NBYTES)
            more = tl.load(octets + first + byte, inside, other=0).to(tl.int32)
            indices |= (more << (8 * byte)) >> (place % 8)
        indices &= (1 << BITS) - 1
    return indices


@triton.jit
def load_directions(
    start,
    codewords,
    vectors,
    mask,
    FORM: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    NBYTES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Coded vectors before their norms or scales, ``[T, D]``, in the codes' space.

    Args:
        start: address of the codes.
        codewords: ``[N, BLOCK]`` of the codebook (``fib``).
        vectors: ``[T]``, which.
        mask: ``[T]``; vectors outside it are 0, and so are coordinates from DIM upwards.
        FORM: see the module.
        DIM: head_dim.
        D: DIM rounded up to a power of two.
        NBYTES: bytes of a vector's codes (``fib``).
        BITS: of an index (``fib``).
        BLOCK: coordinates of a codeword (``fib``).
    """
    if FORM == "fib":
        if BLOCK & (BLOCK - 1):
            # Codewords of an odd length straddle lanes: every coordinate looks its own up.
            axis = tl.arange(0, D)
            inside = mask[:, None] & (axis < DIM)[None, :]
            indices = load_indices(start, vectors[:, None], (axis // BLOCK)[None, :], inside, NBYTES, BITS)
            directions = tl.load(codewords + indices * BLOCK + (axis % BLOCK)[None, :], inside, other=0.0)
        else:
            block = tl.arange(0, D // BLOCK)
            inside = mask[:, None] & (block < DIM // BLOCK)[None, :]
            indices = load_indices(start, vectors[:, None], block[None, :], inside, NBYTES, BITS)
            # One load per codeword: its coordinates lie side by side.
            entries = codewords + indices[:, :, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
            found = tl.load(entries, inside[:, :, None], other=0.0)
            directions = tl.reshape(found, [vectors.shape[0], D])
    else:
        axis = tl.arange(0, D)
        inside = mask[:, None] & (axis < DIM)[None, :]
        offsets = vectors[:, None] * DIM + axis[None, :]
        if FORM == "int8" or FORM == "fp8":  # noqa: PLR1714 - Triton knows no `in`
            directions = load_eights(start, offsets, inside, FORM)
        else:
            directions = load_floats(start, offsets, inside, FORM)
    return directions


@triton.jit
def load_norms(norms, ranges, vectors, groups, mask, NORM: tl.constexpr):
    """What directions are multiplied by, ``[T]`` float32: norms or scales; 0 where masked.

    Args:
        norms: address of norms or scales.
        ranges: address of ``[groups, 2]`` float16, (lowest log2 norm, step) (``log8``).
        vectors: ``[T]``, which.
        groups: ``[T]``, the group of each (``log8``).
        mask: ``[T]``.
        NORM: ``log8``, ``f16``, ``bf16``, or ``none``: all 1.
    """
    if NORM == "none":
        values = tl.where(mask, 1.0, 0.0)
    elif NORM == "log8":
        codes = tl.load(norms.to(tl.pointer_type(tl.uint8)) + vectors, mask, other=0).to(tl.float32)
        pairs = ranges.to(tl.pointer_type(tl.float16)) + groups * 2
        low = tl.load(pairs, mask, other=0.0).to(tl.float32)
        step = tl.load(pairs + 1, mask, other=0.0).to(tl.float32)
        values = tl.where(codes > 0.0, tl.exp2(low + (codes - 1.0) * step), 0.0)
    else:
        values = load_floats(norms, vectors, mask, NORM)
    return values


# Decided when the functions above were decorated, by TRITON_INTERPRET in the environment.
INTERPRETED = not isinstance(load_norms, triton.JITFunction)
