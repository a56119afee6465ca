"""Pictures: points and labels of the efficiency gap, heights of the waterline."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from convfirst.analysis import Kernel, Waterline
from convfirst.analysis.devices import Ceilings
from convfirst.analysis.latency import Accuracy, Measurement, Point
from convfirst.analysis.plots import draw_efficiency_gap, draw_waterline


def point(model: str, top1: float | None, ms: float, fused: bool = False, own: float | None = None) -> Point:
    measured = Measurement(model, 224, 128, "float16", ms, "inductor+graph", "a test", fused)
    run = None if own is None else Accuracy(model, "ResNet", 224, own, "a run")
    return Point(Accuracy(model, "ResNet", 224, top1, "a test"), 4 * 10**9, 989e12, measured, run)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that gives the figure of points."""

    def draw(points: list[Point]) -> Figure:
        figures = []
        monkeypatch.setattr(plt, "close", figures.append)  # keep what is saved and closed
        draw_efficiency_gap(points, "title", tmp_path / "gap.png")
        (figure,) = figures
        figure.draw_without_rendering()
        return figure

    return draw


def test_labels_stand_apart_and_inside(drawn):
    """Of models that lie close together, at the edge, and of unknown accuracy."""
    points = [point(f"a_model_of_long_name_{i}", 82 + 0.05 * i, 4 + 0.5 * i) for i in range(3)]
    points += [point("at_the_edge", 84, 9), point("unknown", None, 4), point("unknown_too", None, 4.1)]
    figure = drawn(points)
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


def test_a_model_stands_once_for_each_way_and_at_its_own_run(drawn):
    """Fused and not over the published accuracy, both again, hollow, over that of the own run; none without either."""
    points = [point("a", 82.0, 2, fused=True, own=81.0), point("a", 82.0, 6, own=81.0)]
    points += [point("b", None, 1.5, fused=True), point("b", None, 5), point("c", None, 3)]
    aside, main = drawn(points).axes
    assert main.get_xlabel() == "ImageNet-1K top-1 (%)" and aside.get_xlabel() == "top-1 not known"
    names = {text.get_text().rpartition(" ")[0]: text.xy[0] for text in main.texts}
    assert names == {"a, fused": 82.0, "a": 82.0, "a, fused (own run)": 81.0, "a (own run)": 81.0}
    assert [text.xy[0] for text in aside.texts] == [0, 0, 1]  # one column a model
    marks = [line for line in main.lines if line.get_marker() in "oD"]
    assert {(line.get_marker(), *line.get_xdata(), line.get_markerfacecolor() == "white") for line in marks} == {
        ("D", 82.0, False), ("o", 82.0, False), ("D", 81.0, True), ("o", 81.0, True),
    }  # fmt: skip
    legend = [text.get_text() for text in main.get_legend().get_texts()]
    assert legend == ["ResNet", "measured, fused blocks", "measured", "top-1 of our own run", "ideal: 2 MACs / peak"]
