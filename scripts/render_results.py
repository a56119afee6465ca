"""Write the tables and plots of README and kernels/NOTES.md from results/: python scripts/render_results.py [--check].

They say what to show in comments, and this script fills in what stands between them and their end:

    <!-- table results/throughput-h200.json name:model batch images_per_s:images/s where path=inductor -->
    <!-- plot results/models-h100.json efficiency by name over path -->
    <!-- end -->

`table` lists columns of the file's rows, each with its heading after a colon; `plot` draws bars of one column, a group
for each value of `by` and a colour for each value of `over`. `where column=value` keeps only such rows. A file without
rows, as gpu-tests.json, is one row itself. With --check nothing is written, and the exit status is 1 if their tables
differ from the measurements.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).parents[1]
SECTION = re.compile(r"(<!-- (table|plot) (\S+) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
DOCUMENTS = ("README.md", "kernels/NOTES.md")
MISSING = "Not measured yet.\n"


def render(text: str, root: Path, draw: bool = True) -> str:
    """``text`` with the content of its sections made from the files under ``root``; draws the plots if ``draw``."""

    def section(match: re.Match) -> str:
        start, kind, source, request, end = match.groups()
        path = root / source
        if not path.exists():
            return start + MISSING + end
        results = json.loads(path.read_text())
        request, _, condition = request.partition(" where ")
        rows = [row for row in results.get("rows", [results]) if _matches(row, condition)]
        if not rows:
            return start + MISSING + end
        body = _table(rows, request.split()) if kind == "table" else _plot(rows, request, path, draw)
        return start + body + "\n" + _provenance(results) + "\n" + end

    return SECTION.sub(section, text)


def _matches(row: dict, condition: str) -> bool:
    wanted = dict(pair.split("=", 1) for pair in condition.split())
    return all(str(row.get(column)) == value for column, value in wanted.items())


def _table(rows: list[dict], columns: list[str]) -> str:
    keys, headings = zip(
        *((column.partition(":")[0], column.partition(":")[2] or column) for column in columns), strict=True
    )
    lines = [headings, ["---"] * len(keys), *([_shown(row.get(key)) for key in keys] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _plot(rows: list[dict], request: str, path: Path, draw: bool) -> str:
    value, _, group, _, series = request.split()  # "efficiency by name over path"
    picture = path.with_name(f"{path.stem}-{value}.png")
    if draw:
        _draw(rows, value, group, series, picture)
    return f"![{value} by {group}]({path.parent.name}/{picture.name})\n"


def _draw(rows: list[dict], value: str, group: str, series: str, picture: Path) -> None:
    groups = list(dict.fromkeys(str(row[group]) for row in rows))
    colours = list(dict.fromkeys(str(row[series]) for row in rows))
    figure, axes = plt.subplots(figsize=(max(5, 1.1 * len(groups)), 3.5), layout="constrained")
    for i, colour in enumerate(colours):
        bars = {str(row[group]): row[value] for row in rows if str(row[series]) == colour}
        places = [groups.index(name) + (i - (len(colours) - 1) / 2) * 0.8 / len(colours) for name in bars]
        axes.bar(places, list(bars.values()), width=0.8 / len(colours), label=colour)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set_ylabel(value)
    axes.legend(title=series)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _provenance(results: dict) -> str:
    torch = results["versions"]["torch"]
    return f"Measured on {results['device']}, {results['date']}, commit {results['commit'][:10]}, PyTorch {torch}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    check = parser.parse_args().check
    stale = []
    for name in DOCUMENTS:
        document = REPOSITORY / name
        old = document.read_text()
        new = render(old, REPOSITORY, draw=not check)
        if new == old:
            continue
        stale.append(name)
        if not check:
            document.write_text(new)
    if check and stale:
        print(f"{', '.join(stale)} differ from results/: run python scripts/render_results.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
