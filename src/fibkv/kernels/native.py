"""The native kernels: C++ behind nanobind, for tensors on the CPU.

One `Native` per instruction set. Attention reads pages where they lie, in tile order (`Packed`): products of bytes for
FibQuant and int8 on AVX-512, of int16 on AVX2, float32 for everything else. Tolerances against the reference
are part of the conformance suite (tests/codecs/conformance.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fibkv.codes import Codes
from fibkv.errors import KernelError
from fibkv.kernels import native_codes
from fibkv.kernels.native_sides import (
    WHY_NOT,
    extension,
    extent,
    fill_all,
    fill_bytes,
    native_space,
    packed_codes,
    side_of,
)
from fibkv.kernels.runs import InPlace, Run, Scores
from fibkv.packed import Held, Packed, PackedForm
from fibkv.shape import Role
from fibkv.slabs import Blocks, block_nbytes
from fibkv.tables import Tables, raw_tables

INSTRUCTION_SETS = ("avx512", "avx2", "portable")
# Queries and outputs that are read and written as they are; others are widened.
FORMS = {} if extension is None else {torch.float32: extension.Form.f32, torch.bfloat16: extension.Form.bf16}


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the spans of a layer lie in memory, and what keeps them there."""

    native: Any
    held: tuple[Packed, ...]


def why_not(instruction_set: str | None = None) -> str:
    """Says "yes", or why native kernels (on that instruction set) cannot run here."""
    if extension is None:
        return WHY_NOT
    if instruction_set is not None and not extension.has_isa(getattr(extension.Isa, instruction_set)):
        return f"this machine has no {instruction_set}"
    return "yes"


def read(tensor: Tensor) -> int:
    """Reads every byte of a contiguous tensor on the CPU once, on torch's threads: a bound for whatever must read them.

    Returns:
        A sum, so that nothing can leave the read out.
    """
    total: int = extension.read(tensor.view(-1).view(torch.uint8), torch.get_num_threads())
    return total


class Native(InPlace):
    """Native kernels on one instruction set; by default the best that the machine has."""

    def __init__(self, instruction_set: str | None = None) -> None:
        """Raises KernelError where `why_not` does not say "yes"."""
        reason = why_not(instruction_set)
        if reason != "yes":
            raise KernelError(f"native kernels: {reason}")
        self.isa = extension.best_isa() if instruction_set is None else getattr(extension.Isa, instruction_set)
        self._tail_forms: dict[tuple[Any, ...], Any] = {}
        self._unmasked = {causal: extension.Mask(0, 0, 0, 0, 0, causal) for causal in (False, True)}

    def encode(self, rows: Tensor, tables: Tables) -> Codes:
        """Encodes ``rows [..., T, d]``; see `fibkv.kernels.reference.encode`."""
        return native_codes.encode(rows, tables, isa=self.isa)

    def decode(self, codes: Codes, tables: Tables, *, out: Tensor | None = None) -> Tensor:
        """Decodes to ``[..., T, d]``; see `fibkv.kernels.reference.decode`."""
        return native_codes.decode(codes, tables, out=out, isa=self.isa)

    def pack(
        self, sides: Sequence[tuple[Tables, Role]], pages: Sequence[Sequence[Held]], memory: Blocks
    ) -> list[list[Packed]]:
        """Puts the codes of each page into one block of memory, in the order in which attention reads them.

        Args:
            sides: tables and role of each rectangle of a page.
            pages: of equal form; of each its rectangles of codes ``[heads, tokens, ...]``.
            memory: where the blocks come from, one for each page.
        """
        if not pages:
            return []
        packed = self._room(sides, [extent(codes) for codes in pages[0]], len(pages), memory)
        for index, column in enumerate(packed):
            fill_all([page[index] for page in pages], column)
        return [list(page) for page in zip(*packed, strict=True)]

    def pack_bytes(
        self,
        sides: Sequence[tuple[Tables, Role]],
        extents: Sequence[tuple[int, int]],
        pages: Sequence[Sequence[memoryview]],
        memory: Blocks,
    ) -> list[list[Packed]]:
        """`pack` of the canonical bytes of codes, with heads and tokens of each rectangle."""
        packed = self._room(sides, extents, len(pages), memory)
        for index, column in enumerate(packed):
            fill_bytes([page[index] for page in pages], column)
        return [list(page) for page in zip(*packed, strict=True)]

    def _room(
        self, sides: Sequence[tuple[Tables, Role]], extents: Sequence[tuple[int, int]], pages: int, memory: Blocks
    ) -> list[list[Packed]]:
        """Memory for the rectangles of pages, not yet written: for each rectangle that of all pages."""
        forms: list[PackedForm] = []
        end = 0
        for (tables, role), (heads, tokens) in zip(sides, extents, strict=True):
            forms.append(PackedForm(end, heads, tokens, tables, side_of(tables, role, self.isa)))
            end += block_nbytes(forms[-1].nbytes)
        blocks = memory.take(end, pages)
        return [[Packed(block, form) for block in blocks] for form in forms]

    def hold(self, sides: Sequence[tuple[Tables, Role]], pages: Sequence[Sequence[Held]]) -> bool:
        """Whether the codes of pages, as `pack` takes them, are in the order that these kernels read in place."""
        native = [side_of(tables, role, self.isa) for tables, role in sides]
        return all(
            isinstance(codes, Packed) and codes.side is side
            for page in pages
            for codes, side in zip(page, native, strict=True)
        )

    def plan(self, runs: Sequence[Run]) -> Plan:
        """Makes runs ready to be attended to; codes in another order are packed into memory of the plan's own."""
        native, held = extension.Plan(), []
        for run in runs:
            key = side_of(run.key_tables, "key", self.isa, run.rotated)
            value = side_of(run.value_tables, "value", self.isa, run.rotated)
            keys = [packed_codes(codes, run.key_tables, key) for row in run.keys for codes in row]
            values = [packed_codes(codes, run.value_tables, value) for row in run.values for codes in row]
            native.add(
                row0=run.rows[0],
                row1=run.rows[1],
                head0=run.heads[0],
                head1=run.heads[1],
                start=run.start,
                tokens=run.tokens,
                spans=len(run.keys[0]),
                key=key,
                value=value,
                space=None if run.space is None else native_space(run.space),
                keys=[packed.address for packed in keys],
                values=[packed.address for packed in values],
            )
            held += [*keys, *values]
        return Plan(native, tuple(held))

    def attend_plan(
        self,
        query: Tensor,
        plan: Plan,
        tail: tuple[Tensor, Tensor, int],
        scores: Scores,
        *,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention on everything that a layer holds; see `fibkv.kernels.runs.InPlace`.

        Raises:
            KernelError: a tensor that is not on the CPU.
        """
        keys, values, tokens = tail
        _require_cpu(query, keys, values)
        keys, values = keys.contiguous(), values.contiguous()
        rows = query if query.dtype in FORMS and query.stride(3) == 1 else query.to(torch.float32).contiguous()
        # Sizes one by one: torch takes twice as long to read them from a shape.
        batch, heads, queries, dim = shape = rows.shape
        value_dim = values.shape[3]
        out = torch.empty(batch, heads, queries, value_dim, dtype=rows.dtype)
        lse = torch.empty(batch, heads, queries, dtype=torch.float32)
        mask, pointers = None, self._unmasked[scores.causal]
        if scores.mask is not None:
            mask, pointers = _pointers(scores.mask, shape, length)
        # By address: asking tensors for their arrays takes torch longer than a short context takes here.
        extension.attend(
            plan=plan.native,
            tail=self._tail_form(keys.dtype, dim, values.dtype, value_dim),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            tail_shape=keys.shape,
            tail_tokens=tokens,
            query=rows.data_ptr(),
            form=FORMS[rows.dtype],
            shape=shape,
            strides=rows.stride(),
            tokens=length,
            mask=pointers,
            scale=scores.scale,
            softcap=scores.softcap or 0.0,
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            threads=torch.get_num_threads(),
            isa=self.isa,
        )
        del mask  # the call read it through a pointer
        return out, lse

    def _tail_form(self, *widths: Any) -> Any:
        """The native form of raw tails, made once for each (dtype and head_dim of keys, dtype and that of values)."""
        form = self._tail_forms.get(widths)
        if form is None:
            key_dtype, key_dim, value_dtype, value_dim = widths
            key = side_of(raw_tables(key_dtype, key_dim), "key", self.isa)
            form = extension.TailForm(key, side_of(raw_tables(value_dtype, value_dim), "value", self.isa))
            self._tail_forms[widths] = form
        return form


def _pointers(mask: Tensor, query: torch.Size, length: int) -> tuple[Tensor, Any]:
    """The mask as the kernel reads it, with what to keep alive meanwhile."""
    is_bool = mask.dtype == torch.bool
    mask = mask if is_bool else mask.to(torch.float32)
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    strides = mask.expand(*query[:3], length).stride()
    allowed, added = (mask.data_ptr(), 0) if is_bool else (0, mask.data_ptr())
    return mask, extension.Mask(allowed, added, *strides[:3], False)


def _require_cpu(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_cpu:
            raise KernelError(f"native kernels: expected tensors on the CPU, got one on {tensor.device}")
