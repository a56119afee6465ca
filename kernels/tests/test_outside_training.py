"""Stems and downsampling layers in training, on a CPU: gradients against autograd through the layer, refusals, use."""

import copy

import pytest
import torch
from patch_cases import Patch, module

import convfirst_kernels as ck
from convfirst_kernels import outside, outside_training

timm = pytest.importorskip("timm")
pytest.importorskip("convfirst.models")
CASES = [
    Patch("stem", 32, 4, 32, 33),
    Patch("stem", 64, 3, 7, 5, activation="gelu"),
    Patch("patch_stem", 48, 4, 46, 33),
    Patch("downsample", 32, 4, 17, 18),
    Patch("downsample", 24, 3, 4, 9),
]


def trained(case: Patch):
    """The module with gradients asked for, and x."""
    network = module(case, 1).train().requires_grad_().to(memory_format=torch.channels_last)
    channels = case.channels if case.kind == "downsample" else 3
    x = torch.randn(case.batch, channels, case.height, case.width, dtype=torch.float64)
    return network, x.contiguous(memory_format=torch.channels_last).requires_grad_(case.kind == "downsample")


def gradients(y: torch.Tensor, network, x: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    leaves = [*network.parameters()] + ([x] if x.requires_grad else [])
    for leaf in leaves:
        leaf.grad = None
    (y * weights).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("least_rows", [1, 64, 1 << 20])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_layer(case, least_rows, monkeypatch):
    monkeypatch.setattr(outside_training, "LEAST_ROWS", least_rows)
    network, x = trained(case)
    expected = network(x)
    y = outside_training.forward(outside.read_outside(network), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(gradients(y, network, x), gradients(expected, network, x), strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.stride() == wanted.stride()  # DDP's buckets have the parameters' strides


@pytest.mark.parametrize("images, pixels, groups", [(256, 12544, 256), (256, 784, 64), (256, 49, 4), (3, 784, 1)])
def test_each_group_has_enough_rows(images, pixels, groups):
    assert outside_training._groups(images, pixels) == groups


def test_no_graph_break():
    network, x = trained(CASES[0])
    parts = outside.read_outside(network)
    compiled = torch.compile(lambda x: outside_training.forward(parts, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(x), network, x), gradients(network(x), network, x))


def test_refusals():
    def reason(case: Patch, x: torch.Tensor | None = None, kernels="reference", dtype=torch.float64):
        network, given = trained(case)
        return outside_training.refusal(outside.read_outside(network), given if x is None else x, dtype, kernels)

    assert reason(CASES[0]) is None and reason(CASES[3]) is None
    assert "batch norm" in reason(Patch("stem", 32, 1, 8, 8, norm="batchnorm"))
    assert "on cpu; the products take" in reason(CASES[0], kernels="auto", dtype=torch.float16)
    assert "at least 4 pixels" in reason(CASES[2], torch.zeros(1, 3, 3, 8))
    assert "gradient of the images" in reason(CASES[0], torch.zeros(1, 3, 8, 8, requires_grad=True))


@pytest.mark.parametrize("name", ["convfirst_atto", "convnext_atto"])
def test_accelerated_networks_take_them(name, monkeypatch):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10, ls_init_value=0.5).double().train()
    plain, x = copy.deepcopy(network), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    calls = []
    forward = outside_training.forward
    monkeypatch.setattr(outside_training, "forward", lambda *arguments: (calls.append(1), forward(*arguments))[1])
    ck.accelerate(network, kernels="reference")
    network(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert len(calls) == 4
    for (key, found), wanted in zip(network.named_parameters(), plain.parameters(), strict=True):
        # float32 vectors inside of the blocks
        torch.testing.assert_close(
            found.grad, wanted.grad, rtol=1e-4, atol=1e-5 * wanted.grad.abs().max().item(), msg=key
        )
