"""The operator conv_norm without a GPU: its fake, its definition, its refusals."""

import re

import pytest
import torch

from convfirst_kernels import (
    conv_norm,  # noqa: F401  registers the operator
    pack_conv_weight,
)

operators = torch.ops.convfirst


def arguments(dtype=torch.float16, normalise=True, residual=False, group_width=8, side=3, channels=32):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 5, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = pack_conv_weight(torch.randn(channels, group_width, side, side), dtype)
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        x=x, conv_weight=weight, conv_bias=torch.randn(channels, dtype=vector),
        residual=torch.randn_like(x) if residual else None, group_width=group_width, normalise=normalise, eps=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("normalise, residual", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_opcheck(dtype, normalise, residual):
    given = arguments(dtype, normalise, residual)
    torch.library.opcheck(operators.conv_norm, tuple(given.values()), test_utils=("test_schema", "test_faketensor"))


def test_it_is_convolution_and_layer_norm():
    given = arguments(torch.float64)
    weight = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    given["conv_weight"] = pack_conv_weight(weight, torch.float64)
    a, rstd = operators.conv_norm(*given.values())
    conv = torch.nn.functional.conv2d(given["x"], weight, given["conv_bias"], padding=1, groups=4).permute(0, 2, 3, 1)
    torch.testing.assert_close(a.permute(0, 2, 3, 1), torch.nn.functional.layer_norm(conv, (32,), eps=1e-6))
    torch.testing.assert_close(rstd.view(conv.shape[:3]), (conv.var(-1, correction=0) + 1e-6).rsqrt())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 32, 5, 7)), "x is torch.float32"),
        (dict(group_width=4), "group_width is 4; supported are 1 (depthwise), 8 and 16"),
        (
            dict(conv_weight=torch.zeros(8, 32, 8, dtype=torch.float16)),
            "conv_weight has 8 taps; supported are 9, 25 and 49",
        ),
        (dict(conv_bias=torch.zeros(31)), "conv_bias has shape [31]"),
        (dict(residual=torch.zeros(2, 32, 5, 7, dtype=torch.float16)), "residual is given with normalise=True"),
        (
            dict(residual=torch.zeros(2, 32, 5, 6, dtype=torch.float16), normalise=False),
            "residual has shape [2, 32, 5, 6]",
        ),
        (
            dict(residual=torch.zeros(2, 32, 5, 7, dtype=torch.bfloat16), normalise=False),
            "residual is torch.bfloat16; expected x's dtype torch.float16",
        ),
        (dict(eps=-1.0), "eps is -1; it must not be negative"),
    ],
)
def test_refusals_name_the_argument(change, message):
    with pytest.raises(RuntimeError, match="^" + re.escape(f"conv_norm: {message}")):
        operators.conv_norm_check(*(arguments() | change).values())
