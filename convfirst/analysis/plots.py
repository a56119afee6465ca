"""Figures of the analysis: the waterline of kernel sequences, and the efficiency gap, as pictures and as a web page.

The web page needs plotly, from the extra `analysis`.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from convfirst.analysis.latency import FAMILIES, Point
from convfirst.analysis.waterline import Waterline

COLOURS = dict(zip(FAMILIES, ("#d62728", "#1f77b4", "#2ca02c", "#8c564b", "#9467bd", "#ff7f0e"), strict=True))
_WATER, _LAND, _BAR = "#9ecae1", "#c7a76c", "#08519c"
_LOWEST = 0.3  # FLOP/byte; kernels without multiply-adds are drawn down to it
_TOP1 = "ImageNet-1K top-1 (%)"
_UNKNOWN = "top-1 not known"


def draw_waterline(sequences: Mapping[str, Waterline], title: str, path: Path) -> None:
    """One panel a kernel sequence: a kernel's width is its least time, its height its operational intensity."""
    longest = 1e3 * max(line.latency_s for line in sequences.values())
    figure, panels = plt.subplots(
        len(sequences), figsize=(10, 1.2 + 2.1 * len(sequences)), sharex=True, layout="constrained", squeeze=False
    )
    for axes, (name, line) in zip(panels[:, 0], sequences.items(), strict=True):
        _draw_sequence(axes, line)
        axes.set_title(
            f"{name}: {len(line.kernels)} kernels, at least {1e3 * line.latency_s:.2f} ms, "
            f"attainable efficiency {line.efficiency:.0%}, {line.share_under_water:.0%} of the time under water",
            fontsize=9,
            loc="left",
        )
        axes.set_xlim(0, longest)
    panels[-1, 0].set_xlabel("least time of the kernels, one after another (ms)")
    handles = [
        Patch(color=_LAND, label="above water: arithmetic binds"),
        Patch(color=_BAR, label="under water: memory binds"),
        Patch(color=_WATER, label="depth: waterline over intensity"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _draw_sequence(axes: Axes, line: Waterline) -> None:
    waterline, start = line.ceilings.waterline, 0.0
    rectangles: dict[str, list[Rectangle]] = {_LAND: [], _BAR: [], _WATER: []}
    for time in line.times:
        width, height = 1e3 * time.attainable_s, max(time.kernel.intensity, _LOWEST)
        rectangles[_BAR if time.under_water else _LAND].append(Rectangle((start, _LOWEST), width, height - _LOWEST))
        if time.under_water:
            rectangles[_WATER].append(Rectangle((start, height), width, waterline - height))
        start += width
    for colour, patches in rectangles.items():  # one artist a colour: hundreds would take long to draw
        axes.add_collection(PatchCollection(patches, color=colour, linewidth=0))
    axes.axhline(waterline, color="black", linewidth=1)
    axes.text(1.0, waterline, f" {waterline:.0f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yscale("log")
    highest = max((kernel.intensity for kernel in line.kernels), default=0)
    axes.set_ylim(_LOWEST, max(4000, 1.5 * highest))
    axes.set_ylabel("FLOP/byte", fontsize=8)


def draw_efficiency_gap(points: Sequence[Point], title: str, path: Path) -> None:
    """Ideal and measured latency of an image over accuracy; a bar between them is the gap.

    A point stands at its published accuracy and, hollow, at that of one's own training run. Models of unknown accuracy
    stand in columns of their own. Those without a measurement show their ideal alone.
    """
    known, unknown = _places(points)
    columns = len({x for _, x in unknown})
    ratios = [max(1.6, 0.8 * columns), 7] if unknown else [7]
    figure, panels = plt.subplots(
        1, len(ratios), figsize=(12, 7), sharey=True, width_ratios=ratios, layout="constrained", squeeze=False
    )
    if unknown:
        aside = panels[0, 0]
        for point, x in unknown:
            _draw_point(aside, x, point, False)
        aside.set_xticks([])
        aside.set_xlim(-0.5, columns - 0.2)
        aside.set_xlabel(_UNKNOWN)
    main = panels[0, -1]
    for point, x, own in known:
        _draw_point(main, x, point, own)
    main.margins(x=0.2)
    main.set_xlabel(_TOP1)
    panels[0, 0].set_ylabel("time of one image in the batch (µs)")
    for axes in panels[0]:
        axes.set_yscale("log")
        axes.grid(axis="y", which="both", alpha=0.2)
    main.legend(handles=_legend(points), fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=10)
    _part_labels(figure)
    _save(figure, path)


def _legend(points: Sequence[Point]) -> list[Line2D]:
    families = [family for family in FAMILIES if any(point.accuracy.family == family for point in points)]
    handles = [Line2D([], [], color=COLOURS[family], marker="s", linestyle="", label=family) for family in families]
    grey = {"color": "grey", "linestyle": ""}
    if any(point.measurement is not None and point.measurement.fused for point in points):
        handles.append(Line2D([], [], marker="D", markersize=5, label="measured, fused blocks", **grey))
    handles.append(Line2D([], [], marker="o", label="measured", **grey))
    if any(point.own is not None for point in points):
        handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="top-1 of our own run", **grey))
    return [*handles, Line2D([], [], marker="_", label="ideal: 2 MACs / peak", **grey)]


def _places(points: Sequence[Point]) -> tuple[list[tuple[Point, float, bool]], list[tuple[Point, float]]]:
    """Where points stand: over accuracy, with whether it is of one's own run; and those of unknown accuracy."""
    known = [(point, point.accuracy.top1, False) for point in points if point.accuracy.top1 is not None]
    known += [(point, point.own.top1, True) for point in points if point.own is not None]
    unknown = [point for point in points if point.accuracy.top1 is None and point.own is None]
    models = list(dict.fromkeys(point.accuracy.model for point in unknown))
    known.sort(key=lambda place: place[1])
    return known, [(point, float(models.index(point.accuracy.model))) for point in unknown]


def _times(point: Point) -> list[float]:
    """The ideal latency and the measured one, where there is one, in microseconds."""
    return [1e6 * seconds for seconds in (point.ideal_s, point.measured_s) if seconds is not None]


def _label(point: Point, own: bool) -> str:
    return point.name + (" (own run)" if own else "")


def _draw_point(axes: Axes, x: float, point: Point, own: bool) -> None:
    colour, ideal = COLOURS[point.accuracy.family], 1e6 * point.ideal_s
    axes.plot(x, ideal, marker="_", color=colour, markersize=12, markeredgewidth=2)
    label, height = _label(point, own), ideal
    if point.measured_s is not None:
        height = 1e6 * point.measured_s
        marker, size = ("D", 5) if point.measurement.fused else ("o", 6)
        axes.plot([x, x], [ideal, height], color=colour, linewidth=3, alpha=0.35, solid_capstyle="butt")
        axes.plot(x, height, marker=marker, color=colour, markersize=size, markerfacecolor="white" if own else colour)
        label += f" {point.efficiency:.0%}"
    text = axes.annotate(label, (x, height), xytext=_OFFSETS[0], textcoords="offset points", fontsize=7, va="center")
    text.set_in_layout(False)  # or the panels would move under labels that have found their places


# From a point to its label, the best first.
_OFFSETS = (
    (8, 0), (-8, 0), (0, 10), (0, -10), (8, 8), (-8, 8), (8, -8), (-8, -8), (8, 16), (-8, 16), (8, -16), (-8, -16),
    (8, 24), (-8, 24), (8, -24), (-8, -24),
)  # fmt: skip


def _part_labels(figure: Figure) -> None:
    """Move each label to where it covers no other label, point or ideal, lies inside its axes and crosses few bars."""
    figure.draw_without_rendering()
    padding = {"o": 4, "D": 4, "_": 2}
    for axes in figure.axes:
        marks = [line for line in axes.lines if line.get_marker() in padding]
        taken = [line.get_window_extent().padded(padding[line.get_marker()]) for line in marks]
        taken += [legend.get_window_extent() for legend in [axes.get_legend()] if legend is not None]
        bars = [line.get_window_extent() for line in axes.lines if len(line.get_xdata()) == 2]
        for label in axes.texts:
            extents = [_move(label, offset) for offset in _OFFSETS]
            best = _clearest(extents, (axes.bbox.x0, axes.bbox.x1), taken, bars)
            taken.append(_move(label, _OFFSETS[best]))


def _move(label: Annotation, offset: tuple[int, int]) -> Bbox:
    """Move a label beside its point; where it then stands."""
    label.xyann = offset
    label.set_horizontalalignment("left" if offset[0] > 0 else "right" if offset[0] < 0 else "center")
    return label.get_window_extent()


def _clearest(boxes: Sequence[Bbox], edges: tuple[float, float], taken: Sequence[Bbox], bars: Sequence[Bbox]) -> int:
    """Which of the boxes lies between the edges and covers nothing taken, early in their order and over few bars."""
    costs = []
    for i, box in enumerate(boxes):
        outside = box.x0 < edges[0] or edges[1] < box.x1
        costs.append(100 * (box.count_overlaps(taken) + outside) + box.count_overlaps(bars) + 0.4 * i)
    return costs.index(min(costs))


def write_efficiency_gap_page(points: Sequence[Point], title: str, path: Path) -> None:
    """The efficiency-gap plot as one HTML file that needs nothing from the network; hovering tells each number.

    Raises:
        ModuleNotFoundError: plotly isn't installed.
    """
    plot = _interactive(points, title).to_html(include_plotlyjs=True, full_html=False, div_id="efficiency-gap")
    head = f'<meta charset="utf-8"><title>{html.escape(title.partition(chr(10))[0])}</title>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{plot}\n</body></html>\n'
    _replace(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def _interactive(points: Sequence[Point], title: str) -> Any:
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the interactive page needs plotly: pip install -e '.[analysis]'") from error
    known, unknown = _places(points)
    places = [(point, x, own, 2) for point, x, own in known] + [(point, x, False, 1) for point, x in unknown]
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.25, 0.75], horizontal_spacing=0.02)
    plane = _Plane(places, [axis.domain for axis in (figure.layout.xaxis, figure.layout.xaxis2)])
    shown: set[str] = set()
    for (point, x, own, column), beside in zip(places, plane.text_positions(places), strict=True):
        label, family, measured = _label(point, own), point.accuracy.family, point.measured_s is not None
        heights = _times(point)
        symbol = ("diamond" if measured and point.measurement.fused else "circle") + ("-open" if own else "")
        figure.add_trace(
            go.Scatter(
                x=[x] * len(heights),
                y=heights,
                mode="lines+markers+text",
                name=family,
                legendgroup=family,
                showlegend=family not in shown,
                line={"color": "rgba({:.0%},{:.0%},{:.0%},0.4)".format(*to_rgb(COLOURS[family])), "width": 4},
                marker={
                    "size": [16, 10][: len(heights)],
                    "symbol": ["line-ew-open", symbol][: len(heights)],
                    "color": COLOURS[family],
                    "line": {"width": 3, "color": COLOURS[family]},
                },
                text=["", label] if measured else [f"\N{NO-BREAK SPACE}{label}\N{NO-BREAK SPACE}"],
                textposition=beside,
                textfont={"size": _FONT},
                cliponaxis=False,
                hovertext=_hover(point, own),
                hoverinfo="text",
            ),
            row=1,
            col=column,
        )
        shown.add(family)
    figure.update_yaxes(type="log", range=plane.log_y)
    figure.update_yaxes(title_text="time of one image in the batch (µs)", col=1)
    figure.update_xaxes(title_text=_TOP1, range=plane.x[1], col=2)
    figure.update_xaxes(title_text=_UNKNOWN, showticklabels=False, range=plane.x[0], col=1)
    heading = {"text": title.replace("\n", "<br>"), "font": {"size": 14}}
    margin = {"l": 80, "r": 150, "t": 80, "b": 60}
    width, height = _PLANE[0] + margin["l"] + margin["r"], _PLANE[1] + margin["t"] + margin["b"]
    figure.update_layout(title=heading, template="plotly_white", width=width, height=height, margin=margin)
    return figure


_PLANE = (1100, 620)  # pixels of the page's plot, both panels
_FONT = 10  # pixels
# The best first.
_POSITIONS = (
    "middle right", "middle left", "top center", "bottom center",
    "top right", "top left", "bottom right", "bottom left",
)  # fmt: skip


def _text_box(middle: tuple[float, float], position: str, text: str, gap: float = 8) -> Bbox:
    """Where a label would stand, in pixels; y upwards."""
    width, height = 0.5 * _FONT * len(text), 1.2 * _FONT
    vertical, horizontal = position.split()
    x = {"left": -gap - width, "center": -width / 2, "right": gap}[horizontal]
    y = {"bottom": -gap - height, "middle": -height / 2, "top": gap}[vertical]
    return Bbox.from_bounds(middle[0] + x, middle[1] + y, width, height)


class _Plane:
    """The page's axes in pixels, to know which labels would cover something."""

    def __init__(
        self, places: Sequence[tuple[Point, float, bool, int]], domains: Sequence[tuple[float, float]]
    ) -> None:
        known = [x for _, x, _, column in places if column == 2] or [0.0]
        unknown = [x for _, x, _, column in places if column == 1]
        times = [time for point, *_ in places for time in _times(point)]
        self.x = ((-0.5, max(unknown, default=0.0) + 0.8), (min(known) - 0.6, max(known) + 1))
        self.log_y = (math.log10(0.7 * min(times)), math.log10(1.4 * max(times)))
        self.domains = domains

    def text_positions(self, places: Sequence[tuple[Point, float, bool, int]]) -> list[str]:
        """For each place plotly's name of where its label stands, with the least covered."""
        marks = [self._pixel(x, time, column) for point, x, _, column in places for time in _times(point)]
        taken = [Bbox.from_bounds(x - 8, y - 7, 16, 14) for x, y in marks]
        lines = [[self._pixel(x, time, column) for time in _times(point)] for point, x, _, column in places]
        bars = [Bbox([ends[0], ends[-1]]).padded(2, 0) for ends in lines]
        chosen = []
        for point, x, own, column in places:
            middle = self._pixel(x, max(_times(point)), column)
            boxes = [_text_box(middle, position, _label(point, own)) for position in _POSITIONS]
            left, right = (_PLANE[0] * edge for edge in self.domains[column - 1])
            best = _clearest(boxes, (left, right), taken, bars)
            taken.append(boxes[best])
            chosen.append(_POSITIONS[best])
        return chosen

    def _pixel(self, x: float, time: float, column: int) -> tuple[float, float]:
        (low, high), (left, right) = self.x[column - 1], self.domains[column - 1]
        bottom, top = self.log_y
        across = left + (right - left) * (x - low) / (high - low)
        return _PLANE[0] * across, _PLANE[1] * (math.log10(time) - bottom) / (top - bottom)


def _hover(point: Point, own: bool) -> str:
    accuracy = point.accuracy
    lines = [f"<b>{_label(point, own)}</b>, {accuracy.image_size} px, {point.macs / 1e9:.2f} GMACs"]
    if own:
        lines.append(f"top-1 {point.own.top1:.2f} %, our own run: {point.own.source}")
    if accuracy.top1 is not None:
        lines.append(f"top-1 {accuracy.top1:.1f} % as published: {accuracy.source}")
    elif not own:
        lines.append("top-1 not known")
    lines.append(f"ideal {1e6 * point.ideal_s:.1f} µs at {point.peak_flops / 1e12:.0f} TFLOP/s")
    if point.measurement is None:
        return "<br>".join([*lines, "not measured"])
    how = f"batch {point.measurement.batch}, {point.measurement.dtype}, {point.measurement.path}"
    lines.append(f"measured {1e6 * point.measured_s:.1f} µs ({how}): {point.measurement.source}")
    lines.append(f"efficiency {point.efficiency:.1%}, gap {1e6 * (point.measured_s - point.ideal_s):.1f} µs")
    return "<br>".join(lines)


def draw_lines(lines: Mapping[str, Mapping[float, float]], x: str, y: str, title: str, path: Path) -> None:
    """A line for each name through its {x: y}, with x doubling from tick to tick."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in lines.items():
        axes.plot(list(values), list(values.values()), marker="o", label=name)
    ticks = sorted({place for values in lines.values() for place in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    _replace(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)


def _replace(path: Path, write) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
