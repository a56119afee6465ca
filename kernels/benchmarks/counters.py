"""Benchmark suite of hardware counters: what each launch keeps busy, and maxDNN's computational efficiency.

Nsight Compute's `ncu` profiles profiled_calls.py, at the clocks as they come and with caches emptied before each
launch, in one start for groups of the same counters; its CSV is reduced here. Groups and their rows:

    blocks      each launch of the blocks of ConvFirst-T and ConvNeXt-T at batch 128
    portable    the same on the portable path
    direct      forward passes of AlexNet's and Overfeat's layers, ours and cuDNN's, one row for each layer and dtype
    winograd    each kernel of our Winograd convolution on layers of VGG-E, all its launches in a call together

`computational_efficiency` is useful multiply-adds over elapsed clocks of the multiprocessors (sm__cycles_elapsed.max,
summed over the call's launches) times the multiply-adds a clock of the unit that ours uses; the peer's goes beyond 1
where its algorithm multiplies less than direct convolution does. The peer is cuDNN in the layout, NHWC or NCHW, in
which it takes fewer clocks. `longest_efficiency` is over the clocks of the longest launch alone: cuDNN adds the bias in
one of its own, ours in the product's.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

RANGE_NAME = re.compile(r"counters\.(\d+)")  # profiled_calls.RANGE
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
CYCLES, NANOSECONDS = "sm__cycles_elapsed.max", "gpu__time_duration.sum"
# Column and metric; shares are percent of the peak rate.
SHARES = {
    "tensor_pipe_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "fma_pipe_percent": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue_slots_percent": "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "shared_memory_percent": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
L2_BYTES = "lts__t_bytes.sum.per_second"
SIXTEEN_BITS = ("float16", "bfloat16")
# Options that choose counters: a section, and what is the largest of many (l2, dram), cost more replays of each launch.
FULL = ("--section", "WarpStateStats", "--metrics", ",".join((CYCLES, NANOSECONDS, L2_BYTES, *SHARES.values())))
FEW_SHARES = dict(list(SHARES.items())[:4])
FEW = ("--metrics", ",".join((CYCLES, NANOSECONDS, *FEW_SHARES.values())))
GROUPS = {
    "blocks": (SIXTEEN_BITS, FULL),
    "portable": (("float16",), FULL),
    "direct": (("float16", "float32"), FEW),
    "winograd": (("float16", "float32"), FULL),
}


def counters(
    groups: Sequence[str] = tuple(GROUPS),
    select: str = "",
    dtypes: Sequence[str] | None = None,
    keep: str | None = None,
) -> Iterator[dict]:
    """Rows of the groups as they have been profiled; what ran before an error isn't lost.

    Args:
        groups: of GROUPS.
        select: regular expression over names of blocks or layers.
        dtypes: of those that a group has; by default all.
        keep: a folder for the profiler's CSV, <groups>.csv, and for what the program printed, <groups>.log.

    Raises:
        ValueError: an option is wrong, `ncu` is missing, may not read counters, or fails; the message is one line.
    """
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"groups={sorted(unknown)}; accepted: {', '.join(GROUPS)}")
    errors, profiled = [], 0
    for options in (FULL, FEW):
        wanted = {}
        for group in groups:
            group_dtypes, group_options = GROUPS[group]
            chosen = [dtype for dtype in group_dtypes if dtypes is None or dtype in dtypes]
            if chosen and group_options is options:
                wanted[group] = chosen
        if wanted:
            labels, report, error = profile(wanted, options, select, keep)
            launches = parse(report) if labels and (not error or '"ID"' in report) else []
            for row in reduce(labels, launches):
                print(json.dumps(row), flush=True)
                yield row
            profiled += len(labels)
            if error:
                errors.append(f"{', '.join(wanted)}: {error}")
    if errors:
        raise ValueError(f"ncu, {'; '.join(errors)}")
    if not profiled:
        raise ValueError(f"select={select!r} matches nothing of {', '.join(groups)}")


def profile(
    groups: dict[str, list[str]], options: Sequence[str], select: str = "", keep: str | None = None
) -> tuple[list[dict], str, str]:
    """Run the groups' calls in their types under `ncu`: labels of those that ran, its CSV, and what failed or ""."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ValueError("suite=counters needs Nsight Compute: no ncu on PATH")
    with tempfile.TemporaryDirectory() as folder:
        log, labels = Path(folder, "ncu.csv"), Path(folder, "labels.json")
        command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--nvtx", *options]
        command += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        command += [sys.executable, str(Path(__file__).with_name("profiled_calls.py")), str(labels)]
        command += [f"{group}={','.join(dtypes)}" for group, dtypes in groups.items()]
        done = subprocess.run([*command, "--select", select], capture_output=True, text=True, check=False)
        report = log.read_text() if log.exists() else ""
        if keep is not None:
            stem = Path(keep, "-".join(groups))
            stem.parent.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".csv").write_text(report)
            stem.with_suffix(".log").write_text(done.stdout + done.stderr)
        error = _reason(report, done.stdout + done.stderr) if done.returncode or not labels.exists() else ""
        return json.loads(labels.read_text()) if labels.exists() else [], report, error


def _reason(report: str, output: str) -> str:
    """The line that says why a profile failed."""
    if "ERR_NVGPUCTRPERM" in report + output:
        return "this user may not read the GPU's performance counters (ERR_NVGPUCTRPERM)"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    errors += [line for line in report.splitlines() if line.startswith("==ERROR==")]
    return (errors or lines or ["no output"])[0]


def parse(report: str) -> list[dict]:
    """Launches in `ncu`'s CSV of its raw page: {"call": index of the label, "kernel": name, metric: value}.

    Raises:
        ValueError: there is no table, or a launch lies outside the ranges of profiled_calls.py.
    """
    lines = report.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu profiled no launch")
    header, _, *rows = csv.reader(lines[start:])  # the second line has units
    rows = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    ranges = next((column for column in header if "Push/Pop_Range" in column), None)
    launches = []
    for row in rows:
        found = RANGE_NAME.search(row.get(ranges, ""))
        if not found:
            raise ValueError(f"ncu names no range of the launch {row['Kernel Name']}")
        values = {column: _number(row[column]) for column in header if "__" in column}
        launches.append({"call": int(found[1]), "kernel": kernel_name(row["Kernel Name"]), **values})
    return launches


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "no data", or an attribute that is a name
        return None


def kernel_name(signature: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters: of CUTLASS's wrapper, what it wraps."""
    found = re.search(r"(\w+)[<(]", signature)
    if found and found[1] in ("Kernel", "Kernel2"):
        found = re.search(r"Kernel2?<(?:[\w]+::)*(\w+)", signature)
    return found[1] if found else signature.split()[-1]


def reduce(labels: Sequence[dict], launches: Sequence[dict]) -> list[dict]:
    """The rows: one a launch; in the group winograd one a call and kernel, in direct one a layer and dtype."""
    rows = []
    for i, label in enumerate(labels):
        own = [launch for launch in launches if launch["call"] == i]
        if label["group"] == "winograd":
            for kernel in dict.fromkeys(launch["kernel"] for launch in own):
                same = [launch for launch in own if launch["kernel"] == kernel]
                rows.append({**label, "launches": len(same), **_launch_columns(_together(same))})
        elif label["group"] != "direct":
            rows += [{**label, **_launch_columns(launch)} for launch in own]
    return rows + _efficiencies(labels, launches)


def _together(launches: Sequence[dict]) -> dict:
    """Launches as one: sums of clocks and time, and the rest weighted by the clocks."""
    cycles = _cycles(launches)
    numbers = [metric for metric, value in launches[0].items() if isinstance(value, float)]
    weighted = {m: sum((launch[m] or 0.0) * launch[CYCLES] for launch in launches) / cycles for m in numbers}
    sums = {metric: sum(launch[metric] for launch in launches) for metric in (CYCLES, NANOSECONDS)}
    return {**launches[0], **weighted, **sums}


def _launch_columns(launch: dict) -> dict:
    return {
        "kernel": launch["kernel"],
        "us": round(1e-3 * launch[NANOSECONDS], 1),
        "cycles": round(launch[CYCLES]),
        **{column: _rounded(launch.get(metric)) for column, metric in SHARES.items()},
        "l2_tbps": round(1e-12 * launch[L2_BYTES], 2),
        "stalls": _stalls(launch),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _stalls(launch: dict, most: int = 3) -> str:
    """What a warp waits for longest, as shares of its time; the issue of its own instructions is no wait."""
    found = {STALL.fullmatch(metric)[1]: value or 0.0 for metric, value in launch.items() if STALL.fullmatch(metric)}
    total = sum(found.values())
    longest = sorted(found.keys() - {"selected"}, key=lambda reason: (-found[reason], reason))[:most]
    return ", ".join(f"{reason.replace('_', ' ')} {100 * found[reason] / total:.0f} %" for reason in longest)


def _efficiencies(labels: Sequence[dict], launches: Sequence[dict]) -> list[dict]:
    """One row for each layer and dtype: ours, and the fastest of the peer's calls."""
    calls: dict[tuple, list] = {}
    for i, label in enumerate(labels):
        own = [launch for launch in launches if launch["call"] == i]
        if label["group"] == "direct" and own:
            calls.setdefault((label["layer"], label["dtype"]), []).append((label, own))
    rows = []
    for (label, own), *peers in calls.values():
        if not peers:  # the program ended before the first
            continue
        peer, theirs = min(peers, key=lambda call: _cycles(call[1]))
        rows.append(
            {
                **{column: value for column, value in label.items() if column != "side"},
                **_call_columns(label, own),
                "peer": peer["side"],
                **{f"peer_{column}": value for column, value in _call_columns(peer, theirs).items()},
            }
        )
    return rows


def _cycles(launches: Sequence[dict]) -> float:
    return sum(launch[CYCLES] for launch in launches)


def _call_columns(label: dict, launches: Sequence[dict]) -> dict:
    """A call's launches together: sums, and shares weighted by their clocks."""
    call, longest = _together(launches), max(launch[CYCLES] for launch in launches)
    return {
        "kernels": " + ".join(launch["kernel"] for launch in launches),
        "us": round(1e-3 * call[NANOSECONDS], 1),
        "cycles": round(call[CYCLES]),
        "computational_efficiency": round(label["macs"] / (call[CYCLES] * label["macs_per_clock"]), 4),
        "longest_efficiency": round(label["macs"] / (longest * label["macs_per_clock"]), 4),
        **{column: _rounded(call[metric]) for column, metric in FEW_SHARES.items()},
    }
