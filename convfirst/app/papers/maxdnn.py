"""Report of arXiv 1501.06633: the layers' arithmetic, and computational efficiency of direct convolution."""

from collections.abc import Mapping
from pathlib import Path

from convfirst.analysis.convolutions import ConvLayer, tile_quantisation
from convfirst.analysis.devices import device_names
from convfirst.app.papers.findings import Findings, claims, measured_tables, read_paper
from convfirst.app.report import table

_PAPER = read_paper("maxdnn")
LAYERS = [ConvLayer(**layer) for layer in _PAPER["layers"]]


def suites(folder: Path, slug: str, quick: bool) -> list[list[str]]:
    """Overrides of scripts/benchmark.py; ``quick`` measures AlexNet's layers alone."""
    suite = ["suite=direct", f"output={folder / f'direct-{slug}.json'}"]
    return [[*suite, "direct.select='^alexnet'", "direct.iterations=3"] if quick else suite]


def sections(findings: Findings) -> list[str]:
    """The report's parts in Markdown."""
    parts = [
        "## The paper's claims",
        claims(_PAPER, _best(findings)),
        "## Layers",
        _LAYERS_TEXT,
        _layers(),
        _waterlines(findings),
    ]
    tables = measured_tables(findings, "direct", _layer_efficiencies)
    return [*parts, "## Computational efficiency", _EFFICIENCY_TEXT, *tables]


_LAYERS_TEXT = (
    f"Batch {_PAPER['batch']}, from {_PAPER['source']}. *Tile* is the useful share of the paper's "
    f"{_PAPER['tile']} x {_PAPER['tile']} tiles of filters and images, a ceiling of its efficiency. FLOP/byte is the "
    "operational intensity in 16 bit."
)
_EFFICIENCY_TEXT = (
    "Useful multiply-adds over the elapsed cycles times the unit's multiply-adds a cycle, as the paper defines it, "
    "where the result file has clocks; the share of the measured matrix-product rate where it has not."
)


def _layers() -> str:
    batch = _PAPER["batch"]
    rows = []
    for layer in LAYERS:
        shape = f"{layer.channels}x{layer.height}x{layer.width}"
        filters = f"{layer.filters}x{layer.kernel_size}x{layer.kernel_size}, stride {layer.stride}"
        output = f"{layer.filters}x{layer.output_height}x{layer.output_width}"
        work = (2e-9 * layer.macs * batch, tile_quantisation(layer, batch, _PAPER["tile"]), layer.intensity(batch))
        rows.append((layer.name, shape, filters, output, *work))
    return table(("layer", "input", "filters", "output", "GFLOP", "tile", "FLOP/byte"), rows)


def _waterlines(findings: Findings) -> str:
    rows = []
    for slug in device_names():
        device = findings.device(slug)
        ceilings = device.ceilings("float16")
        below = [layer.name for layer in LAYERS if layer.intensity(_PAPER["batch"]) < ceilings.waterline]
        rows.append((device.name, ceilings.waterline, ceilings.kind, ", ".join(below) or "none"))
    headings = ("device", "waterline FLOP/byte, float16", "ceilings", "layers under water")
    return "Which layers memory would bind:\n\n" + table(headings, rows)


def _best(findings: Findings) -> dict[str, str]:
    best = []
    for path, results in findings.results("direct"):
        # The paper's claim is of the forward pass.
        rows = [row for row in results["rows"] if row.get("direction", "forward") == "forward" and _efficiency(row)]
        if rows:
            row = max(rows, key=_efficiency)
            layer = row.get("layer", row.get("name"))
            best.append(f"{_efficiency(row):.1%}: {layer}, {row['dtype']} ({results['device']}, {path.name})")
    return {"efficiency": "; ".join(best) or "not measured"}


def _efficiency(row: dict) -> float | None:
    return row.get("computational_efficiency") or row.get("efficiency")


def _layer_efficiencies(results: Mapping) -> str:
    rows = []
    for row in results["rows"]:
        peer = row.get("peer_computational_efficiency") or row.get("peer_efficiency")
        if peer is None and row.get("peer_ms") and _efficiency(row) is not None:
            peer = _efficiency(row) * row["ours_ms"] / row["peer_ms"]
        about = (row.get("layer", row.get("name")), row.get("direction", "forward"), row.get("N", row.get("batch")))
        times = (row["dtype"], row["ours_ms"], _efficiency(row), row.get("peer"), row.get("peer_ms"), peer)
        rows.append((*about, *times, row.get("speedup")))
    headings = ("layer", "direction", "N", "dtype", "ms", "efficiency", "peer", "peer ms", "peer's efficiency")
    return table((*headings, "speed-up"), rows)
