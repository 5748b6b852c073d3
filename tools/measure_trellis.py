"""Distortion of trellis codes and of FibQuant at the same bits, on random unit vectors.

python tools/measure_trellis.py [--vectors 4000] [--implementation auto] [--out docs/results/trellis.txt]
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fibkv.codecs import codec_for
from fibkv.files import write_text
from fibkv.parameters import FIB_SETTINGS, CodecParameters, FibParameters, TrellisParameters

SEED = 70


def distortion(parameters: CodecParameters, vectors: int, implementation: str) -> float:
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.nn.functional.normalize(torch.randn(vectors, parameters.head_dim, generator=generator), dim=-1)
    codec = codec_for(parameters)
    decoded = codec.decode(codec.encode(rows, implementation=implementation), implementation=implementation)
    return float((rows - decoded).double().square().sum(-1).mean())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--vectors", type=int, default=4000)
    arguments.add_argument("--implementation", default="auto")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    table = Table(title=f"E|u - û|² of {given.vectors} unit vectors, with gain")
    for heading in ("bits", "d", "fib", "fib, scales", "trellis, fast", "trellis", "trellis, scales"):
        table.add_column(heading, justify="right")
    for bits, head_dim in product((2, 3, 4), (64, 128)):
        book = FIB_SETTINGS[f"fib{bits}"]
        settings = (
            FibParameters.of(head_dim, *book, norm_format="f16"),
            FibParameters.of(head_dim, *book, norm_format="f16", scale_search=True),
            TrellisParameters.of(head_dim, bits, norm_format="f16", path_search="fast"),
            TrellisParameters.of(head_dim, bits, norm_format="f16"),
            TrellisParameters.of(head_dim, bits, norm_format="f16", scale_search=True),
        )
        figures = [f"{distortion(parameters, given.vectors, given.implementation):.5f}" for parameters in settings]
        table.add_row(str(bits), str(head_dim), *figures)
    console = Console(width=120, record=True)
    console.print(table)
    if given.out is not None:
        command = f"python tools/measure_trellis.py --vectors {given.vectors}"
        write_text(given.out, f"{command}\n\n{console.export_text()}")


if __name__ == "__main__":
    main()
