"""Report of arXiv 1509.09308: multiplications, VGG-E's layers, speed by batch size, error by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from convfirst.analysis.convolutions import ConvLayer, WinogradTile
from convfirst.analysis.plots import draw_lines
from convfirst.app.papers.findings import Findings, claims, provenance, read_paper
from convfirst.app.report import figure, table

_PAPER = read_paper("winograd")
LAYERS = [ConvLayer(**layer) for layer in _PAPER["layers"]]
GFLOP = sum(2e-9 * layer.macs * layer.depth for layer in LAYERS)  # of VGG-E's convolutions, one image
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def suites(folder: Path, slug: str, quick: bool) -> list[list[str]]:
    """Overrides of scripts/benchmark.py; ``quick`` measures VGG-E's layers at two batch sizes alone."""
    suite = ["suite=winograd", f"output={folder / f'winograd-{slug}.json'}"]
    return [[*suite, "winograd.select='^[1-5]'", "winograd.batches=[1,8]", "winograd.iterations=3"] if quick else suite]


def sections(findings: Findings) -> list[str]:
    """The report's parts in Markdown; draws its figures."""
    measured = [(*found, "") for found in findings.results("winograd")]
    measured += findings.side_results("winograd")
    parts = ["## The paper's claims", claims(_PAPER, {}), "## Multiplications", _tiles()]
    parts += ["## VGG-E's convolution layers", _layers()]
    parts += [
        "## Speed by batch size",
        "Time of VGG-E's sixteen convolutions, the fastest algorithm for each layer; effective TFLOP/s count direct "
        f"convolution's {GFLOP:.2f} GFLOP an image. The paper's times, on its own GPU, are recalled, unverified; "
        f"{_PAPER['speed']['note']}.",
    ]
    for dtype in ("float32", "float16", "bfloat16"):
        parts.append(f"### {dtype}")
        parts += [_paper_speed(dtype)] if dtype in _PAPER["speed"]["rows"][0] else []
        parts += _measured_speed(findings, measured, dtype)
    parts += ["## Error by layer", "Largest error of an element. The paper's values are recalled and unverified."]
    return [*parts, _paper_error(), *_measured_error(measured)]


def _tiles() -> str:
    rows = []
    for entry in _PAPER["tiles"]:
        tile = WinogradTile(**{key: value for key, value in entry.items() if key != "source"})
        per_tile = (
            tile.direct_multiplications,
            tile.multiplications,
            tile.saving,
            tile.data,
            tile.filter,
            tile.inverse,
        )
        rows.append((tile.name, *per_tile, entry["source"]))
    headings = ("algorithm", "direct", "Winograd", "times fewer", "data FLOP", "filter FLOP", "inverse FLOP")
    return table((*headings, "source of the transforms"), rows)


def _layers() -> str:
    algorithms = [
        WinogradTile(**{key: value for key, value in entry.items() if key != "source"})
        for entry in _PAPER["tiles"]
        if (entry["m"], entry["r"]) in ((2, 3), (4, 3))
    ]
    rows = [
        (layer.name, layer.depth, f"{layer.channels}x{layer.height}x{layer.width}", layer.filters)
        + (2e-9 * layer.macs * layer.depth, layer.intensity(1), layer.intensity(64))
        + tuple(tile.speedup_bound(layer, batch) for tile in algorithms for batch in (1, 64))
        for layer in LAYERS
    ]
    rows.append(
        ("total", sum(layer.depth for layer in LAYERS), None, None, f"{GFLOP:.2f}", None, None, None, None, None, None)
    )
    headings = ["layer", "depth", "CxHxW", "K", "GFLOP an image", "FLOP/byte N=1", "FLOP/byte N=64"]
    headings += [f"{tile.name} N={batch}" for tile in algorithms for batch in (1, 64)]
    note = (
        "FLOP/byte is direct convolution's operational intensity in 16 bit. The last columns are direct convolution's "
        "operations over Winograd's with the transforms included: the most that the arithmetic saves."
    )
    return table(headings, rows) + "\n\n" + note


def _paper_speed(dtype: str) -> str:
    rows = []
    for row in _PAPER["speed"]["rows"]:
        cudnn, ours, work = row[dtype]["cudnn_ms"], row[dtype]["f2_ms"], GFLOP * row["N"]
        rows.append((row["N"], cudnn, work / cudnn, ours, work / ours, cudnn / ours))
    headings = ("N", "cuDNN v3 ms", "TFLOP/s", "paper's F(2x2,3x3) ms", "TFLOP/s", "speed-up")
    return "Paper:\n\n" + table(headings, rows)


def _measured_speed(findings: Findings, measured: Sequence[tuple[Path, dict, str]], dtype: str) -> list[str]:
    parts = []
    for path, results, difference in measured:
        rows = [row for row in results["rows"] if row["dtype"] == dtype]
        if not rows:
            continue
        totals = {n: _total([row for row in rows if row["N"] == n]) for n in sorted({row["N"] for row in rows})}
        shown = [(n, *_speed(n, total)) for n, total in totals.items()]
        parts += [_title(path, difference), table(("N", "peer ms", "TFLOP/s", "ours ms", "TFLOP/s", "speed-up"), shown)]
        parts.append(provenance(path, results))
        complete = {n: total for n, total in totals.items() if not isinstance(total, str)}
        if complete:
            picture = findings.picture(f"{path.stem}-{dtype}")
            lines = {
                name: {n: GFLOP * n / total[i] for n, total in complete.items()}
                for i, name in enumerate(("ours", "peer"))
            }
            title = f"VGG-E's convolutions, {dtype}, {results['device']}" + (f", {path.stem}" if difference else "")
            draw_lines(lines, "batch size", "effective TFLOP/s", title, picture)
            parts.append(figure(picture, findings.reports, title))
    return parts or [f"Here, {dtype}: not measured."]


def _total(rows: Sequence[Mapping]) -> tuple[float, float] | str:
    """Milliseconds of the whole network, ours and the peer's, or which layers are missing."""
    ours, peer = 0.0, 0.0
    missing = []
    for layer in LAYERS:
        own = [row for row in rows if _layer_name(row) == layer.name]
        if not own:
            missing.append(layer.name)
            continue
        ours += layer.depth * min(row["ours_ms"] for row in own)
        peer += layer.depth * min(row["peer_ms"] for row in own)
    return f"layers {', '.join(missing)} not measured" if missing else (ours, peer)


def _speed(n: int, total: tuple[float, float] | str) -> tuple:
    if isinstance(total, str):
        return (total, None, None, None, None)
    ours, peer = total
    return (peer, GFLOP * n / peer, ours, GFLOP * n / ours, peer / ours)


def _paper_error() -> str:
    keys = ("direct_float32", "f2_float32", "f4_float32", "float16")
    rows = [(row["layer"], *(row[key] for key in keys)) for row in _PAPER["error"]["rows"]]
    headings = ("layer", "direct float32", "F(2x2,3x3) float32", "F(4x4,3x3) float32", "float16, all three")
    return "Paper:\n\n" + table(headings, rows)


def _measured_error(measured: Sequence[tuple[Path, dict, str]]) -> list[str]:
    parts = []
    for path, results, difference in measured:
        rows = [row for row in results["rows"] if row.get("max_error") is not None]
        if not rows:
            continue
        errors: dict[tuple, float] = {}
        for row in rows:  # the largest over the batch sizes
            for column, algorithm in (("max_error", row["algorithm"]), ("peer_max_error", "cuDNN")):
                key = (_layer_name(row), row["dtype"], algorithm)
                errors[key] = max(errors.get(key, 0.0), row.get(column) or 0.0)
        columns = sorted({key[1:] for key, error in errors.items() if error}, reverse=True)  # float32 first
        table_rows = [(layer.name, *(errors.get((layer.name, *column)) for column in columns)) for layer in LAYERS]
        headings = ("layer", *(f"{algorithm} {dtype}" for dtype, algorithm in columns))
        parts += [_title(path, difference), table(headings, table_rows), provenance(path, results)]
    return parts or ["Here: not measured."]


def _title(path: Path, difference: str) -> str:
    return f"Here, `{path.name}` ({difference}):" if difference else "Here:"


def _layer_name(row: Mapping) -> str:
    return str(row["layer"]).removeprefix("conv")
