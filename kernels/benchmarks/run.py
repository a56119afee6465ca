"""Run a suite of kernel benchmarks and write results/<suite>-<device>.json.

python kernels/benchmarks/run.py blocks --select convfirst-c --dtypes float16 bfloat16
python kernels/benchmarks/run.py blocks --peer none              # ours alone: no compilation
python kernels/benchmarks/run.py mbconv
python kernels/benchmarks/run.py grouped                         # the grouped convolution alone, beside cuDNN and spio
python kernels/benchmarks/run.py winograd --batches 1 8 64
python kernels/benchmarks/run.py direct --select alexnet
python kernels/benchmarks/run.py counters --groups direct --dtypes float32     # under Nsight Compute
python kernels/benchmarks/run.py models --batches 1 128 --reuse results/models-h100.json
python kernels/benchmarks/run.py models --batches 8 --append --turn /tmp/turn    # as one of several processes at once
"""

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

from convfirst.app.results import environment, gpu_slug, kept_rows, write_results  # noqa: E402
from suites import NAMES, SUITES  # noqa: E402


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--select", help="regular expression over names")
    parser.add_argument("--dtypes", nargs="+", help="float16 bfloat16 float32")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--peer", help="inductor, inductor-max-autotune or none")
    parser.add_argument("--reuse", help="a result file to take peer times from")
    parser.add_argument("--path", help="sm80, sm90 or a variant's name")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--eager-outside", action="store_true", help="models: nothing of ours goes through Inductor")
    parser.add_argument("--groups", nargs="+", help="counters: blocks portable direct winograd")
    parser.add_argument("--keep", help="counters: a folder for the profiler's CSV files")
    parser.add_argument("--turn", help="a file by which processes on one GPU take turns (turns.py)")
    parser.add_argument("--append", action="store_true", help="keep the file's rows, if of this device and commit")
    parser.add_argument("--output", type=Path, help="default: results/<suite>-<device>.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: these benchmarks need one")
    given = {key: value for key, value in vars(options).items() if value is not None}
    if given.get("peer") == "none":
        given["peer"] = None
    if given.pop("eager_outside"):
        given["compiled"] = False
    suite = SUITES[given.pop("suite")]
    output = given.pop("output", REPOSITORY / f"results/{options.suite}-{gpu_slug()}.json")
    append, here = given.pop("append"), environment()
    unknown = set(given) - set(inspect.signature(suite).parameters)
    if unknown:
        sys.exit(f"suite {options.suite} has no option {', '.join(sorted(unknown))}")
    kept = kept_rows(output, here) if append else []
    rows: list[dict] = []
    try:
        for row in suite(**given):
            if append and not rows:
                kept = kept_rows(output, here)  # with what other processes wrote before this one's turn
            rows.append(row)
            # Row by row: what was measured before an error, or before the process is killed, isn't lost.
            write_results(output, options.suite, _in_order(kept + rows) if append else rows, here)
    finally:
        if rows:
            print_table(rows)
            print("wrote", output)


def _in_order(rows: list[dict]) -> list[dict]:
    """float16 first, names as the suites list them, small batches first: processes write in any order."""
    return sorted(rows, key=lambda row: (row["dtype"] != "float16", row["dtype"], *_place(row)))


def _place(row: dict) -> tuple:
    return (NAMES.index(row["name"]), row["batch"]) if row["name"] in NAMES else (len(NAMES),)


def print_table(rows: list[dict]) -> None:
    if "group" in rows[0]:
        for group in dict.fromkeys(row["group"] for row in rows):
            same = [row for row in rows if row["group"] == group]
            print_columns([column for column in same[0] if column != "group"], same)
        return
    columns = ("name", "batch", "dtype", "path", "ours_ms", "peer", "peer_ms", "speedup", "tflops", "efficiency")
    if "algorithm" in rows[0]:
        columns = ("layer", "N", "dtype", "algorithm", "plan", *columns[4:8], "effective_tflops", "max_error")
    if "direction" in rows[0]:
        columns = ("layer", "N", "dtype", "direction", "variant", *columns[4:9], "computational_efficiency")
    print_columns(columns, rows)


def print_columns(columns: Sequence[str], rows: list[dict]) -> None:
    lines = [[str(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    for line in (columns, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
