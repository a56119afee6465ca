"""The suite `counters`: what it makes of Nsight Compute's CSV, and what it says where there are no counters."""

import ast
import csv
import importlib
import io
import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
METRICS = """
    gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed,%,26.79,44.29
    gpu__time_duration.sum,ns,"94,592","24,704"
    l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed,%,56.29,48.56
    lts__t_bytes.sum.per_second,byte/s,"2,163,255,074,424.90","6,942,038,860,103.63"
    lts__throughput.avg.pct_of_peak_sustained_elapsed,%,34.18,68.19
    sm__cycles_elapsed.max,cycle,"167,395","43,500"
    sm__issue_active.avg.pct_of_peak_sustained_elapsed,%,41.82,18.85
    sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_elapsed,%,16.93,2.55
    sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active,%,38.36,no data
    smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio,inst,0.34,5.48
    smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio,inst,0.24,2.14
    smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio,inst,0.74,2.88
    smsp__average_warps_issue_stalled_selected_per_issue_active.ratio,inst,1.00,1.00
    smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio,inst,0.97,0.72
    smsp__average_warps_issue_stalled_wait_per_issue_active.ratio,inst,1.53,1.59
"""
LABELS = [
    {"group": "blocks", "block": "convfirst-c64", "batch": 128, "dtype": "float16", "path": "sm90"},
    {"group": "portable", "block": "convfirst-c512", "batch": 128, "dtype": "float16", "path": "sm90"},
]


@pytest.fixture
def counters(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import counters

    return counters


def report() -> str:
    """An excerpt of the raw page: two launches below names and units, between lines that are no table."""
    names, units, *values = zip(*csv.reader(line.strip() for line in METRICS.strip().splitlines()), strict=True)
    ranges = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
    out = io.StringIO()
    table = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    table.writerow(["ID", ranges, "Kernel Name", *names])
    table.writerow(["", "", "", *units])
    for i, kernel in enumerate(("void conv_first_block_fwd_sm90<Traits<0, 64>>(P)", "void linear_fwd_sm90<L>(P, T)")):
        table.writerow([i, f'1  "<default domain>:counters.{i}:none:none:none:none:none"  ', kernel, *values[i]])
    return f"==PROF== Connected to process 7 (/usr/bin/python)\n{out.getvalue()}==PROF== Disconnected\n"


def test_launches_become_rows(counters):
    first, second = counters.reduce(LABELS, counters.parse(report()))
    assert first == {
        **LABELS[0],
        "kernel": "conv_first_block_fwd_sm90",
        "us": 94.6,
        "cycles": 167395,
        "tensor_pipe_percent": 38.4,
        "fma_pipe_percent": 16.9,
        "issue_slots_percent": 41.8,
        "shared_memory_percent": 56.3,
        "l2_percent": 34.2,
        "dram_percent": 26.8,
        "l2_tbps": 2.16,
        "stalls": "wait 32 %, short scoreboard 20 %, long scoreboard 15 %",
    }
    assert (second["group"], second["kernel"], second["us"]) == ("portable", "linear_fwd_sm90", 24.7)
    assert second["tensor_pipe_percent"] is None
    assert second["stalls"].startswith("barrier 40 %, long scoreboard 21 %")


def test_efficiency_is_of_the_calls_launches_and_the_fastest_peer(counters):
    about = {"group": "direct", "layer": "conv", "N": 1, "dtype": "float32", "macs": 10_000_000, "macs_per_clock": 100}
    sides = ("ours", "cudnn-nhwc", "cudnn-nchw")
    labels = [about | {"side": side, "variant": "v"} for side in sides]
    (one, _), (two, _) = (counters.parse(report()) for _ in range(2))
    launches = [
        {**launch, "call": call, counters.CYCLES: cycles, counters.SHARES["fma_pipe_percent"]: share}
        for launch, call, cycles, share in (
            (one, 0, 150_000, 80.0),
            (two, 0, 50_000, 0.0),
            (one, 1, 400_000, 50.0),
            (one, 2, 250_000, 40.0),
        )
    ]
    (row,) = counters.reduce(labels, launches)
    assert (row["computational_efficiency"], row["cycles"], row["fma_pipe_percent"]) == (0.5, 200_000, 60.0)
    assert row["longest_efficiency"] == pytest.approx(2 / 3, abs=1e-4)
    assert row["kernels"] == "conv_first_block_fwd_sm90 + conv_first_block_fwd_sm90"
    assert (row["peer"], row["peer_computational_efficiency"], row["peer_us"]) == ("cudnn-nchw", 0.4, 94.6)


def test_a_winograd_kernels_launches_are_one_row(counters):
    launches = [dict(launch, call=0, kernel="products") for launch in counters.parse(report())]
    (row,) = counters.reduce([{"group": "winograd", "layer": "5"}], launches)
    assert (row["launches"], row["us"], row["cycles"]) == (2, 119.3, 210_895)
    assert row["issue_slots_percent"] == pytest.approx((167_395 * 41.82 + 43_500 * 18.85) / 210_895, abs=0.06)


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void conv_norm_fwd_sm90<Traits<1, (int)2>>(P)", "conv_norm_fwd_sm90"),
        ("void <unnamed>::float_gemm<128>(const float *)", "float_gemm"),
        ("sm90_xmma_fprop_implicit_gemm_nhwc_cudnn", "sm90_xmma_fprop_implicit_gemm_nhwc_cudnn"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s16816fprop>(T1::Params)", "cutlass_tensorop_s16816fprop"),
        ("void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>(P)", "winogradForwardData4x4"),
    ],
)
def test_kernel_names_are_short(counters, signature, name):
    assert counters.kernel_name(signature) == name


def test_a_launch_without_a_call_is_refused(counters):
    with pytest.raises(ValueError, match="names no range of the launch"):
        counters.parse(report().replace("counters.1", "other"))
    with pytest.raises(ValueError, match="no launch"):
        counters.parse("==WARNING== No kernels were profiled.\n")


def fake_ncu(folder, monkeypatch, csv="", labels=(), status=0, printed=""):
    """A stand-in on PATH that writes its arguments, the CSV to --log-file, and the labels that the program would."""
    program = f"""#!{sys.executable}
import json, pathlib, sys
arguments = sys.argv[1:]
pathlib.Path({str(folder / "arguments.json")!r}).write_text(json.dumps(arguments))
pathlib.Path(arguments[arguments.index("--log-file") + 1]).write_text({csv!r})
print({printed!r}, file=sys.stderr)
pathlib.Path(next(a for a in arguments if a.endswith("labels.json"))).write_text({json.dumps(labels)!r})
sys.exit({status})
"""
    (folder / "ncu").write_text(program)
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_groups_of_the_same_counters_are_profiled_in_one_start(counters, tmp_path, monkeypatch):
    fake_ncu(tmp_path, monkeypatch, report(), LABELS)
    kept = tmp_path / "kept"
    rows = list(counters.counters(groups=["blocks", "portable"], select="c64", dtypes=["float16"], keep=str(kept)))
    assert [row["block"] for row in rows] == ["convfirst-c64", "convfirst-c512"]
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert arguments[:2] == ["--clock-control", "none"]
    assert arguments[-4:] == ["blocks=float16", "portable=float16", "--select", "c64"]
    assert (kept / "blocks-portable.csv").read_text() == report()


def test_what_keeps_counters_away_is_one_line(counters, tmp_path, monkeypatch):
    denied = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access GPU Performance Counters\n"
    fake_ncu(tmp_path, monkeypatch, denied, status=1)
    with pytest.raises(ValueError, match="may not read the GPU's performance counters"):
        list(counters.counters(groups=["blocks"]))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no ncu on PATH"):
        list(counters.counters(groups=["blocks"]))
    with pytest.raises(ValueError, match="accepted: blocks, portable, direct, winograd"):
        list(counters.counters(groups=["networks"]))


def test_what_ran_before_an_error_is_kept(counters, tmp_path, monkeypatch):
    failed = report() + "==ERROR== The application returned an error code (1).\n"
    fake_ncu(tmp_path, monkeypatch, failed, LABELS[:1], 1, "RuntimeError: wrong result")
    rows = []
    with pytest.raises(ValueError, match="^ncu, blocks, portable: RuntimeError: wrong result$"):
        for row in counters.counters(groups=["blocks", "portable"]):
            rows.append(row)
    assert [row["block"] for row in rows] == ["convfirst-c64"]


def test_a_selection_of_nothing_is_said(counters, tmp_path, monkeypatch):
    fake_ncu(tmp_path, monkeypatch, "==WARNING== No kernels were profiled.\n")
    with pytest.raises(ValueError, match="select='x' matches nothing of direct"):
        list(counters.counters(groups=["direct"], select="x"))


def test_the_profiled_process_names_what_its_suites_have(monkeypatch):
    """It runs on a GPU alone, so a function renamed beside it would be found there."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    tree = ast.parse((BENCHMARKS / "profiled_calls.py").read_text())
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = [(node.value.id, node.attr) for node in used if node.value.id in ("direct", "suites", "winograd")]
    assert len(used) > 10
    assert [name for name in used if not hasattr(importlib.import_module(name[0]), name[1])] == []
