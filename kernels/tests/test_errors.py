"""What the operator refuses, and how it says so. The checks run on tensors of any device, so no GPU is needed."""

import re

import pytest
import torch
from cases import Case, inputs

import convfirst_kernels as ck

check = torch.ops.convfirst.conv_first_block_check
NAMES = [
    "x", "conv_weight", "conv_bias", "norm_weight", "norm_bias", "expand_weight", "expand_bias", "project_weight",
    "project_bias", "layer_scale", "sample_scale", "group_width", "activation", "eps", "has_norm",
]  # fmt: skip
CASE = Case(ck.Problem(2, 6, 5, 64, 256), sample_scale=True)


@pytest.fixture
def arguments() -> dict:
    return dict(zip(NAMES, inputs(CASE, 0, device="cpu"), strict=True))


def channels_last(*shape: int, dtype=torch.float16, device="cpu") -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values 2 bytes (float16) or 4 bytes (float32) past an aligned address."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    if tensor.dim() == 4:
        n, c, h, w = tensor.shape
        return storage[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    return storage[1:].view(tensor.shape)


def test_accepts(arguments):
    assert check(**arguments) == "C=64 hidden=256 k=3 group_width=8 float16 silu with norm, 2 x 6 x 5"
    for name in ("conv_bias", "norm_weight", "norm_bias", "expand_bias", "project_bias", "layer_scale", "sample_scale"):
        arguments[name] = None
    check(**arguments)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (3, 8, 1, 5), (1, 8, 7, 1), (4, 8, 1, 1)])
def test_extents_of_one_may_have_any_stride(arguments, shape):
    """A pooled or 1x1 map is channels_last and contiguous at once, whatever its strides say."""
    dense = channels_last(*shape).stride()
    strides = [99 if extent == 1 else stride for extent, stride in zip(shape, dense, strict=True)]
    x = torch.empty(2000, dtype=torch.float16).as_strided(shape, strides)
    arguments |= {"x": x, "conv_weight": torch.empty(9, 8, 8, dtype=torch.float16), "sample_scale": None}
    arguments |= {"expand_weight": torch.empty(32, 8, dtype=torch.float16), "expand_bias": None}
    arguments |= {"project_weight": torch.empty(8, 32, dtype=torch.float16), "project_bias": None}
    arguments |= dict.fromkeys(("conv_bias", "norm_weight", "norm_bias", "layer_scale"))
    check(**arguments)


REFUSALS = {
    "dtype of x": (
        lambda a: {"x": a["x"].float()},
        "x is torch.float32; supported are torch.float16 and torch.bfloat16",
    ),
    "dtype of a matrix": (
        lambda a: {"expand_weight": a["expand_weight"].bfloat16()},
        "expand_weight is torch.bfloat16; expected x's dtype torch.float16",
    ),
    "dtype of a vector": (
        lambda a: {"norm_weight": a["norm_weight"].half()},
        "norm_weight is torch.float16; expected torch.float32",
    ),
    "dimensions of x": (
        lambda a: {"x": a["x"][0]},
        "x has shape [64, 6, 5]; expected 4 dimensions [batch, channels, height, width]",
    ),
    "layout of x": (
        lambda a: {"x": a["x"].contiguous()},
        "x of shape [2, 64, 6, 5] has strides [1920, 30, 5, 1]; expected dense channels_last [1920, 1, 320, 64]",
    ),
    "gaps in x": (
        lambda a: {"x": channels_last(2, 128, 6, 5)[:, :64]},
        "x of shape [2, 64, 6, 5] has strides [3840, 1, 640, 128]; expected dense channels_last",
    ),
    "x overlaps itself": (
        lambda a: {"x": channels_last(1, 64, 6, 5).expand(2, 64, 6, 5)},
        "x of shape [2, 64, 6, 5] has strides [0, 1, 320, 64]; expected dense channels_last",
    ),
    "layout of a matrix": (
        lambda a: {"project_weight": a["expand_weight"].t()},
        "project_weight of shape [64, 256] has strides [1, 64]; it must be contiguous",
    ),
    "layout of a vector": (
        lambda a: {"layer_scale": torch.ones(128)[::2]},
        "layer_scale has strides [2]; it must be contiguous",
    ),
    "alignment of x": (
        lambda a: {"x": misaligned(a["x"])},
        "x starts at an address that is 2 bytes past a multiple of 16; its storage must be 16-byte aligned",
    ),
    "alignment of a matrix": (
        lambda a: {"conv_weight": misaligned(a["conv_weight"])},
        "conv_weight starts at an address that is 2 bytes past a multiple of 16",
    ),
    "alignment of a vector": (
        lambda a: {"expand_bias": misaligned(a["expand_bias"])},
        "expand_bias starts at an address that is 4 bytes past a multiple of 16",
    ),
    "width": (
        lambda a: {"x": channels_last(2, 60, 6, 5)},
        "x has 60 channels; supported are multiples of 8",
    ),
    "size": (
        lambda a: {"x": channels_last(2, 64, 0, 5)},
        "x has shape [2, 64, 0, 5]; height and width must be at least 1",
    ),
    "elements": (
        lambda a: {"x": channels_last(1024, 64, 256, 128, device="meta")},
        "x has shape [1024, 64, 256, 128] = 2147483648 elements; supported are fewer than 2^31 = 2147483648",
    ),
    "kernel size": (
        lambda a: {"conv_weight": torch.empty(121, 64, 8, dtype=torch.float16)},
        "conv_weight has 121 taps; supported are 9, 25 and 49 (kernel size 3, 5, 7)",
    ),
    "unpacked weight": (
        lambda a: {"conv_weight": torch.empty(64, 8, 3, 3, dtype=torch.float16)},
        "conv_weight has shape [64, 8, 3, 3]; expected the packed [kernel_size * kernel_size, channels, group_width]",
    ),
    "weight of another width": (
        lambda a: {"conv_weight": torch.empty(9, 32, 8, dtype=torch.float16)},
        "conv_weight has shape [9, 32, 8]; expected [9, 64, 8]",
    ),
    "group width": (
        lambda a: {"group_width": 4},
        "group_width is 4; supported are 1 (depthwise), 8 and 16",
    ),
    "group width and channels": (
        lambda a: {"group_width": 16, "x": channels_last(2, 40, 6, 5)},
        "group_width 16 does not divide the 40 channels",
    ),
    "expand_weight": (
        lambda a: {"expand_weight": torch.empty(256, 32, dtype=torch.float16)},
        "expand_weight has shape [256, 32]; expected [*, 64] = [hidden, channels]",
    ),
    "hidden units": (
        lambda a: {"expand_weight": torch.empty(250, 64, dtype=torch.float16)},
        "expand_weight has 250 hidden units; supported are multiples of 16",
    ),
    "project_weight": (
        lambda a: {"project_weight": a["expand_weight"]},
        "project_weight has shape [256, 64]; expected [64, 256] = [channels, hidden]",
    ),
    "length of a vector": (
        lambda a: {"expand_bias": torch.ones(64)},
        "expand_bias has shape [64]; expected [256] = [hidden]",
    ),
    "sample_scale": (
        lambda a: {"sample_scale": torch.ones(3)},
        "sample_scale has shape [3]; expected [2] = [batch]",
    ),
    "activation": (
        lambda a: {"activation": "tanh"},
        "activation is 'tanh'; supported are 'relu', 'silu' and 'gelu'",
    ),
    "eps": (
        lambda a: {"eps": 0.0},
        "eps is 0; it must be positive",
    ),
    "norm without a norm": (
        lambda a: {"has_norm": False},
        "norm_weight is given and has_norm is false",
    ),
    "device": (
        lambda a: {"project_weight": a["project_weight"].to("meta")},
        "project_weight is on a device that is neither CUDA nor CPU and x on cpu; all tensors must be on one device",
    ),
    "shape of out": (
        lambda a: {"out": channels_last(2, 64, 5, 6)},
        "out has shape [2, 64, 5, 6]; expected [2, 64, 6, 5] = x's shape",
    ),
    "dtype of out": (
        lambda a: {"out": channels_last(2, 64, 6, 5, dtype=torch.float32)},
        "out is torch.float32; expected x's dtype torch.float16",
    ),
    "layout of out": (
        lambda a: {"out": torch.empty(2, 64, 6, 5, dtype=torch.float16)},
        "out of shape [2, 64, 6, 5] has strides [1920, 30, 5, 1]; expected dense channels_last",
    ),
    "out is x": (
        lambda a: {"out": a["x"]},
        "out shares storage with x; it must not overlap any input",
    ),
    "out overlaps a weight": (
        lambda a: {"out": a["project_weight"].view(-1)[:3840].view(2, 6, 5, 64).permute(0, 3, 1, 2)},
        "out shares storage with project_weight; it must not overlap any input",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_refuses(arguments, what):
    change, message = REFUSALS[what]
    arguments |= change(arguments)
    with pytest.raises(RuntimeError, match=f"^conv_first_block: {re.escape(message)}"):
        check(**arguments)


def test_kernels_refuse_a_cpu_tensor_only_where_they_are_required(arguments):
    assert torch.ops.convfirst.conv_first_block(*arguments.values()).device.type == "cpu"


def test_plan_refuses_unknown_dtypes():
    with pytest.raises(RuntimeError, match="dtype is 'float64'; supported are 'float16' and 'bfloat16'"):
        ck.explain(ck.Problem(1, 7, 7, 64, 256, dtype="float64"), "h100")
