"""Compiles the Triton kernels to machine code of NVIDIA devices, none of which need be here; prints what it made.

``python -m tests.codecs.compile_triton``; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import re
import subprocess
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fibkv.kernels import (
    triton_attend,
    triton_decode,
    triton_encode,
    triton_means,
    triton_merge,
    triton_rotate,
    triton_round,
    triton_search,
)
from fibkv.kernels.triton_sides import Side

SIDES = {
    "fib4": Side("fib", "log8", 128, 128, 64, block=2),
    "fib3": Side("fib", "f16", 128, 128, 48, bits=6, window=6, block=2),
    "fib2": Side("fib", "log8", 128, 128, 32, block=4),
    "centered": Side("fib", "log8", 128, 128, 64, block=2, centered=True),
    "trellis": Side("fib", "log8", 128, 128, 32, bits=2, window=10),
    "channels": Side("fib", "log8", 128, 128, 64, block=2, channels=True, rotated_channels=True),
    "fp8": Side("fp8", "bf16", 128, 128, 128),
    "int8": Side("int8", "bf16", 128, 128, 128),
    "affine": Side("affine", "none", 128, 128, 32, "tf32x3", bits=2, window=2, group=32),
    "bf16": Side("bf16", "none", 128, 128, 256, "tf32"),
}
PAIRS = [
    ("fib4", "fib4"),
    ("fib2", "centered"),
    ("trellis", "trellis"),
    ("channels", "fp8"),
    ("int8", "fib3"),
    ("affine", "affine"),
]


def compiled(capability: int, kernel: Any, types: str, fused: bool = False, **constants: Any) -> None:
    """Compiles a kernel.

    Args:
        capability: 90 for sm_90.
        kernel: a `triton.JITFunction`.
        types: of the arguments that are no constants, in order.
        fused: whether multiplications and additions may be fused.
        constants: all other arguments.
    """
    names = kernel.arg_names
    given = iter(types.split())
    signature = {name: "constexpr" if name in constants else next(given) for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name][0] == "*"}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    made = triton.compile(source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": fused})
    registers, stack = usage(made.asm["cubin"])
    sides = [name for side in constants.values() for name, known in SIDES.items() if side == known]
    print(
        f"sm_{capability} {kernel.__name__} {' '.join(sides)}: {registers} registers, {stack} bytes spilled,",
        f"{made.metadata.shared} of shared memory",
    )


def usage(machine_code: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills or keeps on a stack."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        shown = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", shown).groups()
    return int(registers), int(stack)


def main() -> None:
    """Everything for sm_90, and what is written in integers for sm_80, which has no e4m3."""
    _encoding()
    for side in SIDES.values():
        compiled(90, triton_decode._decode, "*u8 *u8 *u8 *fp32 *fp32 i32 i32", True, VECTORS=32, SIDE=side)
    for key, value in PAIRS:
        _attention(90, SIDES[key], SIDES[value], paged=16)
    _attention(80, SIDES["fp8"], SIDES["bf16"], paged=16)
    _attention(90, SIDES["bf16"], SIDES["bf16"], paged=0)
    sizes = {"DIM": 128, "D": 128, "COLUMNS": 16}
    compiled(90, triton_merge._turn, "*u8 *fp32 *fp32 *fp32 i32", True, FORM="bf16", QUERIES=16, **sizes)
    types = "*fp32 *fp32 *fp32 *bf16 *fp32 i32 i32 i32 i32 i32 i32"
    compiled(
        90, triton_merge.merge_splits, types, True, ROTATED=True, PLAIN=True, ADDED=True, FORM="bf16", SLOTS=16, **sizes
    )


def _encoding() -> None:
    for form in ("bf16", "f16", "f32"):
        sizes = {"DIM": 128, "D": 128, "VECTORS": 32, "COORDINATES": 16}
        compiled(90, triton_rotate.rotate, "*u8 *fp32 *fp32 *fp64 *u8 i32", True, FORM=form, **sizes)
    compiled(90, triton_means.group_means, "*u8 *fp64 i32", FORM="bf16", DIM=128, D=128, TOKENS=64)
    sizes = {"DIM": 128, "D": 128, "GROUPS": 16, "COORDINATES": 32}
    limits = {"LIMIT": 127.0, "LEAST": -126, "MOST": 120}
    compiled(90, triton_means.code_means, "*fp64 *fp32 *i8 *fp32 i32", **limits, **sizes)
    for bits, scales in ((8, 5), (6, 1)):
        sizes = {"DIM": 128, "D": 128, "VECTORS": 8, "SIDE": 64, "STARTS": 0x22100, "WIDTH": 4}
        sizes |= {"SIZE": 1 << bits, "BITS": bits, "NBYTES": 8 * bits}
        types = "*fp32 *fp64 *fp32 *fp32 *i64 *u8 *fp64 i32 fp32 fp32"
        compiled(90, triton_search.search_cells, types, NUM_SCALES=scales, GAIN=True, **sizes)
    compiled(90, triton_rotate.log_norms, "*fp64 *u8 *fp16 *u8 i32", NORMS=64)
    compiled(90, triton_rotate.half_norms, "*fp64 *fp16 *u8 i32", NORMS=1024)
    for cells, block, together in ((256, 2, 32), (0, 8, 32), (0, 4, 1)):
        blocks = 128 // block
        sizes = {"NUM_BLOCKS": blocks, "BLOCK": block, "VECTORS": max(1, 1024 // blocks // together), "BLOCKS": blocks}
        types = "*fp32 *fp32 *u8 *fp32 *i32 *fp64 i32 fp32 fp32"
        compiled(90, triton_encode._search, types, NUM_SCALES=1, SIDE=cells, SIZE=256, CODEWORDS=together, **sizes)
    compiled(90, triton_encode._pack, "*i32 *u8 i32", NUM_BLOCKS=64, BITS=6, NBYTES=48, TILE=1024)
    for form, limit in (("int8", 127.0), ("fp8", 448.0)):
        sizes = {"VECTORS": 64, "DIM": 128, "D": 128}
        types = "*u8 *u8 *i16 *u8 i32"
        compiled(80, triton_round._round, types, SOURCE="bf16", FORM=form, LIMIT=limit, **sizes)


def _attention(capability: int, key: Side, value: Side, paged: int) -> None:
    pointers = "*fp32 *fp32 *i64 *u8 *u8 *fp16 *fp32 *fp16 *fp32 *u8 *fp32 *fp32"
    types = f"{pointers} {'i32 ' * 14} i64 i64 i64 fp32 fp32"
    modes = {"BIASED": True, "MASK": "causal", "SOFTCAP": True, "QUERIES": 16, "TOKENS": 64}
    compiled(capability, triton_attend.attend_splits, types, True, KEY=key, VALUE=value, PAGED=paged, **modes)


if __name__ == "__main__":
    main()
