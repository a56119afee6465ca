"""Where Winograd's kernels were measured, and where they were faster than cuDNN: what "auto" and `accelerate` go by.

measured.json holds, from the results of `scripts/benchmark.py suite=winograd`, one row for each layer and batch size:
dtype, channels, output channels, height = width, batch, and milliseconds of cuDNN's faster layout, of F(2x2, 3x3) and
F(4x4, 3x3) with transformed filters at hand, and of direct convolution, inf where a kernel is missing. Run as a script,
this makes measured.json anew from the result files that are named, or from results/winograd-*.json; of a problem that
several files have, the last one's row counts.
"""

import json
import math
import os
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("measured.json")
RESULTS = Path(__file__).parents[3] / "results"
ALGORITHMS = ("f2", "f4", "direct")
MARGIN = 1.05  # a gain smaller than what runs differ by counts as none
REACH = 1.1  # how far, in powers of two of channels, outputs and pixels, a measurement speaks for a problem
CAPABILITY = (9, 0)  # of the GPU that was measured


class Row(NamedTuple):
    dtype: str
    channels: int
    outputs: int
    side: int
    batch: int
    peer_ms: float
    f2_ms: float
    f4_ms: float
    direct_ms: float = math.inf

    def best(self) -> tuple[float, str]:
        """Milliseconds of the fastest algorithm, and its name."""
        return min(zip((self.f2_ms, self.f4_ms, self.direct_ms), ALGORITHMS, strict=True))


@cache
def table() -> tuple[Row, ...]:
    """The measured rows; empty where the package has none."""
    return tuple(Row(*row) for row in json.loads(FILE.read_text())["rows"]) if FILE.exists() else ()


@cache
def nearest(dtype: str, batch: int, height: int, width: int, channels: int, outputs: int) -> Row | None:
    """The measurement nearest to a convolution with an output of height x width, or None where none is within reach."""
    if min(batch, height, width) < 1:
        return None
    found, least = None, math.inf
    for row in table():
        if row.dtype != dtype:
            continue
        steps = (
            math.log2(channels / row.channels),
            math.log2(outputs / row.outputs),
            math.log2(batch * height * width / (row.batch * row.side**2)),
            # Small images waste part of their tiles: 7 x 7 pixels take 8 x 8.
            4 * (_waste(height, width) - _waste(row.side, row.side)),
        )
        distance = sum(map(abs, steps))
        if max(map(abs, steps)) <= REACH and distance < least:
            found, least = row, distance
    return found


def fastest(dtype: str, batch: int, height: int, width: int, channels: int, outputs: int) -> str | None:
    """That of `ALGORITHMS` which was measured to be the fastest; None where nothing near was measured."""
    row = nearest(dtype, batch, height, width, channels, outputs)
    if row is None or math.isinf(row.best()[0]):
        return None
    return row.best()[1]


def faster(dtype: str, batch: int, height: int, width: int, channels: int, outputs: int) -> str | None:
    """The `fastest` where it was measured to be faster than cuDNN by `MARGIN`; None elsewhere."""
    row = nearest(dtype, batch, height, width, channels, outputs)
    return row.best()[1] if row is not None and gains(row) else None


def gains(row: Row) -> bool:
    """Whether our fastest algorithm was faster than cuDNN."""
    return row.best()[0] * MARGIN <= row.peer_ms


def _waste(height: int, width: int) -> float:
    """log2 of the pixels of whole 4 x 4 tiles over those of the image."""
    return math.log2(-(-height // 4) * -(-width // 4) * 16 / (height * width))


def rows_of(results: dict) -> list[Row]:
    """Rows of one result file, best of each algorithm."""
    times: dict[tuple, dict[str, float]] = {}
    for row in results["rows"]:
        if "channels" not in row or row["algorithm"] not in ALGORITHMS:
            continue  # a sum over layers, or a kernel that runs where it is asked for alone
        key = (row["dtype"], row["channels"], row["outputs"], row["side"], row["N"])
        entry = times.setdefault(key, {"peer": row["peer_ms"], **dict.fromkeys(ALGORITHMS, math.inf)})
        entry[row["algorithm"]] = min(entry[row["algorithm"]], row["ours_filtered_ms"])
        entry["peer"] = min(entry["peer"], row["peer_ms"])
    return [Row(*key, entry["peer"], *(entry[a] for a in ALGORITHMS)) for key, entry in sorted(times.items())]


def main(paths: list[str]) -> None:
    files = [json.loads(Path(path).read_text()) for path in paths or sorted(RESULTS.glob("winograd-*.json"))]
    files = [results for results in files if results["suite"] == "winograd"]
    latest = {row[:5]: row for results in files for row in rows_of(results)}
    rows = [latest[problem] for problem in sorted(latest)]
    sources = [{key: results[key] for key in ("device", "date", "commit")} for results in files]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    temporary = FILE.with_name(f".{FILE.name}.{os.getpid()}")
    temporary.write_text(f'{{"sources": {json.dumps(sources)},\n "rows": [\n  {lines}\n]}}\n')
    os.replace(temporary, FILE)
    print(f"wrote {FILE}:", ", ".join(f"{n} rows of {dtype}" for dtype, n in Counter(r.dtype for r in rows).items()))


if __name__ == "__main__":
    main(sys.argv[1:])
