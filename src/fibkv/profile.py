"""The profile: how one role of one model is compressed, bound to a shape and to the objects in use."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import StringConstraints, model_validator

from fibkv.allocation import KltParameters
from fibkv.contract import Count, MarkedContract
from fibkv.digest import Digest, DigestOrNone, require_digest
from fibkv.errors import ContractError
from fibkv.parameters import CodecParameters
from fibkv.regions import Axis, FallbackSettings, PageGeometry, ProtectedRegions, QualityBudget
from fibkv.shape import KVShape, Role

MISSING_CALIBRATION = "missing:calibration"
"""Stands for the calibration digest of a profile that was not calibrated."""

CalibrationDigest = Annotated[str, StringConstraints(pattern=r"^(blake3:[0-9a-f]{64}|missing:calibration)$")]


class Profile(MarkedContract):
    """One role's codec, axis, pages, protection, fallback and budget. Stamped by digest on pages and receipts.

    The digests say which shape, parameters, codebook, rotation and calibration it was made for;
    :meth:`check_binding` compares them with what is in use.

    Raises:
        ContractError: on construction, also where the codec is raw and the axis is not, or the reverse:
            an axis that compresses is never silently stored raw.
    """

    schema_version: Literal["fibkv_profile_v1"] = "fibkv_profile_v1"
    profile_version: Count = 1
    profile_id: Annotated[str, StringConstraints(min_length=1)]
    shape_digest: Digest
    codec: CodecParameters
    codec_digest: Digest
    codebook_digest: DigestOrNone
    rotation_digest: DigestOrNone
    role: Role
    axis: Axis
    geometry: PageGeometry
    protected: ProtectedRegions
    fallback: FallbackSettings
    budget: QualityBudget
    calibration_digest: CalibrationDigest

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.axis == "raw") != (self.codec.codec == "raw"):
            expected = "raw" if self.codec.codec == "raw" else "an axis that compresses"
            raise ContractError("Profile.axis", f"{expected} for codec {self.codec.codec}", self.axis)
        return self

    @classmethod
    def bind(
        cls,
        shape: KVShape,
        parameters: CodecParameters,
        *,
        profile_id: str,
        axis: Axis,
        geometry: PageGeometry,
        rotation_digest: str,
        codebook_digest: str,
        protected: ProtectedRegions | None = None,
        fallback: FallbackSettings | None = None,
        budget: QualityBudget | None = None,
        calibration_digest: str = MISSING_CALIBRATION,
        profile_version: int = 1,
    ) -> Profile:
        """A profile for a shape and the objects in use, with all its digests, checked.

        Args:
            shape: of the role that the profile is for; for a live cache its fixed part.
            parameters: of the codec.
            profile_id: the operator's name for the profile.
            axis: along which scales are shared.
            geometry: of the pages; its encoded size is taken as the codec's here.
            rotation_digest: of the rotation in use, or ``none:<codec>``.
            codebook_digest: of the codebook in use, or ``none:<codec>``.
            protected: regions kept raw, by default none.
            fallback: by default keep raw.
            budget: by default none.
            calibration_digest: of the calibration that the settings come from.
            profile_version: the operator's revision of the profile.

        Raises:
            ContractError: a field is not valid or does not fit the shape.
        """
        profile = cls(
            profile_version=profile_version,
            profile_id=profile_id,
            shape_digest=shape.digest(),
            codec=parameters,
            codec_digest=parameters.digest(),
            codebook_digest=codebook_digest,
            rotation_digest=rotation_digest,
            role=shape.role,
            axis=axis,
            geometry=geometry,
            protected=protected or ProtectedRegions(),
            fallback=fallback or FallbackSettings(),
            budget=budget or QualityBudget.unavailable(),
            calibration_digest=calibration_digest,
        )
        profile.check_binding(
            shape,
            rotation_digest=rotation_digest,
            codebook_digest=codebook_digest,
            vector_nbytes=geometry.encoded_block_bytes // geometry.vectors_per_block,
        )
        return profile

    @property
    def block_dim(self) -> int:
        """Coordinates that the codec codes together."""
        return self.codec.block_dim

    @property
    def is_calibrated(self) -> bool:
        """Whether the settings come from a calibration."""
        return self.calibration_digest != MISSING_CALIBRATION

    def check_binding(self, shape: KVShape, *, rotation_digest: str, codebook_digest: str, vector_nbytes: int) -> None:
        """Check that the profile fits what it is about to be used with.

        The marker, the parameters' bounds, the form of the digests and the budget's bounds were
        checked when the profile was made; the rest follows here in the order of the contract.

        Args:
            shape: in use; for a live cache its fixed part.
            rotation_digest: of the rotation in use, rebuilt from dim and seed, or ``none:<codec>``.
            codebook_digest: of the codebook in use, or ``none:<codec>``.
            vector_nbytes: the codec's size of an encoded vector.

        Raises:
            DigestMismatch: a digest differs from the profile's.
            ContractError: role, head_dim, geometry or protected regions do not fit the shape.
        """
        self.check_shape(shape)
        require_digest("Profile.rotation_digest", self.rotation_digest, rotation_digest)
        require_digest("Profile.codebook_digest", self.codebook_digest, codebook_digest)
        self.geometry.validate_for(shape, vector_nbytes)
        self.protected.validate_for(shape)

    def check_shape(self, shape: KVShape) -> None:
        """The checks of `check_binding` that need no codec: they come before one is made.

        Raises:
            DigestMismatch: the shape's or the parameters' digest differs from the profile's.
            ContractError: block dim, role or head_dim do not fit the shape.
        """
        shape.validate_block_dim(self.block_dim)
        require_digest("Profile.shape_digest", self.shape_digest, shape.digest())
        if self.role != shape.role:
            raise ContractError("Profile.role", f"{shape.role} of the shape", self.role)
        if self.codec.head_dim != shape.head_dim:
            raise ContractError("Profile.codec.head_dim", f"{shape.head_dim} of the shape", self.codec.head_dim)
        if isinstance(self.codec, KltParameters) and len(self.codec.heads) != shape.kv_heads:
            raise ContractError("Profile.codec.heads", f"{shape.kv_heads} of the shape", len(self.codec.heads))
        require_digest("Profile.codec_digest", self.codec_digest, self.codec.digest())
