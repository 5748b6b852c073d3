"""The base of every typed contract: frozen, strict, complete, and refused in fibkv's own words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from fibkv.digest import canonical_json, digest
from fibkv.errors import ContractError

# No contract has as many. Bound what hostile JSON costs before it is refused.
MAX_NAMES = 256
MAX_COMPLAINTS = 100

Index = Annotated[int, Field(ge=0, lt=2**32)]
"""Field type: an unsigned 32-bit number that may be zero."""

Count = Annotated[int, Field(gt=0, lt=2**32)]
"""Field type: an unsigned 32-bit number above zero."""

Total = Annotated[int, Field(ge=0, lt=2**63)]
"""Field type: a sum of counts or bytes; not negative, fits in a signed 64-bit integer."""


class Contract(BaseModel):
    """Immutable, validated plain data with a canonical JSON form.

    Types are strict, unknown fields are refused, floats are finite. A copy with changes is validated
    again, and construction without validation is refused.

    Raises:
        ContractError: on construction; names ``Class.field``, what was expected and what came.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _translate_errors(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise _contract_error(cls, error) from error

    def to_json(self) -> str:
        """Canonical JSON: compact, fields in declaration order."""
        return canonical_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The contract that a JSON text describes.

        Raises:
            ContractError: the text is not JSON, or not a valid contract of this class.
        """
        try:
            data = _tuples(json.loads(text, object_pairs_hook=_fields))
        except (ValueError, RecursionError) as error:
            raise ContractError(cls.__name__, "JSON without repeated names", str(error)) from error
        return cls.model_validate(data)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, with the fields in ``update`` replaced and everything validated again.

        Raises:
            ContractError: the changed contract is not valid, or a name is unknown.
        """
        if not update:
            return super().model_copy(deep=deep)
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **update})

    # The ignored error is against the signature that pydantic's mypy plugin makes up for each model.
    @classmethod
    def model_construct(  # type: ignore[override]
        cls, _fields_set: set[str] | None = None, **values: Any
    ) -> Self:
        """Refused: it would build a contract without validation."""
        raise ContractError(f"{cls.__name__}.model_construct", "construction through validation", values)

    def __setattr__(self, name: str, value: object) -> None:
        raise ContractError(f"{type(self).__name__}.{name}", "no assignment, contracts are frozen", value)

    def __delattr__(self, name: str) -> None:
        raise ContractError(f"{type(self).__name__}.{name}", "no deletion, contracts are frozen", getattr(self, name))


class MarkedContract(Contract):
    """A contract that carries a format marker, and therefore a digest."""

    schema_version: str

    def digest(self) -> str:
        """Digest over all fields; the marker is its domain."""
        return digest(self.schema_version, self)


def _fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; one that names a field twice would have a second meaning for another reader."""
    if len(pairs) > MAX_NAMES:
        raise ValueError(f"{len(pairs)} names in one object, expected at most {MAX_NAMES}")
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(f"a repeated name among {', '.join(name for name, _ in pairs)}")
    return fields


def _tuples(value: Any) -> Any:
    """A JSON value with its arrays as tuples, which is what contracts hold."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _contract_error(cls: type[Contract], error: ValidationError) -> ContractError:
    """The first complaint of pydantic, in the words of the one error tree."""
    if error.error_count() > MAX_COMPLAINTS:
        return ContractError(cls.__name__, "a valid contract", f"{error.error_count()} mistakes")
    first = error.errors(include_url=False)[0]
    field = ".".join([cls.__name__, *map(str, first["loc"])])
    message, actual = first["msg"], first["input"]
    match first["type"]:
        case "missing":
            return ContractError(field, "a value, the field is required", "nothing")
        case "extra_forbidden":
            return ContractError(field, f"only the fields {', '.join(cls.model_fields)}", actual)
        case "union_tag_invalid":
            context = first["ctx"]
            name = context["discriminator"].strip("'")
            return ContractError(f"{field}.{name}", f"one of {context['expected_tags']}", context["tag"])
        case "string_pattern_mismatch":
            return ContractError(field, f"a text like {first['ctx']['pattern']}", actual)
    return ContractError(field, message.removeprefix("Input should be "), actual)
