"""What "auto" and `accelerate` make of the measurements of Winograd's kernels, on a table made for the test."""

import copy
import json
import math

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
        (nn.Conv2d(3, 64, 3), "3 -> 64 channels in float32 were not measured to be faster than cuDNN"),
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


@pytest.fixture
def direct_on_a_cpu(monkeypatch):
    """Lets a swapped convolution take direct convolution for batches of 2, as on the GPU that was measured."""
    monkeypatch.setattr(measured, "faster", lambda dtype, batch, *_: "direct" if batch == 2 else None)
    monkeypatch.setattr(swap, "choose", lambda conv, x, dtype: swap._faster(dtype, x.shape[0], 14, 14, 64, 64))

    def swapped(frozen: bool = False) -> nn.Conv2d:
        conv = nn.Conv2d(64, 64, 3, padding=1).eval()
        conv.forward = swap.WinogradForward(conv, frozen)
        return conv

    return swapped


def own(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return nn.Conv2d.forward(conv, x)


@pytest.mark.parametrize(("algorithm", "operators"), [("direct", ["direct_conv2d"]), ("f2", [])])
def test_a_traced_program_does_not_transform_filters(direct_on_a_cpu, monkeypatch, algorithm, operators):
    monkeypatch.setattr(swap, "choose", lambda conv, x, dtype: algorithm)
    conv, x = direct_on_a_cpu().requires_grad_(False), torch.randn(2, 64, 14, 14).to(memory_format=torch.channels_last)
    graphs = []

    def noting(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "convfirst" in str(node.target)])
        return graph

    torch.compiler.reset()
    net = torch.compile(nn.Sequential(conv), fullgraph=True, backend=noting)
    torch.testing.assert_close(net(x), own(conv, x), atol=1e-5, rtol=1e-4)
    assert [[name.split(".")[1] for name in graph] for graph in graphs] == [operators]


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_sizes_are_told_from_symbolic_ones(dynamic):
    torch.compiler.reset()
    program = torch.compile(
        lambda x: x + (1 if all(map(swap._is_static, x.shape)) else 2), fullgraph=True, dynamic=dynamic, backend="eager"
    )
    assert [program(torch.zeros(n, 5))[0, 0].item() for n in (3, 8)] == [2 if dynamic else 1] * 2


def test_converted_weights_follow_what_changes_them(direct_on_a_cpu):
    """A step of a fused optimiser, which leaves version counters alone, and whatever forget() is called after."""
    conv = direct_on_a_cpu()
    x = torch.randn(2, 64, 14, 14).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(conv.parameters(), lr=1.0, fused=True)

    def agrees() -> bool:
        with torch.no_grad():
            return torch.allclose(conv(x), own(conv, x), atol=1e-4)

    assert agrees() and conv.forward.converted
    conv(x).sum().backward()
    optimizer.step()
    assert agrees()
    conv.weight.data.mul_(2)
    convfirst_kernels.forget(nn.Sequential(conv))
    assert agrees()
    with torch.no_grad():
        conv.weight.zero_()
    assert agrees()


def test_weights_made_in_inference_mode_are_not_taken_for_unchanged(direct_on_a_cpu):
    with torch.inference_mode():
        conv = direct_on_a_cpu()
        x = torch.randn(2, 64, 14, 14).to(memory_format=torch.channels_last)
        conv(x)
        conv.load_state_dict(nn.Conv2d(64, 64, 3).state_dict())
        torch.testing.assert_close(conv(x), own(conv, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", ["input", "weight", "bias"])
def test_gradients_of_everything(direct_on_a_cpu, trained):
    conv = direct_on_a_cpu().requires_grad_(False)
    x = torch.randn(2, 64, 14, 14).to(memory_format=torch.channels_last)
    tensor = x if trained == "input" else getattr(conv, trained)
    tensor.requires_grad_()
    conv(input=x).sum().backward()
    assert tensor.grad is not None


def test_frozen_weights_follow_their_module_to_another_device(direct_on_a_cpu):
    conv = direct_on_a_cpu(frozen=True)
    x = torch.randn(2, 64, 14, 14).to(memory_format=torch.channels_last)
    with torch.no_grad():
        conv(x)
        filter, _ = conv.to("meta").forward.operands("direct", torch.float32, torch.device("meta"))
    assert filter.is_meta


def test_parameters_that_are_views_of_one_buffer(direct_on_a_cpu):
    conv = direct_on_a_cpu()
    buffer = torch.randn(1 + conv.weight.numel())
    conv.weight = nn.Parameter(buffer[1:].view(64, 3, 3, 64).permute(0, 3, 1, 2))
    filter, _ = conv.forward.operands("direct", torch.float32, torch.device("cpu"))
    assert conv.weight.data_ptr() % 16 != 0 and filter.data_ptr() % 16 == 0 and torch.equal(filter, conv.weight)


def test_nothing_was_measured_of_empty_batches():
    assert measured.faster("float32", 0, 56, 56, 64, 64) is None


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
    convfirst_kernels.accelerate(net)
    convfirst_kernels.accelerate(net, winograd=False)
    assert "forward" not in net.second.__dict__
