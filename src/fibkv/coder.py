"""From vectors and the policy's decisions to segments: how one role of one model is coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from fibkv.codecs import Codec, codec_for
from fibkv.codes import Codes
from fibkv.errors import ContractError, DecisionError, EncodingError, PageError
from fibkv.page import Segment
from fibkv.page_form import FALLBACKS, NOT_ENCODABLE, OVER_BUDGET, SegmentForm, SegmentHeader, shared
from fibkv.parameters import CodecParameters, RawParameters, named_parameters
from fibkv.policy import Decision, Plan, Policy, Run, decide, plan, role_aware_axis
from fibkv.profile import Profile
from fibkv.regions import PageGeometry, ProtectedRegions
from fibkv.shape import Dtype, KVShape
from fibkv.space import KeySpace


@dataclass(frozen=True, eq=False)
class RoleCoder:
    """How one role of one model is coded: its bound profile, its policy, the codecs behind them, and the raw one.

    Attributes:
        profile: bound to a shape; for a live cache its fixed part.
        policy: asked for every page; protects what the profile protects.
        raw_dtype: in which protected vectors and fallbacks are kept.
        block_dim: that the policy is asked about: the codec's, or that of a codec which the shape cannot carry and
            which the profile's raw codec stands in for.
        implementation: of the kernels.
        space: what keys go through before they are coded (those that are kept raw do not); None = nothing.
    """

    profile: Profile
    policy: Policy
    raw_dtype: Dtype
    block_dim: int
    implementation: str = "auto"
    space: KeySpace | None = None

    def __post_init__(self) -> None:
        if self.profile.protected != self.policy.protected:
            raise ContractError("Profile.protected", f"{self.policy.protected!r} of the policy", self.profile.protected)
        codec = self.profile.codec
        if isinstance(codec, RawParameters) and codec.dtype != self.raw_dtype:
            raise ContractError("Profile.codec.dtype", f"{self.raw_dtype}, in which vectors are kept raw", codec.dtype)

    def plan(self, shape: KVShape) -> Plan:
        """The policy's decisions for a tensor of that shape: the only place where a coder learns what to compress."""
        return plan(self.policy, shape, self.profile.is_calibrated, self.block_dim)

    @cached_property
    def raw(self) -> Codec:
        """The codec of protected regions and fallbacks."""
        return codec_for(RawParameters(head_dim=self.profile.codec.head_dim, dtype=self.raw_dtype))

    @cached_property
    def compressing(self) -> Codec:
        """The codec of everything that is compressed, for all KV heads."""
        return codec_for(self.profile.codec, self.axis)

    @cached_property
    def axis(self) -> Literal["raw", "per_token", "per_channel"]:
        """The profile's axis, with the role-aware one resolved."""
        axis = self.profile.axis
        return role_aware_axis(self.profile.role) if axis == "role_aware_kivi_style" else axis

    @cached_property
    def profile_digest(self) -> str:
        """Digest of the whole bound profile: stamped on every page.

        A space counts as the profile's calibration, so that the digest binds pages to it.
        """
        if self.space is None:
            return self.profile.digest()
        return self.profile.model_copy(update={"calibration_digest": self.space.digest}).digest()

    def codec_of(self, decision: Decision, heads: tuple[int, int]) -> Codec:
        """The codec that a decision on a range of KV heads asks for."""
        match decision.action:
            case "keep_raw":
                return self.raw
            case "compress" if decision.axis == self.axis:
                return self.compressing.of_heads(*heads)
            case "compress":
                raise ContractError("Profile.axis", f"{decision.axis}, as the policy decides", self.profile.axis)
            case _:
                raise DecisionError(f"profile {self.profile.profile_id!r}: {decision.action}: {list(decision.reasons)}")

    def codec_of_segment(self, header: SegmentHeader, decision: Decision) -> Codec:
        """The codec of a stored segment: the decision's, or the raw one where the header says that it fell back."""
        return self.raw if FALLBACKS.intersection(header.reasons) else self.codec_of(decision, header.heads)

    def check_segment(self, where: str, header: SegmentHeader, run: Run) -> None:
        """Checks a stored segment's header against the policy's run.

        Raises:
            PageError: another rectangle, decision, codec or size.
        """
        reasons: tuple[str, ...] = run.decision.reasons
        may_fall_back = run.decision.action == "compress" and self._may_fall_back
        if may_fall_back and header.reasons in {(*reasons, fallback) for fallback in FALLBACKS}:
            reasons = header.reasons
        codec = self.codec_of_segment(header, run.decision)
        groups, tokens = run.heads[1] - run.heads[0], run.tokens[1] - run.tokens[0]
        expected = SegmentHeader(
            heads=run.heads,
            tokens=run.tokens,
            codec=codec.name,
            action=run.decision.action,
            axis=run.decision.axis,
            reasons=reasons,
            nbytes=codec.encoded_nbytes(groups, tokens),
        )
        if header != expected:
            raise PageError(f"{where}: expected {expected}, got {header}")

    @property
    def _may_fall_back(self) -> bool:
        return self.profile.fallback.mode == "keep_raw" and self.profile.fallback.raw_available

    def seal(self, values: Tensor, runs: Sequence[Run]) -> list[tuple[Segment, ...]]:
        """Encodes pages of equal length under equal decisions.

        Args:
            values: ``[pages, heads, T, d]``.
            runs: the policy's rectangles with token ranges relative to the page.

        Returns:
            The segments of each page.

        Raises:
            EncodingError: a page cannot be encoded and the profile forbids to keep it raw. Nothing is kept then.
            DecisionError: the policy asks for a calibration that is missing.
            ContractError: the policy asks for another axis than the profile's.
        """
        columns = [self._seal_run(values, run) for run in runs]
        return [tuple(segments) for segments in zip(*columns, strict=True)]

    def seal_raw(self, values: Tensor, runs: Sequence[Run]) -> tuple[Segment, ...]:
        """One page ``[heads, T, d]`` that broke the quality budget: what would be compressed is kept raw.

        Raises:
            EncodingError: the profile forbids it.
        """
        if not self._may_fall_back:
            raise EncodingError(f"profile {self.profile.profile_id!r}: quality budget; raw fallback is not allowed")
        one = values.unsqueeze(0)
        sealed = [
            self._kept_raw(one, run, OVER_BUDGET) if run.decision.action == "compress" else self._seal_run(one, run)
            for run in runs
        ]
        return tuple(segments[0] for segments in sealed)

    def encode(self, values: Tensor, run: Run) -> Column:
        """One segment of each page, side by side.

        Args:
            values: ``[pages, heads, T, d]``.
            run: a rectangle of the policy's, with a token range relative to the page.

        Raises:
            EncodingError: a page cannot be encoded.
            DecisionError: the policy asks for a calibration that is missing.
            ContractError: the policy asks for another axis than the profile's.
        """
        block = values[:, run.heads[0] : run.heads[1], run.tokens[0] : run.tokens[1]]
        codec = self.codec_of(run.decision, run.heads)
        space = self.space if run.decision.action == "compress" else None
        rows = block if space is None else space.enter(block, slice(*run.heads))
        codes = codec.encode(rows, implementation=self.implementation)
        return Column.of_run(run, codec, codes, space=space)

    def _seal_run(self, values: Tensor, run: Run) -> list[Segment]:
        try:
            return self.encode(values, run).segments()
        except EncodingError as error:
            return self._fall_back(values, run, error)

    def _fall_back(self, values: Tensor, run: Run, error: EncodingError) -> list[Segment]:
        if len(values) > 1:
            # One bad page does not make the others raw.
            return [segment for page in values.split(1) for segment in self._seal_run(page, run)]
        if run.decision.action != "compress":
            raise EncodingError(f"profile {self.profile.profile_id!r}, raw in {self.raw_dtype}: {error}") from error
        if not self._may_fall_back:
            raise EncodingError(f"profile {self.profile.profile_id!r}: {error}; raw fallback is not allowed") from error
        return self._kept_raw(values, run, NOT_ENCODABLE)

    def _kept_raw(self, values: Tensor, run: Run, reason: str) -> list[Segment]:
        block = values[:, run.heads[0] : run.heads[1], run.tokens[0] : run.tokens[1]]
        codes = self.raw.encode(block, implementation=self.implementation)
        return Column.of_run(run, self.raw, codes, fallback=(reason,)).segments()


@dataclass(frozen=True, eq=False)
class Column:
    """One segment of each of several pages that are alike.

    Attributes:
        form: of the segment.
        codes: ``[pages, heads, T, ...]``.
    """

    form: SegmentForm
    codes: Codes

    @classmethod
    def of_run(
        cls, run: Run, codec: Codec, codes: Codes, *, space: KeySpace | None = None, fallback: tuple[str, ...] = ()
    ) -> Column:
        """What became of a rectangle of the policy's.

        Args:
            run: the rectangle.
            codec: how it is coded.
            codes: ``[pages, heads, T, ...]``.
            space: that its keys were taken to.
            fallback: why it is raw against the policy.
        """
        reasons = (*run.decision.reasons, *fallback)
        return cls(shared(SegmentForm(run.heads, run.tokens, run.decision, reasons, codec, space)), codes)

    def segments(self) -> list[Segment]:
        """The segments. Several are clones: a page must not keep the memory of the whole prefill alive."""
        pages = [self.of(page) for page in range(self.codes.axes[0])]
        return [self.segment(codes.map(Tensor.clone) if len(pages) > 1 else codes) for codes in pages]

    def segment(self, codes: Codes) -> Segment:
        """The segment of one page, with its codes ``[heads, T, ...]``, which may lie on another device."""
        return Segment(self.form.on(codes.device), codes)

    def of(self, page: int) -> Codes:
        """The codes of one page ``[heads, T, ...]``, as views."""
        return self.codes.map(lambda tensor: tensor[page])


def bind_coder(
    shape: KVShape,
    parameters: CodecParameters,
    policy: Policy,
    *,
    profile_id: str,
    tokens_per_page: int,
    raw_dtype: Dtype,
    block_dim: int | None = None,
    implementation: str = "auto",
) -> RoleCoder:
    """A coder whose profile is bound to a shape, to the codec's tables and to a policy.

    Args:
        shape: of the role; for a live cache its fixed part.
        parameters: of the codec.
        policy: its protected regions become the profile's, its strategy decides the axis.
        profile_id: the operator's name.
        tokens_per_page: tokens of a full page.
        raw_dtype: of vectors that are kept raw.
        block_dim: see `RoleCoder`; default: the codec's.
        implementation: of the kernels.

    Raises:
        DecisionError: the shape does not carry the block dim and the policy forbids raw fallback.
        ContractError: the parameters do not fit the shape.
    """
    wanted = parameters.block_dim if block_dim is None else block_dim
    # Asked without protection, the policy says on which axis it compresses this role, if it can.
    bare = policy.model_copy(update={"protected": ProtectedRegions()})
    axis = decide(bare, shape, 0, 0, 0, has_calibration=True, block_dim=wanted).axis
    codec = codec_for(parameters, axis)
    profile = Profile.bind(
        shape,
        parameters,
        profile_id=profile_id,
        axis=axis,
        geometry=PageGeometry.of(tokens_per_page, shape.head_dim, codec.vector_nbytes),
        rotation_digest=codec.rotation_digest,
        codebook_digest=codec.codebook_digest,
        protected=policy.protected,
    )
    return RoleCoder(profile, policy, raw_dtype, wanted, implementation)


def bind_profile(
    shape: KVShape,
    codec: str | CodecParameters,
    policy: Policy,
    *,
    profile_id: str,
    tokens_per_page: int = 64,
) -> Profile:
    """A profile for `fibkv.encode_tensor`: bound to a shape, to the codec's tables and to a policy.

    Args:
        shape: of the tensor.
        codec: a name of `fibkv.parameters.PARAMETER_NAMES`, or codec parameters.
        policy: its protected regions become the profile's, its strategy decides the axis.
        profile_id: the operator's name for the profile.
        tokens_per_page: tokens of a full page; at most those of the shape are taken.

    Raises:
        ContractError: the codec is unknown or does not fit the shape.
    """
    parameters = named_parameters(codec, shape.head_dim, shape.dtype) if isinstance(codec, str) else codec
    pages = min(tokens_per_page, shape.tokens)
    return bind_coder(
        shape, parameters, policy, profile_id=profile_id, tokens_per_page=pages, raw_dtype=shape.dtype
    ).profile


def bound_coder(shape: KVShape, profile: Profile, policy: Policy) -> RoleCoder:
    """The coder of a profile that exists, checked against a shape and against the objects in use.

    Raises:
        DigestMismatch: the profile is bound to another shape, codec, rotation or codebook.
        ContractError: geometry or protected regions do not fit the shape, or the policy protects something else.
    """
    coder = RoleCoder(profile, policy, shape.dtype, profile.codec.block_dim)
    codec = coder.compressing
    profile.check_binding(
        shape,
        rotation_digest=codec.rotation_digest,
        codebook_digest=codec.codebook_digest,
        vector_nbytes=codec.vector_nbytes,
    )
    return coder
