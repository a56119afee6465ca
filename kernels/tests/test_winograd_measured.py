"""What "auto" and `accelerate` make of the measurements of Winograd's kernels, on a table made for the test."""

import copy
import json
import math
import operator

import pytest
import torch
from torch import nn

import convfirst_kernels
from convfirst_kernels.winograd import measured, swap
from convfirst_kernels.winograd.measured import Row

ROWS = (
    Row("float32", 64, 64, 56, 8, 1.0, 0.6, 0.5),
    Row("float32", 512, 512, 7, 8, 1.0, 0.6, 0.7),
    Row("float32", 256, 256, 14, 8, 1.0, 0.98, 1.2),
    Row("float16", 64, 64, 56, 1, 1.0, 0.9, math.inf),
    Row("float16", 256, 256, 56, 1, 1.0, 1.9, math.inf, 0.7),
)


@pytest.fixture(autouse=True)
def a_table(monkeypatch):
    monkeypatch.setattr(measured, "table", lambda: ROWS)
    measured.nearest.cache_clear()
    yield
    measured.nearest.cache_clear()


@pytest.mark.parametrize(
    ("problem", "algorithm"),
    [
        (("float32", 8, 56, 56, 64, 64), "f4"),
        (("float32", 16, 56, 56, 64, 128), "f4"),  # a factor of two away
        (("float32", 4, 80, 80, 96, 64), "f4"),
        (("float32", 8, 7, 7, 512, 512), "f2"),
        (("float32", 8, 14, 14, 256, 256), None),  # faster by less than the margin
        (("float32", 64, 56, 56, 64, 64), None),  # too far in pixels
        (("float32", 8, 56, 56, 8, 64), None),  # too far in channels
        (("float32", 512, 7, 7, 64, 64), None),  # as many pixels, but tiles half wasted
        (("float16", 1, 56, 56, 64, 64), "f2"),
        (("float16", 1, 56, 56, 256, 256), "direct"),
        (("bfloat16", 1, 56, 56, 64, 64), None),
    ],
)
def test_what_was_measured_to_be_faster(problem, algorithm):
    assert measured.faster(*problem) == algorithm


def test_which_algorithm_was_measured_to_be_faster():
    assert measured.fastest("float32", 8, 14, 14, 256, 256) == "f2"  # though not faster than cuDNN
    assert measured.fastest("float32", 8, 56, 56, 64, 64) == "f4"
    assert measured.fastest("float32", 8, 14, 14, 8, 8) is None


def test_rows_of_results(tmp_path, monkeypatch):
    row = {"dtype": "float32", "channels": 64, "outputs": 128, "side": 28, "N": 2, "peer_ms": 3.0}
    times = (("f2", 2.0), ("f4", 1.0), ("f2", 1.5), ("f2-fused", 0.5))  # the last is never taken unasked for
    rows = [{**row, "algorithm": a, "ours_filtered_ms": ms} for a, ms in times]
    rows.append({**row, "dtype": "float16", "algorithm": "f2", "ours_filtered_ms": 0.5})
    results = {"suite": "winograd", "device": "a GPU", "date": "2026-01-02", "commit": "0123", "rows": rows}
    rows.append({**row, "dtype": "bfloat16", "algorithm": "direct", "ours_filtered_ms": 0.25})
    expected = [
        ("bfloat16", 64, 128, 28, 2, 3.0, math.inf, math.inf, 0.25),
        ("float16", 64, 128, 28, 2, 3.0, 0.5, math.inf, math.inf),
        ("float32", 64, 128, 28, 2, 3.0, 1.5, 1.0, math.inf),
    ]
    assert measured.rows_of(results) == expected
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    measured.main([str(tmp_path / "results.json")])
    written = json.loads(measured.FILE.read_text())
    assert [tuple(row) for row in written["rows"]] == expected
    assert written["sources"] == [{"device": "a GPU", "date": "2026-01-02", "commit": "0123"}]


def test_the_table_is_made_of_all_results(tmp_path, monkeypatch):
    row = {"channels": 64, "outputs": 128, "side": 28, "N": 2, "peer_ms": 3.0, "algorithm": "f2"}
    about = {"suite": "winograd", "device": "a GPU", "date": "2026-01-02"}
    for name, rows in {"a": [("float32", 1.0), ("float16", 2.0)], "b": [("float32", 1.5)]}.items():
        rows = [{**row, "dtype": dtype, "ours_filtered_ms": ms} for dtype, ms in rows]
        (tmp_path / f"winograd-{name}.json").write_text(json.dumps({**about, "commit": name, "rows": rows}))
    (tmp_path / "winograd-error.json").write_text(json.dumps({"suite": "winograd_error", "rows": [{"channels": 1}]}))
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    measured.main([])
    written = json.loads(measured.FILE.read_text())
    assert [(row[0], row[6]) for row in written["rows"]] == [("float16", 2.0), ("float32", 1.5)]
    assert [source["commit"] for source in written["sources"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("conv", "answer"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), ""),
        (nn.Conv2d(64, 64, 3, stride=2), None),
        (nn.Conv2d(64, 64, 1), None),
        (nn.Linear(3, 3), None),
        (nn.Conv2d(64, 64, 3, groups=8), "groups=8; the kernels convolve all channels with all"),
        (nn.Conv2d(64, 64, 3, dilation=2), "dilation=(2, 2); supported is 1"),
        (nn.Conv2d(64, 64, 3, padding=(0, 1)), "padding=(0, 1) of zeros; supported are 0, 1 and 2 zeros"),
        (nn.Conv2d(64, 64, 3, padding="same"), "padding='same' of zeros; supported are 0, 1 and 2 zeros"),
        (nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), "padding=(1, 1) of reflect"),
        (nn.Conv2d(3, 64, 3), "3 -> 64 channels were not measured to be faster than cuDNN"),
    ],
)
def test_which_convolutions(conv, answer):
    reason = swap.read_convolution(conv)
    assert reason == answer if not answer else reason.startswith(answer)


def test_runs_its_own_code_on_a_cpu():
    conv = nn.Conv2d(64, 64, 3, padding=1).eval()
    x = torch.randn(1, 64, 8, 8)
    expected = conv(x)
    conv.forward = swap.WinogradForward(conv, frozen=False)
    assert torch.equal(conv(x), expected)
    assert torch.equal(copy.deepcopy(conv)(x), expected)


@pytest.mark.parametrize(("algorithm", "operators"), [("direct", ["direct_conv2d"]), ("f2", [])])
def test_a_traced_program_does_not_transform_filters(monkeypatch, algorithm, operators):
    """It is whole, and of one batch size, as the choice is."""
    monkeypatch.setattr(measured, "faster", lambda dtype, batch, *_: algorithm if batch == 2 else None)
    monkeypatch.setattr(
        swap, "choose", lambda conv, x, dtype: swap._faster(dtype, operator.index(x.shape[0]), 14, 14, 64, 64)
    )
    conv = nn.Conv2d(64, 64, 3, padding=1).eval().requires_grad_(False)
    x = torch.randn(2, 64, 14, 14).to(memory_format=torch.channels_last)
    expected = conv(x)
    conv.forward = swap.WinogradForward(conv, frozen=False)
    graphs = []

    def noting(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "convfirst" in str(node.target)])
        return graph

    torch.compiler.reset()
    net = torch.compile(nn.Sequential(conv), fullgraph=True, backend=noting)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net(torch.cat([x, x])), torch.cat([expected, expected]))
    assert [[name.split(".")[1] for name in graph] for graph in graphs] == [operators, []]


def test_accelerate_finds_what_it_may_replace():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
            self.strided = nn.Conv2d(64, 64, 3, stride=2, padding=1)

        def forward(self, x):
            return self.strided(self.second(self.first(x)))

    net = Net().eval()
    x = torch.randn(1, 3, 8, 8)
    expected = net(x)
    report = convfirst_kernels.accelerate(net, winograd=False)
    assert not report.convolutions and "forward" not in net.second.__dict__
    report = convfirst_kernels.accelerate(net)
    assert [(row.name, row.swapped) for row in report.convolutions] == [("first", False), ("second", True)]
    assert "second" in str(report) and "were not measured to be faster" in str(report)
    assert torch.equal(net(x), expected)
    assert isinstance(net.second.forward, swap.WinogradForward) and "forward" not in net.first.__dict__
    assert list(net.state_dict()) == list(Net().state_dict())
    report.undo()
    assert "forward" not in net.second.__dict__
