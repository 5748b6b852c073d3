"""Codecs, by name in a literal dict. `docs/CODECS.md` has what adding one takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch

from fibkv.allocation import KltParameters
from fibkv.codecs.affine import AffineCodec
from fibkv.codecs.base import Codec
from fibkv.codecs.channel import ChannelCodec
from fibkv.codecs.fib import FibCodec
from fibkv.codecs.klt import KltCodec
from fibkv.codecs.raw import RawCodec
from fibkv.codecs.scaled import Fp8Codec, Int8Codec
from fibkv.codecs.trellis import TrellisCodec
from fibkv.errors import ContractError
from fibkv.parameters import AffineParameters, CodecParameters

__all__ = ["CODECS", "Codec", "codec_for"]

CODECS: dict[str, Callable[[Any], Codec]] = {
    "raw": RawCodec,
    "int8": Int8Codec,
    "fp8": Fp8Codec,
    "affine": AffineCodec,
    "fib": FibCodec,
    "trellis": TrellisCodec,
    "klt": KltCodec,
}


# Layers of a calibrated model have codecs of their own.
@lru_cache(maxsize=512)
def codec_for(parameters: CodecParameters, axis: Literal["raw", "per_token", "per_channel"] = "per_token") -> Codec:
    """The codec of these parameters on an axis, one object per process and setting.

    Args:
        parameters: the contract.
        axis: ``per_channel`` (the tokens of a page share one scale per channel), or ``per_token``, which for the raw
            codec is the same as ``raw``.
    """
    # Shared by the whole process: its tables must not become inference tensors of the caller's mode.
    with torch.inference_mode(False):
        if isinstance(parameters, AffineParameters):
            return AffineCodec(parameters, axis)
        codec = CODECS[parameters.codec](parameters)
    if axis == "per_channel" and isinstance(parameters, KltParameters):
        raise ContractError("Profile.axis", "per_token for klt codes, whose space has scaled the channels", axis)
    return ChannelCodec(codec) if axis == "per_channel" else codec
