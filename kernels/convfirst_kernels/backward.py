"""The backward of the conv-first block as a few kernels, none of which stores the hidden tensor.

    a, rstd = conv_norm(x)                          recomputed: the convolution, normalised without the affine part
    da, dW1', db1', dW2, db2, dg = feed_forward_backward(a, dy)    the expansion takes the norm's affine part in
    dx = dy + conv_norm(da, transposed filter)      with dy as its residual
    dW, db = conv_weight_gradient(da, x)

Elsewhere than where these kernels run, `reference.conv_first_block_backward` computes the same.
"""

from collections.abc import Callable
from functools import cache
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from convfirst_kernels import (
    conv_norm,  # noqa: F401  registers the operator
    library,  # noqa: F401  owns the namespace
    reference,
)

CAPABILITY = 90  # 10 * major + minor, of the devices that all the kernels run on
operators = torch.ops.convfirst
_implementations = torch.library.Library("convfirst", "IMPL")


@torch.library.impl(_implementations, "conv_weight_gradient", "CPU")
def conv_weight_gradient(da: Tensor, x: Tensor, kernel_size: int, group_width: int) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of the bias of the block's convolution, summed over pixels in float32 at least.

    Args:
        da: gradient of the convolution's output, [N, C, H, W] in x's dtype.
        x: [N, C, H, W].
        kernel_size: 3, 5 or 7; padding is its half, the stride 1.
        group_width: input channels of a group.

    Returns:
        [kernel_size * kernel_size, C, group_width] and [C], float32 (float64 for float64).

    Raises:
        RuntimeError: in 16 bits, the operator refuses an argument; the message names it, its value and what is
            supported.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        operators.conv_weight_gradient_check(da, x, kernel_size, group_width)
    channels, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    weight = x.new_empty(channels, group_width, kernel_size, kernel_size, dtype=wide)
    _, d_weight, _ = torch.ops.aten.convolution_backward(
        da.to(wide), x.to(wide), weight, None, [1, 1], [kernel_size // 2] * 2, [1, 1], False, [0, 0],
        channels // group_width, [False, True, False],
    )  # fmt: skip
    return d_weight.flatten(2).permute(2, 0, 1).contiguous(), da.to(wide).sum((0, 2, 3))


@torch.library.register_fake("convfirst::conv_weight_gradient")
def _conv_weight_gradient_fake(da: Tensor, x: Tensor, kernel_size: int, group_width: int) -> tuple[Tensor, Tensor]:
    channels, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((kernel_size**2, channels, group_width), dtype=wide),
        x.new_empty((channels,), dtype=wide),
    )


@torch.library.impl(_implementations, "transpose_filter", "CPU")
def transpose_filter(conv_weight: Tensor) -> Tensor:
    """The packed filter whose convolution is the transpose of ``conv_weight``'s: taps reversed, channels swapped."""
    taps, channels, group_width = conv_weight.shape
    groups = conv_weight.view(taps, channels // group_width, group_width, group_width)
    return groups.flip(0).transpose(2, 3).reshape(taps, channels, group_width)


@torch.library.impl(_implementations, "absorb_affine", "CPU")
def absorb_affine(
    expand_weight: Tensor, expand_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that takes ``n`` where the expansion takes ``n * norm_weight + norm_bias``.

    Products in float32 at least; the weight is rounded once.
    """
    wide = torch.promote_types(expand_weight.dtype, torch.float32)
    matrix = expand_weight.to(wide)
    bias = matrix.new_zeros(matrix.shape[0]) if expand_bias is None else expand_bias.clone()
    if norm_bias is not None:
        bias += matrix @ norm_bias.to(wide)
    if norm_weight is not None:
        matrix = matrix * norm_weight
    return matrix.to(expand_weight.dtype, copy=True), bias


@torch.library.impl(_implementations, "release_affine", "CPU")
def release_affine(
    d_matrix: Tensor,
    d_bias: Tensor,
    expand_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    d_project: Tensor,
    d_conv: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of norm_weight, norm_bias and expand_weight from those of what `absorb_affine` made of them.

    With W' = W diag(g) and b' = b + W beta: dg = column sums of dW' * W, dbeta = W^T db',
    dW = dW' diag(g) + db' beta^T.
    dW, ``d_project`` and ``d_conv`` are rounded to expand_weight's dtype; dg and dbeta mean nothing without g and beta.
    """
    wide = torch.promote_types(expand_weight.dtype, torch.float32)
    matrix = expand_weight.to(wide)
    d_expand = d_matrix if norm_weight is None else d_matrix * norm_weight
    if norm_bias is not None:
        d_expand = torch.addr(d_expand, d_bias, norm_bias.to(wide))
    rounded = (gradient.to(expand_weight.dtype, copy=True) for gradient in (d_expand, d_project, d_conv))
    return (d_matrix * matrix).sum(0), d_bias @ matrix, *rounded


class Stages(NamedTuple):
    """What `staged_backward` is made of; the operators of ``torch.ops.convfirst`` but in tests.

    Images are [N, C, H, W] in channels_last; rstd is [N * H * W]; `feed_forward_backward`'s da is [N * H * W, C].
    """

    conv_norm: Callable
    feed_forward_backward: Callable
    conv_weight_gradient: Callable


@cache
def stages() -> Stages:
    return Stages(*(getattr(operators, name) for name in Stages._fields))


def conv_first_block_backward(grad: Tensor, *arguments) -> tuple[Tensor, ...]:
    """`reference.conv_first_block_backward`, by kernels where they cover the call."""
    with torch.autocast(grad.device.type, enabled=False):  # a backward inside of an autocast region would round sums
        if refusal_of(arguments) is None and arguments[0].numel():
            return staged_backward(stages(), grad, *arguments)
        return reference.conv_first_block_backward(grad, *arguments)


def refusal_of(arguments: tuple) -> str | None:
    """`refusal` for the forward operator's arguments."""
    x, conv_weight, expand_weight = arguments[0], arguments[1], arguments[5]
    hidden, channels = expand_weight.shape
    side = {9: 3, 25: 5, 49: 7}[conv_weight.shape[0]]
    return refusal(x.device, x.dtype, channels, hidden, side, *arguments[11:13])


def refusal(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    hidden: int,
    kernel_size: int,
    group_width: int,
    activation: str,
) -> str | None:
    """Why no kernels compute the gradients of such a block on a tensor of this device and dtype, or None."""
    if device.type != "cuda":
        return f"x is on {device.type}; the kernels run on CUDA devices"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x is {dtype}; the kernels take torch.float16 and torch.bfloat16"
    channels, hidden, kernel_size, group_width = map(index, (channels, hidden, kernel_size, group_width))
    return _uncovered(channels, hidden, kernel_size, group_width, str(dtype), activation, device.index or 0)


@torch.compiler.assume_constant_result
def _uncovered(*shape) -> str | None:
    return _uncovered_cached(*shape)


@cache
def _uncovered_cached(channels, hidden, kernel_size, group_width, dtype, activation, device_index) -> str | None:
    major, minor = torch.cuda.get_device_capability(device_index)
    if 10 * major + minor != CAPABILITY:
        return f"the backward's kernels run on compute capability 9.0; the device has {major}.{minor}"
    grouped = kernel_size in (3, 5) and group_width in (8, 16) and channels % 32 == 0 and channels <= 1024
    depthwise = kernel_size == 7 and group_width == 1 and channels <= 1536
    if not grouped and not depthwise:
        return (
            f"conv_norm has no kernel for {kernel_size}x{kernel_size} filters on {channels} channels in groups of "
            f"{group_width}: it takes 3x3 and 5x5 in groups of 8 and 16 on multiples of 32 channels up to 1024, and "
            "7x7 depthwise up to 1536"
        )
    return None


def staged_backward(
    stages: Stages,
    grad: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    group_width: int,
    activation: str,
    eps: float,
    has_norm: bool,
    output_mask: list[bool],
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """`reference.conv_first_block_backward` by stages; ``kept`` is what the first one gave in the forward pass."""
    inputs = (
        x, conv_weight, conv_bias, norm_weight, norm_bias, expand_weight, expand_bias, project_weight, project_bias,
        layer_scale, sample_scale,
    )  # fmt: skip
    output_mask = [wanted and tensor is not None for wanted, tensor in zip(output_mask, inputs, strict=True)]
    results: list[Tensor | None] = [None] * len(inputs)
    if any(output_mask[:10]):
        a, rstd = kept or stages.conv_norm(x, conv_weight, conv_bias, None, group_width, has_norm, eps)
        affine = norm_weight is not None or norm_bias is not None
        matrix, bias = expand_weight, expand_bias
        if affine:
            matrix, bias = operators.absorb_affine(expand_weight, expand_bias, norm_weight, norm_bias)
        da, *results[5:10] = stages.feed_forward_backward(
            a, grad, rstd if has_norm else None, matrix, bias, project_weight, project_bias, layer_scale, sample_scale,
            activation,
        )  # fmt: skip
        del a, rstd, kept
        da = da.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        if output_mask[0]:
            transposed = operators.transpose_filter(conv_weight)
            results[0], _ = stages.conv_norm(da, transposed, None, grad, group_width, False, eps)
        if output_mask[1] or output_mask[2]:
            side = {9: 3, 25: 5, 49: 7}[conv_weight.shape[0]]
            results[1], results[2] = stages.conv_weight_gradient(da, x, side, group_width)
        d_conv = da.new_empty(0, dtype=results[5].dtype) if results[1] is None else results[1]
        results[3], results[4], results[5], results[7], results[1] = operators.release_affine(
            results[5], results[6], expand_weight, norm_weight, norm_bias, results[7], d_conv
        )
    if output_mask[10]:  # drop path's factors, which nothing trains
        only = [position == 10 for position in range(len(inputs))]
        options = group_width, activation, eps, has_norm, only
        results[10] = reference.conv_first_block_backward(grad, *inputs, *options)[10]
    return tuple(
        _as_gradient(result, tensor, wanted, x)
        for result, tensor, wanted in zip(results, inputs, output_mask, strict=True)
    )


def _as_gradient(result: Tensor | None, tensor: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    """The result in the dtype and strides of `reference.empty_gradient`."""
    if not wanted:
        return reference.empty_gradient(tensor, wanted, x)
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return result.to(tensor.dtype).contiguous(memory_format=layout)
