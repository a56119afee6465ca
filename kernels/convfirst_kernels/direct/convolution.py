"""Direct convolution as a function of weights in PyTorch's own layout, and what the planner says about it."""

import json

import torch
from torch import Tensor

from convfirst_kernels.block import KERNELS, compute_dtype, log_once
from convfirst_kernels.direct import (
    operators,  # noqa: F401  defines the operators
    reference,
)
from convfirst_kernels.planner import Device

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def direct_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    kernels: str = "auto",
) -> Tensor:
    """``act(conv2d(x, weight, bias, stride, padding, dilation))`` as one implicit matrix product (Lavin, 1501.06633).

    Bias and activation are applied before the only rounding. Differentiable once, by kernels too.

    Args:
        x: [N, C, H, W], float16, bfloat16 or float32 (true float32 on a GPU); other layouts than channels_last are
            copied. Under autocast it is computed in autocast's dtype.
        weight: [K, C, R, S]; bias: [K] or None. Any floating dtype.
        stride, padding, dilation: one number or (vertical, horizontal).
        groups: 1.
        activation: "none", "relu", "silu" or "gelu" (exact).
        kernels: "auto" runs the PyTorch reference where x is not on a GPU or of another dtype, and logs that once;
            "required" raises instead; "off" always runs the reference.

    Returns:
        [N, K, P, Q], channels_last, in the dtype computed in.

    Raises:
        ValueError: ``kernels``, ``groups``, ``stride``, ``padding`` or ``dilation`` is none of those.
        RuntimeError: the operator refuses an argument; the message names it, its value and what is supported. Or
            a second derivative is asked for.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}; accepted: {', '.join(map(repr, KERNELS))}")
    if groups != 1:
        raise ValueError(f"groups={groups!r}; direct_conv2d takes groups=1 (torch.nn.functional.conv2d takes others)")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; accepted: {', '.join(map(repr, reference.ACTIVATIONS))}")
    geometry = (*_pair("stride", stride), *_pair("padding", padding), *_pair("dilation", dilation))
    dtype = compute_dtype(x)
    reason = "kernels='off'" if kernels == "off" else refusal(x, dtype)
    if reason is None:
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        return torch.ops.convfirst.direct_conv2d(_dense(x, dtype), _dense(weight, dtype), bias, *geometry, activation)
    if kernels == "required":
        raise RuntimeError(f"direct_conv2d: kernels='required', but {reason}")
    if kernels == "auto":
        log_once(f"direct_conv2d runs the PyTorch reference: {reason}")
    y = reference.direct_conv2d(x.to(dtype), weight.to(dtype), bias, *geometry, activation)
    return y.contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name}={value!r}; accepted: one integer or a pair (vertical, horizontal)")
    return pair


def refusal(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why no kernel convolves x in ``dtype``, or None where one does."""
    if x.device.type != "cuda":
        return f"x is on {x.device.type}; the kernels run on CUDA devices"
    if dtype not in DTYPES:
        return f"x is {dtype}; the kernels take {', '.join(map(str, DTYPES))}"
    return None


def plan_direct(
    shape: tuple[int, int, int, int],
    weight_shape: tuple[int, int, int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    direction: str = "forward",
    dtype: str = "float16",
    activation: str = "none",
    device: str | Device = "h100",
    path: str = "",
) -> dict:
    """The planner's answer for x and weight of these shapes; see `convfirst_kernels.planner.plan`."""
    device = device if isinstance(device, Device) else Device.named(device)
    (n, c, h, w), (k, _, r, s) = shape, weight_shape
    geometry = (*_pair("stride", stride), *_pair("padding", padding), *_pair("dilation", dilation))
    on = device.capability, device.multiprocessors, device.max_shared_memory, path
    answer = torch.ops.convfirst.plan_direct_conv2d(direction, n, h, w, c, k, r, s, *geometry, dtype, activation, *on)
    return json.loads(answer)
