"""What a cache holds, counted: per layer what is compressed, what is left raw, and why."""

from __future__ import annotations

from fibkv.contract import Contract, Total
from fibkv.shape import Role


class LayerReport(Contract):
    """One layer.

    Attributes:
        layer: its index.
        kind: class of its cache.
        compressed: whether fibkv keeps its pages.
        reason: why not, or how.
        tokens: tokens held.
        pages: sealed pages, shared ones once.
        elements: elements of keys and values that the layer stands for.
        nbytes: bytes held.
        raw_vectors: vectors inside pages that are kept raw, by reason.
        tail_tokens: newest tokens, raw.
        materialized: how often its keys or values were decoded to a dense tensor because something other than
            attention on pages read them.
        raw_elements: elements of those kept raw: protected ones, fallbacks, the tail.
        raw_nbytes: bytes of these, the tail's unused room included.
        metadata_nbytes: bytes of digests, counts and page tables.
        flags: what is hard about the layer's keys (`fibkv.hard_statistics`), as its first page shows it.
        host_nbytes: bytes of codes that were offloaded to host memory.
    """

    layer: Total
    kind: str
    compressed: bool
    reason: str
    tokens: Total
    pages: Total
    elements: Total
    nbytes: Total
    raw_vectors: tuple[tuple[str, Total], ...] = ()
    tail_tokens: Total = 0
    materialized: Total = 0
    raw_elements: Total = 0
    raw_nbytes: Total = 0
    metadata_nbytes: Total = 0
    flags: tuple[str, ...] = ()
    host_nbytes: Total = 0


class BudgetViolation(Contract):
    """A bound of the quality budget that a codec broke when it was measured; the role of the layer or page is kept raw.

    Attributes:
        layer: its index.
        head: KV head.
        role: "key" or "value".
        profile: the codec.
        bound: field of `fibkv.QualityBudget`.
        allowed: its value.
        measured: what came.
        start: first token of the page that was measured when it was sealed; None = the calibration measured the layer.
    """

    layer: Total
    head: Total
    role: Role
    profile: str
    bound: str
    allowed: float
    measured: float
    start: Total | None = None

    def __str__(self) -> str:
        where = "" if self.start is None else f" at token {self.start}"
        return (
            f"layer {self.layer} {self.role}s{where}: head {self.head} in {self.profile} has {self.bound} "
            f"{self.measured:.3g}, allowed {self.allowed:g}"
        )


class CacheReport(Contract):
    """A whole cache.

    Attributes:
        layers: layer by layer.
        tables_nbytes: codebooks and rotations, counted once although all caches of a process share them.
        slack_nbytes: memory allocated for pages and used by none, shared with forks of the cache.
        budget_violations: why roles of layers or pages are raw although a codec was chosen for them.
        buffer_nbytes: memory on devices for copies of pages that are in host memory.
    """

    layers: tuple[LayerReport, ...]
    tables_nbytes: Total
    slack_nbytes: Total = 0
    budget_violations: tuple[BudgetViolation, ...] = ()
    buffer_nbytes: Total = 0

    @property
    def materialized(self) -> int:
        """How often a layer was decoded to dense tensors, summed over the layers."""
        return sum(layer.materialized for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """All bytes: codes, norms, scales, raw windows with their slack, page metadata, tables, wherever they are."""
        layers = sum(layer.nbytes for layer in self.layers)
        return self.tables_nbytes + self.slack_nbytes + self.buffer_nbytes + layers

    @property
    def host_nbytes(self) -> int:
        """Bytes of codes that were offloaded to host memory."""
        return sum(layer.host_nbytes for layer in self.layers)

    @property
    def elements(self) -> int:
        """Elements of all keys and values held."""
        return sum(layer.elements for layer in self.layers)

    @property
    def bits_per_element(self) -> float:
        """Counted bits: all bytes * 8 / elements; 0 for an empty cache."""
        return 8 * self.nbytes / self.elements if self.elements else 0.0

    @property
    def codec_bits_per_element(self) -> float:
        """Codes, norms, scales and tables * 8 over the elements that are compressed; 0 if none is.

        Raw regions, page metadata and slack are left out: `bits_per_element` has them too.
        """
        layers = [layer for layer in self.layers if layer.compressed]
        elements = sum(layer.elements - layer.raw_elements for layer in layers)
        coded = sum(layer.nbytes - layer.raw_nbytes - layer.metadata_nbytes for layer in layers)
        return 8 * (coded + self.tables_nbytes) / elements if elements else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.nbytes / 1024:.1f} KiB in {len(self.layers)} layers, {self.bits_per_element:.3f} bits per element "
            f"(tables {self.tables_nbytes / 1024:.1f} KiB, slack {self.slack_nbytes / 1024:.1f} KiB), "
            f"{self.materialized} materialized"
        ]
        if self.host_nbytes:
            host, buffers = (nbytes / 1024 for nbytes in (self.host_nbytes, self.buffer_nbytes))
            lines.append(f"  {host:.1f} KiB of codes in host memory, {buffers:.1f} KiB of buffers for them on devices")
        lines += [
            f"  layer {layer.layer}: {'compressed' if layer.compressed else 'stock'} ({layer.reason}), "
            f"{layer.tokens} tokens, {layer.pages} pages, {layer.tail_tokens} in the raw tail, {layer.nbytes} bytes"
            + (f", decoded {layer.materialized} times" if layer.materialized else "")
            + "".join(f", {count} raw vectors: {reason}" for reason, count in layer.raw_vectors)
            + "".join(f"; hard: {flag}" for flag in layer.flags)
            for layer in self.layers
        ]
        lines += [f"  raw for the budget: {one}" for one in self.budget_violations]
        return "\n".join(lines)
