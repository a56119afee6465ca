"""Benchmark suite of hardware counters: what each launch keeps busy, and maxDNN's computational efficiency.

Nsight Compute's `ncu` profiles profiled_calls.py once for each group, at the clocks as they come and with caches
emptied before each launch; its CSV is reduced here. Groups and their rows:

    blocks      each launch of the blocks of ConvFirst-T and ConvNeXt-T at batch 128
    portable    the same on the portable path
    direct      forward passes of AlexNet's and Overfeat's layers, ours and cuDNN's, one row for each layer and dtype
    winograd    each launch of our Winograd kernels on layers of VGG-E

`computational_efficiency` is useful multiply-adds over elapsed clocks of the multiprocessors (sm__cycles_elapsed.max,
summed over the call's launches) times the multiply-adds a clock of the unit that ours uses; the peer's goes beyond 1
where its algorithm multiplies less than direct convolution does. The peer is cuDNN in the layout, NHWC or NCHW, in
which it takes fewer clocks.
"""

import csv
import json
import os
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
# A group's types, and the options that choose its counters: each section and throughput costs replays of the launch.
GROUPS = {
    "blocks": (SIXTEEN_BITS, ("--section", "WarpStateStats"), (*SHARES.values(), L2_BYTES)),
    "portable": (("float16",), ("--section", "WarpStateStats"), (*SHARES.values(), L2_BYTES)),
    "direct": (("float16", "float32"), (), tuple(SHARES.values())[:4]),
    "winograd": (("float16", "float32"), ("--section", "WarpStateStats"), (*SHARES.values(), L2_BYTES)),
}


def counters(
    groups: Sequence[str] = tuple(GROUPS),
    select: str = "",
    dtypes: Sequence[str] | None = None,
    keep: str | None = None,
) -> Iterator[dict]:
    """Rows of each group as it has been profiled.

    Args:
        groups: of GROUPS.
        select: regular expression over names of blocks or layers.
        dtypes: of those that a group has; by default all.
        keep: a folder for the profiler's CSV, <group>.csv, and for what the program printed, <group>.log.

    Raises:
        ValueError: an option is wrong, `ncu` is missing, may not read counters, or fails; the message is one line.
    """
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise ValueError(f"groups={sorted(unknown)}; accepted: {', '.join(GROUPS)}")
    for group in groups:
        chosen = [dtype for dtype in GROUPS[group][0] if dtypes is None or dtype in dtypes]
        if not chosen:
            continue
        labels, launches = profile(group, select, chosen, keep)
        for row in reduce(group, labels, launches):
            print(json.dumps(row), flush=True)
            yield row


def profile(group: str, select: str, dtypes: Sequence[str], keep: str | None = None) -> tuple[list[dict], list[dict]]:
    """Run a group's calls under `ncu`: their labels, and launches as `parse` gives them."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ValueError("suite=counters needs Nsight Compute: no ncu on PATH")
    _, sections, metrics = GROUPS[group]
    with tempfile.TemporaryDirectory() as folder:
        log, labels = Path(folder, f"{group}.csv"), Path(folder, "labels.json")
        command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--nvtx", *sections]
        command += ["--metrics", ",".join((CYCLES, NANOSECONDS, *metrics)), "--csv", "--page", "raw"]
        command += ["--print-units", "base", "--log-file", str(log), sys.executable]
        command += [str(Path(__file__).with_name("profiled_calls.py")), group, str(labels)]
        command += ["--select", select, "--dtypes", *dtypes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        report = log.read_text() if log.exists() else ""
        if keep is not None:
            os.makedirs(keep, exist_ok=True)
            Path(keep, f"{group}.csv").write_text(report)
            Path(keep, f"{group}.log").write_text(done.stdout + done.stderr)
        if done.returncode or not labels.exists():
            raise ValueError(f"ncu, group {group}: {_reason(report, done.stdout + done.stderr)}")
        return json.loads(labels.read_text()), parse(report)


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


def reduce(group: str, labels: Sequence[dict], launches: Sequence[dict]) -> list[dict]:
    """The group's rows."""
    if group == "direct":
        return _efficiencies(labels, launches)
    return [{"group": group, **labels[launch["call"]], **_launch_columns(launch)} for launch in launches]


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
    """One row for each of our calls, with the faster of the peer's calls that follow it."""
    calls = [(label, [launch for launch in launches if launch["call"] == i]) for i, label in enumerate(labels)]
    rows = []
    for i, (label, own) in enumerate(calls):
        if label["side"] != "ours":
            continue
        key = label["layer"], label["dtype"]
        peers = [call for call in calls[i + 1 :] if (call[0]["layer"], call[0]["dtype"]) == key]
        peer, theirs = min(peers, key=lambda call: _cycles(call[1]))
        rows.append(
            {
                "group": "direct",
                **{column: label[column] for column in ("layer", "N", "dtype", "variant", "macs", "macs_per_clock")},
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
    cycles = _cycles(launches)
    shares = {
        column: _rounded(sum(launch[metric] * launch[CYCLES] for launch in launches) / cycles)
        for column, metric in list(SHARES.items())[:4]
    }
    return {
        "kernels": " + ".join(launch["kernel"] for launch in launches),
        "us": round(1e-3 * sum(launch[NANOSECONDS] for launch in launches), 1),
        "cycles": round(cycles),
        "computational_efficiency": round(label["macs"] / (cycles * label["macs_per_clock"]), 4),
        **shares,
    }
