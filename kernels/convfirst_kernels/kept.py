"""``torch.ops.convfirst.conv_first_block_kept``: the block's forward that keeps what its backward would compute again.

    a, rstd = conv_norm(x)            normalised without the affine part, kept for the backward beside x
    y = feed_forward(a, x)            with the affine part in the expansion

The same function as ``conv_first_block``, and the same gradients, whose first stage would compute ``a`` again.
"""

from functools import cache

import torch
from torch import Tensor

from convfirst_kernels import backward, conv_norm, reference
from convfirst_kernels.planner import Device, Problem, plan

ENABLED = True

TENSORS = 11  # the operator's leading arguments that are tensors
operators = torch.ops.convfirst
_ARGUMENTS = str(operators.conv_first_block.default._schema).partition("(")[2].rpartition(") ->")[0]
_GRADIENTS = ", ".join(["Tensor"] * TENSORS)
_definitions = torch.library.Library("convfirst", "FRAGMENT")
_definitions.define(f"conv_first_block_kept({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_definitions.define(
    f"conv_first_block_kept_backward(Tensor grad, Tensor a, Tensor rstd, {_ARGUMENTS}, bool[{TENSORS}] output_mask) "
    f"-> ({_GRADIENTS})"
)


@torch.library.impl(_definitions, "conv_first_block_kept", "CUDA")
def conv_first_block_kept(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments are those of ``conv_first_block``; returns its result, and what `conv_norm.conv_norm` gives."""
    if norm_weight is not None or norm_bias is not None:
        expand_weight, expand_bias = operators.absorb_affine(expand_weight, expand_bias, norm_weight, norm_bias)
    # conv_norm comes last before feed_forward, whose kernel starts under it and counts on its weights being there.
    a, rstd = operators.conv_norm(x, conv_weight, conv_bias, None, group_width, has_norm, eps)
    side = {9: 3, 25: 5, 49: 7}[conv_weight.shape[0]]
    y = operators.feed_forward(
        a, x, expand_weight, expand_bias, project_weight, project_bias, layer_scale, sample_scale, side, group_width,
        activation,
    )  # fmt: skip
    return y, a, rstd


@torch.library.impl(_definitions, "conv_first_block_kept", "CPU")
def _cpu(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        y = torch.empty_like(x, memory_format=torch.channels_last).copy_(reference.conv_first_block(x, *arguments))
        conv_weight, conv_bias, group_width, (_, eps, has_norm) = *arguments[:2], arguments[10], arguments[11:]
        return y, *conv_norm.conv_norm(x, conv_weight, conv_bias, None, group_width, has_norm, eps)


@torch.library.register_fake("convfirst::conv_first_block_kept")
def _fake(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    a, rstd = conv_norm._conv_norm_fake(x, None, None, None, arguments[10], arguments[13], 0.0)
    return torch.empty_like(a), a, rstd


@torch.library.impl(_definitions, "conv_first_block_kept_backward", "CUDA")
def _backward_cuda(grad: Tensor, a: Tensor, rstd: Tensor, *arguments) -> tuple[Tensor, ...]:
    with torch.autocast(grad.device.type, enabled=False):  # a backward inside of an autocast region would round sums
        if not grad.numel():
            return reference.conv_first_block_backward(grad, *arguments)
        return backward.staged_backward(backward.stages(), grad, *arguments, kept=(a, rstd))


@torch.library.impl(_definitions, "conv_first_block_kept_backward", "CPU")
def _backward_cpu(grad: Tensor, a: Tensor, rstd: Tensor, *arguments) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", enabled=False):
        return reference.conv_first_block_backward(grad, *arguments)


@torch.library.register_fake("convfirst::conv_first_block_kept_backward")
def _backward_fake(grad: Tensor, a: Tensor, rstd: Tensor, *arguments) -> tuple[Tensor, ...]:
    tensors = arguments[:TENSORS]
    return tuple(
        reference.empty_gradient(tensor, wanted, tensors[0])
        for tensor, wanted in zip(tensors, arguments[-1], strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    _, a, rstd = output
    ctx.mark_non_differentiable(a, rstd)
    ctx.save_for_backward(a, rstd, *inputs[:TENSORS])
    ctx.scalars = inputs[TENSORS:]


def _backward(ctx, grad: Tensor, *_):
    a, rstd, *tensors = ctx.saved_tensors
    output_mask = [bool(wanted) for wanted in ctx.needs_input_grad[:TENSORS]]
    grad = grad.contiguous(memory_format=torch.channels_last)
    gradients = operators.conv_first_block_kept_backward(grad, a, rstd, *tensors, *ctx.scalars, output_mask)
    wanted = (
        gradient if asked and tensor is not None else None
        for gradient, tensor, asked in zip(gradients, tensors, output_mask, strict=True)
    )
    return (*wanted, *(None for _ in ctx.scalars))


torch.library.register_autograd("convfirst::conv_first_block_kept", _backward, setup_context=_setup_context)


def keeps(arguments: tuple, kernels: str) -> bool:
    """Whether a block of these arguments of ``conv_first_block`` can run as two parts, and keep what is between."""
    x, conv_weight, expand_weight = arguments[0], arguments[1], arguments[5]
    if not ENABLED or not x.numel():
        return False
    if kernels == "reference":
        return True
    if x.device.type != "cuda" or backward.refusal_of(arguments) is not None:
        return False
    side = {9: 3, 25: 5, 49: 7}[int(conv_weight.shape[0])]
    shape = x.shape[0], x.shape[2], x.shape[3], x.shape[1], expand_weight.shape[0], side, arguments[11]
    return splits(*shape, x.dtype, arguments[12], arguments[14], x.device)


def splits(
    batch: int,
    height: int,
    width: int,
    channels: int,
    hidden: int,
    kernel_size: int,
    group_width: int,
    dtype: torch.dtype,
    activation: str,
    has_norm: bool,
    device: torch.device,
) -> bool:
    """Whether kernels run such a block in two parts, the convolution and the rest, on a CUDA device."""
    shape = map(int, (batch, height, width, channels, hidden, kernel_size, group_width))
    return _split(*shape, str(dtype).split(".")[1], activation, has_norm, device.index or 0)


@torch.compiler.assume_constant_result
def _split(*problem) -> bool:
    return _split_cached(*problem)


@cache
def _split_cached(*problem) -> bool:
    *fields, device_index = problem
    rows = plan(Problem(*fields), Device.of(device_index))["candidates"]
    return any(row["name"].startswith("sm90_split") and not row["refusal"] for row in rows)
