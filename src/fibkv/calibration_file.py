"""Calibrations on disk: moments, what was measured with them, and what follows, in one safetensors file.

Metadata ``fibkv``: a `StampedInfo` as canonical JSON, whose digest by ``tensors_digest`` covers the tensors too (one
entry only, since safetensors keeps entries in no fixed order).
Tensors: ``<layer>.<moment>`` float64, the fields of `fibkv.calibration.LayerStatistics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fibkv.allocation import KLT_BITS, KltParameters
from fibkv.attention_errors import AttentionErrors
from fibkv.calibration import Klt, LayerStatistics, balanced_transform, klt, klt_parameters
from fibkv.codecs.base import tensor_bytes
from fibkv.contract import Contract, Count, Index, MarkedContract
from fibkv.digest import Digest, digest_bytes, require_digest
from fibkv.errors import ContractError
from fibkv.files import write_bytes
from fibkv.shape import Role
from fibkv.space import KeySpace
from fibkv.trials import SpaceKind, SpaceTrial, best_keys, best_space

TENSORS_DOMAIN = "fibkv_calibration_tensors_v1"
_MOMENTS = tuple(field.name for field in fields(LayerStatistics) if field.name != "tokens")


class Sensitivity(Contract):
    """What coding one role of one layer, all else raw, does to the model.

    Attributes:
        layer: its index.
        role: keys or values.
        profile: name of the codec.
        bits: counted, per element, of a full page: codes, norms and scales.
        kl: mean KL against dense over the tokens of the calibration windows.
        heads: errors of attention of each KV head, values or keys being exact.
    """

    layer: Index
    role: Role
    profile: str
    bits: float
    kl: float
    heads: tuple[AttentionErrors, ...]


class LayerChoice(Contract):
    """What is recommended for one layer: names of codecs."""

    layer: Index
    keys: str
    values: str


class Recommendation(Contract):
    """Codecs per layer and role.

    Attributes:
        target_bits: the average that was asked for.
        bits: the average of what was chosen, as in `Sensitivity`.
        kl: mean KL against dense, measured with all of it together.
        uniform_kl: that of the best single codec for all layers that stays within the target, for comparison.
        layers: the choices.
    """

    target_bits: float
    bits: float
    kl: float
    uniform_kl: float
    layers: tuple[LayerChoice, ...]


class CalibrationInfo(MarkedContract):
    """Everything of a calibration but its tensors.

    Attributes:
        model_digest: of the model's configuration.
        source_digest: of the texts.
        tokens: that the moments were gathered from.
        spaces: trials of key spaces.
        sensitivities: per layer, role and codec.
        recommendation: for the average of bits that was asked for.
        tensors_digest: over the moments.
    """

    schema_version: Literal["fibkv_calibration_v1"] = "fibkv_calibration_v1"
    model_digest: Digest
    source_digest: Digest
    tokens: Count
    spaces: tuple[SpaceTrial, ...]
    sensitivities: tuple[Sensitivity, ...]
    recommendation: Recommendation
    tensors_digest: Digest


class StampedInfo(Contract):
    """What a file says of itself, and the digest of that.

    Raises:
        DigestMismatch: on construction, for information that is not what was stamped.
    """

    digest: Digest
    info: CalibrationInfo

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_digest("Calibration.digest", self.digest, self.info.digest())
        return self


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibration: `info`, and the moments by layer index."""

    info: CalibrationInfo
    statistics: Mapping[int, LayerStatistics]

    def check_model(self, model_digest: str) -> None:
        """Refuses another model than the one it was made from.

        Raises:
            DigestMismatch: with both digests.
        """
        require_digest("Calibration.model_digest", self.info.model_digest, model_digest)

    def best_space(self, profile: str) -> SpaceKind:
        """See `fibkv.trials.best_space`."""
        return best_space(self.info.spaces, profile)

    def best_keys(self, profile: str) -> str:
        """See `fibkv.trials.best_keys`."""
        return best_keys(self.info.spaces, profile)

    def space(self, layer: int, kind: SpaceKind) -> KeySpace | None:
        """The space of a layer's keys."""
        return None if kind == "plain" else self._spaces[layer, kind]

    def klt_parameters(self, layer: int, profile: str) -> KltParameters:
        """What a name of `fibkv.allocation.KLT_BITS` stands for in a layer: made of its moments, always the same.

        Raises:
            ContractError: the layer's head_dim is odd.
        """
        return klt_parameters(klt_of(self.statistics[layer]), KLT_BITS[profile])

    @cached_property
    def _spaces(self) -> dict[tuple[int, SpaceKind], KeySpace]:
        return spaces_of(self.statistics)

    def choices(self) -> dict[int, tuple[str, str]]:
        """Codecs of keys and values by layer, as recommended."""
        return {one.layer: (one.keys, one.values) for one in self.info.recommendation.layers}

    def save(self, path: Path) -> None:
        """Writes the file by way of a temporary one.

        Raises:
            OSError: it cannot be written.
        """
        stamped = StampedInfo(digest=self.info.digest(), info=self.info)
        write_bytes(path, save(named_tensors(self.statistics), {"fibkv": stamped.to_json()}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file, checked against its digests.

        Raises:
            ContractError: it is not a calibration.
            DigestMismatch: it was damaged or changed.
            OSError: it cannot be read.
        """
        if path.is_dir():
            raise ContractError(f"calibration {path}", "a safetensors file", "a directory")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ContractError(f"calibration {path}", "a safetensors file", str(error)) from error
        if "fibkv" not in metadata:
            raise ContractError(f"calibration {path}", "metadata 'fibkv'", sorted(metadata))
        info = StampedInfo.from_json(metadata["fibkv"]).info
        require_digest("Calibration.tensors_digest", info.tensors_digest, tensors_digest(tensors))
        return cls(info, statistics_of(tensors, info.tokens))


def spaces_of(statistics: Mapping[int, LayerStatistics]) -> dict[tuple[int, SpaceKind], KeySpace]:
    """Key spaces by layer and kind: the mean alone, with the balanced transform, and with that of klt codes."""
    found: dict[tuple[int, SpaceKind], KeySpace] = {}
    for layer, one in statistics.items():
        found[layer, "mean"] = KeySpace.of(one.key_mean)
        transform = balanced_transform(one.key_covariance, one.query_moment)
        found[layer, "balanced"] = KeySpace.of(one.key_mean, transform)
        if one.key_mean.shape[-1] % 2 == 0:
            found[layer, "klt"] = KeySpace.of(one.key_mean, klt_of(one).whitened)
    return found


def klt_of(statistics: LayerStatistics) -> Klt:
    """The transform of a layer's keys, weighted by its queries.

    Raises:
        ContractError: an odd head_dim, of which no pairs can be made.
    """
    if statistics.key_mean.shape[-1] % 2:
        raise ContractError("LayerStatistics.key_mean", "an even head_dim for klt codes", statistics.key_mean.shape[-1])
    return klt(statistics.key_covariance, statistics.query_moment)


def named_tensors(statistics: Mapping[int, LayerStatistics]) -> dict[str, Tensor]:
    """The moments by their names in the file."""
    return {
        f"{layer}.{name}": getattr(one, name).contiguous() for layer, one in statistics.items() for name in _MOMENTS
    }


def statistics_of(tensors: Mapping[str, Tensor], tokens: int) -> dict[int, LayerStatistics]:
    """The inverse of `named_tensors`.

    Raises:
        ContractError: a tensor is missing, or foreign.
    """
    layers = sorted({int(name.split(".")[0]) for name in tensors if name.split(".")[0].isdecimal()})
    expected = {f"{layer}.{name}" for layer in layers for name in _MOMENTS}
    if set(tensors) != expected or not layers:
        raise ContractError("calibration tensors", f"{sorted(expected)}", sorted(tensors))
    return {
        layer: LayerStatistics(tokens, **{name: tensors[f"{layer}.{name}"] for name in _MOMENTS}) for layer in layers
    }


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest over names, shapes and values, in the order of the names."""
    chunks: list[bytes | memoryview] = []
    for name in sorted(tensors):
        chunks += [f"{name}{list(tensors[name].shape)}\0".encode(), tensor_bytes(tensors[name])]
    return digest_bytes(TENSORS_DOMAIN, *chunks)
