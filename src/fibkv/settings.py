"""What a user chooses for a whole cache, and what each layer gets of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, get_args

import torch
from torch import Tensor

from fibkv import kernels
from fibkv.allocation import KLT_BITS, KltParameters
from fibkv.calibration_file import Calibration
from fibkv.choices import block_dim_of, known_pair, names_by_bits, parameters_of
from fibkv.coder import RoleCoder, bind_coder
from fibkv.errors import ContractError, DecisionError, ModelError
from fibkv.ladder import Choice, Ladder, Rung
from fibkv.parameters import RawParameters
from fibkv.policy import Policy, carries
from fibkv.regions import ProtectedRegions
from fibkv.sampling import PageSampler
from fibkv.sealing import LayerSettings
from fibkv.shape import AttentionKind, Dtype, KVShape, Role
from fibkv.space import KeySpace
from fibkv.view import DTYPE_NAMES

# Attention sinks sit in the first tokens, and the newest tokens are read most.
DEFAULT_PROTECTED = ProtectedRegions(first_tokens_raw=4, last_tokens_raw=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The settings of one cache, the same for all of its layers.

    Attributes:
        keys: codec of the keys.
        values: codec of the values.
        policy: None = per token with `DEFAULT_PROTECTED` (nothing protected when read through).
        tokens_per_page: tokens of a full page.
        raw_dtype: of what is kept raw; None = the model's.
        read_through: see `fibkv.sealing.LayerSettings`.
        implementation: of the kernels.
        layers: layers of the model.
        query_heads: query heads of the model.
        key_spaces: by layer, what its keys go through before they are coded.
        layer_profiles: by layer, codecs of keys and values in place of the above.
        allocations: by layer, what the name of a klt code of its keys stands for, from a calibration.
        samplers: by layer, what measures its pages when they are sealed.
        rungs: of a pool's ladder, the codecs of keys and values at each rung, in place of the above; empty = none.
    """

    keys: Choice
    values: Choice
    policy: Policy | None
    tokens_per_page: int
    raw_dtype: Dtype | None
    read_through: bool
    implementation: str
    layers: int
    query_heads: int
    key_spaces: Mapping[int, KeySpace]
    layer_profiles: Mapping[int, tuple[Choice, Choice]]
    rungs: Mapping[Rung, tuple[Choice, Choice]] = field(default_factory=dict)
    samplers: Mapping[int, PageSampler] = field(default_factory=dict)
    allocations: Mapping[int, KltParameters] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        bits: float | tuple[int, int] | None,
        profile: Choice | tuple[Choice, Choice] | None,
        policy: Policy | None,
        tokens_per_page: int,
        raw_dtype: str | None,
        read_through: bool,
        implementation: str,
        layers: int,
        kv_heads: int,
        query_heads: int,
        key_spaces: Mapping[int, KeySpace] | None = None,
        layer_profiles: Mapping[int, tuple[Choice, Choice]] | None = None,
    ) -> Self:
        """Settings from what `fibkv.Cache` takes.

        Raises:
            ContractError: bits and profile both given, or a value that is unknown or out of range.
            KernelError: the implementation is not available.
        """
        if bits is not None and profile is not None:
            raise ContractError("Cache.profile", "either bits or profile", profile)
        keys: Choice
        values: Choice
        if profile is None:
            keys, values = names_by_bits(4 if bits is None else bits)
        else:
            keys, values = known_pair("Cache.profile", profile)
        if raw_dtype is not None and raw_dtype not in get_args(Dtype):
            raise ContractError("Cache.raw_dtype", f"one of {', '.join(get_args(Dtype))}", raw_dtype)
        if not isinstance(tokens_per_page, int) or tokens_per_page <= 0:
            raise ContractError("Cache.tokens_per_page", "a positive number", tokens_per_page)
        _check_policy(policy, layers, kv_heads)
        kernels.resolve(implementation)
        return cls(
            keys=keys,
            values=values,
            policy=policy,
            tokens_per_page=tokens_per_page,
            raw_dtype=raw_dtype,  # type: ignore[arg-type]  # checked against the literal above
            read_through=read_through,
            implementation=implementation,
            layers=layers,
            query_heads=query_heads,
            key_spaces=_checked_spaces(key_spaces or {}, layers),
            layer_profiles=_checked_profiles(layer_profiles or {}, layers),
        )

    def choices(self, layer: int) -> tuple[Choice, Choice]:
        """Codecs of the keys and the values of a layer."""
        return self.layer_profiles.get(layer, (self.keys, self.values))

    def coded(self, layer: int) -> tuple[Choice, Choice]:
        """The same, with what the name of a klt code stands for."""
        keys, values = self.choices(layer)
        return self.allocations.get(layer, keys), values

    def names(self, layer: int) -> tuple[str, str]:
        """Those of `choices` in words."""
        keys, values = (choice if isinstance(choice, str) else choice.codec for choice in self.choices(layer))
        return keys, values

    def check_head_dims(self, head_dims: Sequence[int]) -> None:
        """Refuses, before the first token, what no layer of a model could be given.

        Args:
            head_dims: every width that the model's layers may have; with none, nothing is refused.

        Raises:
            ContractError: parameters for another head_dim.
            DecisionError: no width splits into whole blocks, and the policy forbids to keep such vectors raw.
        """
        may_be_raw = self.policy is None or self.policy.allow_raw_fallback or self.policy.strategy == "raw"
        if not self.allocations and any(self.names(layer)[0] in KLT_BITS for layer in range(self.layers)):
            raise ContractError("Cache.calibration", "one of the model beside klt codes, and no key_spaces", None)
        for role, choice in (("keys", self.keys), ("values", self.values)):
            block_dim = block_dim_of(choice)
            if not head_dims:
                continue
            if not isinstance(choice, str) and choice.head_dim not in head_dims:
                expected = f"a head_dim of the model ({', '.join(map(str, head_dims))}) for {role}"
                raise ContractError("Cache.profile.head_dim", expected, choice.head_dim)
            if not may_be_raw and not any(carries(width, block_dim) for width in head_dims):
                raise DecisionError(
                    f"{role}: blocks of {block_dim} do not divide a head_dim of the model "
                    f"({', '.join(map(str, head_dims))}), and the policy forbids raw fallback"
                )

    def for_layer(self, layer: int, keys: Tensor, values: Tensor, *, is_latent: bool = False) -> LayerSettings:
        """The settings of one layer.

        Args:
            layer: its index.
            keys: ``[B, H, t, d]``, like all keys to come.
            values: ``[B, H, t, d_value]``.
            is_latent: the tensors are latents and rotary keys. The latents, which stand for keys and values alike,
                get the codec of the keys; the rotary keys are few and stay raw.

        Raises:
            ModelError: a dtype that cannot be kept.
            ContractError: the codec does not fit the head_dim, or the policy does not fit the heads.
        """
        if keys.dtype not in DTYPE_NAMES or values.dtype not in DTYPE_NAMES:
            got = f"{keys.dtype} and {values.dtype}"
            raise ModelError(f"layer {layer}: expected keys and values in float16, bfloat16 or float32, got {got}")
        if keys.device.type == "meta":
            raise ModelError(f"layer {layer}: expected keys with data, got a meta tensor")
        key_choice, value_choice = self.coded(layer)
        key_shape, key_coder = self._role("key", keys, key_choice)
        value_shape, value_coder = self._role("value", values, "raw" if is_latent else value_choice)
        return LayerSettings(
            layer=layer,
            key_shape=key_shape,
            value_shape=value_shape,
            keys=self._in_space(key_coder, layer, keys),
            values=value_coder,
            tokens_per_page=self.tokens_per_page,
            read_through=self.read_through,
            # Latents are neither keys nor values that a query meets.
            sampler=None if is_latent else self.samplers.get(layer),
        )

    def on_ladder(self, ladder: Ladder, rungs: Sequence[Rung]) -> Self:
        """The settings of a cache whose codecs a pool chooses.

        Raises:
            ContractError: the ladder lacks a rung, or has an unknown codec.
        """
        found = {}
        for rung in rungs:
            found[rung] = known_pair(f"Ladder.{rung}", ladder.choices(rung))
            if found[rung][0] in KLT_BITS:
                raise ContractError(f"Ladder.{rung}", "codecs that need no calibration", found[rung][0])
        return replace(self, rungs=found)

    def rungs_of_layer(
        self, layer: int, keys: Tensor, values: Tensor, *, is_latent: bool = False
    ) -> dict[Rung, LayerSettings]:
        """The settings of one layer at each rung of the ladder, as `for_layer` makes them; none without a ladder."""
        made = {}
        for rung, (key_choice, value_choice) in self.rungs.items():
            at_rung = replace(
                self,
                keys=key_choice,
                values=value_choice,
                layer_profiles={},
                # What the level fp16 is named after, whatever the model computes in.
                raw_dtype=self.raw_dtype or ("f16" if keys.dtype == torch.float32 else None),
            )
            made[rung] = replace(at_rung.for_layer(layer, keys, values, is_latent=is_latent), rung=rung)
        return made

    def _role(self, role: Role, tensor: Tensor, choice: Choice) -> tuple[KVShape, RoleCoder]:
        raw_dtype = self.raw_dtype or DTYPE_NAMES[tensor.dtype]
        if isinstance(choice, RawParameters):
            raw_dtype = choice.dtype
        policy = self._policy(choice)
        protected = policy.protected
        shape = self._shape(role, tensor).fixed_part(
            # The fixed part must hold the protected tokens, whatever the page size.
            max(self.tokens_per_page, protected.first_tokens_raw, protected.last_tokens_raw)
        )
        block_dim = block_dim_of(choice)
        # Where the shape cannot carry the choice, the raw codec stands in, if the policy allows that.
        stands_in = policy.strategy == "raw" or not carries(shape.head_dim, block_dim)
        fitting = "raw" if stands_in and not isinstance(choice, RawParameters) else choice
        coder = bind_coder(
            shape,
            parameters_of(fitting, shape.head_dim, raw_dtype),
            policy,
            profile_id=f"{role}:{choice if isinstance(choice, str) else choice.codec}",
            tokens_per_page=self.tokens_per_page,
            raw_dtype=raw_dtype,
            block_dim=block_dim,
            implementation=self.implementation,
        )
        return shape, coder

    def _in_space(self, coder: RoleCoder, layer: int, keys: Tensor) -> RoleCoder:
        space = self.key_spaces.get(layer)
        if space is None:
            return coder
        expected = [keys.shape[1], keys.shape[3]]
        if list(space.mean.shape) != expected:
            raise ContractError(f"Cache.key_spaces[{layer}].mean", f"shape {expected}", list(space.mean.shape))
        return replace(coder, space=space.to(keys.device))

    def _policy(self, choice: Choice) -> Policy:
        protected = ProtectedRegions() if self.read_through else DEFAULT_PROTECTED
        policy = self.policy or Policy.per_token(protected)
        # A role that is chosen raw is raw by strategy; it keeps the other role's protected rectangles.
        is_raw = choice == "raw" or isinstance(choice, RawParameters)
        return policy.model_copy(update={"strategy": "raw"}) if is_raw else policy

    def _shape(self, role: Role, tensor: Tensor) -> KVShape:
        heads = tensor.shape[1]
        query_heads = self.query_heads
        kind: AttentionKind = "mha" if heads == query_heads else "mqa" if heads == 1 else "gqa"
        return KVShape(
            role=role,
            attention_kind=kind,
            batch=1,
            layers=self.layers,
            kv_heads=heads,
            query_heads=query_heads,
            tokens=1,
            head_dim=tensor.shape[3],
            dtype=DTYPE_NAMES[tensor.dtype],
            rope_state="post_rope" if role == "key" else "not_applicable",
        )


def recommended(
    calibration: Calibration,
    bits: float | tuple[int, int] | None,
    layer_profiles: Mapping[int, tuple[Choice, Choice]] | None,
    *,
    in_its_spaces: bool,
) -> tuple[tuple[Choice, Choice] | None, Mapping[int, tuple[Choice, Choice]] | None]:
    """The codecs of all layers and those by layer where no profile is given.

    Args:
        calibration: of the model.
        bits: asked for; None = what the calibration recommends, if ``layer_profiles`` does not say.
        layer_profiles: asked for, or None.
        in_its_spaces: whether keys are coded in the calibration's spaces, without which there are no klt codes.
    """
    if bits is None:
        return None, dict(calibration.choices()) if layer_profiles is None else layer_profiles
    keys, values = names_by_bits(bits)
    return (calibration.best_keys(keys) if in_its_spaces else keys, values), layer_profiles


def calibrated(settings: CacheSettings, calibration: Calibration) -> CacheSettings:
    """Settings with the key spaces of a calibration that measured best with each layer's key codec, and with what the
    names of klt codes stand for.
    """
    spaces, allocations = {}, {}
    for layer in calibration.statistics:
        name = settings.names(layer)[0]
        space = calibration.space(layer, calibration.best_space(name))
        if space is not None:
            spaces[layer] = space
        if name in KLT_BITS:
            allocations[layer] = calibration.klt_parameters(layer, name)
    return replace(settings, key_spaces=_checked_spaces(spaces, settings.layers), allocations=allocations)


def _checked_spaces(spaces: Mapping[int, KeySpace], layers: int) -> Mapping[int, KeySpace]:
    """Refuses spaces of layers that the model does not have."""
    for layer, space in spaces.items():
        if not isinstance(space, KeySpace) or not 0 <= layer < layers:
            raise ContractError(
                "Cache.key_spaces", f"KeySpaces of layers below {layers}", (layer, type(space).__name__)
            )
    return dict(spaces)


def _checked_profiles(
    profiles: Mapping[int, tuple[Choice, Choice]], layers: int
) -> Mapping[int, tuple[Choice, Choice]]:
    """Refuses codecs of layers that the model does not have, and unknown ones."""
    if not isinstance(profiles, Mapping):
        raise ContractError("Cache.layer_profiles", "pairs of codecs by layer index", profiles)
    found = {}
    for layer, pair in profiles.items():
        if not 0 <= layer < layers:
            raise ContractError("Cache.layer_profiles", f"layers below {layers}", layer)
        found[layer] = known_pair(f"Cache.layer_profiles[{layer}]", pair)
    return found


def _check_policy(policy: Policy | None, layers: int, kv_heads: int) -> None:
    """Refuses protected layers and heads that the model does not have, before its first token."""
    if policy is None:
        return
    if not isinstance(policy, Policy):
        raise ContractError("Cache.policy", "a fibkv.Policy", policy)
    for name, count in (("raw_layers", layers), ("raw_heads", kv_heads)):
        listed = getattr(policy.protected, name)
        if any(index >= count for index in listed):
            raise ContractError(f"Cache.policy.protected.{name}", f"indices below {count}", listed)
