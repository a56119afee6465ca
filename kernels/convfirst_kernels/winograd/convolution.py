"""Winograd's convolution as a function of weights in PyTorch's own layout."""

from operator import index

import torch
from torch import Tensor

from convfirst_kernels.block import KERNELS, compute_dtype, log_once
from convfirst_kernels.direct.convolution import direct_conv2d
from convfirst_kernels.winograd import operators, reference
from convfirst_kernels.winograd.kernels import refusal
from convfirst_kernels.winograd.measured import fastest

ALGORITHMS = ("auto", *operators.ALGORITHMS)
# How many times direct convolution's largest error in the same dtype that of F(4x4, 3x3) may be for "auto" to take it,
# and the dtypes in which it is not more on VGG's layers (results/winograd-error.json; float64 by a test).
F4_BOUND = {torch.float32: 30, torch.float64: 30, torch.float16: 2, torch.bfloat16: 2}
F4_DTYPES = (torch.float32, torch.float64)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int = 1,
    *,
    algorithm: str = "auto",
    activation: str = "none",
    kernels: str = "auto",
) -> Tensor:
    """``act(conv2d(x, weight, bias, padding=padding))`` by Winograd's minimal filtering (Lavin & Gray, 1509.09308).

    CUDA kernels compute it in float32 (true float32, no TF32), and by "f2" in float16 and bfloat16: under
    `force_path`("sm90") in one kernel on Hopper where channels and outputs are multiples of 8, else there and under
    `force_path`("sm80") by the portable kernels. Elsewhere the operator runs its definition, `winograd.reference`,
    there for its numbers and not for speed. In 16 bits shared memory, not the tensor cores, binds F(2x2, 3x3), and
    "auto" is `direct_conv2d` there on a GPU.
    Differentiable once: the gradient of x by the same algorithm, that of weight by F(3x3, 2x2).

    Args:
        x: [N, C, H, W], float32, float16, bfloat16 or float64. Under autocast it is computed in autocast's dtype.
        weight: [K, C, 3, 3], stride 1; bias: [K] or None. Any floating dtype.
        padding: 0, 1 or 2 zeros at each edge of the image.
        algorithm: "f2", F(2x2, 3x3); "f4", F(4x4, 3x3); "auto", on a GPU what was measured to be the fastest, direct
            convolution among them, elsewhere what has fewer multiplications, but "f4" only where its error is within
            `F4_BOUND`: float32 and float64.
        activation: "none", "relu", "silu" or "gelu" (exact).
        kernels: "auto" computes what no kernel covers by the reference and logs that once; "required" raises instead;
            "off" always uses the reference.

    Returns:
        [N, K, H + 2 padding - 2, W + 2 padding - 2], channels_last, in the dtype computed in.

    Raises:
        ValueError: ``kernels`` or ``algorithm`` is none of those.
        RuntimeError: the operator refuses an argument; the message names it, its value and what is supported. Or
            a second derivative is asked for.
    """
    for name, value, accepted in (("kernels", kernels, KERNELS), ("algorithm", algorithm, ALGORITHMS)):
        if value not in accepted:
            raise ValueError(f"{name}={value!r}; accepted: {', '.join(map(repr, accepted))}")
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if bias is not None:
        bias = bias.to(torch.promote_types(dtype, torch.float32))
    if algorithm == "auto":
        operators.check(x, weight, bias, padding, "f2", activation)
        size = [extent + 2 * padding - 2 for extent in x.shape[2:]]
        shape = map(index, (x.shape[0], *size, x.shape[1], weight.shape[0]))
        known = _measured_fastest(str(dtype).removeprefix("torch."), *shape) if x.device.type == "cuda" else None
        algorithm = known or choose(dtype, *size, x.device.type)
    if algorithm == "direct":
        return direct_conv2d(x, weight, bias, padding=padding, activation=activation, kernels=kernels)
    arguments = (x, weight, bias, padding, algorithm, activation)
    operators.check(*arguments)
    reason = "kernels='off'" if kernels == "off" else refusal(x, weight.shape[0], padding, algorithm)
    if kernels == "required" and reason is not None:
        raise RuntimeError(f"winograd_conv2d: kernels='required', but {reason}")
    if kernels == "auto" and reason is not None:
        log_once(f"winograd_conv2d runs the PyTorch reference: {reason}")
    if kernels == "off" and x.device.type == "cuda":
        return reference.winograd_conv2d(*arguments)
    return torch.ops.convfirst.winograd_conv2d(*arguments)


@torch.compiler.assume_constant_result  # it reads a file, which Dynamo can't follow
def _measured_fastest(dtype: str, *shape: int) -> str | None:
    return fastest(dtype, *shape)


def choose(dtype: torch.dtype, height: int, width: int, device: str = "cpu") -> str:
    """What "auto" means where nothing was measured, for an output of height x width pixels on a device of that type:
    direct convolution in 16 bits on a GPU, elsewhere fewest multiplications with an error within `F4_BOUND`."""
    if dtype in (torch.float16, torch.bfloat16) and device == "cuda":
        return "direct"
    if dtype not in F4_DTYPES:
        return "f2"
    return "f4" if multiplications("f4", height, width) < multiplications("f2", height, width) else "f2"


def multiplications(algorithm: str, height: int, width: int) -> int:
    """For each input and output channel, of an output of height x width pixels: whole tiles at the edges too."""
    m = {"f2": 2, "f4": 4}[algorithm]
    return (m + 2) ** 2 * -(-height // m) * -(-width // m)
