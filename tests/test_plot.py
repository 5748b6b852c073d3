"""Labels of plots stand beside their points, not on one another."""

from __future__ import annotations

import pytest

from fibkv.plot import label_points, new_figure

pytest.importorskip("matplotlib")


def test_labels_avoid_one_another_and_the_points() -> None:
    """Also where points all but coincide."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    points = [(1.0, 1.0), (1.0, 1.01), (1.01, 1.0), (1.5, 1.0), (1.52, 1.0), (2.0, 2.0)]
    axes.plot(*zip(*points, strict=True), "o")
    axes.set_yscale("log")
    label_points(axes, {point: f"a rather long title {index}" for index, point in enumerate(points)}, size=7)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.texts]
    assert [label.get_text()[-1] for label in axes.texts] == list("012345")
    assert all(not box.count_overlaps(boxes[:index]) for index, box in enumerate(boxes))
    assert not any(box.contains(*place) for place in axes.transData.transform(points) for box in boxes)


def test_what_finds_no_free_place_is_written_all_the_same() -> None:
    axes = new_figure(1, 1).add_subplot()
    points = [(float(index % 5), float(index // 5)) for index in range(25)]
    axes.plot(*zip(*points, strict=True), "o")
    label_points(axes, dict.fromkeys(points, "a title as wide as the figure is"), size=10)
    assert len(axes.texts) == len(points)
