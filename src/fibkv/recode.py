"""A sealed page sealed again, with other codecs: what makes a full cache smaller while it is in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fibkv.page import Page, Segment, decode_segments
from fibkv.sealing import LayerSettings, resident, seal
from fibkv.slabs import Slabs
from fibkv.view import Tail


def recode(page: Page, settings: LayerSettings, slabs: Slabs) -> Page:
    """The page as other settings of its layer seal it, from what it holds.

    Protected vectors keep their values, since raw codes decode exactly; others lose what both codecs lose. The page
    itself stays as it is.

    Args:
        page: of any settings of the layer that agree with these in protected regions and page size.
        settings: to seal with.
        slabs: memory of the new page.

    Raises:
        DigestMismatch: the page was damaged after sealing, and must not get a new digest.
        EncodingError: the new page can be neither encoded nor kept raw.
    """
    page.verify()
    implementation = settings.keys.implementation
    with torch.inference_mode(False), torch.no_grad():
        keys, values = (_dense(side, page.tokens, implementation) for side in (page.keys, page.values))
        # Seen from where the page is old: its newest tokens are not the newest of the layer.
        length = page.start + page.tokens + settings.last_tokens_raw
        ((sealed,),) = seal(settings, Tail(keys, values, page.tokens), length, [(0, page.tokens)], page.start)
        return resident([sealed], implementation, slabs, page.device)[0]


def _dense(segments: Sequence[Segment], tokens: int, implementation: str) -> Tensor:
    """``[1, heads, tokens, d]`` float32."""
    heads = max(segment.form.heads[1] for segment in segments)
    first = segments[0]
    out = torch.empty(heads, tokens, first.codec.head_dim, device=first.held.device)
    return decode_segments(segments, out, implementation=implementation)[None]
