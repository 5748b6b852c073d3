// Instruction sets, and which of them this machine has.
//
// Sources named in `fibkv_isa` of CMakeLists.txt are compiled once per instruction set, inside a namespace of that
// name, and offer tables of functions (AttendKernels, EncodeKernels). They must not instantiate templates of the
// standard library: the linker keeps one copy, and it could be the one for a larger instruction set.
#pragma once

namespace fibkv {

enum class Isa { portable, avx2, avx512 };

// The best instruction set that this machine has and that was compiled.
Isa best_isa();

// Whether an instruction set was compiled and this machine has it.
bool has_isa(Isa isa);

// Whether this machine has products of bfloat16 numbers beside AVX-512.
bool has_bf16();

}  // namespace fibkv
