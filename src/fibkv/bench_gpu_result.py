"""What `fibkv bench gpu` finds: plain data with a JSON form. Figures stand behind checks."""

from __future__ import annotations

from typing import Literal

from fibkv.bench_result import Checks
from fibkv.bench_settings import GpuSettings
from fibkv.contract import Contract, Count, Total
from fibkv.kernels.triton_tuning import Tunings
from fibkv.machine import Conditions
from fibkv.timing import Timing


class GpuFigures(Contract):
    """How fast one contender is at one size.

    Attributes:
        called: seconds on the device from the first to the last kernel of a call from Python.
        replayed: the same of a CUDA graph of that call, without the time in which Python launches; None on a CPU.
        gigabytes_per_second: bytes that must be read over the median of `best`.
        speedup: over the strongest baseline of the same size, median of per-round ratios of `best`; None where no
            baseline passed its checks.
    """

    called: Timing
    replayed: Timing | None
    gigabytes_per_second: float
    speedup: float | None

    @property
    def best(self) -> Timing:
        """The faster of the two: of kernels the replayed one, which a server that captures its steps gets."""
        if self.replayed is None:
            return self.called
        return min(self.called, self.replayed, key=lambda timing: timing.median)


class GpuRow(Contract):
    """One contender at one size.

    Attributes:
        name: of the contender.
        kind: a torch baseline on dense bfloat16, a plain copy of the dense bytes, or attention on codes.
        head_dim: d.
        batch: rows.
        context: cached tokens of each row.
        nbytes: of keys and values as they are stored.
        bytes_per_element: the same over elements.
        checks: their outcome; None for the copy.
        figures: None if the checks failed.
    """

    name: str
    kind: Literal["baseline", "copy", "fibkv"]
    head_dim: Count
    batch: Count
    context: Count
    nbytes: Total
    bytes_per_element: float
    checks: Checks | None
    figures: GpuFigures | None


class GpuResult(Contract):
    """All figures of one run.

    Attributes:
        settings: what was asked for.
        conditions: machine, software, load.
        device: name of the device.
        cuda: whether pages were read in CUDA C++ where it reads them, "yes", or why not.
        tunings: how attention was launched there in Triton.
        first_calls: seconds of the first call of each profile and head_dim, the compilation of its kernels included.
        rows: size by size, baselines first.
        seconds: duration of the run.
    """

    settings: GpuSettings
    conditions: Conditions
    device: str
    cuda: str
    tunings: Tunings
    first_calls: tuple[tuple[str, float], ...]
    rows: tuple[GpuRow, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every contender passed its checks."""
        return all(row.checks is None or row.checks.passed for row in self.rows)
