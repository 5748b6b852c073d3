"""Figures of matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fibkv.errors import FibkvError

# Where a label may stand beside its point, in points: behind it, below, before it, and then further away.
_PLACES = [
    (side * (5 + 3 * far), height, align)
    for far in range(8)
    for height in (0, -4 - 7 * far, 4 + 7 * far)
    for side, align in ((1, "left"), (-1, "right"))
]


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


def label_points(axes: Any, titles: Mapping[tuple[float, float], str], size: float) -> None:
    """Writes titles beside their points, where neither another title nor a point is; the axes must be complete.

    Args:
        axes: of a figure of `new_figure`.
        titles: by point.
        size: of the letters, in points.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # what follows is measured on the figure as it is laid out
    where = axes.transData.transform(list(titles))
    taken: list[Any] = []
    for (point, title), here in zip(titles.items(), where, strict=True):
        for x, y, align in _PLACES:
            label = axes.annotate(
                title, point, xytext=(x, y), textcoords="offset points", ha=align, va="center", fontsize=size
            )
            box = label.get_window_extent()
            others = (other for other in where if other is not here)
            if not box.count_overlaps(taken) and not any(box.contains(*other) for other in others):
                taken.append(box)
                break
            label.remove()
        else:
            axes.annotate(title, point, xytext=(5, 0), textcoords="offset points", va="center", fontsize=size)
