"""The conditions of a measurement: what machine, what software, how busy."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

import torch

from fibkv import kernels
from fibkv.contract import Contract, Count, Total
from fibkv.kernels.native_sides import extension

PACKAGES = ("fibkv", "torch", "transformers", "optimum-quanto", "hqq")
"""Packages whose versions decide figures."""


class Conditions(Contract):
    """What has to be said beside every figure of speed.

    Attributes:
        cpu: its model.
        cores: logical cores that this process may run on.
        last_level_cache: bytes, as the operating system reports them; None if it does not.
        available_memory: bytes that were free at the start, a container's limit considered.
        threads: CPU threads of torch.
        instruction_set: that torch uses.
        kernels: implementations of fibkv's kernels, each with "yes" or the reason why not.
        packages: names with their versions.
        started: UTC, ISO 8601.
        load_average: of the last 1, 5 and 15 minutes at the start; None where there is no such thing.
        command: line that started the process.
    """

    cpu: str
    cores: Count
    last_level_cache: Total | None
    available_memory: Total
    threads: Count
    instruction_set: str
    kernels: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]
    started: str
    load_average: tuple[float, float, float] | None
    command: str

    @classmethod
    def now(cls, num_threads: int) -> Self:
        """The conditions at this moment, for a measurement with that many threads."""
        return cls(
            cpu=_cpu(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            last_level_cache=last_level_cache(),
            available_memory=available_memory(),
            threads=num_threads,
            instruction_set=torch.backends.cpu.get_cpu_capability(),
            kernels=tuple(_kernel_states().items()),
            packages=tuple((name, found) for name in PACKAGES if (found := _version(name)) is not None),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
            command=shlex.join(["fibkv", *sys.argv[1:]]),
        )


def _kernel_states() -> dict[str, str]:
    states = kernels.available()
    # Compilers without OpenMP make kernels that do not share their work.
    alone = extension is not None and not extension.HAS_THREADS
    return {name: f"{state}, on one thread" if alone and "native" in name else state for name, state in states.items()}


def last_level_cache(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Bytes of the last-level cache that core 0 uses, or None if the operating system does not say."""
    found = [
        (int(_line(index / "level")), _line(index / "size"))
        for index in caches.glob("index*")
        if (index / "size").exists()
    ]
    return int(max(found)[1].removesuffix("K")) * 1024 if found else None


def available_memory(meminfo: Path = Path("/proc/meminfo"), control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be used: what the machine has, or a container's limit if that is less.

    Where the operating system says neither, half of the physical memory.
    """
    rooms = []
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        rooms.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, used = control_group / "memory.max", control_group / "memory.current"
    if limit.exists() and used.exists() and _line(limit) != "max":
        rooms.append(max(0, int(_line(limit)) - int(_line(used))))
    return min(rooms) if rooms else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def process_nbytes(status: Path = Path("/proc/self/status")) -> int:
    """Anonymous memory of this process that exists, as the kernel counts it; 0 where it does not say."""
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(path: Path) -> str:
    return path.read_text().strip()
