from typing import Any

import pytest

from fibkv.errors import ContractError, DigestMismatch
from fibkv.parameters import FibParameters, Int8Parameters, RawParameters
from fibkv.profile import MISSING_CALIBRATION, Profile
from fibkv.regions import FallbackSettings, PageGeometry, ProtectedRegions, QualityBudget

from .examples import DIGEST, FIB, KEY_SHAPE, OTHER_DIGEST, PROFILE, VALUE_SHAPE

IN_USE: dict[str, Any] = {
    "rotation_digest": DIGEST,
    "codebook_digest": OTHER_DIGEST,
    "vector_nbytes": 33,
}


def test_bound_profile_passes_its_own_checks() -> None:
    PROFILE.check_binding(KEY_SHAPE, **IN_USE)
    assert PROFILE.role == "key"
    assert PROFILE.shape_digest == KEY_SHAPE.digest()
    assert PROFILE.codec_digest == FIB.digest()
    assert PROFILE.block_dim == 2


def test_bind_defaults_are_conservative() -> None:
    profile = Profile.bind(
        VALUE_SHAPE,
        Int8Parameters(head_dim=64),
        profile_id="q8",
        axis="per_token",
        geometry=PageGeometry.of(8, 64, 66),
        rotation_digest="none:int8",
        codebook_digest="none:int8",
    )
    assert profile.protected == ProtectedRegions()
    assert profile.fallback == FallbackSettings(mode="keep_raw", raw_available=True)
    assert profile.budget == QualityBudget.unavailable()
    assert profile.calibration_digest == MISSING_CALIBRATION == "missing:calibration"
    assert not profile.is_calibrated
    assert profile.model_copy(update={"calibration_digest": DIGEST}).is_calibrated


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profile_id": ""}, r"profile_id: expected"),
        ({"profile_version": 0}, r"profile_version: expected greater than 0"),
        ({"shape_digest": "blake3:12"}, r"shape_digest: expected a text like \^blake3"),
        ({"shape_digest": DIGEST + "\n"}, r"shape_digest: expected a text like \^blake3"),
        ({"codebook_digest": ""}, r"codebook_digest: expected a text like"),
        ({"rotation_digest": "none:"}, r"rotation_digest: expected a text like"),
        ({"calibration_digest": "missing"}, r"calibration_digest: expected a text like .*missing:calibration"),
        ({"axis": "diagonal"}, r"axis: expected 'raw', 'per_token', 'per_channel' or 'role_aware_kivi_style'"),
        ({"axis": "raw"}, r"axis: expected an axis that compresses for codec fib, got 'raw'"),
        ({"codec": RawParameters(head_dim=64, dtype="f16")}, r"axis: expected raw for codec raw, got 'per_token'"),
    ],
)
def test_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=rf"^Profile\.{message}"):
        PROFILE.model_copy(update=fields)


def bound(**fields: object) -> Profile:
    return PROFILE.model_copy(update=fields)


WIDE = KEY_SHAPE.model_copy(update={"head_dim": 128})
ODD = KEY_SHAPE.model_copy(update={"head_dim": 63})
# In the order of the checks: a profile, a shape and objects in use that break one rule.
BROKEN: list[tuple[Profile, Any, dict[str, Any], type[ContractError], str]] = [
    (PROFILE, ODD, {}, ContractError, "block_dim: expected a positive divisor of head_dim 63, got 2"),
    (
        PROFILE,
        KEY_SHAPE.with_tokens(17),
        {},
        DigestMismatch,
        r"Profile\.shape_digest: digest mismatch: expected blake3",
    ),
    (bound(role="value"), KEY_SHAPE, {}, ContractError, r"Profile\.role: expected key of the shape, got 'value'"),
    (
        bound(shape_digest=WIDE.digest()),
        WIDE,
        {},
        ContractError,
        r"Profile\.codec\.head_dim: expected 128 of the shape, got 64",
    ),
    (
        bound(codec_digest=DIGEST),
        KEY_SHAPE,
        {},
        DigestMismatch,
        rf"Profile\.codec_digest: digest mismatch: expected {DIGEST}, got {FIB.digest()}",
    ),
    (
        PROFILE,
        KEY_SHAPE,
        {"rotation_digest": OTHER_DIGEST},
        DigestMismatch,
        rf"Profile\.rotation_digest: digest mismatch: expected {DIGEST}, got {OTHER_DIGEST}",
    ),
    (
        PROFILE,
        KEY_SHAPE,
        {"codebook_digest": ""},
        DigestMismatch,
        rf"Profile\.codebook_digest: digest mismatch: expected {OTHER_DIGEST}, got $",
    ),
    (
        PROFILE,
        KEY_SHAPE,
        {"vector_nbytes": 34},
        ContractError,
        r"PageGeometry\.encoded_block_bytes: expected 34 bytes of the codec, got 33",
    ),
    (
        bound(protected=ProtectedRegions(raw_layers=(2,))),
        KEY_SHAPE,
        {},
        ContractError,
        r"ProtectedRegions\.raw_layers: expected layers below 2, got 2",
    ),
]


@pytest.mark.parametrize(("profile", "shape", "in_use", "error", "message"), BROKEN)
def test_binding_refusals(
    profile: Profile, shape: Any, in_use: dict[str, Any], error: type[ContractError], message: str
) -> None:
    with pytest.raises(ContractError, match=f"^{message}") as caught:
        profile.check_binding(shape, **{**IN_USE, **in_use})
    assert type(caught.value) is error


# Changes of profile and use that break the rules from the given one on, so that order is seen.
LAYERED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Profile.shape_digest", {"shape_digest": DIGEST}, {}),
    ("Profile.role", {"role": "value"}, {}),
    ("Profile.codec.head_dim", {"codec": FibParameters.of(128, 2, 256)}, {}),
    ("Profile.codec_digest", {"codec_digest": DIGEST}, {}),
    ("Profile.rotation_digest", {}, {"rotation_digest": OTHER_DIGEST}),
    ("Profile.codebook_digest", {}, {"codebook_digest": DIGEST}),
    ("PageGeometry.tokens_per_page", {"geometry": PageGeometry.of(17, 64, 33)}, {}),
    ("ProtectedRegions.first_tokens_raw", {"protected": ProtectedRegions(first_tokens_raw=17)}, {}),
]


@pytest.mark.parametrize("first", range(len(LAYERED)))
def test_checks_come_in_the_order_of_the_contract(first: int) -> None:
    fields: dict[str, Any] = {}
    in_use = dict(IN_USE)
    for _, field, use in LAYERED[first:]:
        fields |= field
        in_use |= use
    with pytest.raises(ContractError) as caught:
        bound(**fields).check_binding(KEY_SHAPE, **in_use)
    assert caught.value.field == LAYERED[first][0]


def test_bind_refuses_what_does_not_fit() -> None:
    with pytest.raises(ContractError, match=r"PageGeometry\.tokens_per_page: expected at most 16 tokens, got 32"):
        Profile.bind(
            KEY_SHAPE,
            FIB,
            profile_id="long pages",
            axis="per_token",
            geometry=PageGeometry.of(32, 64, 33),
            rotation_digest=DIGEST,
            codebook_digest=OTHER_DIGEST,
        )
