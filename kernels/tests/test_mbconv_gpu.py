"""The fused MBConv block against float64 on a GPU, over everything that it supports."""

import pytest
import torch
from cases import guards_intact, worst_ratio
from mbconv_cases import MBConv, mbconv_cases, mbconv_inputs, mbconv_oracle, network_cases

import convfirst_kernels as ck
from convfirst_kernels import reference
from convfirst_kernels.planner import Device, plan

pytestmark = pytest.mark.gpu
block = torch.ops.convfirst.mbconv_block

SMALL = {width: MBConv(3, 13, 17, 64, 256, width, sample_scale=True) for width in (1, 8, 16)}


def variants() -> list[str]:
    return [row["name"] for row in plan(SMALL[1], Device.named("h100"))["candidates"]]


@pytest.fixture(autouse=True)
def asked_for():
    """The planner leaves kernels alone that have not been tested on a GPU, unless their path is asked for."""
    with ck.force_path("sm80"):
        yield


def poison(x: torch.Tensor) -> None:
    """Leaves NaNs in the memory that the caching allocator hands to the next result of x's size."""
    torch.empty_like(x).fill_(float("nan"))


def check_accuracy(case: MBConv, seed: int) -> None:
    arguments = mbconv_inputs(case, seed)
    x = arguments[0]
    poison(x)
    y = block(*arguments)
    torch.cuda.synchronize()
    assert guards_intact(x), "wrote around its input"
    assert y.is_contiguous(memory_format=torch.channels_last)
    ratio = worst_ratio(y, mbconv_oracle(arguments), reference.mbconv_block(*arguments))
    assert ratio <= 1, f"error {ratio:.2f}x its bound (seed {seed})"
    poison(x)
    assert torch.equal(y, block(*arguments)), "differs from run to run"


@pytest.mark.parametrize("case", [*mbconv_cases(), *network_cases()], ids=str)
def test_accuracy(case, seed):
    answer = plan(case, Device.of(0))
    if answer["chosen"] is None:
        pytest.skip(f"no variant covers {answer['problem']} in this device's shared memory")
    check_accuracy(case, seed)


@pytest.mark.parametrize("variant", variants())
def test_each_variant(variant, seed):
    """Every row of the planner's table on the widest cases that it covers, chosen by the planner or not."""
    cases = [c for c in mbconv_cases() if plan(c, Device.of(0), variant)["chosen"]]
    if not cases:
        pytest.skip(f"{variant} does not fit this device's shared memory")
    with ck.force_path(variant):
        for case in sorted(cases, key=lambda c: c.channels)[-5:]:
            check_accuracy(case, seed)


def test_an_uncovered_width_is_an_error():
    arguments = mbconv_inputs(MBConv(1, 4, 4, 2048, 64), 0)
    message = r"no kernel variant covers mbconv C=2048 .* the kernels take up to \d+ channels"
    with pytest.raises(RuntimeError, match=message):
        block(*arguments)
    layers = arguments[1], None, reference.unpack_conv_weight(arguments[3]), None, arguments[5], None
    with pytest.raises(RuntimeError, match="kernels='required', but no kernel variant covers"):
        ck.mbconv_block(arguments[0], *layers, kernels="required")
    assert ck.mbconv_block(arguments[0], *layers, kernels="auto").shape == arguments[0].shape


@pytest.mark.parametrize("group_width", SMALL)
class TestAnyCall:
    """The same numbers however the operator is called."""

    def test_side_stream(self, group_width, seed):
        arguments = mbconv_inputs(SMALL[group_width], seed)
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

    def test_cuda_graph(self, group_width, seed):
        arguments = mbconv_inputs(SMALL[group_width], seed)
        other = mbconv_inputs(SMALL[group_width], seed + 1)[0]
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

    def test_compile(self, group_width, seed):
        arguments = mbconv_inputs(SMALL[group_width], seed)

        def around(x):
            return block(x * 2, *arguments[1:]) + 1

        assert torch.equal(torch.compile(around, fullgraph=True)(arguments[0]), around(arguments[0]))

    def test_compile_the_function(self, group_width, seed):
        """The public function on weights in PyTorch's layout, with packing inside the compiled program."""
        arguments = mbconv_inputs(SMALL[group_width], seed)
        x, expand, expand_bias, conv, conv_bias, project, project_bias, sample_scale = arguments[:8]
        filters = reference.unpack_conv_weight(conv)
        weights = expand, expand_bias, filters, conv_bias, project, project_bias, sample_scale

        def function(x):
            return ck.mbconv_block(x, *weights, kernels="required")

        assert torch.equal(torch.compile(function, fullgraph=True)(x), block(*arguments))

    def test_opcheck(self, group_width, seed):
        torch.library.opcheck(block.default, mbconv_inputs(SMALL[group_width], seed))

    def test_second_device(self, group_width, seed):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        arguments = mbconv_inputs(SMALL[group_width], seed)
        moved = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in arguments]
        y = block(*moved)
        assert y.device.index == 1 and torch.cuda.current_device() == 0
        assert torch.equal(y.cpu(), block(*arguments).cpu())

    def test_empty_batch(self, group_width, seed):
        x, *rest = mbconv_inputs(MBConv(3, 13, 17, 64, 256, group_width), seed)
        assert block(x[:0], *rest).shape == (0, *x.shape[1:])

    def test_other_images_do_not_matter(self, group_width, seed):
        """A tile spans images: what overflows in one of them must not reach its neighbours."""
        arguments = list(mbconv_inputs(MBConv(3, 7, 7, 64, 256, group_width), seed))
        expected = block(*arguments)
        arguments[0] = arguments[0].clone(memory_format=torch.preserve_format)
        arguments[0][1] = float("nan")
        y = block(*arguments)
        assert torch.equal(y[[0, 2]], expected[[0, 2]])
        assert y[1].isnan().all()
