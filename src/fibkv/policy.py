"""The policy: which vectors are compressed, on which axis, and why.

:func:`decide` is the rule, for one vector; :func:`plan` is the same rule for a whole tensor, in runs.
Both are pure. No other place in fibkv decides this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby, pairwise
from typing import Literal, TypeVar

from fibkv.contract import Contract
from fibkv.errors import ContractError, DecisionError
from fibkv.regions import ProtectedRegions
from fibkv.shape import KVShape, Role

Strategy = Literal[
    "raw",
    "fib_quant_per_token",
    "fib_quant_per_channel",
    "role_aware_kivi_style_baseline",
    "experimental_fib_quant_role_aware",
]
Action = Literal["keep_raw", "compress", "need_calibration", "quarantine"]
DecisionAxis = Literal["raw", "per_token", "per_channel"]
Reason = Literal[
    "raw_strategy",
    "protected_region",
    "unsupported_shape",
    "calibration_missing",
    "key_role_axis",
    "value_role_axis",
    "experimental_role_aware",
]
Range = tuple[int, int]
"""Half-open range of indices."""

Content = TypeVar("Content")
Merged = tuple[tuple[Range, Content], ...]
"""Ranges that cover an axis in order, each with what holds there."""


class Policy(Contract):
    """A strategy, what it must leave raw, and what it may do where it cannot compress."""

    strategy: Strategy
    protected: ProtectedRegions
    require_calibration: bool
    allow_raw_fallback: bool

    @classmethod
    def raw(cls) -> Policy:
        """Compress nothing."""
        return cls(strategy="raw", protected=ProtectedRegions(), require_calibration=False, allow_raw_fallback=True)

    @classmethod
    def role_aware_baseline(cls) -> Policy:
        """KIVI's axes (arXiv 2402.02750): keys per channel, values per token; the last token stays raw."""
        return cls(
            strategy="role_aware_kivi_style_baseline",
            protected=ProtectedRegions(last_tokens_raw=1),
            require_calibration=False,
            allow_raw_fallback=True,
        )

    @classmethod
    def per_token(cls, protected: ProtectedRegions | None = None) -> Policy:
        """Compress everything but ``protected`` (by default nothing is) per token."""
        return cls(
            strategy="fib_quant_per_token",
            protected=protected or ProtectedRegions(),
            require_calibration=False,
            allow_raw_fallback=True,
        )


class Decision(Contract):
    """What to do with a vector, along which axis, and why.

    The action ``quarantine`` is not the policy's to take: see :mod:`fibkv.quarantine`.
    """

    action: Action
    axis: DecisionAxis
    reasons: tuple[Reason, ...]


class Run(Contract):
    """A box of vectors, [layers, heads, tokens] in half-open ranges over all batch rows, decided alike."""

    layers: Range
    heads: Range
    tokens: Range
    decision: Decision

    def relative_to(self, start: int) -> Run:
        """The run with token indices counted from ``start``, a page's first token."""
        tokens = (self.tokens[0] - start, self.tokens[1] - start)
        return Run(layers=self.layers, heads=self.heads, tokens=tokens, decision=self.decision)


class Plan(Contract):
    """Runs that cover a shape exactly once, ordered by layer, head and token.

    Neighbouring layers share runs where all their heads agree, neighbouring heads where all their
    tokens agree, and along tokens the runs are as long as the decision stays the same.
    """

    shape: KVShape
    runs: tuple[Run, ...]

    def clip(self, layer: int, start: int, stop: int) -> tuple[Run, ...]:
        """The runs of one layer and the tokens ``start`` to ``stop``, cut to them, by head and token.

        Raises:
            ContractError: the layer or the token range lies outside the shape.
        """
        _require_index("Plan.clip.layer", layer, self.shape.layers)
        if not 0 <= start <= stop <= self.shape.tokens:
            expected = f"0 <= start <= stop <= {self.shape.tokens}"
            raise ContractError("Plan.clip.tokens", expected, (start, stop))
        runs = []
        for run in self.runs:
            tokens = (max(start, run.tokens[0]), min(stop, run.tokens[1]))
            if run.layers[0] <= layer < run.layers[1] and tokens[0] < tokens[1]:
                runs.append(Run(layers=(layer, layer + 1), heads=run.heads, tokens=tokens, decision=run.decision))
        return tuple(runs)


def decide(
    policy: Policy,
    shape: KVShape,
    layer: int,
    head: int,
    token: int,
    has_calibration: bool,
    block_dim: int | None = None,
) -> Decision:
    """The decision for one vector.

    Args:
        policy: the rules.
        shape: of the tensor.
        layer: index below ``shape.layers``.
        head: index of the KV head, below ``shape.kv_heads``.
        token: index below ``shape.tokens``.
        has_calibration: whether the profile in use was calibrated.
        block_dim: of the codec in use; None leaves it out of the decision.

    Raises:
        ContractError: the protected regions do not fit the shape, or an index lies outside it.
        DecisionError: the shape does not carry ``block_dim`` and the policy forbids raw fallback.
    """
    rule = _Rule(policy, shape, has_calibration, block_dim)
    _require_index("decide.layer", layer, shape.layers)
    _require_index("decide.head", head, shape.kv_heads)
    _require_index("decide.token", token, shape.tokens)
    return rule.at(layer, head, token)


def carries(head_dim: int, block_dim: int) -> bool:
    """Whether vectors of ``head_dim`` elements split into whole blocks, more than one."""
    return 0 < block_dim < head_dim and head_dim % block_dim == 0


# Layers that are alike ask for the same at each length.
@lru_cache(maxsize=64)
def plan(policy: Policy, shape: KVShape, has_calibration: bool, block_dim: int | None = None) -> Plan:
    """The decisions for all vectors of a tensor; equal to :func:`decide` at every index.

    Costs time in the number of protected layers and heads, not in the number of tokens.

    Args:
        policy: the rules.
        shape: of the tensor.
        has_calibration: whether the profile in use was calibrated.
        block_dim: of the codec in use; None leaves it out of the decisions.

    Raises:
        ContractError: the protected regions do not fit the shape.
        DecisionError: the shape does not carry ``block_dim`` and the policy forbids raw fallback.
    """
    rule = _Rule(policy, shape, has_calibration, block_dim)
    layers, heads, tokens = policy.protected.boundaries(shape)

    def along_tokens(layer: int, head: int) -> Merged[Decision]:
        return _merge(tokens, lambda token: rule.at(layer, head, token))

    def along_heads(layer: int) -> Merged[Merged[Decision]]:
        return _merge(heads, lambda head: along_tokens(layer, head))

    runs = (
        Run(layers=layer_range, heads=head_range, tokens=token_range, decision=decision)
        for layer_range, by_head in _merge(layers, along_heads)
        for head_range, by_token in by_head
        for token_range, decision in by_token
    )
    return Plan(shape=shape, runs=tuple(runs))


@dataclass(frozen=True, slots=True)
class _Rule:
    """The rule itself, for indices inside the shape; refuses protected regions that do not fit it."""

    policy: Policy
    shape: KVShape
    has_calibration: bool
    block_dim: int | None

    def __post_init__(self) -> None:
        self.policy.protected.validate_for(self.shape)

    def at(self, layer: int, head: int, token: int) -> Decision:
        """The decision for one vector, by the first case that applies, in the order of the contract."""
        policy = self.policy
        if policy.protected.is_protected(self.shape.tokens, layer, head, token):
            return _decision("keep_raw", "raw", "protected_region")
        if policy.require_calibration and not self.has_calibration:
            action: Action = "keep_raw" if policy.allow_raw_fallback else "need_calibration"
            return _decision(action, "raw", "calibration_missing")
        if policy.strategy == "raw":
            return _decision("keep_raw", "raw", "raw_strategy")
        if self.block_dim is not None and not carries(self.shape.head_dim, self.block_dim):
            if policy.allow_raw_fallback:
                return _decision("keep_raw", "raw", "unsupported_shape")
            raise DecisionError(
                f"strategy {policy.strategy} cannot carry head_dim {self.shape.head_dim} in blocks of "
                f"{self.block_dim}: expected a divisor of head_dim below it, or a policy that allows raw fallback"
            )
        return _compress(policy.strategy, self.shape.role)


def role_aware_axis(role: Role) -> Literal["per_token", "per_channel"]:
    """The axis of the role-aware strategies: keys per channel, values per token (KIVI, arXiv 2402.02750)."""
    return "per_channel" if role == "key" else "per_token"


def _compress(strategy: Strategy, role: Role) -> Decision:
    role_axis = role_aware_axis(role)
    role_reason: Reason = "key_role_axis" if role == "key" else "value_role_axis"
    match strategy:
        case "fib_quant_per_token":
            return _decision("compress", "per_token", role_reason)
        case "fib_quant_per_channel":
            return _decision("compress", "per_channel", role_reason)
        case "role_aware_kivi_style_baseline":
            return _decision("compress", role_axis, role_reason)
        case _:
            return _decision("compress", role_axis, "experimental_role_aware")


@cache
def _decision(action: Action, axis: DecisionAxis, reason: Reason) -> Decision:
    return Decision(action=action, axis=axis, reasons=(reason,))


def _merge(boundaries: Sequence[int], content_at: Callable[[int], Content]) -> Merged[Content]:
    """The ranges between boundaries with what is at their first index; neighbours with equal content joined."""
    merged = []
    for content, group in groupby(pairwise(boundaries), key=lambda piece: content_at(piece[0])):
        pieces = list(group)
        merged.append(((pieces[0][0], pieces[-1][1]), content))
    return tuple(merged)


def _require_index(field: str, index: int, count: int) -> None:
    if type(index) is not int or not 0 <= index < count:
        raise ContractError(field, f"an index from 0 to {count - 1}", index)
