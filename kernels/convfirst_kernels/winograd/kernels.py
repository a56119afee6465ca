"""Winograd by the CUDA kernels: what they cover, forward and backward on top of the library's operators."""

import torch
from torch import Tensor

from convfirst_kernels.reference import _activation_backward, empty_gradient

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LIMIT = 2**31  # elements of x and of the result: the kernels count pixels in 32 bits


def refusal(x: Tensor, outputs: int, padding: int, algorithm: str) -> str | None:
    """Why no kernel computes the convolution of x, or None where one does."""
    if x.device.type != "cuda":
        return f"x is on {x.device.type}; the kernels run on CUDA devices"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}; the kernels take torch.float32, torch.float16 and torch.bfloat16"
    if x.dtype != torch.float32:
        path = _forced_path()
        if path not in ("sm80", "sm90"):
            return f"its {x.dtype} kernels run where asked for; force_path('sm90') or force_path('sm80') asks for them"
        if path == "sm90" and torch.cuda.get_device_capability(x.device) != (9, 0):
            return "path 'sm90' needs compute capability 9.0; force_path('sm80') asks for the portable kernels"
    if x.dtype != torch.float32 and algorithm != "f2":
        return f"algorithm is {algorithm!r}; in {x.dtype} the kernels know 'f2'"
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    if max(x.numel(), x.shape[0] * outputs * height * width) >= _LIMIT:
        return f"x has shape {list(x.shape)}; the kernels take fewer than 2^31 elements of x and of the result"
    return None


@torch.compiler.assume_constant_result
def _forced_path() -> str:
    forced = torch.ops.convfirst.force_path("")
    torch.ops.convfirst.force_path(forced)
    return forced


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, algorithm: str, activation: str, plan: str = ""
) -> Tensor:
    """`reference.winograd_conv2d` on tensors that `refusal` takes, channels_last."""
    filter = torch.ops.convfirst.winograd_filter(weight, algorithm, False)
    return _convolve(x, filter, bias, weight.shape[0], padding, algorithm, activation, plan)


def plan(x: Tensor, outputs: int, padding: int, algorithm: str) -> str:
    """How the convolution of x would run on its device: "fused", or "split", its tile, splits and tiles of a chunk."""
    device = torch.cuda.get_device_properties(x.device)
    batch, channels, height, width = x.shape
    shape = (batch, height, width, channels, outputs, padding)
    limits = (device.multi_processor_count, device.shared_memory_per_block_optin)
    dtype = str(x.dtype).removeprefix("torch.")
    return torch.ops.convfirst.plan_winograd(*shape, dtype, algorithm, *limits)


def explain(x: Tensor, outputs: int, padding: int, algorithm: str) -> str:
    """Which kernels the convolution of x would run on its device, or why none, in words; under `force_path`("sm90")
    also why not the fused kernel of 16 bits."""
    reason = refusal(x, outputs, padding, algorithm)
    if reason is not None:
        return f"PyTorch reference: {reason}"
    chosen = plan(x, outputs, padding, algorithm)
    if chosen == "fused":
        return f"fused_fwd_{'sm80' if x.dtype == torch.float32 else 'sm90'}, one launch, no workspace"
    path, *numbers = chosen.split()
    products = "products_fwd_sm80" if x.dtype == torch.float32 else "products_mma_fwd_sm80"
    kernels = f"{path}: input_transform_sm80, {products}, output_transform_sm80; rows, columns, splits, tiles {numbers}"
    if x.dtype == torch.float32 or _forced_path() != "sm90":
        return kernels
    return (
        f"{kernels}; fused_fwd_sm90 takes channels and outputs that are multiples of 8 and 2 columns at least, "
        f"not {x.shape[1]}, {outputs} and {x.shape[3]}"
    )


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    algorithm: str,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.winograd_conv2d_backward` on tensors that `refusal` takes."""
    if activation != "none":
        before = forward(x, weight, bias, padding, algorithm, "none").float()
        grad = _activation_backward(activation, grad.float(), before).to(x.dtype)
    gradients = tuple(map(empty_gradient, (x, weight, bias), output_mask, (x, x, x)))
    if output_mask[0]:
        rotated = torch.ops.convfirst.winograd_filter(weight, algorithm, True)
        gradients[0].copy_(_convolve(grad, rotated, None, weight.shape[1], 2 - padding, algorithm, "none"))
    if output_mask[1]:
        gradients[1].copy_(
            torch.ops.convfirst.winograd_weight_gradient(_dense(x.float()), _dense(grad.float()), padding)
        )
    if output_mask[2] and bias is not None:
        gradients[2].copy_(grad.sum((0, 2, 3), dtype=torch.float32))
    return gradients


def _convolve(x: Tensor, filter: Tensor, bias: Tensor | None, outputs: int, padding: int, *options) -> Tensor:
    algorithm, activation, plan = (*options, "")[:3]
    bias = None if bias is None else bias.contiguous()
    return torch.ops.convfirst.winograd_conv2d_filtered(
        _dense(x), filter, bias, outputs, padding, algorithm, activation, plan
    )


def _dense(x: Tensor) -> Tensor:
    """x in channels_last, at an address that is a multiple of 16 bytes."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)
