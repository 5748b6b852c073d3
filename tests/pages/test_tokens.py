"""Writing a step's tokens into a tail's buffer: the same as torch does, in every layout, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fibkv.kernels.tokens import write_tokens

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tokens: tokens,
    "of a projection": lambda tokens: tokens.transpose(1, 2).contiguous().transpose(1, 2),
    "of a longer tensor": lambda tokens: torch.cat([tokens, tokens], 2)[:, :, : tokens.shape[2]],
    "one row for all": lambda tokens: tokens[:1].expand(tokens.shape),
    "gaps between elements": lambda tokens: torch.stack([tokens, tokens + 1], -1)[..., 0],
    "a subclass": lambda tokens: nn.Parameter(tokens, requires_grad=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 16), (1, 2, 1, 8), (2, 2, 3, 1), (1, 2, 0, 8)])
def test_writes_as_torch_does(layout: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype))
    buffer = torch.randn(*shape[:2], 9, shape[3], generator=generator).to(dtype)
    expected = buffer.clone()
    expected[:, :, 5 : 5 + shape[2]] = tokens
    write_tokens(buffer, 5, tokens)
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("layout", ["contiguous", "gaps between elements"])
def test_no_gradient_goes_through_it(layout: str) -> None:
    buffer, tokens = torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 2, 8, requires_grad=True)
    write_tokens(buffer, 1, LAYOUTS[layout](tokens * 2))
    assert not buffer.requires_grad
    assert buffer.grad_fn is None
    assert buffer[0, 0, :, 0].tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("layout", ["contiguous", "gaps between elements"])
def test_inference_mode_leaves_a_plain_tensor(layout: str) -> None:
    buffer = torch.zeros(1, 1, 4, 8)
    with torch.inference_mode():
        write_tokens(buffer, 0, LAYOUTS[layout](torch.ones(1, 1, 2, 8)))
    assert not buffer.is_inference()
    assert (buffer * torch.ones(8, requires_grad=True)).requires_grad
