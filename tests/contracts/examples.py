"""One valid instance of every contract of rank 0, and what the tests share."""

from fibkv.allocation import HeadAllocation, KltParameters
from fibkv.contract import Contract
from fibkv.ladder import Ladder
from fibkv.parameters import (
    AffineParameters,
    FibParameters,
    Fp8Parameters,
    Int8Parameters,
    RawParameters,
    TrellisParameters,
)
from fibkv.policy import Decision, Plan, Policy, Run
from fibkv.pool_stats import PoolStats, RungStats
from fibkv.pressure import PressureConfig, PressureState
from fibkv.profile import Profile
from fibkv.quarantine import Admission, QuarantineRecord
from fibkv.receipt import Receipt
from fibkv.regions import FallbackSettings, PageGeometry, ProtectedRegions, QualityBudget
from fibkv.report import BudgetViolation, CacheReport, LayerReport
from fibkv.shape import KVShape
from fibkv.timing import Timing
from fibkv.training_settings import TrainingSettings
from fibkv.trials import SpaceTrial

DIGEST = "blake3:" + "0123456789abcdef" * 4
OTHER_DIGEST = "blake3:" + "fedcba9876543210" * 4

KEY_SHAPE = KVShape(
    role="key",
    attention_kind="gqa",
    batch=1,
    layers=2,
    kv_heads=2,
    query_heads=8,
    tokens=16,
    head_dim=64,
    dtype="f16",
    rope_state="post_rope",
)
VALUE_SHAPE = KEY_SHAPE.model_copy(update={"role": "value", "rope_state": "not_applicable"})
FIB = FibParameters.of(64, 2, 256)
KLT = KltParameters(head_dim=4, heads=(HeadAllocation(bits=(8, 2), half_octaves=(0, 5)),))
PROFILE = Profile.bind(
    KEY_SHAPE,
    FIB,
    profile_id="house keys",
    axis="per_token",
    geometry=PageGeometry.of(tokens_per_page=8, head_dim=64, vector_nbytes=33),
    rotation_digest=DIGEST,
    codebook_digest=OTHER_DIGEST,
    protected=ProtectedRegions(first_tokens_raw=1, last_tokens_raw=2, raw_layers=(0,), raw_heads=(1,)),
    budget=QualityBudget(max_logit_mse=0.5),
)
COMPRESS_RECEIPT = Receipt(
    operation="compress",
    source_digest=DIGEST,
    shape_digest=KEY_SHAPE.digest(),
    profile_digest=PROFILE.digest(),
    codebook_digest=OTHER_DIGEST,
    rotation_digest=DIGEST,
    page_digests=(DIGEST, OTHER_DIGEST),
    num_pages=2,
    compressed_vectors=60,
    raw_vectors=4,
    raw_nbytes=64 * 128,
    encoded_nbytes=60 * 33 + 4 * 128,
    raw_reasons=(("not_encodable", 1), ("protected_region", 3)),
    seconds=0.25,
)
DECISION = Decision(action="compress", axis="per_channel", reasons=("key_role_axis",))
RUN = Run(layers=(0, 2), heads=(0, 2), tokens=(0, 16), decision=DECISION)

LAYER_REPORT = LayerReport(
    layer=0,
    kind="CompressedLayer",
    compressed=True,
    reason="keys fib4, values fib4",
    tokens=16,
    pages=1,
    elements=4096,
    nbytes=2300,
    raw_vectors=(("protected_region", 8),),
    tail_tokens=2,
)

VIOLATION = BudgetViolation(
    layer=1, head=0, role="key", profile="fib2", bound="max_attention_tv", allowed=0.1, measured=0.2
)

PRESSURE = PressureState(level="q8", pressure=0.5, samples=3, upgrades=1, downgrades=0)
RUNG = RungStats(rung="q8", pages=2, nbytes=300)
EXAMPLES: list[Contract] = [
    KEY_SHAPE,
    RawParameters(head_dim=64, dtype="bf16"),
    Int8Parameters(head_dim=64),
    Fp8Parameters(head_dim=64),
    AffineParameters(head_dim=64, bits=3, group=16),
    FIB,
    TrellisParameters.of(64, 2),
    KLT,
    KLT.heads[0],
    TrainingSettings(head_dim=64),
    PROFILE.protected,
    FallbackSettings(),
    PROFILE.budget,
    PROFILE.geometry,
    PROFILE,
    Policy.role_aware_baseline(),
    DECISION,
    RUN,
    Plan(shape=KEY_SHAPE, runs=(RUN,)),
    PressureConfig(),
    PRESSURE,
    Ladder(q2=(FIB, "fib2")),
    SpaceTrial(profile="key2", space="balanced", kl=0.125),
    RUNG,
    PoolStats(
        budget=1000,
        allocated=600,
        slack=64,
        peak=700,
        claimed=10,
        tables=22,
        rungs=(RUNG,),
        shared_pages=1,
        layers=4,
        pressure=PRESSURE,
        recoded_pages=2,
        recoding_seconds=0.5,
        longest_step_seconds=0.25,
        refusals=0,
        damaged_pages=0,
    ),
    QuarantineRecord(subject="page", name="3", expected=DIGEST, actual=OTHER_DIGEST, reason="digest mismatch"),
    Admission(action="admit", reason=""),
    COMPRESS_RECEIPT,
    LAYER_REPORT,
    CacheReport(layers=(LAYER_REPORT,), tables_nbytes=100, budget_violations=(VIOLATION,)),
    VIOLATION,
    Timing.of([[0.25, 0.5], [0.75]]),
]
