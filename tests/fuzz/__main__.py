"""Coverage-guided fuzzing of every parser with atheris: `python -m tests.fuzz [--seconds 60] [--part 0/2] [NAME...]`.

Parts share the targets out among processes. What makes a parser fail otherwise than it may is written to `--failures`
(the current directory by default) as `TARGET-DIGEST`, and belongs into tests/fuzz/crashers once it is understood.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import resource
import sys
import tempfile
from pathlib import Path

# Beyond what the process has when it starts: what a parser may allocate is far below.
SPARE_NBYTES = 2 << 30
MAX_LENGTH = 1 << 16


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("names", nargs="*", help="of targets, or their beginnings; default all")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--seed", type=int, default=0, help="0 = another one each time")
    parser.add_argument("--failures", type=Path, default=Path())
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("fuzzing: skipped, atheris is not installed; it has wheels for few versions of Python")
        return
    import atheris  # noqa: PLC0415 - optional

    with atheris.instrument_imports(include=["fibkv"], enable_loader_override=False):
        from tests.fuzz.check import check  # noqa: PLC0415 - it imports what is to be instrumented
        from tests.fuzz.mutations import mutate  # noqa: PLC0415
        from tests.fuzz.targets import NAMES, target  # noqa: PLC0415

    part, parts = map(int, options.part.split("/"))
    chosen = [name for name in NAMES if not options.names or name.startswith(tuple(options.names))][part::parts]
    limit_memory()

    def one_input(data: bytes) -> None:
        if data:
            name = chosen[data[0] % len(chosen)]
            check(name, data[1:], options.failures)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        first = data[:1] or b"\0"
        form = target(chosen[first[0] % len(chosen)]).form
        changed = mutate(form, data[1:], rng, lambda some: bytes(atheris.Mutate(some, max(1, max_size - 1))))
        return first + changed[: max_size - 1]

    with tempfile.TemporaryDirectory() as corpus:
        for index, name in enumerate(chosen):
            Path(corpus, name).write_bytes(bytes([index]) + target(name).seed)
        arguments = [sys.argv[0], f"-max_total_time={options.seconds}", f"-max_len={MAX_LENGTH}"]
        # Failures are written by `check`, under the name of their target.
        arguments += [f"-artifact_prefix={corpus}/", "-rss_limit_mb=0", "-verbosity=0", "-print_final_stats=1"]
        arguments += [f"-seed={options.seed}", corpus]
        print(f"fuzzing {len(chosen)} targets for {options.seconds} s: {', '.join(chosen)}", flush=True)
        atheris.Setup(arguments, one_input, custom_mutator=mutator)
        atheris.Fuzz()


def limit_memory() -> None:
    """Makes large allocations errors, those of torch too, which nobody else counts."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
