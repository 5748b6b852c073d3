"""`bits=` with a calibration and without one, rate by rate, on text that neither model nor calibration has seen.

python tools/measure_choices.py CALIBRATION [--windows 12] [--out docs/results/choices.txt]

The embedded model reads windows of its held-out text, everything through the codecs. Bits are codes, norms and means of
pages of 64 tokens. Exit code 1 if a calibrated cache has a higher KL than the same rate without a calibration.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fibkv import embedded
from fibkv.calibrate import page_bits
from fibkv.calibration_file import Calibration
from fibkv.files import write_text
from fibkv.hf import Cache
from fibkv.hf_attention import attention
from fibkv.prompts import spread_windows
from fibkv.quality import CausalLM, cached_logits, dense_logits, score_tokens

RATES = (8, 4, 3.5, 3, 2.5, 2, 1, (4, 3), (4, 2), (3, 4), (3, 2), (2, 4), (2, 3))
WINDOW_TOKENS, CHUNK_TOKENS = 1024, 128


class Measured(NamedTuple):
    """What a rate stands for, and what that does: ``kls`` [windows] float64, means over the tokens of a window."""

    codecs: str
    bits: float
    kls: Tensor

    @property
    def kl(self) -> float:
        """Mean over all windows."""
        return self.kls.mean().item()


def measure(model: CausalLM, windows: Sequence[Tensor], bits: object, calibration: Calibration | None) -> Measured:
    """KL against dense of one rate. All layers have the same codecs."""
    make = partial(Cache, model, bits=bits, calibration=calibration, read_through=True)
    settings = make().settings
    kls = []
    for ids in windows:
        with attention(model):
            logits = cached_logits(model, ids, make(), chunk_tokens=CHUNK_TOKENS)
        kls.append(score_tokens(dense_logits(model, ids), logits, ids).kl.mean())
    of_roles = [page_bits(choice, model.config.head_dim) for choice in settings.coded(0)]
    return Measured(", ".join(settings.names(0)), sum(of_roles) / 2, torch.stack(kls))


def row(bits: object, recipe: Measured, chosen: Measured) -> tuple[str, ...]:
    """One line: the recipe, what the calibration makes of it, and how they compare."""
    lower = int((chosen.kls < recipe.kls).sum())
    is_same = torch.equal(chosen.kls, recipe.kls)
    columns = [text for one in (recipe, chosen) for text in (one.codecs, f"{one.bits:.2f}", f"{one.kl:.5f}")]
    verdict = ("", "the same") if is_same else (f"{chosen.kl / recipe.kl:.3f}", f"{lower} of {len(recipe.kls)}")
    return (str(bits), *columns, *verdict)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("calibration", type=Path, help="what `fibkv calibrate embedded TEXT...` wrote")
    arguments.add_argument("--windows", type=int, default=12)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = embedded.load()
    calibration = Calibration.load(given.calibration)
    text = embedded.heldout_text()
    windows = spread_windows(tokenizer, text, num_windows=given.windows, window_tokens=WINDOW_TOKENS)
    table = Table(title=f"{given.windows} windows of {WINDOW_TOKENS} tokens, held out")
    for heading in ("bits=", "recipe", "bits", "KL", "calibrated", "bits", "KL", "of recipe", "windows lower"):
        table.add_column(heading, justify="left" if heading in ("bits=", "recipe", "calibrated") else "right")
    worse = []
    for bits in RATES:
        recipe, chosen = (measure(model, windows, bits, one) for one in (None, calibration))
        table.add_row(*row(bits, recipe, chosen))
        if chosen.kl > recipe.kl:
            worse.append(bits)
    console = Console(width=100, record=True)
    console.print(table)
    if given.out is not None:
        write_text(given.out, f"python tools/measure_choices.py CALIBRATION\n\n{console.export_text().rstrip()}\n")
    if worse:
        raise SystemExit(f"worse with a calibration at bits= {worse}")


if __name__ == "__main__":
    main()
