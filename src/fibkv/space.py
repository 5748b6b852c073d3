"""Key spaces: what the keys of one layer go through before they are coded, head by head, and how attention undoes it.

A coded key is ``A (k - mean)``. Attention takes the query to the same space once, ``A^-T q``, and adds ``<q, mean>`` to
the query's logits on such keys: <q, k> = <A^-T q, A (k - mean)> + <q, mean>, whatever stands beside them in the cache.
Nothing is done per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fibkv.digest import digest_bytes
from fibkv.errors import ContractError

SPACE_DOMAIN = "fibkv_key_space_v1"


@dataclass(frozen=True, slots=True, eq=False)
class KeySpace:
    """The space of one layer's coded keys. Equal if the digests are; copies of a cache share it.

    Attributes:
        mean: ``[H, d]`` float32.
        transform: ``[H, d, d]`` float32, A; None = the identity.
        inverse: ``[H, d, d]`` float32, A^-1; None = the identity.
        digest: over both.
    """

    mean: Tensor
    transform: Tensor | None
    inverse: Tensor | None
    digest: str

    @classmethod
    def of(cls, mean: Tensor, transform: Tensor | None = None) -> KeySpace:
        """A space from a mean ``[H, d]`` and an invertible transform ``[H, d, d]``, both of any floating dtype.

        Raises:
            ContractError: shapes that do not belong together, numbers that are not finite, or no inverse.
        """
        mean = mean.detach().to(torch.float32).contiguous()
        inverse = None
        if transform is not None:
            expected = [*mean.shape, mean.shape[-1]]
            if list(transform.shape) != expected:
                raise ContractError("KeySpace.transform", f"shape {expected}", list(transform.shape))
            # Of the transform as it is kept: what encoding rounds, attention undoes.
            transform = transform.detach().to(torch.float32).contiguous()
            inverse, singular = torch.linalg.inv_ex(transform.to(torch.float64))
            inverse = inverse.to(torch.float32).contiguous()
            if bool(singular.any()) or not bool(torch.isfinite(inverse).all()):
                raise ContractError("KeySpace.transform", "invertible matrices", "a singular one")
        numbers = [mean] if transform is None else [mean, transform]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers):
            raise ContractError("KeySpace", "finite numbers", "NaN or infinity")
        sizes = b"".join(size.to_bytes(8, "little") for tensor in numbers for size in tensor.shape)
        digest = digest_bytes(SPACE_DOMAIN, sizes, *(tensor.cpu().numpy() for tensor in numbers))
        return cls(mean, transform, inverse, digest)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What takes memory."""
        return tuple(tensor for tensor in (self.mean, self.transform, self.inverse) if tensor is not None)

    def enter(self, keys: Tensor, heads: slice = slice(None)) -> Tensor:
        """Keys ``[..., heads, T, d]`` as they are coded, float32."""
        centered = keys.to(torch.float32) - self.mean[heads].unsqueeze(-2)
        if self.transform is None:
            return centered
        # In float64, so that codes do not depend on the batch that a product was computed in.
        turned = centered.to(torch.float64) @ self.transform[heads].to(torch.float64).mT
        return turned.to(torch.float32)

    def leave(self, coded: Tensor, heads: slice = slice(None)) -> Tensor:
        """Keys ``[..., heads, T, d]`` float32 from what was coded: the inverse of `enter`."""
        keys = coded if self.inverse is None else coded @ self.inverse[heads].mT
        return keys + self.mean[heads].unsqueeze(-2)

    def queries(self, query: Tensor) -> Tensor:
        """Queries ``[..., H, Q, d]`` float32 in the space of coded keys."""
        return query if self.inverse is None else query @ self.inverse

    def mean_inside(self) -> Tensor:
        """``[H, d]``: the mean in the space of coded keys, where `fibkv.kernels.attend` wants it."""
        return self.mean if self.transform is None else (self.transform @ self.mean.unsqueeze(-1)).squeeze(-1)

    def to(self, device: torch.device) -> KeySpace:
        """The same space on a device."""
        if self.mean.device == device:
            return self
        transform, inverse = (None if t is None else t.to(device) for t in (self.transform, self.inverse))
        return replace(self, mean=self.mean.to(device), transform=transform, inverse=inverse)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeySpace) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict[int, object]) -> KeySpace:
        return self  # immutable
