"""Compiles the Triton kernels to machine code of NVIDIA devices, none of which need be here; prints what it made."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fibkv.kernels import triton_decode, triton_encode

WORD = {"BITS": 8, "BLOCK": 1}
FORMS: dict[str, dict[str, Any]] = {
    "fib4": {"FORM": "fib", "NORM": "log8", "NBYTES": 64, "BITS": 8, "BLOCK": 2},
    "fib3": {"FORM": "fib", "NORM": "f16", "NBYTES": 48, "BITS": 6, "BLOCK": 2},
    "fp8": {"FORM": "fp8", "NORM": "bf16", "NBYTES": 128, **WORD},
    "int8": {"FORM": "int8", "NORM": "bf16", "NBYTES": 128, **WORD},
    "bf16": {"FORM": "bf16", "NORM": "none", "NBYTES": 256, **WORD},
}
WIDE = {"DIM": 128, "D": 128}


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
    print(capability, kernel.__name__, len(made.asm["cubin"]), "bytes,", made.metadata.shared, "shared")


def main() -> None:
    """Everything, for sm_80 and sm_90."""
    for capability in (80, 90):
        for side in (0, 256):
            sizes = {"NUM_BLOCKS": 64, "BLOCK": 2, "VECTORS": 4, "BLOCKS": 64, "CODEWORDS": 32}
            types = "*fp32 *fp32 *u8 *fp32 *i32 *fp64 i32 fp32 fp32"
            compiled(capability, triton_encode._search, types, NUM_SCALES=9, SIDE=side, SIZE=256, **sizes)
        compiled(capability, triton_encode._pack, "*i32 *u8 i32", NUM_BLOCKS=64, BITS=6, NBYTES=48, TILE=1024)
        for form, limit in (("int8", 127.0), ("fp8", 448.0)):
            compiled(capability, triton_encode._round, "*fp32 *u8 *i16 i32", FORM=form, LIMIT=limit, VECTORS=64, **WIDE)
        for constants in FORMS.values():
            types = "*u8 *u8 *u8 *fp32 *fp32 i32 i32"
            compiled(capability, triton_decode._decode, types, True, VECTORS=32, **WIDE, **constants)


if __name__ == "__main__":
    main()
