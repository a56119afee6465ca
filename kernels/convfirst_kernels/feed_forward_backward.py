"""``torch.ops.convfirst.feed_forward_backward``: gradients of the feed-forward half of a block.

The kernels for Hopper, up to 256 channels, are in the compiled library
(csrc/block_fusion/feed_forward_backward_sm90.cpp): nothing of width hidden leaves the chip there. Elsewhere on a GPU
the gradients come from matrix products over bounded chunks of pixels: the hidden tensor is never saved, but a chunk of
it passes through device memory.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from convfirst_kernels import (
    library,  # noqa: F401  owns the namespace
)

SM90_CHANNELS = 256  # the widest that the Hopper kernels take
CHUNK_BYTES = 128 << 20  # of the two tensors of hidden units of a chunk of pixels

_SCHEMA = (
    "feed_forward_backward(Tensor a, Tensor dy, Tensor? rstd, Tensor expand_weight, Tensor? expand_bias, "
    "Tensor project_weight, Tensor? project_bias, Tensor? layer_scale, Tensor? sample_scale, str activation) "
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
    """Gradients of ``branch = sample_scale * layer_scale * project(act(expand(a)))`` for a, matrices and vectors.

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
        d_project_bias [C], d_layer_scale [C], empty where there is no layer scale. All but the first in float32, or
        float64 where a is.
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
    """From ``(sample_scale dy)^T hidden`` and dy's sums: gradients of projection, its bias and layer scale."""
    if layer_scale is None:
        return sums, column_sums, sums.new_empty(0)
    scale = layer_scale.to(sums.dtype)
    d_scale = (sums * project_weight.to(sums.dtype)).sum(1)
    if project_bias is not None:
        d_scale = d_scale + project_bias.to(sums.dtype) * column_sums
    return sums * scale[:, None], column_sums * scale, d_scale


def scaled_project_weight(project_weight: Tensor, layer_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """A power of two, and layer scale over it times the weight in its dtype: float16 would lose a layer scale of 1e-6.

    The greatest layer scale comes out in [1/2, 1).
    """
    if layer_scale is None:
        return project_weight.new_ones((), dtype=torch.float32), project_weight
    unit = torch.exp2(torch.frexp(layer_scale.abs().max().clamp_min(1e-30)).exponent.float())
    return unit, (project_weight.float() * (layer_scale / unit)[:, None]).to(project_weight.dtype)


def _chunked(
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
    """What `reference` computes, by matrix products over chunks of pixels whose hidden units take `CHUNK_BYTES`.

    Products have 16-bit factors and float32 sums; a chunk's weight gradients leave their product in float32. What lies
    between products is a kernel (csrc/block_fusion/feed_forward_bwd_chunk_sm80.cu): the hidden tensors S and D become
    ``act(S)`` and ``act'(S) * D`` in place. dy is scaled and rounded, and the gradient of the norm's result rounded
    before the norm's backward, as in PyTorch's own: errors are then PyTorch's, where other roundings of the same size
    exceeded twice PyTorch's largest error in one of eight draws.
    """
    operators = torch.ops.convfirst
    rows, grad = _rows(a), _rows(dy)
    scaled, column_sums = operators.scale_rows(grad, sample_scale, a.shape[2] * a.shape[3])
    grad = grad if sample_scale is None else scaled
    pixels, channels = rows.shape
    hidden = expand_weight.shape[0]
    unit, scaled_weight = scaled_project_weight(project_weight, layer_scale)
    bias = None if expand_bias is None else expand_bias.to(a.dtype)
    da = torch.empty_like(rows)
    sums = a.new_zeros(channels, hidden, dtype=torch.float32)
    d_expand = a.new_zeros(hidden, channels, dtype=torch.float32)
    d_bias = [a.new_zeros(0, hidden, dtype=torch.float32)]  # sums of dS by ranges of pixels
    for some in _chunks(pixels, hidden):
        before, d_before = F.linear(rows[some], expand_weight, bias), grad[some] @ scaled_weight
        d_bias.append(operators.hidden_backward_(before, d_before, activation))
        torch.mm(d_before, expand_weight, out=da[some])
        _add_product(d_expand, d_before.t(), rows[some])
        _add_product(sums, grad[some].t(), before)
    operators.norm_backward_(da, rows, rstd, unit)
    projected = _project_gradients(sums, column_sums.sum(0), project_weight, project_bias, layer_scale)
    return da, d_expand * unit, torch.cat(d_bias).sum(0) * unit, *projected


def _chunks(pixels: int, hidden: int) -> Iterator[slice]:
    """Ranges of pixels, alike in length, whose two hidden tensors take at most `CHUNK_BYTES`."""
    count = -(-pixels * 4 * hidden // CHUNK_BYTES)
    length = max(256, -(-pixels // max(1, count) // 128) * 128)
    return (slice(first, min(pixels, first + length)) for first in range(0, pixels, length))


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """``sums += a @ b``, 16-bit factors, float32 sums."""
    torch.ops.aten.addmm.dtype_out(sums, a, b, torch.float32, out=sums)


def _fused(a: Tensor, expand_weight: Tensor) -> bool:
    return (
        a.shape[1] <= SM90_CHANNELS
        and expand_weight.shape[0] % 64 == 0
        and hasattr(torch.ops.convfirst, "feed_forward_backward_sm90")
        and torch.cuda.get_device_capability(a.device) == (9, 0)
    )


@torch.library.impl(_definitions, "feed_forward_backward", "CUDA")
def _cuda(a: Tensor, dy: Tensor, rstd: Tensor | None, expand_weight: Tensor, *arguments):
    route = torch.ops.convfirst.feed_forward_backward_sm90 if _fused(a, expand_weight) else _chunked
    return route(a, dy, rstd, expand_weight, *arguments)


@torch.library.impl(_definitions, "feed_forward_backward", "CPU")
def _cpu(a: Tensor, *arguments):
    da, *gradients = reference(a, *arguments)
    return da.contiguous(), *(gradient.contiguous() for gradient in gradients)


@torch.library.register_fake("convfirst::feed_forward_backward")
def _fake(
    a, dy, rstd, expand_weight, expand_bias, project_weight, project_bias, layer_scale, sample_scale, activation
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, hidden = a.shape[1], expand_weight.shape[0]
    wide = torch.promote_types(a.dtype, torch.float32)

    def sums(*shape: int) -> Tensor:
        return a.new_empty(shape, dtype=wide)

    da = a.new_empty(a.shape[0] * a.shape[2] * a.shape[3], channels)
    scale = sums(0 if layer_scale is None else channels)
    return da, sums(hidden, channels), sums(hidden), sums(channels, hidden), sums(channels), scale
