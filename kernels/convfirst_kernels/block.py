"""The fused block as a function of weights in PyTorch's own layout, and the packing that the kernels want."""

import logging
from functools import cache
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from convfirst_kernels import (
    backward,
    operators,  # noqa: F401  registers the operators
    reference,
)
from convfirst_kernels.planner import Device, Problem, plan

ACTIVATIONS = ("relu", "silu", "gelu")
KERNELS = ("auto", "required", "off")
_log = logging.getLogger("convfirst_kernels")


class BlockWeights(NamedTuple):
    """A block's weights, packed: the operator's arguments between x and sample_scale, and its options.

    Matrices have the dtype that x will have; vectors are float32.
    """

    conv_weight: Tensor  # [k * k, C, group_width]
    conv_bias: Tensor | None  # [C]
    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None  # [C]
    expand_weight: Tensor  # [hidden, C]
    expand_bias: Tensor | None  # [hidden]
    project_weight: Tensor  # [C, hidden]
    project_bias: Tensor | None  # [C]
    layer_scale: Tensor | None  # [C]
    activation: str
    eps: float
    has_norm: bool


def pack_conv_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, group_width, k, k] -> contiguous [k * k, C, group_width]: tap, output channel, input channel of the group."""
    return weight.flatten(2).permute(2, 0, 1).to(dtype).contiguous()


def pack_matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] of a linear layer or [out, in, 1, 1] of a 1x1 convolution -> contiguous [out, in]."""
    if weight.dim() == 4 and weight.stride(3) > 1:  # channels_last: DDP wants its gradient so too
        weight = weight.permute(0, 2, 3, 1).flatten(0, 2)
    return weight.flatten(1).to(dtype).contiguous()


def pack_vector(vector: Tensor | None) -> Tensor | None:
    """[C] of any dtype, or None -> contiguous float32."""
    return None if vector is None else vector.flatten().float().contiguous()


def pack_block(
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    layer_scale: Tensor | None,
    *,
    activation: str,
    eps: float,
    has_norm: bool,
    dtype: torch.dtype,
) -> BlockWeights:
    """Pack a block's weights, in PyTorch's layouts and any dtype, for inputs of ``dtype``. Differentiable."""
    return BlockWeights(
        pack_conv_weight(conv_weight, dtype),
        pack_vector(conv_bias),
        pack_vector(norm_weight),
        pack_vector(norm_bias),
        pack_matrix(expand_weight, dtype),
        pack_vector(expand_bias),
        pack_matrix(project_weight, dtype),
        pack_vector(project_bias),
        pack_vector(layer_scale),
        activation,
        eps,
        has_norm,
    )


def conv_first_block(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    *,
    activation: str = "silu",
    eps: float = 1e-6,
    has_norm: bool = True,
    kernels: str = "auto",
) -> Tensor:
    """``x + sample_scale * layer_scale * project(act(expand(norm(conv(x)))))`` in one launch.

    `reference.conv_first_block` defines it. Weights are in PyTorch's layout and any floating dtype; they are packed on
    every call, differentiably. `pack_block` and `run_block` pack once.

    Args:
        x: [N, C, H, W], channels_last, float16 or bfloat16 for the kernels. Under autocast any floating dtype.
        conv_weight: [C, group_width, k, k]; k in 3, 5, 7; group_width in 1, 8, 16.
        conv_bias, norm_weight, norm_bias, project_bias, layer_scale: [C] or None.
        expand_weight: [hidden, C] or [hidden, C, 1, 1]; expand_bias: [hidden] or None.
        project_weight: [C, hidden] or [C, hidden, 1, 1].
        sample_scale: [N] or None.
        activation: "relu", "silu" or "gelu".
        has_norm: whether a LayerNorm follows the convolution.
        kernels: "auto" computes what no kernel covers by the reference and logs that once; "required" raises instead,
            where a gradient may be asked for also if it is the backward that no kernel covers; "off" always uses the
            reference.

    Returns:
        [N, C, H, W] in x's dtype, channels_last.

    Raises:
        ValueError: ``kernels`` is none of those.
        RuntimeError: the operator refuses an argument; the message names it, its value and what is supported.
    """
    dtype = compute_dtype(x)
    weights = pack_block(
        conv_weight, conv_bias, norm_weight, norm_bias, expand_weight, expand_bias, project_weight, project_bias,
        layer_scale, activation=activation, eps=eps, has_norm=has_norm, dtype=dtype,
    )  # fmt: skip
    return run_block(x, weights, sample_scale, kernels=kernels)


def run_block(x: Tensor, weights: BlockWeights, sample_scale: Tensor | None = None, *, kernels: str = "auto") -> Tensor:
    """`conv_first_block` on packed weights."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}; accepted: {', '.join(map(repr, KERNELS))}")
    arguments = operator_arguments(x, weights, sample_scale)
    reason = "kernels='off'" if kernels == "off" else _refusal_of(arguments)
    if reason is None:
        check_backward("conv_first_block", arguments, kernels)
        return torch.ops.convfirst.conv_first_block(*arguments)
    if kernels == "required":
        raise RuntimeError(f"conv_first_block: kernels='required', but {reason}")
    if kernels == "auto":
        log_once(f"conv_first_block runs the PyTorch reference: {reason}")
    return reference.conv_first_block(*arguments)


def check_backward(name: str, arguments: tuple, kernels: str) -> None:
    """Where a gradient may be asked for that PyTorch would compute: refused if kernels are required, else logged once.

    Raises:
        RuntimeError: kernels="required"; the message says why no kernels compute the gradients.
    """
    asked = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if not asked or kernels == "reference":
        return
    reason = backward.refusal_of(arguments)
    if reason is None and arguments[10] is not None and arguments[10].requires_grad:
        reason = "sample_scale, drop path's factors, requires one"
    if reason is None:
        return
    if kernels == "required":
        raise RuntimeError(f"{name}: kernels='required', but a gradient would be PyTorch's: {reason}")
    log_once(f"{name}: a gradient is computed by the PyTorch reference: {reason}")


def _refusal_of(arguments: tuple) -> str | None:
    x, conv_weight, expand_weight = arguments[0], arguments[1], arguments[5]
    group_width, activation, _, has_norm = arguments[11:]
    side = {9: 3, 25: 5, 49: 7}.get(conv_weight.shape[0])
    if side is None or activation not in ACTIVATIONS:
        return f"{conv_weight.shape[0]} filter taps with activation {activation!r} have no kernel"
    hidden, channels = expand_weight.shape
    return refusal(x.device, x.dtype, channels, hidden, side, group_width, activation, has_norm)


def operator_arguments(x: Tensor, weights: BlockWeights, sample_scale: Tensor | None) -> tuple:
    """The arguments of ``torch.ops.convfirst.conv_first_block`` in order."""
    *tensors, activation, eps, has_norm = weights
    group_width = weights.conv_weight.shape[2]
    return (x.to(weights.conv_weight.dtype), *tensors, sample_scale, group_width, activation, eps, has_norm)


def state_of(tensor: Tensor) -> tuple:
    """What tells that a tensor's values may have changed; never twice the same for those made in inference mode."""
    return tensor.data_ptr(), object() if tensor.is_inference() else tensor._version, tensor.dtype


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the block computes in: autocast's where that is on, else x's."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)  # which has no autocast
    return torch.get_autocast_dtype(device) if enabled else x.dtype


def refusal(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    hidden: int,
    kernel_size: int,
    group_width: int,
    activation: str,
    has_norm: bool,
) -> str | None:
    """Why no kernel computes such a block on a tensor of this device and dtype, or None where one does."""
    if device.type != "cuda":
        return f"x is on {device.type}; the kernels run on CUDA devices"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x is {dtype}; the kernels take torch.float16 and torch.bfloat16"
    name = str(dtype).split(".")[1]
    # Dynamo may hold sizes as symbols; index() makes numbers of them, and guards.
    channels, hidden, kernel_size, group_width = map(index, (channels, hidden, kernel_size, group_width))
    return _uncovered(channels, hidden, kernel_size, group_width, name, activation, has_norm, device.index or 0)


@torch.compiler.assume_constant_result
def _uncovered(*shape) -> str | None:
    # Dynamo traces through a cache, so the cache must lie inside what it takes for a constant.
    return _uncovered_cached(*shape)


@cache
def _uncovered_cached(
    channels, hidden, kernel_size, group_width, dtype, activation, has_norm, device_index
) -> str | None:
    """What the planner says of a shape on a CUDA device; height, width and batch do not matter to coverage."""
    problem = Problem(1, 14, 14, channels, hidden, kernel_size, group_width, dtype, activation, has_norm)
    answer = plan(problem, Device.of(device_index))
    return None if answer["chosen"] else f"no kernel variant covers {answer['problem']} on this device"


_logged: set[str] = set()


@torch.compiler.assume_constant_result
def log_once(message: str) -> None:
    """One warning a process for each message."""
    if message not in _logged:
        _logged.add(message)
        _log.warning(message)
