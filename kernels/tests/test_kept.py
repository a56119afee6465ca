"""The forward that keeps the normalised convolution, on a CPU: it is the block, its gradients are the block's."""

import copy

import pytest
import torch
from cases import Case, inputs

import convfirst_kernels as ck
from convfirst_kernels import kept
from convfirst_kernels.planner import Problem

timm = pytest.importorskip("timm")
pytest.importorskip("convfirst.models")
operators = torch.ops.convfirst
CASES = [
    Case(Problem(2, 5, 6, 32, 128, 3, 8, "bfloat16", "silu", True), sample_scale=True),
    Case(Problem(2, 5, 6, 24, 96, 7, 1, "float16", "gelu", True), affine=False),
    Case(Problem(1, 4, 4, 32, 64, 3, 8, "float16", "relu", False), biases=False, layer_scale=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_block(case, seed):
    arguments = inputs(case, seed, device="cpu")
    with_gradient = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    if with_gradient[10] is not None:
        with_gradient[10].requires_grad_(False)
    leaves = [a for a in with_gradient if isinstance(a, torch.Tensor) and a.requires_grad]
    y, a, rstd = operators.conv_first_block_kept(*with_gradient)
    expected = operators.conv_first_block(*with_gradient)
    assert torch.equal(y, expected) and not a.requires_grad and not rstd.requires_grad
    grad = torch.randn_like(y)
    found, wanted = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, seed):
    arguments = inputs(case, seed, device="cpu")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(operators.conv_first_block_kept.default, arguments, test_utils=tests)
    y, a, rstd = operators.conv_first_block_kept(*arguments)
    mask = [argument is not None for argument in arguments[:10]] + [False]
    torch.library.opcheck(
        operators.conv_first_block_kept_backward.default, (torch.randn_like(y), a, rstd, *arguments, mask),
        test_utils=tests[:2],
    )  # fmt: skip


def test_a_network_takes_it_where_enabled(monkeypatch):
    torch.manual_seed(0)
    network = timm.create_model("convfirst_atto", num_classes=10).train()
    other, x = copy.deepcopy(network), torch.randn(2, 3, 64, 64)
    calls = []
    operator = operators.conv_first_block_kept
    monkeypatch.setattr("convfirst_kernels.acceleration.launch_kept", lambda *a: (calls.append(1), operator(*a))[1])
    gradients = []
    for model, enabled in ((network, True), (other, False)):
        monkeypatch.setattr(kept, "ENABLED", enabled)
        report = ck.accelerate(model, kernels="reference")
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(calls) == len(report.swapped)
    assert all(map(torch.equal, *gradients))


def test_nothing_is_kept_where_no_gradient_is_asked_for(monkeypatch):
    monkeypatch.setattr(kept, "ENABLED", True)
    monkeypatch.setattr("convfirst_kernels.acceleration.launch_kept", lambda *a: pytest.fail("kept"))
    network = timm.create_model("convfirst_atto", num_classes=10).eval()
    ck.accelerate(network, kernels="reference")
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
