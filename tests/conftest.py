"""For all tests: Triton kernels run in Triton's interpreter, on the CPU. Read when triton is imported, so set here."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
