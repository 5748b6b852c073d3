"""Quarantine: objects whose digest is not the expected one are set aside, reported, and never decoded."""

from __future__ import annotations

from threading import Lock
from typing import Literal

from fibkv.contract import Contract
from fibkv.errors import ContractError

Subject = Literal["page", "codebook", "profile", "calibration"]


class QuarantineRecord(Contract):
    """What was set aside, and why."""

    subject: Subject
    name: str
    expected: str
    actual: str
    reason: str


class Admission(Contract):
    """Whether an object may be used; ``reason`` is empty where it may."""

    action: Literal["admit", "quarantine"]
    reason: str


_ADMITTED = Admission(action="admit", reason="")


class Quarantine:
    """Register of objects that were set aside. Safe to use from many threads.

    What is set aside stays so under its name, even if the right digest turns up later, until it is released.
    """

    def __init__(self) -> None:
        self._records: dict[tuple[Subject, str], QuarantineRecord] = {}
        self._lock = Lock()

    def __getstate__(self) -> dict[tuple[Subject, str], QuarantineRecord]:
        return dict(self._records)

    def __setstate__(self, records: dict[tuple[Subject, str], QuarantineRecord]) -> None:
        self._records, self._lock = records, Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> Quarantine:
        return self  # copies of a cache share their pages, and so what is known of them

    def admit(self, subject: Subject, name: str, expected: str, actual: str) -> Admission:
        """Admits an object whose digest is the expected one, and sets any other aside.

        Args:
            subject: kind of the object.
            name: of the object among its kind.
            expected: the digest that its user expects.
            actual: the digest that it has.
        """
        with self._lock:
            # The first record stays: it tells why the object was set aside.
            record = self._records.get((subject, name))
            if record is None and expected != actual:
                reason = f"{subject} {name}: digest mismatch: expected {expected}, got {actual}"
                record = QuarantineRecord(subject=subject, name=name, expected=expected, actual=actual, reason=reason)
                self._records[subject, name] = record
        return _ADMITTED if record is None else Admission(action="quarantine", reason=record.reason)

    def release(self, subject: Subject, name: str) -> QuarantineRecord:
        """Forgets an object that was replaced by a sound one, and returns why it had been set aside.

        Raises:
            ContractError: it is not in quarantine.
        """
        with self._lock:
            record = self._records.pop((subject, name), None)
        if record is None:
            raise ContractError("Quarantine.release", "an object in quarantine", f"{subject} {name}")
        return record

    def is_quarantined(self, subject: Subject, name: str) -> bool:
        """Whether the object is set aside."""
        return (subject, name) in self._records

    @property
    def is_empty(self) -> bool:
        """Whether nothing is set aside."""
        return not self._records

    @property
    def records(self) -> tuple[QuarantineRecord, ...]:
        """What is set aside, in the order in which it was."""
        with self._lock:
            return tuple(self._records.values())
