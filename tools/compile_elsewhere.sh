#!/usr/bin/env bash
# Compiles the sources that depend on an instruction set by clang, for this kind of processor and for 64-bit ARM, and
# throws the result away: `pip install ziglang` brings both. The flags are those of CMakeLists.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ZIG_GLOBAL_CACHE_DIR="$work/cache" ZIG_LOCAL_CACHE_DIR="$work/cache"
avx2="-mavx2 -mfma -mf16c -mbmi2 -DFIBKV_INTEGER"
avx512="-march=skylake_avx512 -mavx512vnni -mavx512vbmi -mavx512vbmi2 -mgfni -DFIBKV_INTEGER -DFIBKV_BF16"

units=()
for source in encode attend_tiles; do
  units+=("aarch64-linux-gnu portable $source" "x86_64-linux-gnu portable $source")
  units+=("x86_64-linux-gnu avx2 $source $avx2" "x86_64-linux-gnu avx512 $source $avx512")
done
units+=("x86_64-linux-gnu avx2 attend_avx2 $avx2" "x86_64-linux-gnu avx512 attend_avx512 $avx512")
units+=("x86_64-linux-gnu avx512 attend_bf16 $avx512 -mavx512bf16")

export python work
compile() {
  read -r target isa source flags <<<"$1"
  # shellcheck disable=SC2086  # flags are words
  "$python" -m ziglang c++ -target "$target" -std=gnu++17 -Wall -Wextra -Werror -Wno-psabi -Wno-uninitialized \
    -DFIBKV_ISA="$isa" $flags -c "csrc/$source.cpp" -o "$work/$target-$isa-$source.o"
  echo "$target $isa $source"
}
export -f compile
printf '%s\0' "${units[@]}" | xargs -0 -P 2 -I{} bash -c 'set -e; compile "$1"' _ {}
