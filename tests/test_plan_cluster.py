"""The arithmetic of the cluster plan, by hand, and README's copy of it."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def plan_cluster(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    import plan_cluster

    return plan_cluster


@pytest.fixture
def model(plan_cluster):
    return plan_cluster.Model("model", parameters=25e6, images_per_s=1000, source="")


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


def test_scaling_ends_later_with_half_the_bytes(plan_cluster, model):
    ends = [plan_cluster.limit(model, 12.5e9, bytes_each) for bytes_each in (4, 2)]
    assert 8 <= ends[0] < ends[1] <= 4096
    assert plan_cluster.plan(model, ends[0], 12.5e9)["efficiency"] >= 0.9
    assert plan_cluster.plan(model, ends[0] + 8, 12.5e9)["efficiency"] < 0.9


def test_the_readme_holds_the_plan_of_the_results():
    command = [sys.executable, str(REPOSITORY / "scripts/plan_cluster.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
