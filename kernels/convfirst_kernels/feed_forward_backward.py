"""``torch.ops.convfirst.feed_forward_backward``: gradients of the feed-forward half of a block.

The kernels for Hopper, up to 256 channels, are in the compiled library (csrc/block_fusion/feed_forward_backward_sm90.cpp): nothing
of width hidden leaves the chip there. Elsewhere on a GPU the gradients come from matrix products over bounded chunks of
pixels: the hidden tensor is never saved, but a chunk of it passes through device memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convfirst_kernels import (
    library,  # noqa: F401  owns the namespace
)

SM90_CHANNELS = 256  # the widest that the Hopper kernels take
CHUNK_BYTES = 64 << 20  # of the hidden units' four tensors of a chunk of pixels

_SCHEMA = (
    "feed_forward_backward(Tensor a, Tensor dy, Tensor? rstd, Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, "
    "Tensor? project_bias, Tensor? layer_scale, Tensor? sample_scale, str activation) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_definitions = torch.library.Library("convfirst", "FRAGMENT")
_definitions.define(_SCHEMA)
_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last -> [pixels, C], without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _slope(activation: str, before: Tensor, grad: Tensor) -> Tensor:
    """act'(before) * grad."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, before)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, before)
    return torch.ops.aten.threshold_backward(grad, before, 0)


def reference(
    a: Tensor,
    dy: Tensor,
    rstd: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``branch = sample_scale * layer_scale * project(act(expand(a)))`` for a, the matrices and the vectors.

    With rstd, a is LayerNorm's result without its affine part and the first gradient is that of LayerNorm's input:
    ``rstd * (da - mean(da) - a * mean(da * a))`` over channels.

    Args:
        a, dy: [N, C, H, W] in channels_last.
        rstd: [N * H * W] or None.
        expand_weight: [hidden, C]; expand_bias: [hidden] or None.
        project_weight: [C, hidden]; project_bias, layer_scale: [C] or None.
        sample_scale: [N] or None.
        activation: "relu", "silu" or "gelu" (exact).

    Returns:
        da [pixels, C] in a's dtype, d_expand_weight [hidden, C], d_expand_bias [hidden], d_project_weight [C, hidden],
        d_project_bias [C], d_layer_scale [C], empty where there is no layer scale. All but the first in float32, or float64 where
        a is.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    rows, grad = _rows(a), _rows(dy)
    if sample_scale is not None:
        pixels = a.shape[2] * a.shape[3]
        grad = (grad.to(wide) * sample_scale.to(wide).repeat_interleave(pixels)[:, None]).to(a.dtype)
    before = F.linear(rows, expand_weight, None if expand_bias is None else expand_bias.to(a.dtype))
    hidden = _ACTIVATIONS[activation](before)
    scaled = grad if layer_scale is None else grad * layer_scale.to(a.dtype)
    d_before = _slope(activation, before, scaled @ project_weight)
    da = _norm_backward(d_before @ expand_weight, rows, rstd)
    sums = grad.to(wide).t() @ hidden.to(wide)
    column_sums = grad.to(wide).sum(0)
    return (
        da,
        d_before.to(wide).t() @ rows.to(wide),
        d_before.to(wide).sum(0),
        *_project_gradients(sums, column_sums, project_weight, project_bias, layer_scale),
    )


def _norm_backward(da: Tensor, a: Tensor, rstd: Tensor | None) -> Tensor:
    if rstd is None:
        return da
    wide = torch.promote_types(a.dtype, torch.float32)
    grad, normalised = da.to(wide), a.to(wide)
    centred = grad - grad.mean(1, keepdim=True) - normalised * (grad * normalised).mean(1, keepdim=True)
    return (rstd.to(wide)[:, None] * centred).to(a.dtype)


def _project_gradients(
    sums: Tensor, column_sums: Tensor, project_weight: Tensor, project_bias: Tensor | None, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From ``sums = (sample_scale dy)^T hidden`` and dy's: gradients of projection, its bias and layer scale."""
    if layer_scale is None:
        return sums, column_sums, sums.new_empty(0)
    scale = layer_scale.to(sums.dtype)
    d_scale = (sums * project_weight.to(sums.dtype)).sum(1)
    if project_bias is not None:
        d_scale = d_scale + project_bias.to(sums.dtype) * column_sums
    return sums * scale[:, None], column_sums * scale, d_scale
