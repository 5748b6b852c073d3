"""Constant tensors (codebooks, rotations, tables) on the devices where they are used, each copied there once.

A copy from ordinary memory to a device is waited for, and one per call would make every encoding wait for the model.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


# By identity: tensors hash by it. A process has a few tables per codec, which live as long as it does.
@lru_cache(maxsize=512)
def constant(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that nobody changes, on a device and in a dtype (None = its own): itself if it is there already."""
    return tensor.to(device, tensor.dtype if dtype is None else dtype)
