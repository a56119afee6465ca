"""The fused MBConv block as a function of weights in PyTorch's own layout."""

from functools import cache
from operator import index

import torch
from torch import Tensor

from convfirst_kernels import reference
from convfirst_kernels.block import KERNELS, compute_dtype, log_once, pack_conv_weight, pack_matrix, pack_vector
from convfirst_kernels.planner import Device, MBConvProblem, plan


def mbconv_block(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    sample_scale: Tensor | None = None,
    *,
    activation: str = "silu",
    kernels: str = "auto",
) -> Tensor:
    """``x + sample_scale * project(act(conv(act(expand(x)))))`` in one launch: MBConv of stride 1 with folded norms.

    `reference.mbconv_block` defines it. The operator has no gradient: where one may be asked for, "auto" runs
    the reference.

    Args:
        x: [N, C, H, W], channels_last, float16 or bfloat16 for the kernels. Under autocast any floating dtype.
        expand_weight: [hidden, C] or [hidden, C, 1, 1]; expand_bias, conv_bias: [hidden] or None.
        conv_weight: [hidden, group_width, 3, 3]; group_width in 1, 8, 16.
        project_weight: [C, hidden] or [C, hidden, 1, 1]; project_bias: [C] or None.
        sample_scale: [N] or None.
        activation: "relu", "silu" or "gelu".
        kernels: "auto" computes what no kernel covers by the reference and logs that once; "required" raises instead;
            "off" always uses the reference.

    Returns:
        [N, C, H, W] in x's dtype.

    Raises:
        ValueError: ``kernels`` is none of those.
        RuntimeError: the operator refuses an argument; the message names it, its value and what is supported.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}; accepted: {', '.join(map(repr, KERNELS))}")
    dtype = compute_dtype(x)
    arguments = (
        x.to(dtype), pack_matrix(expand_weight, dtype), pack_vector(expand_bias), pack_conv_weight(conv_weight, dtype),
        pack_vector(conv_bias), pack_matrix(project_weight, dtype), pack_vector(project_bias),
        pack_vector(sample_scale), conv_weight.shape[1], activation,
    )  # fmt: skip
    reason = "kernels='off'" if kernels == "off" else _refusal(arguments)
    if reason is None:
        return torch.ops.convfirst.mbconv_block(*arguments)
    if kernels == "required":
        raise RuntimeError(f"mbconv_block: kernels='required', but {reason}")
    if kernels == "auto":
        log_once(f"mbconv_block runs the PyTorch reference: {reason}")
    return reference.mbconv_block(*arguments)


def _refusal(arguments: tuple) -> str | None:
    x, expand_weight, group_width, activation = arguments[0], arguments[1], *arguments[8:]
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return "a gradient may be asked for, and the operator has none"
    if x.device.type != "cuda":
        return f"x is on {x.device.type}; the kernels run on CUDA devices"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernels take torch.float16 and torch.bfloat16"
    # Dynamo may hold sizes as symbols; index() makes numbers of them, and guards.
    hidden, channels, group_width = map(index, (*expand_weight.shape, group_width))
    return _uncovered(channels, hidden, group_width, str(x.dtype).split(".")[1], activation, x.device.index or 0)


@torch.compiler.assume_constant_result
def _uncovered(*shape) -> str | None:
    # Dynamo traces through a cache, so the cache must lie inside what it takes for a constant.
    return _uncovered_cached(*shape)


@cache
def _uncovered_cached(
    channels: int, hidden: int, group_width: int, dtype: str, activation: str, device_index: int
) -> str | None:
    """What the planner says of a shape on a CUDA device; height, width and batch do not matter to coverage."""
    answer = plan(MBConvProblem(1, 14, 14, channels, hidden, group_width, dtype, activation), Device.of(device_index))
    if answer["chosen"]:
        return None
    return f"no kernel variant covers {answer['problem']} on this device"
