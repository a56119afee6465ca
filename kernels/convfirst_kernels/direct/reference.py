"""What direct convolution's operators compute, in PyTorch: the CPU path and the tests' oracle (in float64)."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def direct_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sh: int,
    sw: int,
    ph: int,
    pw: int,
    dh: int,
    dw: int,
    activation: str,
) -> Tensor:
    """``act(conv2d(x, weight, bias))``, [N, C, H, W] and [K, C, R, S] -> [N, K, P, Q]; rounded once, at the end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    y = F.conv2d(x.to(wide), weight.to(wide), bias, (sh, sw), (ph, pw), (dh, dw))
    return ACTIVATIONS[activation](y).to(x.dtype)


def dgrad(grad: Tensor, weight: Tensor, height: int, width: int, *geometry: int) -> Tensor:
    """The gradient of x [N, C, height, width] from that of the output without bias and activation."""
    x = weight.new_empty((grad.shape[0], weight.shape[1], height, width))
    return _backward(grad, x, weight, geometry, [True, False, False])[0]


def wgrad(grad: Tensor, x: Tensor, kernel_h: int, kernel_w: int, *geometry: int) -> Tensor:
    """The gradient of weight [K, C, kernel_h, kernel_w] from that of the output without bias and activation."""
    weight = x.new_empty((grad.shape[1], x.shape[1], kernel_h, kernel_w))
    return _backward(grad, x, weight, geometry, [False, True, False])[1]


def _backward(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple[int, ...], output_mask: list[bool]):
    stride, padding, dilation = (list(geometry[i : i + 2]) for i in (0, 2, 4))
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], 1, output_mask
    )
