"""The MBConv operator on a CPU: definition, fake, opcheck, refusals."""

import re

import pytest
import torch
import torch.nn.functional as F

import convfirst_kernels as ck
from convfirst_kernels import planner

NAMES = [
    "x", "expand_weight", "expand_bias", "conv_weight", "conv_bias", "project_weight", "project_bias", "sample_scale",
    "group_width", "activation",
]  # fmt: skip


def arguments(channels: int = 32, hidden: int = 64, group_width: int = 8) -> dict:
    generator = torch.Generator().manual_seed(0)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half() * 0.1

    values = (
        half(2, channels, 6, 5).contiguous(memory_format=torch.channels_last), half(hidden, channels),
        half(hidden).float(), half(9, hidden, group_width), half(hidden).float(), half(channels, hidden),
        half(channels).float(), torch.tensor([2.0, 0.0]), group_width, "silu",
    )  # fmt: skip
    return dict(zip(NAMES, values, strict=True))


@pytest.mark.parametrize("group_width", [1, 8, 16])
def test_matches_plain_functions(group_width):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 32, 6, 5, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    expand, project = torch.randn(64, 32, 1, 1, dtype=torch.float64), torch.randn(32, 64, dtype=torch.float64)
    conv = torch.randn(64, group_width, 3, 3, dtype=torch.float64)
    h = F.silu(F.conv2d(F.silu(F.conv2d(x, expand)), conv, bias.float().double(), padding=1, groups=64 // group_width))
    expected = x + F.conv2d(h, project[:, :, None, None])
    torch.testing.assert_close(ck.mbconv_block(x, expand, None, conv, bias, project, None), expected)
    dropped = ck.mbconv_block(x, expand, None, conv, bias, project, None, torch.zeros(2))
    torch.testing.assert_close(dropped, x)


def test_gradients_come_from_the_reference():
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    weights = [torch.randn(*shape, requires_grad=True) for shape in ((32, 16), (32, 8, 3, 3), (16, 32))]
    ck.mbconv_block(x, weights[0], None, weights[1], None, weights[2], None).sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in (x, *weights))
    with pytest.raises(RuntimeError, match="kernels='required', but a gradient may be asked for"):
        ck.mbconv_block(x, weights[0], None, weights[1], None, weights[2], None, kernels="required")


def test_opcheck():
    torch.library.opcheck(torch.ops.convfirst.mbconv_block.default, tuple(arguments().values()))


def test_compile_without_graph_break():
    x = torch.randn(1, 16, 4, 4)
    weights = [torch.randn(*shape) for shape in ((32, 16), (32, 8, 3, 3), (16, 32))]

    def network(x):
        return ck.mbconv_block(x, weights[0], None, weights[1], None, weights[2], None)

    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


REFUSALS = {
    "layout": (
        lambda a: {"x": a["x"].contiguous()},
        "x of shape [2, 32, 6, 5] has strides [960, 30, 5, 1]; expected dense",
    ),
    "dtype": (lambda a: {"conv_weight": a["conv_weight"].float()}, "conv_weight is torch.float32; expected x's dtype"),
    "filter": (
        lambda a: {"conv_weight": torch.zeros(25, 64, 8).half()},
        "conv_weight has shape [25, 64, 8]; expected [9, 64, 8] = [9 taps, hidden, group_width]",
    ),
    "hidden": (
        lambda a: {"expand_weight": torch.zeros(60, 32).half()},
        "expand_weight has 60 hidden units; supported are multiples of 16",
    ),
    "group width": (lambda a: {"group_width": 2}, "group_width is 2; supported are 1 (depthwise), 8 and 16"),
    "bias": (lambda a: {"expand_bias": torch.zeros(32)}, "expand_bias has shape [32]; expected [64] = [hidden]"),
    "activation": (lambda a: {"activation": "elu"}, "activation is 'elu'; supported are 'relu', 'silu' and 'gelu'"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refuses(what):
    change, message = REFUSALS[what]
    given = arguments()
    assert torch.ops.convfirst.mbconv_block_check(**given).startswith("mbconv C=32 hidden=64 k=3 group_width=8 float16")
    given |= change(given)
    with pytest.raises(RuntimeError, match=f"^mbconv_block: {re.escape(message)}"):
        torch.ops.convfirst.mbconv_block_check(**given)


def plan(channels: int, group_width: int, device: str = "h100", size: tuple = (1, 14, 14), path: str = "sm80") -> dict:
    problem = ck.MBConvProblem(*size, channels, 4 * channels, group_width)
    return planner.plan(problem, ck.Device.named(device), path)


def test_plan():
    answer = plan(64, 8, size=(128, 14, 14))
    assert answer["problem"] == "mbconv C=64 hidden=256 k=3 group_width=8 float16 silu, 128 x 14 x 14"
    assert answer["chosen"] == "sm80_mbconv_grouped_c64_p128"
    (chosen,) = (row for row in answer["candidates"] if row["name"] == answer["chosen"])
    assert chosen["config"]["launches"] == 1 and chosen["config"]["workspace"] == 0
    assert "mbconv_block_fwd_sm80" in chosen["kernel"]


def test_explain():
    with ck.force_path("sm80"):
        text = ck.explain(ck.MBConvProblem(128, 14, 14, 80, 480), "h100")
    assert re.search(r"runs  sm80_mbconv_depthwise_c96_p128: tile 16x8 \(128 pixels\), .*, [1-9]\d+ registers", text)
    assert "not   sm80_mbconv_grouped_c96_p128: does not cover this width, filter, group width" in text


@pytest.mark.parametrize("group_width", [1, 8, 16])
@pytest.mark.parametrize(("device", "widest"), [("h100", 384), ("a100", 256), ("rtx3090", 160)])
def test_widths_that_a_device_covers(device, widest, group_width):
    """Every width up to what shared memory holds, whatever the image's size."""
    for size in ((1, 1, 1), (128, 7, 7), (2, 225, 193)):
        covered = [c for c in range(8, 512, 8) if plan(c, group_width, device, size)["chosen"]]
        assert covered == list(range(8, covered[-1] + 8, 8))
        assert covered[-1] >= widest


def test_no_path_need_be_asked_for():
    assert plan(64, 1, path="")["chosen"] == plan(64, 1, path="sm80")["chosen"] is not None


def test_paths():
    name = "sm80_mbconv_depthwise_c128_p64"
    assert plan(64, 1, path=name)["chosen"] == name
    with ck.force_path(name):
        assert plan(40, 1, path="")["chosen"] == name
    with pytest.raises(RuntimeError, match="'sm80_mbconv_c7' names no path"), ck.force_path("sm80_mbconv_c7"):
        pass
