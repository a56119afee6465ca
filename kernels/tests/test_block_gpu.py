"""The fused block against float64 on a GPU, over everything that it supports, on each path that the device can run."""

import pytest
import torch
from cases import (
    Case,
    conv_first_cases,
    convnext_cases,
    guarded,
    guards_intact,
    inputs,
    network_cases,
    oracle,
    worst_ratio,
)

import convfirst_kernels as ck
from convfirst_kernels import reference
from convfirst_kernels.planner import Device, Problem, plan

pytestmark = pytest.mark.gpu
block = torch.ops.convfirst.conv_first_block
block_out = torch.ops.convfirst.conv_first_block_out

SMALL = Case(Problem(3, 13, 17, 64, 256, 3, 8, "float16", "silu", True), sample_scale=True)


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        only = metafunc.config.getoption("--kernel-path")
        metafunc.parametrize("path", [only] if only else ["sm80", "sm90"])


@pytest.fixture
def covered(path, case):
    """The case, where the path covers it. The portable path covers everything; another may leave it to that one."""
    answer = plan(case.problem, Device.of(0), path)
    if answer["chosen"] is None:
        if path == "sm80":
            pytest.fail(f"no portable variant covers {answer['problem']}")
        pytest.skip(f"path {path} does not cover {answer['problem']}")
    workspace = next(c["config"]["workspace"] for c in answer["candidates"] if c["name"] == answer["chosen"])
    if workspace:
        # The caching allocator hands this poisoned memory to the launch.
        torch.full((workspace // 4 + 1,), float("nan"), device="cuda")
    with ck.force_path(path):
        yield case


def check_accuracy(case: Case, seed: int) -> None:
    arguments = inputs(case, seed)
    x = arguments[0]
    y = guarded(*x.shape, x.dtype, "cuda")  # poisoned: NaN wherever the kernel does not write
    block_out(*arguments, out=y)
    torch.cuda.synchronize()
    assert guards_intact(y), "wrote outside its output"
    assert guards_intact(x), "wrote outside its input"
    ratio = worst_ratio(y, oracle(arguments), reference.conv_first_block(*arguments))
    assert ratio <= 1, f"error {ratio:.2f}x its bound (seed {seed})"
    again = torch.full_like(y, float("nan"))
    block_out(*arguments, out=again)
    assert torch.equal(y, again), "differs from run to run"


@pytest.mark.parametrize("case", conv_first_cases(), ids=str)
def test_conv_first(covered, seed):
    check_accuracy(covered, seed)


@pytest.mark.parametrize("case", convnext_cases(), ids=str)
def test_convnext(covered, seed):
    check_accuracy(covered, seed)


@pytest.mark.parametrize("case", network_cases(), ids=str)
def test_network_shapes(covered, seed):
    check_accuracy(covered, seed)


def every_variant() -> list[str]:
    device = Device(90, 132, 232448)
    return [row["name"] for row in plan(SMALL.problem, device)["candidates"]]


@pytest.mark.parametrize("variant", every_variant())
def test_each_variant(variant, request, seed):
    """Every row of the planner's table on the first cases that it covers, chosen by the planner or not."""
    only = request.config.getoption("--kernel-path")
    if not variant.startswith(only):
        pytest.skip(f"--kernel-path={only}")
    cases = [*network_cases(), *conv_first_cases(), *convnext_cases()]
    tried = 0
    for case in cases:
        if plan(case.problem, Device.of(0), variant)["chosen"] and tried < 6:
            tried += 1
            with ck.force_path(variant):
                check_accuracy(case, seed)
    if not tried:
        capability = Device.of(0).capability
        pytest.skip(f"{variant} covers no case on compute capability {capability}")


@pytest.mark.parametrize("case", [SMALL], ids=str)
class TestAnyCall:
    """The same numbers however the operator is called."""

    def test_allocates_channels_last(self, covered, seed):
        arguments = inputs(covered, seed)
        y = block(*arguments)
        expected = torch.empty_like(arguments[0])
        block_out(*arguments, out=expected)
        assert torch.equal(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)

    def test_side_stream(self, covered, seed):
        arguments = inputs(covered, seed)
        expected = block(*arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a launch on another stream would overtake this
            arguments[0].mul_(2)
            doubled = block(*arguments)
            arguments[0].mul_(0.5)
            y = block(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(y, expected)
        assert not torch.equal(doubled, expected)

    def test_cuda_graph(self, covered, seed):
        arguments = inputs(covered, seed)
        other = inputs(covered, seed + 1)[0]
        block(*arguments)
        graph = torch.cuda.CUDAGraph()
        static = arguments[0].clone(memory_format=torch.preserve_format)
        with torch.cuda.graph(graph):
            y = block(static, *arguments[1:])
        for x in (arguments[0], other):
            static.copy_(x)
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, block(x, *arguments[1:]))

    def test_compile(self, covered, seed):
        arguments = inputs(covered, seed)

        def around(x):
            return block(x * 2, *arguments[1:]) + 1

        y = torch.compile(around, fullgraph=True)(arguments[0])
        assert torch.equal(y, around(arguments[0]))

    def test_second_device(self, covered, seed):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        arguments = inputs(covered, seed)
        moved = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in arguments]
        assert torch.cuda.current_device() == 0
        y = block(*moved)
        assert torch.cuda.current_device() == 0
        assert y.device.index == 1
        assert torch.equal(y.cpu(), block(*arguments).cpu())
        with pytest.raises(RuntimeError, match="expand_weight is on cuda:0 and x on cuda:1"):
            block(*moved[:5], arguments[5], *moved[6:])

    def test_threads(self, covered, seed):
        """Several Python threads, each with its own stream."""
        from concurrent.futures import ThreadPoolExecutor

        arguments = inputs(covered, seed)
        expected = block(*arguments)
        torch.cuda.synchronize()

        def call(_):
            with torch.cuda.stream(torch.cuda.Stream()):
                y = block(*arguments)
                torch.cuda.current_stream().synchronize()
                return torch.equal(y, expected)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(call, range(16)))

    def test_empty_batch(self, covered, seed):
        x, *rest = inputs(Case(covered.problem), seed)
        assert block(x[:0], *rest).shape == (0, *x.shape[1:])

    def test_eps_matters(self, covered, seed):
        arguments = list(inputs(covered, seed))
        arguments[1].mul_(0.1)  # a variance far below eps
        arguments[2] = None
        arguments[13] = 0.5
        ratio = worst_ratio(block(*arguments), oracle(tuple(arguments)), reference.conv_first_block(*arguments))
        assert ratio <= 1

    def test_large_values(self, covered, seed):
        """Activations whose squares leave float16's range survive the norm, as they do in float32."""
        arguments = list(inputs(covered, seed))
        arguments[0].mul_(1000)
        ratio = worst_ratio(block(*arguments), oracle(tuple(arguments)), reference.conv_first_block(*arguments))
        assert ratio <= 1

    def test_shifted_mean(self, covered, seed):
        """A mean far above the deviation must not cancel in the norm's variance."""
        arguments = list(inputs(covered, seed))
        arguments[2] = torch.full_like(arguments[3], 64.0)
        ratio = worst_ratio(block(*arguments), oracle(tuple(arguments)), reference.conv_first_block(*arguments))
        assert ratio <= 1


def test_errors_reach_the_caller():
    arguments = list(inputs(SMALL, 0))
    with pytest.raises(RuntimeError, match="x is torch.float32; supported are torch.float16 and torch.bfloat16"):
        block(arguments[0].float(), *arguments[1:])
    with pytest.raises(RuntimeError, match="channels_last"):
        block(arguments[0].contiguous(), *arguments[1:])
    with pytest.raises(RuntimeError, match="expand_weight is on cpu and x on cuda:0"):
        block(*arguments[:5], arguments[5].cpu(), *arguments[6:])
    with pytest.raises(RuntimeError, match="out shares storage with x"):
        block_out(*arguments, out=arguments[0])
    torch.cuda.synchronize()  # nothing was launched, so nothing can have failed


def test_uncovered_path_is_an_error():
    missing = [name for name in every_variant() if not plan(SMALL.problem, Device.of(0), name)["chosen"]]
    if not missing:
        pytest.skip("every variant covers this problem")
    with (
        ck.force_path(missing[0]),
        pytest.raises(RuntimeError, match=f"no kernel variant covers .* on path {missing[0]}"),
    ):
        block(*inputs(SMALL, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backward(dtype, seed):
    """Gradients through the fused forward agree with float64 as well as PyTorch's own do."""
    case = Case(Problem(3, 9, 7, 64, 256, 3, 8, str(dtype).split(".")[1], "silu", True), sample_scale=True)
    arguments = inputs(case, seed)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    grad = torch.randn_like(arguments[0])

    def gradients(function, cast):
        leaves = [t.detach().to(cast(t)).requires_grad_() for t in tensors]
        y = function(*leaves, *arguments[len(tensors) :])
        return torch.autograd.grad(y, leaves, grad.to(y.dtype))

    truth = gradients(reference.conv_first_block, lambda t: torch.float64)
    peer = gradients(reference.conv_first_block, lambda t: t.dtype)
    ours = gradients(block, lambda t: t.dtype)
    for index, (g, p, t) in enumerate(zip(ours, peer, truth, strict=True)):
        bound = 2 * (p.double() - t).abs().max() + 2 * torch.finfo(dtype).eps * t.abs().max()
        assert (g.double() - t).abs().max() <= bound, f"gradient of argument {index}"


def test_autocast(seed):
    arguments = inputs(SMALL, seed)
    wide = [a.float() if isinstance(a, torch.Tensor) else a for a in arguments]
    with torch.autocast("cuda", torch.float16):
        y = block(*wide)
    assert y.dtype == torch.float16
    assert torch.equal(y, block(*arguments))
