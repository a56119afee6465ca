"""Report of arXiv 2404.03617: efficiency gap, waterline, fused blocks, accuracy."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convfirst.analysis.devices import Ceilings, Device
from convfirst.analysis.kernels import PARTITIONS, kernels
from convfirst.analysis.latency import (
    Accuracy,
    Measurement,
    Point,
    decompose,
    fastest,
    read_accuracies,
    read_published_latencies,
    read_results,
)
from convfirst.analysis.plots import draw_efficiency_gap, draw_waterline, write_efficiency_gap_page
from convfirst.analysis.waterline import KernelTime, Waterline
from convfirst.app.papers.findings import Findings, claims, measured_tables, provenance, read_paper, traced
from convfirst.app.report import figure, table
from convfirst.app.results import gpu_slug

NETWORKS = ("convnext_tiny", "convfirst_tiny")
REFERENCE = "convnext_tiny"
SIZES = ("nano", "tiny", "small", "base")  # of the networks with fused blocks, each beside its counterpart
BATCH = 128
IMAGENET_IMAGES = 50_000  # of the validation set
_PUBLISHED = "rtx-4090"  # the device of published_latency.csv


@dataclass(frozen=True)
class Score:
    """ImageNet top-1 in percent of a training run."""

    top1: float
    image_size: int
    source: str


def suites(folder: Path, slug: str, quick: bool) -> list[list[str]]:
    """Overrides of scripts/benchmark.py: fused blocks, networks with them, and the networks of the efficiency gap."""
    blocks = ["suite=blocks", f"output={folder / f'blocks-{slug}.json'}"]
    models = ["suite=models", f"output={folder / f'models-{slug}.json'}"]
    if quick:
        blocks += ["++blocks.select='^convfirst-c64$|^convnext-c96$'", "blocks.dtypes=[float16]", "blocks.iterations=5"]
        models += ["networks.select='^convfirst_tiny$'", f"networks.batches=[{BATCH}]", "networks.iterations=5"]
        return [blocks, models, *_throughputs(folder, slug, quick)]
    networks = [[*models, f"networks.select='^conv(first|next)_{size}$'"] for size in SIZES]
    return [blocks, *networks, *_throughputs(folder, slug, quick)]


def _throughputs(folder: Path, slug: str, quick: bool) -> list[list[str]]:
    sizes: dict[int, list[str]] = {}
    for accuracy in read_accuracies():
        sizes.setdefault(accuracy.image_size, []).append(accuracy.model)
    if quick:
        sizes = {224: ["resnet50"]}
    common = ["suite=throughput", f"output={folder / f'throughput-{slug}.json'}", f"throughput.batches=[{BATCH}]"]
    common += [f"throughput.modes=[{'eager' if quick else 'inductor'}+graph]"]  # a compilation takes longest
    return [[*common, f"models=[{','.join(models)}]", f"image_size={size}"] for size, models in sizes.items()]


def sections(findings: Findings) -> list[str]:
    """The report's parts in Markdown; draws its figures."""
    trained = {recipe: _score(path) for recipe, path in findings.runs.items()}
    ours = _headline(findings, trained)
    parts = ["## The paper's claims", claims(read_paper("convfirst"), ours)]
    parts += _networks(findings, trained)
    parts += ["## Efficiency gap", _GAP_TEXT, *_without_ceilings(findings)]
    for slug in _devices(findings):
        parts += _efficiency_gap(findings, slug, trained)
    parts += ["## Fused blocks", *measured_tables(findings, "blocks", _block_table)]
    parts += ["## Waterline", _WATERLINE_TEXT]
    for slug in _devices(findings):
        parts += _waterline(findings, slug)
    return [*parts, *_accuracies(trained)]


_GAP_TEXT = (
    "latency = 2 MACs / (peak x efficiency), per image. *Ideal* is the latency at efficiency 1 on the peak of the data "
    "sheet for float16 with float32 accumulation; the gap is what lies between it and the measured latency. "
    "The speed-up is the product of two factors: less work, and more efficiency. As in the paper, its reference is "
    f"{REFERENCE} without our kernels, which the heading of the table names with how it was run. *Fused* is "
    f"with our fused blocks. All times are those at a batch of {BATCH}, where the network was measured at it."
)
_WATERLINE_TEXT = (
    "Each kernel takes at least the longer of its arithmetic at the device's FLOP/s and its memory traffic at the "
    "device's bytes/s. The waterline is the operational intensity where both are equal; below it a kernel waits for "
    "memory. *Layer by layer* is one kernel an operation, *compiled* fuses everything between two convolutions or "
    "matrix products, *block fused* makes each residual block one kernel. Traffic is the least possible, launches "
    "cost nothing, all multiply-adds run at the one peak, and activation functions and norms count as traffic only, so "
    "these are bounds."
)


def _wanted_devices(findings: Findings) -> list[str]:
    """The GPU at hand, the devices of result files and that of published latencies."""
    own = [findings.slug] if findings.slug else []
    others = [gpu_slug(results["device"]) for _, results in findings.results("models")]
    return list(dict.fromkeys([*own, *others, _PUBLISHED]))


def _devices(findings: Findings) -> list[str]:
    """Those of the wanted devices whose ceilings are known."""
    return [slug for slug in _wanted_devices(findings) if findings.knows(slug)]


def _without_ceilings(findings: Findings) -> list[str]:
    """What to say of the other ones."""
    unknown = [slug for slug in _wanted_devices(findings) if not findings.knows(slug)]
    if not unknown:
        return []
    return [
        f"Left out here and below, as their ceilings are neither shipped nor measured: {', '.join(unknown)} "
        "(`python scripts/measure_device.py` measures those of the GPU at hand)."
    ]


def _peak(device: Device) -> Ceilings:
    """The data sheet's ceilings; those measured for a device whose data sheet isn't shipped."""
    return device.ceilings("float16", "datasheet" if "datasheet" in device.sheets else None)


def _headline(findings: Findings, trained: dict[str, Score | str]) -> dict[str, str]:
    speedups = []
    for path, results in findings.results("models"):
        for row in results["rows"]:
            if row["name"] == "convfirst_tiny" and (row["peer"] or "").startswith("convnext_tiny ") and row["speedup"]:
                about = f"{results['device']}, {row['dtype']}, batch {row['batch']}, {path.name}"
                work = _macs(REFERENCE) / _macs("convfirst_tiny")
                factors = f"{row['speedup']:.2f}x = {work:.2f} (less work) x {row['speedup'] / work:.2f} (efficiency)"
                speedups.append(f"{factors}: convfirst_tiny against {row['peer']} ({about})")
    scores = [f"{name}: {_top1(score)}{' %' if isinstance(score, Score) else ''}" for name, score in trained.items()]
    return {"speedup": "; ".join(speedups) or "not measured", "accuracy": "; ".join(scores)}


def _macs(model: str) -> int:
    return traced(model, 1, 224).macs


def _score(run: Path) -> Score | str:
    """ImageNet top-1 of a finished run, the EMA's where there is one, or why there is none."""
    path = run / "summary.json"
    if not path.exists():
        return "not run"
    summary = json.loads(path.read_text())
    if summary["test_images"] != IMAGENET_IMAGES:
        return f"not run (the run tested {summary['test_images']} images, not ImageNet's {IMAGENET_IMAGES})"
    top1 = summary["test"].get("top1_ema", summary["test"]["top1"])
    return Score(top1, summary["test_image_size"], f"{run.name}/{path.name}, {summary['epochs']} epochs")


def _networks(findings: Findings, trained: dict[str, Score | str]) -> list[str]:
    published = {accuracy.model: accuracy for accuracy in read_accuracies()}
    keys = ("batch", "dtype", "path", "ours_ms", "peer", "peer_ms", "speedup", "efficiency")
    headings = ("model", "GMACs", "top-1 published", "top-1 here", "batch", "dtype", "path", "ms", "peer", "peer ms")
    parts = ["## Networks with fused blocks"]
    for path, results in findings.results("models"):
        rows = []
        for row in results["rows"]:
            name = row["name"]
            gmacs = traced(name, 1, row.get("image_size", 224)).macs / 1e9
            top1 = (_published(published.get(name)), _top1(trained.get(name)))
            rows.append((name, gmacs, *top1, *(row[key] for key in keys)))
        parts += [table((*headings, "speed-up", "efficiency"), rows), provenance(path, results)]
    if len(parts) == 1:
        return [*parts, "Not measured."]
    return [*parts, "The efficiency is against the matrix-product rate measured in the same run."]


def _points(findings: Findings, slug: str, peak: Ceilings, trained: dict[str, Score | str]) -> list[Point]:
    found = [*findings.results("models"), *findings.results("throughput")]
    measured: list[Measurement] = read_results(path for path, results in found if gpu_slug(results["device"]) == slug)
    measured += read_published_latencies(slug)
    points = []
    for accuracy in read_accuracies():
        run = trained.get(accuracy.model)
        own = replace(accuracy, top1=run.top1, source=run.source) if isinstance(run, Score) else None
        macs = traced(accuracy.model, 1, accuracy.image_size).macs
        about = (accuracy.model, accuracy.image_size)
        found = [fastest(measured, *about, fused=fused, batch=BATCH) for fused in (True, False)]
        found = [measurement for measurement in found if measurement is not None]
        points += [Point(accuracy, macs, peak.flops, measurement, own) for measurement in found or [None]]
    return points


def _point(points: Sequence[Point], model: str, fused: bool) -> Point | None:
    """The measured point of a model with fused blocks or without."""
    measured = [point for point in points if point.measurement is not None and point.accuracy.model == model]
    return next((point for point in measured if point.measurement.fused == fused), None)


def _efficiency_gap(findings: Findings, slug: str, trained: dict[str, Score | str]) -> list[str]:
    device = findings.device(slug)
    peak = _peak(device)
    points = _points(findings, slug, peak, trained)
    picture = findings.picture(f"efficiency-gap-{slug}")
    page = findings.reports / f"efficiency-gap-{slug}{findings.suffix}.html"
    title = f"Efficiency gap on {device.name}: peak {peak.flops / 1e12:.0f} TFLOP/s (float16, {_kind(peak)})"
    claim = _claim(points)
    draw_efficiency_gap(points, f"{title}\n{claim}".strip(), picture)
    write_efficiency_gap_page(points, f"{title}\n{claim}".strip(), page)
    missing = [point.accuracy.model for point in points if point.measurement is None]
    parts = [f"### {device.name}", figure(picture, findings.reports, title), f"[Interactive page]({page.name})"]
    parts += [f"{claim}."] if claim else []
    parts.append(_decompositions(points))
    if missing:
        parts.append(f"Not measured on this device, ideal only: {', '.join(missing)}.")
    sources = dict.fromkeys(point.measurement.source for point in points if point.measurement is not None)
    parts.append(f"Peak: {peak.source}. Measured: {'; '.join(sources) or 'nothing'}.")
    return parts


def _claim(points: Sequence[Point]) -> str:
    """The paper's comparison in a sentence; empty where its two networks weren't both measured."""
    ours, reference = _point(points, "convfirst_tiny", fused=True), _point(points, REFERENCE, fused=False)
    if ours is None or reference is None:
        return ""
    parts = decompose(ours, reference)
    batches = dict.fromkeys(point.measurement.batch for point in (ours, reference))
    return (
        f"{ours.name}, over {reference.name}: {parts.speedup:.2f}x = {parts.work:.2f} (less work) x "
        f"{parts.efficiency:.2f} (efficiency), batch {' against '.join(map(str, batches))}"
    )


def _decompositions(points: Sequence[Point]) -> str:
    reference = _point(points, REFERENCE, fused=False)
    rows = []
    for point in sorted(points, key=lambda p: (p.measured_s is None, p.measured_s or p.ideal_s)):
        measured, how, parts = point.measurement, None, (None, None, None)
        if measured is not None:
            how = f"{measured.path}, batch {measured.batch}"
            if reference is not None:
                factors = decompose(point, reference)
                parts = (factors.speedup, factors.work, factors.efficiency)
        latency = (
            (None, None) if measured is None else (1e6 * point.measured_s, 1e6 * (point.measured_s - point.ideal_s))
        )
        about = (point.name, point.accuracy.image_size, _published(point.accuracy), _top1(point.own))
        rows.append((*about, point.macs / 1e9, 1e6 * point.ideal_s, *latency, point.efficiency, *parts, how))
    headings = ("model", "px", "top-1 % published", "here", "GMACs", "ideal µs", "measured µs", "gap µs", "efficiency")
    over = f"speed-up over {REFERENCE if reference is None else reference.name}"
    return table((*headings, over, "= less work", "x efficiency", "how"), rows)


def _block_table(results: Mapping) -> str:
    rows = []
    for row in results["rows"]:
        floor = max(row["floor_tensor_ms"], row["floor_memory_ms"])
        binds = "memory" if row["floor_memory_ms"] > row["floor_tensor_ms"] else "arithmetic"
        rows.append(
            (row["name"], row["batch"], row["dtype"], row["path"], row["ours_ms"], row["peer"], row["peer_ms"])
            + (row["speedup"], floor, binds, floor / row["ours_ms"])
        )
    headings = ("block", "batch", "dtype", "path", "ms", "peer", "peer ms", "speed-up", "least ms", "bound by")
    return table((*headings, "reached"), rows)


def _waterline(findings: Findings, slug: str) -> list[str]:
    device = findings.device(slug)
    ceilings = device.ceilings("float16")
    lines = {
        (name, partition): Waterline(kernels(traced(name, BATCH, 224), partition), ceilings)
        for name in NETWORKS
        for partition in PARTITIONS
    }
    picture = findings.picture(f"waterline-{slug}")
    title = f"Waterline on {device.name}: {ceilings.flops / 1e12:.0f} TFLOP/s, {ceilings.bandwidth / 1e12:.3g} TB/s"
    title += f" ({_kind(ceilings)}), float16, batch {BATCH}"
    panels = {
        f"{name}, {part.replace('_', ' ')}": line for (name, part), line in lines.items() if part != "layer_by_layer"
    }
    draw_waterline(panels, title, picture)
    rows = []
    for (name, partition), line in lines.items():
        water = (len(line.under_water), line.share_under_water)
        times = (1e3 * line.compute_s, 1e3 * line.latency_s, line.efficiency)
        rows.append((name, partition.replace("_", " "), len(line.kernels), *water, line.bytes / 1e9, *times))
    headings = ("model", "sequence", "kernels", "under water", "share of time", "GB", "arithmetic ms", "least ms")
    return [
        f"### {device.name}",
        figure(picture, findings.reports, title),
        table((*headings, "attainable efficiency"), rows),
        "What is under water in the compiled networks, and the time that its arithmetic units wait for memory:",
        table(("model", "kernels", "count", "FLOP/byte", "waiting ms"), _under_water(lines)),
        f"Waterline {ceilings.waterline:.0f} FLOP/byte. Ceilings ({_kind(ceilings)}): {ceilings.source}.",
    ]


def _under_water(lines: Mapping[tuple[str, str], Waterline], kinds: int = 5) -> list[tuple]:
    """The kinds of kernels that wait longest for memory in each compiled network, by their operators."""
    rows = []
    for (name, partition), line in lines.items():
        if partition != "compiled":
            continue
        groups: dict[str, list[KernelTime]] = {}
        for time in line.under_water:
            groups.setdefault(time.kernel.name.partition(": ")[2], []).append(time)
        for operators, times in sorted(groups.items(), key=lambda item: -sum(t.lost_s for t in item[1]))[:kinds]:
            low, high = (limit(time.kernel.intensity for time in times) for limit in (min, max))
            intensity = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            rows.append((name, operators, len(times), intensity, 1e3 * sum(time.lost_s for time in times)))
    return rows


def _accuracies(trained: dict[str, Score | str]) -> list[str]:
    rows = []
    for accuracy in read_accuracies():
        here = trained.get(accuracy.model)
        run = (_top1(here), *((here.image_size, here.source) if isinstance(here, Score) else (None, None)))
        rows.append((accuracy.model, _published(accuracy), accuracy.image_size, accuracy.source, *run))
    headings = ("model", "published top-1 %", "px", "source", "here %", "px", "run")
    return ["## Accuracy on ImageNet-1K", table(headings, rows)]


def _top1(score: Accuracy | Score | str | None) -> str:
    """A top-1 of one's own with two decimals; "not run" or the reason where there is none."""
    if isinstance(score, str):
        return score
    return "not run" if score is None else f"{score.top1:.2f}"


def _published(accuracy: Accuracy | None) -> str | None:
    """A published top-1 with two decimals; None where there is none."""
    return None if accuracy is None or accuracy.top1 is None else f"{accuracy.top1:.2f}"


def _kind(ceilings: Ceilings) -> str:
    return {"datasheet": "data sheet", "measured": "measured"}[ceilings.kind]
