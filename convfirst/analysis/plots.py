"""Figures of the analysis: the waterline of kernel sequences, and the efficiency gap, as pictures and as a web page.

The web page needs plotly, from the extra `analysis`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from convfirst.analysis.latency import FAMILIES, Point
from convfirst.analysis.waterline import Waterline

COLOURS = dict(zip(FAMILIES, ("#d62728", "#1f77b4", "#2ca02c", "#8c564b", "#9467bd", "#ff7f0e"), strict=True))
_WATER, _LAND, _BAR = "#9ecae1", "#c7a76c", "#08519c"
_LOWEST = 0.3  # FLOP/byte; kernels without multiply-adds are drawn down to it
_UNKNOWN = "top-1 not run"


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

    Models of unknown accuracy stand in a column of their own. Those without a measurement show their ideal alone.
    """
    known, unknown = _by_accuracy(points)
    ratios = [max(1.0, 0.7 * len(unknown)), 7] if unknown else [7]
    figure, panels = plt.subplots(
        1, len(ratios), figsize=(11, 6), sharey=True, width_ratios=ratios, layout="constrained", squeeze=False
    )
    if unknown:
        aside = panels[0, 0]
        for x, point in enumerate(unknown):
            _draw_point(aside, x, point)
        aside.set_xticks([])
        aside.set_xlim(-0.5, len(unknown) + 0.8)
        aside.set_xlabel(_UNKNOWN)
    main = panels[0, -1]
    for point in known:
        _draw_point(main, point.accuracy.top1, point)
    main.margins(x=0.15)
    main.set_xlabel("ImageNet-1K top-1 (%), as published")
    panels[0, 0].set_ylabel("time of one image in the batch (µs)")
    for axes in panels[0]:
        axes.set_yscale("log")
        axes.grid(axis="y", which="both", alpha=0.2)
    families = [family for family in FAMILIES if any(point.accuracy.family == family for point in points)]
    handles = [Line2D([], [], color=COLOURS[family], marker="o", label=family) for family in families]
    handles += [
        Line2D([], [], color="grey", marker="o", linestyle="", label="measured"),
        Line2D([], [], color="grey", marker="_", linestyle="", label="ideal: 2 MACs / peak"),
    ]
    main.legend(handles=handles, fontsize=8, loc="upper left")
    figure.suptitle(title, fontsize=10)
    _part_labels(figure)
    _save(figure, path)


def _by_accuracy(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Points in the order of their accuracy, and those of unknown accuracy."""
    known = sorted((p for p in points if p.accuracy.top1 is not None), key=lambda p: p.accuracy.top1)
    return known, [point for point in points if point.accuracy.top1 is None]


def _draw_point(axes: Axes, x: float, point: Point) -> None:
    colour, ideal = COLOURS[point.accuracy.family], 1e6 * point.ideal_s
    axes.plot(x, ideal, marker="_", color=colour, markersize=12, markeredgewidth=2)
    label, height = point.accuracy.model, ideal
    if point.measured_s is not None:
        height = 1e6 * point.measured_s
        axes.plot([x, x], [ideal, height], color=colour, linewidth=3, alpha=0.35, solid_capstyle="butt")
        axes.plot(x, height, marker="o", color=colour, markersize=6)
        label += f" {point.efficiency:.0%}"
    text = axes.annotate(label, (x, height), xytext=_OFFSETS[0], textcoords="offset points", fontsize=7, va="center")
    text.set_in_layout(False)  # or the panels would move under labels that have found their places


# From a point to its label, the best first.
_OFFSETS = (
    (8, 0), (-8, 0), (0, 10), (0, -10), (8, 8), (-8, 8), (8, -8), (-8, -8), (8, 16), (-8, 16), (8, -16), (-8, -16),
)  # fmt: skip


def _part_labels(figure: Figure) -> None:
    """Move each label to the first place where it covers no other label, point or ideal and lies inside its axes."""
    figure.draw_without_rendering()
    padding = {"o": 4, "_": 2}
    for axes in figure.axes:
        marks = [line for line in axes.lines if line.get_marker() in padding]
        taken = [line.get_window_extent().padded(padding[line.get_marker()]) for line in marks]
        taken += [legend.get_window_extent() for legend in [axes.get_legend()] if legend is not None]
        for label in axes.texts:
            for x, y in (*_OFFSETS, _OFFSETS[0]):  # the first again where none is free
                label.xyann = x, y
                label.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
                extent = label.get_window_extent()
                inside = axes.bbox.x0 <= extent.x0 and extent.x1 <= axes.bbox.x1
                if inside and not extent.count_overlaps(taken):
                    break
            taken.append(extent)


def write_efficiency_gap_page(points: Sequence[Point], title: str, path: Path) -> None:
    """The efficiency-gap plot as one HTML file that needs nothing from the network; hovering tells each number.

    Raises:
        ModuleNotFoundError: plotly isn't installed.
    """
    figure = _interactive(points, title)
    _replace(path, lambda partial: figure.write_html(partial, include_plotlyjs=True, full_html=True))


def _interactive(points: Sequence[Point], title: str) -> Any:
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the interactive page needs plotly: pip install -e '.[analysis]'") from error
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.2, 0.8], horizontal_spacing=0.02)
    known, unknown = _by_accuracy(points)
    places = [(point, point.accuracy.top1, 2) for point in known]
    places += [(point, x, 1) for x, point in enumerate(unknown)]
    shown: set[str] = set()
    for i, (point, x, column) in enumerate(places):
        beside = "middle left" if i % 2 == 0 and column == 2 else "middle right"
        family, measured = point.accuracy.family, point.measured_s is not None
        heights = [1e6 * point.ideal_s] + ([1e6 * point.measured_s] if measured else [])
        figure.add_trace(
            go.Scatter(
                x=[x] * len(heights),
                y=heights,
                mode="lines+markers+text",
                name=family,
                legendgroup=family,
                showlegend=family not in shown,
                line={"color": COLOURS[family], "width": 5},
                opacity=0.85,
                marker={
                    "size": [16, 10][: len(heights)],
                    "symbol": ["line-ew-open", "circle"][: len(heights)],
                    "line": {"width": 3, "color": COLOURS[family]},
                },
                text=["", point.accuracy.model] if measured else [point.accuracy.model],
                textposition=beside if measured else "bottom center",
                textfont={"size": 10},
                cliponaxis=False,
                hovertext=_hover(point),
                hoverinfo="text",
            ),
            row=1,
            col=column,
        )
        shown.add(family)
    figure.update_yaxes(type="log")
    figure.update_yaxes(title_text="time of one image in the batch (µs)", col=1)
    figure.update_xaxes(title_text="ImageNet-1K top-1 (%), as published", col=2)
    figure.update_xaxes(title_text=_UNKNOWN, showticklabels=False, range=[-0.5, len(unknown) + 1], col=1)
    figure.update_layout(title={"text": title, "font": {"size": 14}}, template="plotly_white", height=720)
    return figure


def _hover(point: Point) -> str:
    accuracy, lines = point.accuracy, []
    lines.append(f"<b>{accuracy.model}</b>, {accuracy.image_size} px, {point.macs / 1e9:.2f} GMACs")
    lines.append("top-1 not run" if accuracy.top1 is None else f"top-1 {accuracy.top1:.1f} %: {accuracy.source}")
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
