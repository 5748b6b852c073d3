import threading

import pytest

from fibkv.errors import ContractError
from fibkv.policy import Action
from fibkv.quarantine import Admission, Quarantine, Subject

from .examples import DIGEST, OTHER_DIGEST


def test_equal_digests_are_admitted() -> None:
    quarantine = Quarantine()
    assert quarantine.admit("page", "7", DIGEST, DIGEST) == Admission(action="admit", reason="")
    assert quarantine.records == ()
    assert not quarantine.is_quarantined("page", "7")


@pytest.mark.parametrize("subject", ["page", "codebook", "profile", "calibration"])
def test_any_other_digest_sets_the_object_aside(subject: Subject) -> None:
    quarantine = Quarantine()
    admission = quarantine.admit(subject, "7", DIGEST, OTHER_DIGEST)
    action: Action = "quarantine"
    assert admission.action == action
    assert admission.reason == f"{subject} 7: digest mismatch: expected {DIGEST}, got {OTHER_DIGEST}"
    assert quarantine.is_quarantined(subject, "7")
    (record,) = quarantine.records
    assert record.model_dump() == {
        "subject": subject,
        "name": "7",
        "expected": DIGEST,
        "actual": OTHER_DIGEST,
        "reason": admission.reason,
    }


def test_subjects_and_names_are_apart() -> None:
    quarantine = Quarantine()
    quarantine.admit("page", "7", DIGEST, OTHER_DIGEST)
    assert not quarantine.is_quarantined("page", "8")
    assert not quarantine.is_quarantined("codebook", "7")
    assert quarantine.admit("codebook", "7", DIGEST, DIGEST).action == "admit"


def test_set_aside_stays_set_aside_for_its_first_reason() -> None:
    quarantine = Quarantine()
    first = quarantine.admit("page", "7", DIGEST, OTHER_DIGEST)
    assert quarantine.admit("page", "7", DIGEST, "blake3:00") == first
    assert quarantine.admit("page", "7", DIGEST, DIGEST) == first
    assert len(quarantine.records) == 1


def test_release() -> None:
    quarantine = Quarantine()
    quarantine.admit("page", "7", DIGEST, OTHER_DIGEST)
    assert quarantine.release("page", "7").actual == OTHER_DIGEST
    assert quarantine.admit("page", "7", DIGEST, DIGEST).action == "admit"
    with pytest.raises(ContractError, match=r"^Quarantine\.release: expected an object in quarantine, got 'page 7'$"):
        quarantine.release("page", "7")


def test_unknown_subject_is_refused() -> None:
    with pytest.raises(ContractError, match=r"QuarantineRecord\.subject: expected 'page', .*, got 'tensor'"):
        Quarantine().admit("tensor", "7", DIGEST, OTHER_DIGEST)  # type: ignore[arg-type]


def test_many_threads_make_one_record_per_object() -> None:
    quarantine = Quarantine()
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for name in range(50):
            quarantine.admit("page", str(name), DIGEST, f"blake3:{number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(record.name) for record in quarantine.records) == list(range(50))
