"""What every contract has in common, checked for all of them."""

import copy
import json
import pickle
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pydantic
import pytest

from fibkv.contract import Contract, MarkedContract
from fibkv.errors import ContractError
from fibkv.quarantine import QuarantineRecord
from fibkv.regions import PageGeometry, ProtectedRegions
from fibkv.shape import KVShape

from .examples import DIGEST, EXAMPLES, KEY_SHAPE, PROFILE

DESIGN = Path(__file__).parents[2] / "docs" / "DESIGN.md"
RANK_0 = [f"fibkv.{name}" for name in re.search(r"^rank 0  (.+)$", DESIGN.read_text(), re.MULTILINE)[1].split()]
MARKED = [example for example in EXAMPLES if isinstance(example, MarkedContract)]
each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
each_marked = pytest.mark.parametrize("example", MARKED, ids=lambda example: type(example).__name__)


def subclasses(cls: type[Contract]) -> set[type[Contract]]:
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def test_every_contract_of_rank_0_has_an_example() -> None:
    for module in RANK_0:
        import_module(module)
    concrete = {cls for cls in subclasses(Contract) if cls.__module__ in RANK_0 and not cls.__name__.startswith("_")}
    bases = {Contract, MarkedContract}
    assert concrete - bases == {type(example) for example in EXAMPLES} - bases


@each
def test_json_round_trip_keeps_every_field_in_declaration_order(example: Contract) -> None:
    text = example.to_json()
    assert type(example).from_json(text) == example
    assert type(example).from_json(text.encode()) == example
    assert type(example).from_json(text).to_json() == text
    assert list(json.loads(text)) == list(type(example).model_fields)


@each
def test_unknown_field_is_refused_by_name(example: Contract) -> None:
    name = type(example).__name__
    fields = {field: getattr(example, field) for field in type(example).model_fields}
    with pytest.raises(ContractError, match=rf"^{name}\.colour: expected only the fields .*, got 'red'$"):
        type(example)(**fields, colour="red")
    with pytest.raises(ContractError, match=rf"^{name}\.colour: expected only the fields"):
        type(example).from_json(json.dumps({**json.loads(example.to_json()), "colour": "red"}))
    with pytest.raises(ContractError, match=rf"^{name}\.colour: expected only the fields"):
        example.model_copy(update={"colour": "red"})


@each
def test_required_field_left_out_is_refused_by_name(example: Contract) -> None:
    required = [name for name, field in type(example).model_fields.items() if field.is_required()]
    for left_out in required:
        fields = {name: getattr(example, name) for name in type(example).model_fields if name != left_out}
        with pytest.raises(ContractError, match=rf"^{type(example).__name__}\.{left_out}: expected a value"):
            type(example)(**fields)


@each
def test_frozen(example: Contract) -> None:
    name, field = type(example).__name__, next(iter(type(example).model_fields))
    with pytest.raises(ContractError, match=rf"^{name}\.{field}: expected no assignment"):
        setattr(example, field, 1)
    with pytest.raises(ContractError, match=rf"^{name}\.{field}: expected no deletion"):
        delattr(example, field)
    with pytest.raises(ContractError, match=rf"^{name}\.model_construct: expected construction through validation"):
        type(example).model_construct()


@each
def test_copies_and_pickles_are_equal_and_hash_alike(example: Contract) -> None:
    for twin in (copy.copy(example), copy.deepcopy(example), pickle.loads(pickle.dumps(example)), example.model_copy()):
        assert twin == example
        assert hash(twin) == hash(example)


# The changed value is a text in the place of any type, which pydantic remarks on.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@each_marked
def test_digest_is_stable_and_every_field_changes_it(example: MarkedContract) -> None:
    assert type(example).from_json(example.to_json()).digest() == example.digest()
    digests = {example.digest()}
    for name in type(example).model_fields:
        changed = unvalidated(example, name, "something else").digest()
        assert changed not in digests, f"{name} does not change the digest"
        digests.add(changed)


@each_marked
def test_marker_comes_first_and_no_other_is_taken(example: MarkedContract) -> None:
    cls = type(example)
    assert next(iter(cls.model_fields)) == "schema_version"
    with pytest.raises(ContractError, match=rf"{cls.__name__}\.schema_version: expected '{example.schema_version}'"):
        example.model_copy(update={"schema_version": "v0"})


def test_markers_are_distinct() -> None:
    assert len({example.schema_version for example in MARKED}) == len(MARKED)


def unvalidated(example: MarkedContract, name: str, value: object) -> MarkedContract:
    """A copy with one wrong field, made by pydantic's own constructor, which contracts refuse to lend."""
    fields: dict[str, Any] = {field: getattr(example, field) for field in type(example).model_fields}
    construct = pydantic.BaseModel.model_construct.__func__  # type: ignore[attr-defined]
    return construct(type(example), **{**fields, name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "KVShape: expected JSON without repeated names, got 'Expecting value"),
        ("{", "KVShape: expected JSON without repeated names"),
        (b"\xff", "KVShape: expected JSON without repeated names, got .*can't decode byte 0xff"),
        ("[" * 100_000, "KVShape: expected JSON without repeated names, got 'maximum recursion depth"),
        ('{"batch":1,"batch":2}', "KVShape: expected JSON .*a repeated name among batch, batch"),
        ("[1]", r"KVShape: expected a valid dictionary or instance of KVShape, got \(1,\)"),
    ],
)
def test_what_is_no_json_object_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        KVShape.from_json(text)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_types_are_strict(value: object) -> None:
    with pytest.raises(ContractError, match=r"KVShape\.batch: expected a valid integer"):
        KEY_SHAPE.model_copy(update={"batch": value})


def test_nested_contracts_are_named_where_they_break() -> None:
    text = PROFILE.to_json()
    with pytest.raises(ContractError, match=r"^ProtectedRegions\.raw_layers\.0: expected greater than or equal to 0"):
        type(PROFILE).from_json(text.replace('"raw_layers":[0]', '"raw_layers":[-1]'))
    with pytest.raises(ContractError, match=r"^Profile\.codec\.codec: expected one of 'raw', .*, got 'zip'$"):
        type(PROFILE).from_json(text.replace('"codec":"fib"', '"codec":"zip"'))


def test_errors_carry_their_parts() -> None:
    with pytest.raises(ContractError) as caught:
        KEY_SHAPE.model_copy(update={"batch": 0})
    assert (caught.value.field, caught.value.expected, caught.value.actual) == ("KVShape.batch", "greater than 0", 0)
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)


def test_text_fields_keep_their_characters() -> None:
    record = QuarantineRecord(subject="page", name="Schlüssel 鍵", expected=DIGEST, actual="", reason="x")
    assert '"name":"Schlüssel 鍵"' in record.to_json()
    assert QuarantineRecord.from_json(record.to_json()) == record


def test_lists_are_no_tuples_in_python() -> None:
    with pytest.raises(ContractError, match=r"ProtectedRegions\.raw_layers: expected a valid tuple, got \[0\]"):
        ProtectedRegions(raw_layers=[0])  # type: ignore[arg-type]


def test_counts_fit_in_32_bits() -> None:
    PageGeometry.of(tokens_per_page=2**32 - 1, head_dim=1, vector_nbytes=1)
    with pytest.raises(ContractError, match=r"PageGeometry\.tokens_per_page: expected less than 4294967296"):
        PageGeometry.of(tokens_per_page=2**32, head_dim=1, vector_nbytes=1)
