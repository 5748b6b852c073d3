"""Figures of matplotlib, which is an optional extra."""

from __future__ import annotations

from typing import Any

from fibkv.errors import FibkvError


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib; its ``savefig`` takes the format from the file's suffix.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        FibkvError: matplotlib is not installed.
    """
    try:
        # Not at the top: matplotlib is an optional extra.
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise FibkvError("plots need matplotlib: pip install 'fibkv[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
