"""Pictures: labels of the efficiency gap, heights of the waterline."""

import matplotlib.pyplot as plt
import pytest

from convfirst.analysis import Kernel, Waterline
from convfirst.analysis.devices import Ceilings
from convfirst.analysis.latency import Accuracy, Measurement, Point
from convfirst.analysis.plots import draw_efficiency_gap, draw_waterline


def point(model: str, top1: float | None, ms: float) -> Point:
    measured = Measurement(model, 224, 128, "float16", ms, "inductor+graph", "a test")
    return Point(Accuracy(model, "ResNet", 224, top1, "a test"), 4 * 10**9, 989e12, measured)


def test_labels_stand_apart_and_inside(tmp_path, monkeypatch):
    """Of models that lie close together, at the edge, and of unknown accuracy."""
    points = [point(f"a_model_of_long_name_{i}", 82 + 0.05 * i, 4 + 0.5 * i) for i in range(3)]
    points += [point("at_the_edge", 84, 9), point("unknown", None, 4), point("unknown_too", None, 4.1)]
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)  # keep what is saved and closed
    draw_efficiency_gap(points, "title", tmp_path / "gap.png")
    (figure,) = figures
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [text.get_window_extent() for text in axes.texts]
        for i, label in enumerate(labels):
            assert label.count_overlaps(labels[:i]) == 0
            assert axes.bbox.x0 <= label.x0 and label.x1 <= axes.bbox.x1
    assert sum(len(axes.texts) for axes in figure.axes) == len(points)


@pytest.mark.parametrize("intensity, top", [(100, 4000), (20_000, 30_000)])
def test_no_kernel_is_cut_off(tmp_path, monkeypatch, intensity, top):
    kernel = Kernel("a", intensity * 50, read_bytes=60, write_bytes=40, weight_bytes=0, block=None)
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    line = Waterline([kernel], Ceilings(1e12, 1e10, "measured", "a test"))
    draw_waterline({"one": line}, "title", tmp_path / "waterline.png")
    assert figures[0].axes[0].get_ylim()[1] == pytest.approx(top)
