"""per-channel scaling in front of any codec: what the axis ``per_channel`` of a profile means.

Keys have a few channels that are large in every token. Dividing each channel by its root mean square over the group
of tokens (one page of one head) takes them out before the vector's norm is taken, at 16/T bits per element. The
scales go to the query when attention reads the page, so nothing is undone per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fibkv.codecs.base import Codec, Field, require
from fibkv.codes import ChannelCodes, Codes
from fibkv.tables import ChannelTables, FibTables, RawTables, ScaledTables


class ChannelCodec(Codec):
    """Wraps an inner codec; parameters and digests are the inner one's, the profile's axis tells them apart."""

    def __init__(self, inner: Codec) -> None:
        assert isinstance(inner.tables, RawTables | ScaledTables | FibTables)
        self.inner = inner
        self.parameters = inner.parameters
        self.tables = ChannelTables(inner=inner.tables)
        self.codebook_digest = inner.codebook_digest
        self.rotation_digest = inner.rotation_digest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.inner,)

    def layout(self, tokens: int) -> tuple[Field, ...]:
        """``channel_scales [d]`` and the inner layout."""
        return (Field("channel_scales", torch.bfloat16, (self.head_dim,)), *self.inner.layout(tokens))

    def assemble(self, tensors: dict[str, Tensor]) -> Codes:
        """ChannelCodes."""
        rest = {name: tensor for name, tensor in tensors.items() if name != "channel_scales"}
        return ChannelCodes(channel_scales=tensors["channel_scales"], inner=self.inner.assemble(rest))

    def check_fields(self, fields: Mapping[str, Tensor]) -> None:
        """Scales are finite and not negative; the inner codes as their codec says."""
        scales = fields["channel_scales"]
        require(torch.isfinite(scales) & ~torch.signbit(scales), "channel_scales", "finite numbers >= 0")
        self.inner.check_fields(fields)
