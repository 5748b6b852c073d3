"""Times encoding and decoding by the native kernels: one thread, vectors of 128 bfloat16 elements.

    python tools/time_encode.py

Prints, per instruction set and codec, nanoseconds per vector and GB/s of bfloat16 (256 bytes a vector) read or
written, the best of several runs, and the distortion E|u - û|² of unit vectors that the codec was not trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.functional import normalize

from fibkv.codecs import Codec, codec_for
from fibkv.kernels import native_codes
from fibkv.kernels.native_sides import extension as native
from fibkv.parameters import FibParameters, Fp8Parameters, Int8Parameters, TrellisParameters

HEAD_DIM = 128
GROUPS, TOKENS = 64, 256
RUNS, SECONDS = 5, 0.3
VECTOR_NBYTES = 2 * HEAD_DIM

CODECS = {
    "k=2 N=256 exact": FibParameters.of(HEAD_DIM, 2, 256),
    "k=2 N=256 table": FibParameters.of(HEAD_DIM, 2, 256, codeword_search="table"),
    "k=2 N=256 exact, scale search": FibParameters.of(HEAD_DIM, 2, 256, scale_search=True),
    "k=2 N=256 table, scale search": FibParameters.of(HEAD_DIM, 2, 256, codeword_search="table", scale_search=True),
    "k=2 N=64  exact": FibParameters.of(HEAD_DIM, 2, 64),
    "k=4 N=256 exact": FibParameters.of(HEAD_DIM, 4, 256),
    "k=1 N=16  exact": FibParameters.of(HEAD_DIM, 1, 16),
    "k=2 N=256 exact, Haar": FibParameters.of(HEAD_DIM, 2, 256, rotation="haar"),
    "trellis 2": TrellisParameters.of(HEAD_DIM, 2),
    "trellis 2, fast": TrellisParameters.of(HEAD_DIM, 2, path_search="fast"),
    "trellis 3": TrellisParameters.of(HEAD_DIM, 3),
    "trellis 3, fast": TrellisParameters.of(HEAD_DIM, 3, path_search="fast"),
    "trellis 4": TrellisParameters.of(HEAD_DIM, 4),
    "trellis 4, fast": TrellisParameters.of(HEAD_DIM, 4, path_search="fast"),
    "int8": Int8Parameters(head_dim=HEAD_DIM),
    "fp8": Fp8Parameters(head_dim=HEAD_DIM),
}


def nanoseconds(run: Callable[[], object]) -> float:
    """CPU time per vector of the best of RUNS batches of SECONDS each, so that other load counts little."""
    best = float("inf")
    for _ in range(RUNS):
        calls, start = 0, time.thread_time()
        while time.thread_time() - start < SECONDS:
            run()
            calls += 1
        best = min(best, (time.thread_time() - start) / calls)
    return best / (GROUPS * TOKENS) * 1e9


def distortion(codec: Codec, isa: object) -> float:
    rows = normalize(torch.randn(GROUPS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
    decoded = native_codes.decode(native_codes.encode(rows, codec.tables, isa=isa), codec.tables, isa=isa)
    return float((rows - decoded).double().square().sum(-1).mean())


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    torch.set_num_threads(1)
    rows = torch.randn(GROUPS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    out = torch.empty_like(rows)
    print(f"{processor()}; torch {version('torch')}; one thread; {GROUPS} groups of {TOKENS} vectors of {HEAD_DIM}")
    print(f"{'':9}{'':31}{'encode':>15}{'':14}{'decode':>9}{'':14}{'distortion':>8}")
    for isa in (native.Isa.avx512, native.Isa.avx2, native.Isa.portable):
        if not native.has_isa(isa):
            continue
        for name, parameters in CODECS.items():
            codec = codec_for(parameters)
            codes = native_codes.encode(rows, codec.tables, isa=isa)

            def encode(codec: Codec = codec, isa: object = isa) -> object:
                return native_codes.encode(rows, codec.tables, isa=isa)

            def decode(codec: Codec = codec, isa: object = isa, codes: object = codes) -> object:
                return native_codes.decode(codes, codec.tables, out=out, isa=isa)

            times = [nanoseconds(run) for run in (encode, decode)]
            columns = "".join(f"{ns:9.0f} ns {VECTOR_NBYTES / ns:6.2f} GB/s" for ns in times)
            print(f"{isa.name:9}{name:31}{columns}   {distortion(codec, isa):.3g}", flush=True)


if __name__ == "__main__":
    main()
