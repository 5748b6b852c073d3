"""Codebooks as values and as files: the codewords, a report of how they were made, and a digest over the words.

A file is in safetensors format: one tensor ``codewords [N, k]`` float32, and one metadata entry ``report``, the JSON of
a `CodebookReport`. Reading checks the words against the digest in the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeFloat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fibkv.contract import Contract, Count, Index, MarkedContract, Total
from fibkv.digest import Digest, digest_bytes
from fibkv.errors import CodebookError, ContractError
from fibkv.files import write_bytes
from fibkv.parameters import Seed
from fibkv.training_settings import TrainingSettings

CODEBOOK_DOMAIN = "fibkv_codebook_v1"
"""Domain of a codebook's digest."""


class HeldOut(Contract):
    """Distortion on blocks that were used neither for training nor for choosing among restarts.

    ``distortion`` is D = E||u - u_hat||^2 of unit vectors of ``head_dim`` coordinates; the codewords are scaled to it.
    """

    head_dim: Count
    distortion: NonNegativeFloat


class CodebookReport(MarkedContract):
    """How a codebook was made, and how good it is.

    ``training_samples`` is 0 where the code was found exactly, without samples (k = 1). ``restart`` is the one chosen,
    ``iterations`` counts its centroid updates. ``held_out`` holds the training dimension and those of common models.
    """

    schema_version: Literal["fibkv_codebook_report_v1"] = "fibkv_codebook_report_v1"
    block_dim: Count
    size: Count
    seed: Seed
    training: TrainingSettings
    training_samples: Total
    restart: Index
    iterations: Count
    train_distortion: NonNegativeFloat
    held_out: tuple[HeldOut, ...]
    codebook_digest: Digest

    def held_out_at(self, head_dim: int) -> float:
        """Held-out distortion at a dimension.

        Raises:
            CodebookError: the report has no such dimension.
        """
        for measured in self.held_out:
            if measured.head_dim == head_dim:
                return measured.distortion
        raise CodebookError(
            f"codebook k={self.block_dim}, N={self.size}: no held-out distortion at head_dim {head_dim}, "
            f"only at {[measured.head_dim for measured in self.held_out]}"
        )

    @property
    def gap(self) -> float:
        """(held-out - train) / held-out at the training dimension: how much of the training result is overfitting."""
        held_out = self.held_out_at(self.training.head_dim)
        return (held_out - self.train_distortion) / held_out


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """The codewords that all blocks of all vectors share.

    Attributes:
        block_dim: k.
        size: N.
        codewords: ``[N, k]`` float32 in units in which a coordinate has variance 1: divided by sqrt(d) they quantize
            blocks of unit vectors of R^d. One book serves every d.
        digest: over k, N and the codewords.
        report: how the book was made.
    """

    block_dim: int
    size: int
    codewords: Tensor
    digest: str
    report: CodebookReport


def codebook_digest(codewords: Tensor) -> str:
    """Digest of codewords ``[N, k]`` float32: over k and N as u32 and the words as f32, all little endian."""
    size, block_dim = codewords.shape
    words = codewords.numpy().astype("<f4")
    return digest_bytes(CODEBOOK_DOMAIN, block_dim.to_bytes(4, "little"), size.to_bytes(4, "little"), words)


def file_name(block_dim: int, size: int) -> str:
    """Name of a codebook's file, in the package and in the cache."""
    return f"k{block_dim}_n{size}.safetensors"


def read(path: Path, block_dim: int, size: int) -> Codebook:
    """Reads and checks a codebook.

    Raises:
        CodebookError: the file cannot be read, is not the codebook (block_dim, size), or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # A copy, so that nothing depends on the file afterwards.
            codewords = file.get_tensor("codewords").clone()
            report = CodebookReport.from_json((file.metadata() or {}).get("report", ""))
    except (OSError, SafetensorError, ContractError) as error:
        raise CodebookError(f"codebook {path}: cannot be read: {error}") from error
    expected, actual = (size, block_dim), tuple(codewords.shape)
    if codewords.dtype != torch.float32 or actual != expected or (report.size, report.block_dim) != expected:
        raise CodebookError(
            f"codebook {path}: expected float32 codewords of shape {expected} and a report of them, got "
            f"{codewords.dtype} of shape {actual} and a report of {(report.size, report.block_dim)}"
        )
    digest = codebook_digest(codewords)
    if digest != report.codebook_digest:
        raise CodebookError(f"codebook {path}: digest mismatch: expected {report.codebook_digest}, got {digest}")
    return Codebook(block_dim, size, codewords, digest, report)


def write(path: Path, book: Codebook) -> None:
    """Writes a codebook so that the file appears whole or not at all, whoever else writes it at the same time.

    Raises:
        OSError: the directory cannot be made or written to.
    """
    write_bytes(path, save({"codewords": book.codewords}, metadata={"report": book.report.to_json()}))
