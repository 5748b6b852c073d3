"""Pages on their way to bytes, docs/FORMAT.md: the codes of many are written to their places together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fibkv.container import Draft, packed_nbytes
from fibkv.digest import require_digest
from fibkv.packed import Packed, write_runs
from fibkv.page import Page


@dataclass(frozen=True, slots=True, eq=False)
class PageDraft:
    """A page that is to be written, with what its container begins with.

    Attributes:
        page: it.
        header: of its container.
        sizes: of the sections.
    """

    page: Page
    header: bytes
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, page: Page) -> PageDraft:
        """The draft of a page."""
        return cls(page, page.stored_header(), page.form.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the container."""
        return packed_nbytes(len(self.header), self.sizes)


def write_pages(drafts: Sequence[PageDraft], places: Sequence[memoryview]) -> None:
    """Writes the containers of pages, the codes of all of them together.

    Args:
        drafts: what to write.
        places: for each as many writable zeros as its `PageDraft.nbytes`.

    Raises:
        DigestMismatch: a page was damaged after it was sealed, and must not get a stored form.
    """
    pairs = zip(drafts, places, strict=True)
    containers = [Draft("page", draft.header, draft.sizes, place) for draft, place in pairs]
    packed: list[tuple[Packed, memoryview]] = []
    for draft, container in zip(drafts, containers, strict=True):
        for segment, section in zip(draft.page.segments, container.sections, strict=True):
            if isinstance(segment.held, Packed):
                packed.append((segment.held, section))
            else:
                section[:] = segment.to_bytes()
    write_runs([codes for codes, _ in packed], [section for _, section in packed])
    for draft, container in zip(drafts, containers, strict=True):
        page = draft.page
        require_digest(f"Page(layer={page.layer}, start={page.start})", page.digest, container.finish())


def page_to_bytes(page: Page) -> bytes:
    """The container of a page; see `write_pages`."""
    draft = PageDraft.of(page)
    data = bytearray(draft.nbytes)
    write_pages([draft], [memoryview(data)])
    return bytes(data)
