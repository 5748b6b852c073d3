"""Trains the shipped trellis codes.

    python tools/train_trellis.py [--bits 2 3 4] [--draws 150] [--seed 0] [--out src/fibkv/data/trellis] [--count]

A code is drawn at random: the columns that middle bits add to labels, and normal quantiles for levels, in the order of
a random linear map of labels. It is trained by Lloyd's iteration (encode, then every level becomes the mean of the
coordinates that it stands for), a few rounds on few vectors. The three best draws are trained on more and compared on
vectors of their own. Then the labels are counted that the code gives to other vectors. The codes that fibkv ships were
made with the default arguments and the search of their time, before its costs were bytes; the counts are of today's.
``--count`` trains nothing: it counts the labels of the codes that are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fibkv import kernels
from fibkv.digest import digest_bytes
from fibkv.errors import ContractError
from fibkv.files import write_text
from fibkv.kernels.reference_trellis import windows
from fibkv.label_counts import LabelCounts
from fibkv.packing import unpack
from fibkv.rotation import Rotation
from fibkv.tables import FibTables
from fibkv.trellis import GRID, STATE_BITS, Trellis, TrellisCode

HEAD_DIM = 128
LABEL_BITS = {2: 6, 3: 6, 4: 8}
FIRST, SECOND = (1024, 8, 16), (16384, 16, 64)
"""Vectors, rounds and overlap of the two stages."""
TEST_VECTORS = 8192
COUNTED = 1 << 16, 64
"""Vectors and overlap of the count."""
COUNT_SEED = 1
LARGEST = (1 << 15) - 1


def unit_vectors(count: int, generator: torch.Generator) -> Tensor:
    """``[count, d]`` float32."""
    return torch.nn.functional.normalize(torch.randn(count, HEAD_DIM, generator=generator), dim=-1)


def drawn(bits: int, generator: torch.Generator) -> TrellisCode:
    """A random code before training."""
    size = 1 << LABEL_BITS[bits]
    quantiles = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size)
    while True:
        columns = torch.randint(1, size, (STATE_BITS - bits,), generator=generator).tolist()
        levels = (quantiles[_linear_order(size, generator)] * GRID).round().to(torch.int64)
        try:
            return TrellisCode(bits=bits, columns=tuple(columns), levels=tuple(levels.tolist()))  # type: ignore[arg-type]
        except ContractError:  # columns that the encoder cannot follow
            continue


def _linear_order(size: int, generator: torch.Generator) -> Tensor:
    """A random invertible linear map over GF(2) of ``range(size)``."""
    while True:
        order = torch.zeros(size, dtype=torch.int64)
        for bit in range(size.bit_length() - 1):
            image = int(torch.randint(1, size, (), generator=generator))
            order ^= (torch.arange(size) >> bit & 1) * image
        if len(order.unique()) == size:
            return order


def encoded(code: TrellisCode, rows: Tensor, overlap: int) -> Tensor:
    """The labels ``[V, d]`` that the encoder gives to unit vectors, as they are, not rotated."""
    paths = Trellis.of(code, HEAD_DIM, overlap)
    identity = torch.eye(HEAD_DIM)
    tables = FibTables(
        codewords=paths.codewords,
        rotation=Rotation("haar", HEAD_DIM, 0, identity, digest_bytes("identity", identity.numpy())),
        head_dim=HEAD_DIM,
        bits=code.bits,
        norm_format="f16",
        gain_corrected=False,
        trellis=paths,
    )
    symbols = unpack(kernels.encode(rows, tables).indices, HEAD_DIM, code.bits)
    return code.labels()[windows(symbols, code)]


def trained(code: TrellisCode, rows: Tensor, rounds: int, overlap: int) -> TrellisCode:
    coordinates = (rows.to(torch.float64) * HEAD_DIM**0.5).flatten()
    for _ in range(rounds):
        labels = encoded(code, rows, overlap).flatten()
        counts = labels.bincount(minlength=len(code.levels)).clamp(min=1)
        sums = torch.zeros(len(code.levels), dtype=torch.float64).index_add_(0, labels, coordinates)
        levels = (sums / counts * GRID).round().clamp(-LARGEST, LARGEST).to(torch.int64)
        code = code.model_copy(update={"levels": tuple(levels.tolist())})
    return code


def distortion(code: TrellisCode, rows: Tensor, overlap: int) -> float:
    """E|u - û|² without gain."""
    levels = torch.tensor(code.levels, dtype=torch.float64) / GRID / HEAD_DIM**0.5
    return float((rows - levels[encoded(code, rows, overlap)]).square().sum(-1).mean())


def train(bits: int, draws: int, seed: int) -> TrellisCode:
    generator = torch.Generator().manual_seed(seed)
    few, many, test = (unit_vectors(count, generator) for count in (FIRST[0], SECOND[0], TEST_VECTORS))
    found = [trained(drawn(bits, generator), few, *FIRST[1:]) for _ in range(draws)]
    errors = [distortion(code, few, FIRST[2]) for code in found]
    order = sorted(range(draws), key=errors.__getitem__)
    print(f"{bits} bits: best, median, worst draw {[round(errors[order[i]], 6) for i in (0, draws // 2, -1)]}")
    finalists = [trained(found[index], many, *SECOND[1:]) for index in order[:3]]
    results = [distortion(code, test, SECOND[2]) for code in finalists]
    print(f"{bits} bits: finalists {[round(error, 6) for error in results]}", flush=True)
    return finalists[results.index(min(results))]


def counted(code: TrellisCode) -> LabelCounts:
    """How often the encoder gives each label."""
    rows = unit_vectors(COUNTED[0], torch.Generator().manual_seed(COUNT_SEED))
    counts = encoded(code, rows, COUNTED[1]).flatten().bincount(minlength=len(code.levels))
    return LabelCounts(code=code.digest(), counts=tuple(counts.tolist()))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--bits", type=int, nargs="+", default=(2, 3, 4), choices=(2, 3, 4))
    arguments.add_argument("--draws", type=int, default=150)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=Path("src/fibkv/data/trellis"))
    arguments.add_argument("--count", action="store_true")
    given = arguments.parse_args()
    for bits in given.bits:
        path = given.out / f"trellis{bits}.json"
        if not given.count:
            write_text(path, train(bits, given.draws, given.seed).to_json() + "\n")
        code = TrellisCode.from_json(path.read_bytes())
        write_text(given.out / f"counts{bits}.json", counted(code).to_json() + "\n")
        print(f"{bits} bits: {code.digest()}")


if __name__ == "__main__":
    main()
