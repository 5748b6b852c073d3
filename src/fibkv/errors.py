"""The one error tree of fibkv.

    FibkvError
    ├── ContractError        a shape, profile, policy or other contract is wrong: field, expected, came
    │   └── DigestMismatch   a digest is not the expected one
    ├── DecisionError        the policy refuses to compress and forbids to keep raw
    ├── EncodingError        vectors that a codec cannot represent (non-finite, norm out of range)
    ├── PageError            a page or an artifact that is not what its digests and counts say
    ├── KernelError          a kernel implementation that is not available, or tensors that it cannot take
    ├── CodebookError        a codebook that cannot be read, built or trusted
    ├── StoreError           a store that cannot be reached, read or written, or names that it cannot have
    ├── BudgetError          no room within the memory budget of a pool; the cache is as it was
    └── ModelError           a model, or a call on its cache, that cannot be served correctly

Messages name what was expected, what came, and where. Errors of other libraries are translated
where they enter, with ``from``.
"""

from __future__ import annotations


class FibkvError(Exception):
    """Base of every error that fibkv raises on purpose."""


class ContractError(FibkvError):
    """A contract is wrong: names the field, what was expected and what came.

    Args:
        field: dotted name of the field, such as ``KVShape.tokens``.
        expected: what the rule asks for.
        actual: what came.
    """

    def __init__(self, field: str, expected: str, actual: object) -> None:
        self.field = field
        self.expected = expected
        self.actual = actual
        super().__init__(f"{field}: expected {expected}, got {actual!r}")

    def __reduce__(self) -> tuple[type[ContractError], tuple[str, str, object]]:
        return type(self), (self.field, self.expected, self.actual)


class DigestMismatch(ContractError):  # noqa: N818 - says what it is
    """A digest differs from the expected one: ``expected`` and ``actual`` are the two digests."""

    def __init__(self, field: str, expected: str, actual: object) -> None:
        super().__init__(field, expected, actual)
        self.args = (f"{field}: digest mismatch: expected {expected}, got {actual}",)


class DecisionError(FibkvError):
    """The policy can neither compress a vector nor keep it raw."""


class EncodingError(FibkvError):
    """Vectors that a codec cannot represent: the message says which bound was broken, and by what."""


class PageError(FibkvError):
    """A page or artifact is truncated, damaged, foreign or out of place. Nothing of it was decoded."""


class KernelError(FibkvError):
    """A kernel implementation is not available, or was handed tensors that it cannot take."""


class CodebookError(FibkvError):
    """A codebook cannot be read, built or trusted."""


class StoreError(FibkvError):
    """A store cannot be reached, read or written, or was asked for a name that no object can have."""


class BudgetError(FibkvError):
    """A step does not fit into a pool's memory budget, even with old pages at the last rung.

    Nothing of the step was done: it may be tried again when other sequences have finished.
    """


class ModelError(FibkvError):
    """A model, or a call on its cache, that cannot be served correctly."""
