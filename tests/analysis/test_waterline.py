"""Roofline, waterline and the latency equation on numbers worked out by hand."""

import csv
import json
import math
from pathlib import Path

import pytest

from convfirst.analysis import Kernel, Waterline, decompose, device_names, efficiency, ideal_latency, load_device
from convfirst.analysis.devices import DTYPES, Ceilings
from convfirst.analysis.latency import (
    DATA,
    Accuracy,
    Measurement,
    Point,
    fastest,
    read_accuracies,
    read_published_latencies,
    read_results,
)
from convfirst.training.flops import _PEAKS

RESULTS = Path(__file__).parents[2] / "results"

# 100 FLOP/s and 10 bytes/s: the waterline lies at 10 FLOP a byte.
CEILINGS = Ceilings(flops=100.0, bandwidth=10.0, kind="measured", source="a toy")


def kernel(name: str, macs: int, moved: int) -> Kernel:
    return Kernel(name, macs, read_bytes=moved, write_bytes=0, weight_bytes=0, block=None)


def test_waterline_of_a_toy_sequence():
    deep, shallow, dry = kernel("norm", 0, 40), kernel("depthwise", 100, 80), kernel("matmul", 1000, 50)
    line = Waterline([deep, shallow, dry], CEILINGS)
    assert CEILINGS.waterline == 10
    assert [time.compute_s for time in line.times] == [0, 2, 20]
    assert [time.memory_s for time in line.times] == [4, 8, 5]
    assert [time.depth for time in line.times] == [math.inf, 4, 0.25]
    assert [time.under_water for time in line.times] == [True, True, False]
    assert [time.kernel.name for time in line.under_water] == ["depthwise", "norm"]  # 6 s lost, 4 s lost
    assert [time.lost_s for time in line.times] == [4, 6, 0]
    assert line.latency_s == 4 + 8 + 20
    assert line.lost_s == line.latency_s - line.compute_s == 10
    assert (line.macs, line.bytes, line.weight_bytes) == (1100, 170, 0)
    assert line.intensity == 2200 / 170 and line.depth == pytest.approx(10 * 170 / 2200)
    assert Waterline([deep], CEILINGS).depth == math.inf
    assert (Waterline([], CEILINGS).intensity, Waterline([], CEILINGS).depth) == (0, math.inf)
    assert line.efficiency == 22 / 32
    assert line.share_under_water == 12 / 32


def test_fusing_a_sequence_lifts_it_above_the_water():
    apart = Waterline([kernel("expand", 500, 120), kernel("project", 500, 120)], CEILINGS)
    fused = Waterline([kernel("both", 1000, 60)], CEILINGS)
    assert (apart.latency_s, len(apart.under_water)) == (24, 2)
    assert (fused.latency_s, len(fused.under_water), fused.efficiency) == (20, 0, 1)


def test_latency_equation():
    # ConvNeXt-T's 4.456 GMACs, 128 images, 989.4 TFLOP/s, in the 7.42166 ms of results/models-h200.json beside this
    assert ideal_latency(4.456e9, 989.4e12, 128) == pytest.approx(1.15296e-3, rel=1e-5)
    assert efficiency(4.456e9, 989.4e12, 7.42166e-3, 128) == pytest.approx(0.15535, rel=1e-4)


def point(macs: float, ms: float | None, batch: int = 2, peak: float = 1e12) -> Point:
    measured = None if ms is None else Measurement("m", 224, batch, "float16", ms, "eager", "here")
    return Point(Accuracy("m", "ResNet", 224, 80.0, "here"), int(macs), peak, measured)


def test_a_speedup_is_less_work_times_more_efficiency():
    ours, theirs = point(1e9, 10), point(2e9, 50)
    assert ours.efficiency == pytest.approx(0.4) and theirs.efficiency == pytest.approx(0.16)
    parts = decompose(ours, theirs)
    assert (parts.work, parts.efficiency) == (2, pytest.approx(2.5))
    assert parts.speedup == pytest.approx(50 / 10)
    with pytest.raises(ValueError, match="m has no measured latency"):
        decompose(point(1e9, None), theirs)
    with pytest.raises(ValueError, match=r"peaks differ: 2e\+12 and 1e\+12"):
        decompose(point(1e9, 10, peak=2e12), theirs)


@pytest.mark.parametrize("slug", ["a100", "a5000", "rtx-4090", "h100", "h200"])
def test_shipped_devices_say_where_their_numbers_come_from(slug):
    assert slug in device_names()
    device = load_device(slug)
    sheet = device.ceilings("float16", "datasheet")
    assert "NVIDIA" in sheet.source and sheet.kind == "datasheet"
    best = device.ceilings("float16")
    assert best.kind == ("measured" if slug in ("h100", "h200") else "datasheet")
    assert best.flops <= sheet.flops and best.bandwidth <= sheet.bandwidth
    # The trainer's table of peaks says the same.
    half, single = next(peaks for name, peaks in _PEAKS.items() if name in device.name) if slug != "a5000" else (0, 0)
    if half:
        assert half == pytest.approx(sheet.flops, rel=0.01)
        assert single == pytest.approx(device.ceilings("tfloat32", "datasheet").flops, rel=0.01)


@pytest.mark.parametrize("slug", device_names())
def test_shipped_measurements_are_those_of_the_results(slug):
    path, shipped = RESULTS / f"device-{slug}.json", load_device(slug).sheets.get("measured")
    if not path.exists():
        assert shipped is None, f"devices/{slug}.json has a measured sheet, but {path.name} was not kept"
        return
    results = json.loads(path.read_text())
    copy = f"copy `measured` of results/{path.name} into convfirst/analysis/devices/{slug}.json"
    assert shipped is not None, copy
    for key in ("bandwidth_tbps", "tflops"):
        assert shipped[key] == results["measured"][key], copy
    for origin in (results["device"], results["date"], results["commit"][:10]):
        assert origin in shipped["source"], f"{copy}, with device, date and commit in its source"
    # so that what the scripts take from results/ is what load_device has without it
    here, packaged = load_device(slug, RESULTS), load_device(slug)
    assert here.name == packaged.name and set(here.sheets) == set(packaged.sheets)
    for dtype in DTYPES:
        assert packaged.ceilings(dtype).kind == here.ceilings(dtype).kind == "measured"
        assert packaged.ceilings(dtype).waterline == here.ceilings(dtype).waterline


def test_own_measurements_win_over_the_shipped(tmp_path):
    own = {"bandwidth_tbps": 4.0, "tflops": {"float16": 700.0}, "source": "scripts/measure_device.py"}
    (tmp_path / "device-h200.json").write_text(json.dumps({"device": "NVIDIA H200", "measured": own}))
    (tmp_path / "device-b200.json").write_text(json.dumps({"device": "NVIDIA B200", "measured": own}))
    assert load_device("h200", tmp_path).ceilings().waterline == pytest.approx(700 / 4)
    assert load_device("h200", tmp_path).ceilings("bfloat16").kind == "datasheet"  # not among those measured
    assert load_device("b200", tmp_path).name == "NVIDIA B200"
    with pytest.raises(ValueError, match="device='k80' is unknown; accepted: a100, a5000, b200, h100, h200, rtx-4090"):
        load_device("k80", tmp_path)


def test_a_data_sheet_that_stands_in_for_a_measurement_says_so(tmp_path):
    own = {"bandwidth_tbps": 4.0, "tflops": {"float16": 700.0}, "source": "scripts/measure_device.py"}
    (tmp_path / "device-h200.json").write_text(json.dumps({"device": "NVIDIA H200", "measured": own}))
    device = load_device("h200", tmp_path)
    assert device.ceilings("float16").source == "scripts/measure_device.py"
    assert device.ceilings("bfloat16").source.endswith("; no measured bfloat16 for device=h200")
    assert load_device("a100").ceilings("float16").source.endswith("; no measured float16 for device=a100")
    assert "no measured" not in device.ceilings("bfloat16", "datasheet").source  # asked for


def test_another_gpu_of_the_same_short_name_gets_nothing_that_is_shipped(tmp_path):
    own = {"bandwidth_tbps": 1.9, "tflops": {"float16": 500.0}, "source": "scripts/measure_device.py"}
    (tmp_path / "device-h100.json").write_text(json.dumps({"device": "NVIDIA H100 PCIe", "measured": own}))
    device = load_device("h100", tmp_path)
    assert (device.name, set(device.sheets)) == ("NVIDIA H100 PCIe", {"measured"})
    with pytest.raises(ValueError, match="NVIDIA H100 PCIe has no datasheet ceilings for float16"):
        device.ceilings("float16", "datasheet")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: load_device("k80"), "device='k80' is unknown; accepted: a100, a5000, h100, h200, rtx-4090"),
        (lambda: load_device("a100").ceilings("int8"), "dtype='int8' is unknown; accepted: float16"),
        (lambda: load_device("a100").ceilings(kind="best"), "ceilings='best' is unknown; accepted: measured"),
        (lambda: load_device("a100").ceilings(kind="measured"), "A100 SXM4 80GB has no measured ceilings for float16"),
    ],
)
def test_unknown_devices_and_ceilings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_accuracy_has_a_source_and_convfirst_has_not_been_run():
    rows = read_accuracies()
    assert {row.family for row in rows} == {
        "ConvFirst", "ConvNeXt", "EfficientNet", "EfficientNetV2", "RegNet", "ResNet",
    }  # fmt: skip
    for row in rows:
        assert row.source
        assert (row.top1 is None) == (row.family == "ConvFirst")
        assert row.family == "ConvFirst" and "none published" in row.source or 70 < row.top1 < 90


def test_a_row_without_a_source_is_refused(tmp_path):
    path = tmp_path / "accuracy.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["model", "family", "image_size", "top1", "source"], ["x", "ResNet", 224, 80, ""]])
    with pytest.raises(ValueError, match="accuracy.csv:2: x has no source"):
        read_accuracies(path)


def test_published_latencies_are_of_the_accuracies_models():
    models = {(row.model, row.image_size) for row in read_accuracies(DATA / "accuracy.csv")}
    published = read_published_latencies("rtx-4090")
    assert published and {(m.model, m.image_size) for m in published} <= models
    tiny = fastest(published, "convnext_tiny", 224)
    assert tiny.ms == pytest.approx(152.87, abs=0.01)  # timm's infer_step_time: 152.852
    assert read_published_latencies("h200") == []


def test_results_give_our_times_and_the_peers(tmp_path):
    about = {"device": "GPU", "date": "2026-01-02"}
    row = {"name": "a", "batch": 128, "dtype": "float16", "path": "sm90", "ours_ms": 2.0, "peer": "b inductor"}
    slow = {"name": "a", "batch": 64, "dtype": "float16", "path": "inductor", "ms": 1.5, "image_size": 224}
    (tmp_path / "models-gpu.json").write_text(json.dumps({**about, "rows": [{**row, "peer_ms": 5.0}]}))
    (tmp_path / "throughput.json").write_text(json.dumps({**about, "rows": [slow, {**slow, "kernels": "required"}]}))
    found = read_results(sorted(tmp_path.iterdir()))
    assert [(m.model, m.ms, m.path) for m in found] == [
        ("a", 2.0, "fused blocks, sm90"), ("b", 5.0, "inductor"), ("a", 1.5, "inductor"),
        ("a", 1.5, "inductor, kernels=required"),
    ]  # fmt: skip
    assert [(m.fused, m.way) for m in found] == [
        (True, "fused"), (False, "Inductor"), (False, "Inductor"), (True, "fused"),
    ]  # fmt: skip
    # Only a row that names no size is taken to be at one.
    assert [m.image_size for m in found] == [224] * 4
    unnamed = [m.source.endswith("name no image size and are taken to be at 224 px") for m in found]
    assert unnamed == [True, True, False, False]
    assert fastest(found, "a", 224).ms == 2.0  # 128 images, against 64 in 1.5 ms
    assert fastest(found, "a", 224, fused=False).ms == 1.5 and fastest(found, "b", 224, fused=True) is None
    assert fastest(found, "a", 224, batch=64).ms == 1.5 and fastest(found, "b", 224, batch=64).ms == 5.0
    assert fastest(found, "a", 288) is None and fastest(found, "a", 224, ("bfloat16",)) is None
