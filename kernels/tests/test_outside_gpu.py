"""Stems and downsampling layers on a GPU, against float64 and PyTorch's own 16-bit layers."""

import pytest
import torch
from cases import guarded, guards_intact, worst_ratio
from patch_cases import (
    Patch,
    as_one_product,
    in_one_launch,
    module,
    multiply,
    network_cases,
    patch_cases,
    patch_inputs,
    run,
)
from torch import Tensor

import convfirst_kernels as ck
from convfirst_kernels import outside

pytestmark = pytest.mark.gpu


def computed(case: Patch, seed: int, one_launch: bool = False, launch=run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the kernels' result, float64's and PyTorch's; memory that the kernels get was NaN before."""
    x, network = patch_inputs(case, seed), module(case, seed + 1).cuda()
    images = max(1, (1 << 24) // x[0].numel())
    truth = torch.cat([network(x[i : i + images].double()) for i in range(0, x.shape[0], images)])
    network = network.to(x.dtype)
    parts = outside.read_outside(network)
    reason = outside.refusal(parts, x, x.dtype)
    if reason is not None:
        pytest.skip(reason)
    packed, peer = parts.pack(x.dtype), network(x)
    poison = [torch.full_like(peer, float("nan")) for _ in range(2)]
    del poison
    result = launch(case, parts, packed, x, one_launch)
    assert torch.equal(result, launch(case, parts, packed, x, one_launch))
    return x, result, truth, peer


@pytest.mark.parametrize("case", patch_cases() + network_cases(), ids=str)
def test_error(case, seed):
    x, result, truth, peer = computed(case, seed)
    assert worst_ratio(result, truth, peer) <= 1
    if case.layout == "channels_last":
        assert guards_intact(x)


@pytest.mark.parametrize("case", in_one_launch(), ids=str)
def test_downsampling_in_one_launch(case, seed):
    x, result, truth, peer = computed(case, seed, one_launch=True)
    assert worst_ratio(result, truth, peer) <= 1
    assert guards_intact(x)


def product(case: Patch, seed: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`computed` of the kernel that takes the norm out of the product."""
    reason = outside._uncovered("downsample_gemm", case.channels, 2 * case.channels, 0)
    if reason:
        pytest.skip(reason)
    return computed(case, seed, launch=lambda _, parts, packed, x, __: multiply(parts, packed, x, tile))


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
@pytest.mark.parametrize("case", as_one_product(), ids=str)
def test_downsampling_as_one_product(case, tile, seed):
    if tile == 4 and 2 * case.channels % 192:
        pytest.skip("its columns do not divide the result's")
    x, result, truth, peer = product(case, seed, tile)
    assert worst_ratio(result, truth, peer) <= 1
    assert guards_intact(x)


@pytest.mark.parametrize("case", [case for case in network_cases() if case.kind == "downsample"], ids=str)
def test_downsampling_of_networks_as_one_product(case, seed):
    _, result, truth, peer = product(case, seed, 0)
    assert worst_ratio(result, truth, peer) <= 1


def test_one_product_in_a_graph_and_on_a_side_stream(seed):
    case = Patch("downsample", 128, 16, 28, 28)
    x, network = patch_inputs(case, seed), module(case, seed).cuda().half()
    parts = outside.read_outside(network)
    packed = parts.pack(x.dtype)
    expected = multiply(parts, packed, x)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = multiply(parts, packed, x)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        # Each launch's input is the result of the one before it, which may still be running when it starts.
        inputs = [x.clone()]
        for _ in range(8):
            inputs.append(x + 0 * multiply(parts, packed, inputs[-1]).mean())
        captured = multiply(parts, packed, inputs[-1])
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(on_stream, expected) and torch.equal(captured, expected)


@pytest.mark.parametrize("case", [Patch("stem", 64, 2, 33, 40), Patch("downsample", 64, 3, 9, 14)], ids=str)
def test_portable_kernels_on_this_device(case, seed):
    with ck.force_path("sm80"):
        _, result, truth, peer = computed(case, seed, one_launch=True)
    assert worst_ratio(result, truth, peer) <= 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, side, classes", [(1, 7, 1000), (3, 1, 10), (4, 9, 21)])
@pytest.mark.parametrize("channels", [256, 512, 768, 1024])
def test_head(channels, batch, side, classes, dtype, seed):
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(seed)
    network = layers.NormMlpClassifierHead(channels, classes).eval().requires_grad_(False)
    for tensor in network.parameters():
        tensor.normal_(0, 0.2 if tensor.dim() == 1 else channels**-0.5)
    network.norm.weight += 1
    network = network.cuda().to(dtype)
    x = guarded(batch, channels, side, side, dtype, "cuda")
    x.copy_(torch.randn(x.shape, device="cuda") + 0.3)
    parts = outside.read_head(network)
    packed, peer = parts.pack(dtype), network(x)
    result = parts.launch(x, packed)
    truth = network.double()(x.double())
    assert torch.equal(result, parts.launch(x, packed)) and guards_intact(x)
    as_maps = (t[:, :, None, None] for t in (result, truth, peer))
    assert worst_ratio(*as_maps) <= 1


@pytest.mark.parametrize("kind", ["stem", "patch_stem", "downsample"])
def test_graph_and_side_stream(kind, seed):
    case = Patch(kind, 64, 2, 33, 40)
    x, network = patch_inputs(case, seed), module(case, seed).cuda().half()
    parts = outside.read_outside(network)
    packed = parts.pack(x.dtype)
    expected = parts.launch(x, packed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = parts.launch(x, packed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = parts.launch(x, packed)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(on_stream, expected) and torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_the_tensors_device(seed):
    case = Patch("stem", 64, 1, 32, 32)
    x, network = patch_inputs(case, seed, device="cuda:1"), module(case, seed).to("cuda:1").half()
    parts = outside.read_outside(network)
    assert parts.launch(x, parts.pack(x.dtype)).device == x.device


def test_an_empty_batch():
    for kind, shape in (("stem", (0, 64, 2, 2)), ("downsample", (0, 128, 4, 4))):
        case = Patch(kind, 64, 1, 8, 8)
        network = module(case, 0).cuda().half()
        parts = outside.read_outside(network)
        x = torch.empty(0, *patch_inputs(case, 0).shape[1:], device="cuda", dtype=torch.float16)
        assert parts.launch(x.contiguous(memory_format=torch.channels_last), parts.pack(x.dtype)).shape == shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["convfirst_tiny", "convnext_tiny"])
def test_accelerated_network(name):
    timm = pytest.importorskip("timm")
    pytest.importorskip("convfirst.models")
    network = timm.create_model(name, num_classes=10).cuda().half().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 224, 224, device="cuda", dtype=torch.float16)
    expected = network(x)
    report = ck.accelerate(network, kernels="required")
    assert [row.swapped for row in report.outside] == [True] * 4, str(report)
    torch.testing.assert_close(network(x), expected, rtol=2e-2, atol=2e-2)
