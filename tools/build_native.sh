#!/usr/bin/env bash
# For development: compiles the native kernels into the source tree, so that a change needs no reinstall.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
nanobind=$("$python" -m nanobind --cmake_dir)
cmake -S . -B _build -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" -Dnanobind_DIR="$nanobind" >/dev/null
cmake --build _build
# In one step: a process that has the old one mapped keeps it.
for built in _build/_native*.so; do
  cp "$built" src/fibkv/kernels/.built
  mv src/fibkv/kernels/.built "src/fibkv/kernels/$(basename "$built")"
done
