"""Writing a step's tokens into a buffer: on the CPU by address, since torch takes longer to be asked than to copy."""

from __future__ import annotations

from torch import Tensor

from fibkv.kernels.native_sides import extension


def write_tokens(buffer: Tensor, start: int, tokens: Tensor) -> None:
    """Writes ``tokens [B, H, t, d]`` to the tokens from ``start`` on of a buffer ``[B, H, capacity, d]``.

    Whatever mode torch is in, the buffer stays a plain tensor: no gradient goes through it.

    Args:
        buffer: contiguous, with room for the tokens.
        start: first token that is written.
        tokens: of the buffer's dtype; any strides.
    """
    dim = buffer.shape[3]
    plain = buffer.is_cpu and tokens.is_cpu and type(tokens) is Tensor and (tokens.stride(3) == 1 or dim == 1)
    if extension is None or not plain:
        buffer[:, :, start : start + tokens.shape[2]] = tokens.detach()
        return
    extension.write_tokens(
        buffer=buffer.data_ptr(),
        capacity=buffer.shape[2],
        start=start,
        tokens=tokens.data_ptr(),
        shape=tokens.shape,
        strides=tokens.stride(),
        element_nbytes=buffer.element_size(),
    )
