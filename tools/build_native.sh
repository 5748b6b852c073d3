#!/usr/bin/env bash
# For development: compiles the native kernels into the source tree, so that a change needs no reinstall.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
nanobind=$("$python" -m nanobind --cmake_dir)
cmake -S . -B _build -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" -Dnanobind_DIR="$nanobind" >/dev/null
cmake --build _build
cp _build/_native*.so src/fibkv/kernels/
