"""Winograd's convolution and its gradients against float64 on a GPU: every path, tile, dtype and awkward shape."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import draws_of

import convfirst_kernels as ck
from convfirst_kernels import direct_conv2d, winograd_conv2d
from convfirst_kernels.winograd import kernels, measured, operators, reference, swap

pytestmark = pytest.mark.gpu
op = torch.ops.convfirst.winograd_conv2d

# Batch, height, width, channels, outputs, padding.
SHAPES = [
    (1, 28, 28, 64, 64, 1),
    (2, 13, 17, 20, 70, 0),
    (3, 9, 31, 33, 5, 2),
    (8, 14, 14, 128, 128, 1),
    (64, 7, 7, 24, 72, 1),
    (1, 64, 65, 3, 64, 1),
    (5, 1, 1, 7, 9, 1),
    (1, 14, 14, 512, 512, 1),
]
PLANS = ["", "fused", "split 32 64 1 96", "split 64 64 2 128", "split 128 64 3 256", "split 128 128 1 128"]
# How many times cuDNN's largest error in the same dtype ours may be; 16 bits round the factors after their transform.
BOUND = {(torch.float32, "f2"): 2, (torch.float32, "f4"): 30, (torch.float16, "f2"): 2, (torch.bfloat16, "f2"): 2}
ACTIVATE = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


@pytest.fixture(autouse=True)
def true_float32():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        with ck.force_path("sm80"):  # asks for the kernels of 16 bits too
            yield


def inputs(shape: tuple, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, height, width, channels, outputs, _ = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, device="cuda") * 2 - 1

    x = uniform(batch, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, uniform(outputs, channels, 3, 3).to(dtype), uniform(outputs)


def poison(elements: int) -> None:
    """Leaves NaNs in the memory that the caching allocator hands to the next tensors of that size."""
    torch.full((elements,), float("nan"), device="cuda")
    torch.full((1 << 24,), float("nan"), device="cuda")


def measures(y: torch.Tensor, exact: torch.Tensor, peer: torch.Tensor) -> torch.Tensor:
    """Largest error of ours, of cuDNN's, and largest value."""
    return torch.stack([value.abs().max() for value in (y.double() - exact, peer.double() - exact, exact)])


def within_bound(draws: list[torch.Tensor], dtype: torch.dtype, algorithm: str) -> bool:
    """Whether the largest error of all draws is within a multiple of cuDNN's plus the rounding of the largest value."""
    ours, theirs, largest = torch.stack(draws).amax(0).tolist()
    return ours <= BOUND[dtype, algorithm] * theirs + torch.finfo(dtype).eps * largest


def seeds(seed: int, *sizes: tuple[int, ...]) -> range:
    """Of as many draws as give the smallest result enough errors: of 45 sums of 7 products the largest is chance."""
    return range(seed, seed + draws_of(min(map(math.prod, sizes))))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize(("dtype", "algorithm"), BOUND, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.replace(" ", "-") or "chosen")
def test_accuracy(shape, dtype, algorithm, plan, seed):
    if plan == "fused" and dtype != torch.float32:
        pytest.skip("TestFusedHopper has its shapes")
    if "128 128" in plan and -(-shape[4] // 64) % 2:
        pytest.skip("tiles of 128 outputs do not divide these")
    batch, height, width, _, outputs, padding = shape
    draws = []
    for drawn in seeds(seed, (batch, outputs, height + 2 * padding - 2, width + 2 * padding - 2)):
        x, weight, bias = inputs(shape, dtype, drawn)
        exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
        peer = F.conv2d(x, weight, bias.to(dtype), padding=padding)
        poison(exact.numel())
        y = kernels.forward(x, weight, bias, padding, algorithm, "none", plan)
        assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
        poison(exact.numel())
        again = kernels.forward(x, weight, bias, padding, algorithm, "none", plan)
        assert torch.equal(y, again), "differs from run to run"
        draws.append(measures(y, exact, peer))
    assert within_bound(draws, dtype, algorithm), f"seed {seed}"


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("plan", PLANS[:3], ids=lambda p: p.replace(" ", "-") or "chosen")
def test_activation(activation, plan, seed):
    x, weight, bias = inputs(SHAPES[1], torch.float32, seed)
    exact = ACTIVATE[activation](F.conv2d(x.double(), weight.double(), bias.double()))
    y = kernels.forward(x, weight, bias, 0, "f2", activation, plan)
    torch.testing.assert_close(y.double(), exact, atol=2e-5, rtol=1e-5)
    without = kernels.forward(x, weight, None, 0, "f2", activation, plan)
    exact = ACTIVATE[activation](F.conv2d(x.double(), weight.double()))
    torch.testing.assert_close(without.double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize(("dtype", "algorithm"), BOUND, ids=lambda v: str(v).removeprefix("torch."))
def test_gradients(shape, dtype, algorithm, seed):
    batch, height, width, channels, outputs, padding = shape
    draws = {"x": [], "weight": []}
    for drawn in seeds(seed, (batch, channels, height, width), (outputs, channels)):
        tensors = inputs(shape, dtype, drawn)
        ours = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
        theirs = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors[:2]]
        wide = [t.double().requires_grad_() for t in tensors]
        y = winograd_conv2d(*ours, padding, algorithm=algorithm, kernels="required")
        exact = F.conv2d(*wide, padding=padding)
        upstream = (torch.rand(exact.shape, device="cuda") * 2 - 1).to(dtype)
        gradients = torch.autograd.grad(y, ours, upstream)
        expected = torch.autograd.grad(exact, wide, upstream.double())
        peers = torch.autograd.grad(F.conv2d(*theirs, padding=padding), theirs, upstream)
        for name, gradient, value, peer in zip(draws, gradients, expected, peers, strict=False):
            assert gradient.dtype == dtype
            draws[name].append(measures(gradient, value, peer))
        torch.testing.assert_close(gradients[2].double(), expected[2], atol=1e-3, rtol=1e-5)
        again = torch.autograd.grad(winograd_conv2d(*ours, padding, algorithm=algorithm), ours, upstream)
        assert all(map(torch.equal, gradients, again)), "differs from run to run"
    for name, compared in draws.items():
        assert within_bound(compared, dtype, algorithm), f"{name}, seed {seed}"


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_gradients_of_an_activation(activation, seed):
    tensors = inputs(SHAPES[1], torch.float32, seed)
    ours, wide = [t.requires_grad_() for t in tensors], [t.detach().double().requires_grad_() for t in tensors]
    y = winograd_conv2d(*ours, 0, activation=activation, kernels="required")
    exact = ACTIVATE[activation](F.conv2d(*wide))
    for ours_, exact_ in zip(torch.autograd.grad(y.sum(), ours), torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(ours_.double(), exact_, atol=1e-3, rtol=1e-3)


def test_layouts_and_offsets(seed):
    """Inputs that are not channels_last, or start at an odd address, are copied; expanded gradients too."""
    x, weight, bias = inputs(SHAPES[1], torch.float32, seed)
    expected = winograd_conv2d(x, weight, bias, algorithm="f2")
    assert torch.equal(winograd_conv2d(x.contiguous(), weight, bias, algorithm="f2"), expected)
    shifted = (
        torch.empty(x.numel() + 1, device="cuda")[1:].view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(x)
    )
    assert torch.equal(winograd_conv2d(shifted, weight, bias, algorithm="f2"), expected)
    channels_last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd_conv2d(x, channels_last, bias, algorithm="f2"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype, seed):
    x, weight, bias = (t.requires_grad_() for t in inputs((2, 6, 5, 16, 12, 1), dtype, seed))
    torch.library.opcheck(op.default, (x, weight, bias, 1, "f2", "silu"))
    filter = torch.ops.convfirst.winograd_filter(weight.detach(), "f2", False)
    torch.library.opcheck(torch.ops.convfirst.winograd_filter.default, (weight.detach(), "f2", True))
    arguments = (x.detach(), filter, bias.detach(), 12, 1, "f2", "relu", "")
    torch.library.opcheck(torch.ops.convfirst.winograd_conv2d_filtered.default, arguments)


def test_cuda_graph_and_compile(seed):
    x, weight, bias = inputs(SHAPES[0], torch.float32, seed)
    expected = winograd_conv2d(x, weight, bias, kernels="required")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = winograd_conv2d(x, weight, bias, kernels="required")
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)
    compiled = torch.compile(lambda *t: winograd_conv2d(*t, kernels="required"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), expected)


def test_16_bits_must_be_asked_for(seed):
    x, weight, bias = inputs(SHAPES[1], torch.float16, seed)
    with ck.force_path(""), pytest.raises(RuntimeError, match="force_path\\('sm80'\\) asks for them"):
        winograd_conv2d(x, weight, bias, algorithm="f2", kernels="required")


# Channels and outputs are multiples of 8; of few and of many slices, strips that end in and beyond the image.
FUSED_SHAPES = [
    (1, 28, 28, 64, 64, 1),
    (2, 13, 17, 24, 72, 0),
    (3, 9, 31, 40, 8, 2),
    (1, 3, 2, 8, 16, 1),
    (64, 7, 7, 24, 72, 1),
    (5, 14, 14, 512, 512, 1),
    (1, 1, 35, 136, 40, 2),
    (9, 33, 50, 264, 256, 1),
    (2, 112, 112, 128, 128, 1),
]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
class TestFusedHopper:
    """F(2x2, 3x3) in one kernel on tensor cores."""

    @pytest.fixture(autouse=True)
    def its_path(self):
        with ck.force_path("sm90"):
            yield

    @pytest.mark.parametrize("shape", FUSED_SHAPES, ids=lambda s: "-".join(map(str, s)))
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("activation", ["none", "silu"])
    def test_accuracy(self, shape, dtype, activation, seed):
        batch, height, width, _, outputs, padding = shape
        draws = []
        for drawn in seeds(seed, (batch, outputs, height + 2 * padding - 2, width + 2 * padding - 2)):
            x, weight, bias = inputs(shape, dtype, drawn)
            assert kernels.plan(x, outputs, padding, "f2") == "fused"
            bias = bias if activation == "silu" else None
            wide = None if bias is None else bias.double()
            exact = ACTIVATE[activation](F.conv2d(x.double(), weight.double(), wide, padding=padding))
            narrow = None if bias is None else bias.to(dtype)
            peer = ACTIVATE[activation](F.conv2d(x, weight, narrow, padding=padding))
            poison(exact.numel() // 2 + 1)
            y = kernels.forward(x, weight, bias, padding, "f2", activation)
            poison(exact.numel() // 2 + 1)
            again = kernels.forward(x, weight, bias, padding, "f2", activation)
            assert torch.equal(y, again), "differs from run to run"
            draws.append(measures(y, exact, peer))
        assert within_bound(draws, dtype, "f2"), f"seed {seed}"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_gradients(self, dtype, seed):
        tensors = inputs(FUSED_SHAPES[2], dtype, seed)
        ours, theirs = ([t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors] for _ in "ab")
        wide = [t.double().requires_grad_() for t in tensors]
        # Not ReLU's: its derivative jumps where a rounding changes a sign.
        y = winograd_conv2d(*ours, 2, algorithm="f2", activation="silu", kernels="required")
        upstream = (torch.rand(y.shape, device="cuda") * 2 - 1).to(dtype)
        exact = torch.autograd.grad(F.silu(F.conv2d(*wide, padding=2)), wide, upstream.double())
        narrow = (*theirs[:2], theirs[2].to(dtype))
        peers = torch.autograd.grad(F.silu(F.conv2d(*narrow, padding=2)), theirs, upstream)
        for gradient, expected, peer in zip(torch.autograd.grad(y, ours, upstream), exact, peers, strict=True):
            assert within_bound([measures(gradient, expected, peer)], dtype, "f2"), f"seed {seed}"

    def test_cuda_graph_compile_and_opcheck(self, seed):
        x, weight, bias = inputs(FUSED_SHAPES[1], torch.float16, seed)
        expected = winograd_conv2d(x, weight, bias, algorithm="f2", kernels="required")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = winograd_conv2d(x, weight, bias, algorithm="f2", kernels="required")
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
        compiled = torch.compile(
            lambda *t: winograd_conv2d(*t, algorithm="f2", kernels="required"), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(x, weight, bias), expected)
        grown = [t.requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(op.default, (*grown, 1, "f2", "silu"))

    def test_what_it_leaves_to_the_portable_kernels(self, seed):
        x, weight, bias = inputs(SHAPES[1], torch.float16, seed)
        y = winograd_conv2d(x, weight, bias, 0, algorithm="f2", kernels="required")
        assert "fused_fwd_sm90 takes channels and outputs that are multiples of 8" in kernels.explain(x, 70, 0, "f2")
        with ck.force_path("sm80"):
            assert torch.equal(y, winograd_conv2d(x, weight, bias, 0, algorithm="f2", kernels="required"))
        with pytest.raises(RuntimeError, match="they are 20, 70 and 17"):
            kernels.forward(x, weight, bias, 0, "f2", "none", "fused")
        with pytest.raises(RuntimeError, match="plan is 'fused 3 1'"):
            kernels.forward(x, weight, bias, 0, "f2", "none", "fused 3 1")
        x, *_ = inputs(FUSED_SHAPES[0], torch.float16, seed)
        assert kernels.explain(x, 64, 1, "f2") == "fused_fwd_sm90, one launch, no workspace"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[7]], ids=str)
def test_auto_is_direct_convolution_in_16_bits(shape, dtype, seed):
    x, weight, bias = inputs(shape, dtype, seed)
    with ck.force_path(""):
        expected = direct_conv2d(x, weight, bias, padding=shape[5], activation="relu", kernels="required")
        y = winograd_conv2d(x, weight, bias, shape[5], activation="relu", kernels="required")
        assert torch.equal(y, expected)
        ours = [t.requires_grad_() for t in (x, weight, bias)]
        (winograd_conv2d(*ours, shape[5], kernels="required").float() ** 2).sum().backward()
        assert all(t.grad is not None and t.grad.isfinite().all() for t in ours)


@pytest.mark.parametrize("frozen", [False, True])
def test_accelerated_convolution_in_16_bits(frozen, seed):
    """VGG's layer 3.2 at one image runs as direct convolution, which was measured to be faster there."""
    if torch.cuda.get_device_capability() != measured.CAPABILITY:
        pytest.skip("nothing was measured on this device")
    x, weight, bias = inputs((1, 56, 56, 256, 256, 1), torch.float16, seed)
    conv = torch.nn.Conv2d(256, 256, 3, padding=1).to("cuda", torch.float16, memory_format=torch.channels_last).eval()
    net = torch.nn.Sequential(conv)
    with torch.no_grad(), ck.force_path(""):
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        expected = direct_conv2d(x, conv.weight, conv.bias, padding=1, kernels="required")
        (row,) = ck.accelerate(net, frozen=frozen).convolutions
        assert row.swapped and swap.choose(conv, x, torch.float16) == "direct"
        assert torch.equal(net(x), expected)
        compiled = torch.compile(net, fullgraph=True)
        assert torch.equal(compiled(x), expected)
        own, dynamic = torch.nn.Conv2d.forward(conv, x), torch.compile(net, fullgraph=True, dynamic=True)
        torch.testing.assert_close(dynamic(x), own, atol=2e-2, rtol=1e-2)  # of any size: PyTorch's
        beside = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(1, 56, 56, 256).permute(0, 3, 1, 2)
        torch.testing.assert_close(net(beside.copy_(x)), own, atol=2e-2, rtol=1e-2)  # no kernel takes such an address
        if not frozen:
            conv.weight.mul_(2)  # filters are kept until then
            again = direct_conv2d(x, conv.weight, conv.bias, padding=1, kernels="required")
            assert torch.equal(net(x), again) and torch.equal(compiled(x), again)
    torch.compiler.reset()


def test_accelerated_convolution_in_float32(seed):
    """Winograd where TF32 is off, under torch.compile and in a CUDA graph, too; cuDNN where it is allowed."""
    if torch.cuda.get_device_capability() != measured.CAPABILITY:
        pytest.skip("nothing was measured on this device")
    x, weight, bias = inputs((8, 28, 28, 256, 512, 1), torch.float32, seed)
    conv = torch.nn.Conv2d(256, 512, 3, padding=1).to("cuda", memory_format=torch.channels_last).eval()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        ck.accelerate(torch.nn.Sequential(conv), frozen=True)
        algorithm = swap.choose(conv, x, torch.float32)
        assert algorithm in ("f2", "f4")
        expected = winograd_conv2d(x, conv.weight, conv.bias, 1, algorithm=algorithm, kernels="required")
        assert torch.equal(conv(x), expected)
        assert torch.equal(torch.compile(torch.nn.Sequential(conv), fullgraph=True)(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = conv(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
        assert swap.choose(conv, x, torch.float32) is None
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "runs"), [("vgg19", 8), ("resnet50", 13)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_accelerated_networks(name, runs, dtype, seed):
    """The logits of 16-bit networks, compiled for inference, are within twice eager PyTorch's error."""
    if torch.cuda.get_device_capability() != measured.CAPABILITY:
        pytest.skip("nothing was measured on this device")
    torch.manual_seed(seed)
    net = timm.create_model(name).eval().cuda()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    x = torch.randn(2, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        wide = net(x)
        narrow = net.to(dtype, memory_format=torch.channels_last)
        plain = narrow(x.to(dtype))
        fast = ck.compile_for_inference(narrow, x.to(dtype), outside="eager")
        rows = fast.report.convolutions
        assert sum(row.swapped and "ReLU" in row.detail for row in rows) >= runs, str(fast.report)
        ours = fast(x.to(dtype))
    error, bound = (ours.float() - wide).abs().max(), (plain.float() - wide).abs().max()
    assert not torch.equal(ours, plain)  # they did run
    assert error <= 2 * bound + 2 * torch.finfo(dtype).eps * wide.abs().max(), f"off by {error:.4g}, eager {bound:.4g}"


def test_float64_and_f4_in_16_bits_run_the_reference(seed):
    x, weight, bias = inputs(SHAPES[1], torch.float16, seed)
    with pytest.raises(RuntimeError, match="algorithm is 'f4'; in torch.float16 the kernels know 'f2'"):
        winograd_conv2d(x, weight, bias, algorithm="f4", kernels="required")
    assert operators.kernels.refusal(x.double(), 70, 1, "f2").startswith("x is torch.float64")
    wide = (x.double(), weight.double(), bias.double())
    torch.testing.assert_close(winograd_conv2d(*wide), F.conv2d(*wide, padding=1))


def test_agrees_with_its_reference_in_16_bits(seed):
    x, weight, bias = inputs(SHAPES[3], torch.float16, seed)
    expected = reference.winograd_conv2d(x, weight, bias, 1, "f2", "relu")
    y = winograd_conv2d(x, weight, bias, algorithm="f2", activation="relu", kernels="required")
    torch.testing.assert_close(y, expected, atol=4e-3, rtol=2e-3)
