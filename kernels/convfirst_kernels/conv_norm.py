"""Convolution and LayerNorm of a block alone, as an operator: what the block's backward begins and ends with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from convfirst_kernels import (
    library,  # noqa: F401  loads the library
    reference,
)

_implementations = torch.library.Library("convfirst", "IMPL")


@torch.library.impl(_implementations, "conv_norm", "CPU")
def conv_norm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    group_width: int,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The block's convolution, normalised over channels without an affine part, or with ``residual`` added to it.

    Args:
        x: [N, C, H, W].
        conv_weight: [k * k, C, group_width], packed as `convfirst_kernels.pack_conv_weight` does.
        conv_bias: [C] or None.
        residual: [N, C, H, W] or None; only without ``normalise``.
        normalise: whether the convolution's result is normalised.
        eps: of the norm.

    Returns:
        [N, C, H, W] in x's dtype, channels_last; and the norm's reciprocal standard deviations, [N * H * W] in float32
        (float64 for float64), empty without ``normalise``.

    Raises:
        RuntimeError: in 16 bits, the operator refuses an argument; the message names it, its value and what is
            supported.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        torch.ops.convfirst.conv_norm_check(x, conv_weight, conv_bias, residual, group_width, normalise, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    a = reference.conv(x.to(wide), conv_weight.to(wide), conv_bias, group_width)
    rstd = a.new_empty(0)
    if normalise:
        rows = a.permute(0, 2, 3, 1)
        rstd = (rows.var(-1, correction=0) + eps).rsqrt().flatten()
        a = F.layer_norm(rows, rows.shape[-1:], eps=eps).permute(0, 3, 1, 2)
    elif residual is not None:
        a = a + residual
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(a), rstd


@torch.library.register_fake("convfirst::conv_norm")
def _conv_norm_fake(x: Tensor, conv_weight, conv_bias, residual, group_width, normalise, eps) -> tuple[Tensor, Tensor]:
    pixels = x.shape[0] * x.shape[2] * x.shape[3] if normalise else 0
    rstd = x.new_empty((pixels,), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.channels_last), rstd
