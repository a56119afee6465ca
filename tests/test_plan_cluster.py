"""The arithmetic of the cluster plan, by hand, and README's copy of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from convfirst.app import plan_cluster as plan_cluster_module

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def plan_cluster():
    return plan_cluster_module


@pytest.fixture
def model(plan_cluster):
    return plan_cluster.Model("model", parameters=25e6, rates={64: 1000}, source="")


def test_a_ring_sends_twice_the_bytes(plan_cluster, monkeypatch):
    monkeypatch.setattr(plan_cluster, "LATENCY_S", 1e-3)
    # 100 MB over 4 nodes of 1 GB/s: 2 * 3/4 * 0.1 s, and 6 hops
    assert plan_cluster.all_reduce_s(25e6, 4, nodes=4, bandwidth=1e9) == pytest.approx(0.15 + 0.006)
    assert plan_cluster.all_reduce_s(25e6, 4, nodes=1, bandwidth=1e9) == 0


def test_only_what_the_backward_pass_leaves_is_paid(plan_cluster, model, monkeypatch):
    monkeypatch.setattr(plan_cluster, "LATENCY_S", 0.0)
    # 64 images a GPU: 64 ms, 42.7 of them backward; 8 nodes: 175 MB
    fast = plan_cluster.plan(model, 64, bandwidth=10e9)
    assert (fast["compute"], fast["reduce"], fast["exposed"]) == pytest.approx((0.064, 0.0175, 0))
    assert fast["images_per_s"] == pytest.approx(64_000)
    slow = plan_cluster.plan(model, 64, bandwidth=1e9)
    assert slow["step"] == pytest.approx(0.064 + 0.175 - 0.064 * 2 / 3)
    assert slow["efficiency"] == pytest.approx(0.064 / slow["step"])


def test_the_rate_is_that_of_the_batch_that_a_gpu_gets(plan_cluster):
    model = plan_cluster.Model("model", 25e6, {256: 1000, 64: 800}, "")
    assert model.rate(64) == (800, False)
    assert model.rate(512) == (1000, False)  # two passes of 256
    assert model.rate(100) == (1000, True)  # the nearest larger one's
    assert model.rate(8) == (800, True)
    one = plan_cluster.plan(model, 64, bandwidth=1e15)
    assert one["compute"] == pytest.approx(64 / 800)
    assert one["efficiency"] == pytest.approx(0.8, rel=0.01)  # of 64 GPUs at batch 256
    assert plan_cluster.limit(model, 1e15) == 56  # 73 images: the bound is 256's rate


@pytest.fixture
def results(plan_cluster, tmp_path, monkeypatch):
    """Writes a result file for the plan of one model `net` to read; returns how."""
    monkeypatch.setattr(plan_cluster, "RESULTS", tmp_path)
    monkeypatch.setattr(plan_cluster, "MODELS", ("net",))

    def write(file: str, *rows: dict, **changes) -> None:
        common = {"name": "net", "data": "synthetic", "devices": 1, "precision": "bf16-mixed", "image_size": 224}
        content = {"device": "GPU", "date": "2026-01-01", "commit": "c" * 40, "rows": [common | row for row in rows]}
        (tmp_path / file).write_text(json.dumps(content | changes))

    write("cost.json", {"mparams": 8})
    return write


GRAPH = {"kernels": "required"}


def line_of(section: str, gpus: int) -> list[str]:
    return next(line for line in section.splitlines() if line.startswith(f"| net | {gpus} |")).split(" | ")


def test_a_batch_that_is_not_measured_is_said_and_marked(plan_cluster, results):
    results("training-throughput-graph.json", GRAPH | {"batch": 256, "images_per_s": 8000})
    section = plan_cluster.section()
    assert (
        "8,000 at batch 256 (the trainer with kernels and CUDA graphs, bf16-mixed, GPU, commit cccccccccc)" in section
    )
    assert "Not measured at batch 64 and 8: the next larger one's rate is an upper bound there." in section
    assert line_of(section, 8)[3:5] == ["8,000", "64.0"]
    assert line_of(section, 64)[3:5] == ["≤ 8,000", "≥ 8.0"]
    assert line_of(section, 512)[3:5] == ["≤ 8,000", "≥ 1.0"]


def test_added_rows_take_the_bounds_place(plan_cluster, results):
    rows = [{"batch": 256, "images_per_s": 8000}, {"batch": 64, "images_per_s": 4000, "other_commit": "d" * 10}]
    results("training-throughput-graph.json", *(GRAPH | row for row in rows))
    section = plan_cluster.section()
    assert "8,000 at batch 256, 4,000 at batch 64 (" in section
    assert "commit cccccccccc, dddddddddd)" in section
    assert "Not measured at batch 8:" in section
    assert line_of(section, 64)[3:6] == ["4,000", "16.0", "0.21 / 16.0 (50%)"]
    assert line_of(section, 512)[3] == "≤ 4,000"
    rows.append({"batch": 8, "images_per_s": 400})
    results("training-throughput-graph.json", *(GRAPH | row for row in rows))
    section = plan_cluster.section()
    assert "Not measured" not in section and "≤" not in section and "≥" not in section
    assert line_of(section, 512)[3:5] == ["400", "20.0"]


def test_the_first_file_that_has_a_model_is_taken(plan_cluster, results):
    results("training-throughput.json", {"batch": 256, "images_per_s": 1000})
    assert plan_cluster.models()[0].rates == {256: 1000}
    steps = GRAPH | {"batch": 256, "mode": "inductor"}
    two = steps | {"devices": 2, "images_per_s": 3000, "scaling": 1.9}
    results("training-h200.json", two)
    assert plan_cluster.models()[0].rates == {256: 1500}
    section = plan_cluster.section()
    assert "(bare steps with kernels, mode=inductor, on 2 GPUs, bf16-mixed" in section
    assert "net 95% on 2 GPUs (bare steps with kernels)" in section
    results("training-h200.json", steps | {"images_per_s": 1400}, two)
    assert plan_cluster.models()[0].rates == {256: 1400}  # of one GPU, though slower
    results("training-throughput-graph.json", GRAPH | {"batch": 256, "images_per_s": 2000, "data": "ffcv"})
    assert plan_cluster.models()[0].rates == {256: 1400}  # a loader's rate says nothing of the GPU's
    results("training-throughput-graph.json", GRAPH | {"batch": 256, "images_per_s": 2000})
    assert plan_cluster.models()[0].rates == {256: 2000}


def test_a_model_without_a_rate_ends_the_plan(plan_cluster, results):
    with pytest.raises(SystemExit, match="no training of net has been measured"):
        plan_cluster.models()


def test_loaders_are_planned_with_the_least_that_they_gave_in_training(plan_cluster, results):
    results("training-throughput-graph.json", GRAPH | {"batch": 256, "images_per_s": 8000})
    folder = {"data": "image_folder", "batch": 256, "num_workers": 16, "data_wait": 0.5}
    rows = [folder | {"images_per_s": 3200}, folder | {"images_per_s": 3200, "devices": 2}]
    rows.append(folder | {"images_per_s": 16, "data_wait": 0.01})  # the GPU was the slower one
    results("training-throughput.json", *rows)
    alone = {"name": "image_folder", "workers": 2, "cores": 2, "images_per_s": 100, "bytes_per_image": 92_550}
    results("data-loading.json", alone | {"processor": "CPU"})
    assert plan_cluster.planned_loaders() == {"image_folder": 100}
    section = plan_cluster.section()
    assert "planned with 100 images a core and second. Cores that a GPU needs: net 80; 16 feed 20% of net." in section
    assert "| image_folder | training net, 2 GPUs with 16 workers each, host of GPU | 100 |" in section
    assert "| image_folder | alone, 2 workers on 2 cores, CPU, 93 kB an image | 50 |" in section
    minutes = 300 * 1_281_167 / 60
    assert line_of(section, 8)[-2:] == [f"{minutes / 64_000:.0f}", f"{minutes / 8 / 1600:.0f} |"]


def test_scaling_ends_later_with_half_the_bytes(plan_cluster, model):
    ends = [plan_cluster.limit(model, 12.5e9, bytes_each) for bytes_each in (4, 2)]
    assert 8 <= ends[0] < ends[1] <= 4096
    assert plan_cluster.plan(model, ends[0], 12.5e9)["efficiency"] >= 0.9
    assert plan_cluster.plan(model, ends[0] + 8, 12.5e9)["efficiency"] < 0.9


def test_the_readme_holds_the_plan_of_the_results():
    command = [sys.executable, str(REPOSITORY / "scripts/plan_cluster.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
