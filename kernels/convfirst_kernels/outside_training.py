"""Stems and downsampling layers where a gradient is asked for, as products of patches with a matrix.

Made for ``torch.compile``: patches, norms and activations become a kernel each way between two products, where
convolutions of three channels or of stride 2 would need passes of their own to change layouts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convfirst_kernels.outside import DownsampleParts, OutsideParts, PatchStemParts, StemParts
from convfirst_kernels.reference import _ACTIVATIONS

LEAST_ROWS = 2048  # of a product for the matrix's gradient: a sum over all pixels must be spread over the GPU


def refusal(parts: OutsideParts, x: Tensor, dtype: torch.dtype, kernels: str) -> str | None:
    """Why `forward` does not compute this on x in this dtype, or None where it does."""
    if parts.batch_norms:
        return "batch norm in training mode needs the batch's statistics; only evaluation mode folds"
    if kernels == "reference":
        if x.device.type != "cpu":
            return f"kernels='reference' computes on a CPU, and x is on {x.device}"
    elif x.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"x is {dtype} on {x.device.type}; the products take torch.float16 and torch.bfloat16 on CUDA devices"
    if x.dim() != 4 or min(x.shape[2:]) < parts.least_size:
        return f"x has shape {list(x.shape)}; taken are images of at least {parts.least_size} pixels a side"
    if x.requires_grad and not isinstance(parts, DownsampleParts):
        return "a gradient of the images is asked for"
    return None


def forward(parts: OutsideParts, x: Tensor) -> Tensor:
    """The layer on x, [N, C, H, W], in x's dtype and channels_last, differentiable; norms in float32 at least."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.permute(0, 2, 3, 1)
        if isinstance(parts, StemParts):
            y = _stem(parts, x)
        elif isinstance(parts, PatchStemParts):
            y = _patch_stem(parts, x)
        else:
            y = _downsample(parts, x)
        return y.permute(0, 3, 1, 2)


def _stem(parts: StemParts, x: Tensor) -> Tensor:
    conv1, conv2 = parts.first.conv, parts.second.conv
    y = _product(_patches_of_images(x), _matrix_of_images(conv1))
    y = _ACTIVATIONS[parts.activation](_normalised(y, parts.first.layer_norm)).to(x.dtype)
    bias = None if conv2.bias is None else conv2.bias.to(x.dtype)
    y = F.conv2d(y.permute(0, 3, 1, 2), conv2.weight.to(x.dtype), bias, stride=2, padding=1)
    return _normalised(y.permute(0, 2, 3, 1), parts.second.layer_norm).to(x.dtype)


def _patch_stem(parts: PatchStemParts, x: Tensor) -> Tensor:
    conv = parts.part.conv
    y = _product(_patches(x, 4), _matrix(conv.weight), conv.bias)
    return _normalised(y, parts.part.layer_norm).to(x.dtype)


def _downsample(parts: DownsampleParts, x: Tensor) -> Tensor:
    """The norm's affine part goes into the matrix, whose gradient then holds its."""
    matrix, norm = _matrix(parts.conv.weight), parts.layer_norm
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = parts.conv.bias
    if norm is not None:
        x = F.layer_norm(x.to(wide), norm.normalized_shape, eps=norm.eps).to(x.dtype)
        if norm.bias is not None:
            moved = matrix.to(wide) @ norm.bias.to(wide).repeat(4)
            bias = moved if bias is None else bias + moved
        if norm.weight is not None:
            matrix = matrix * norm.weight.repeat(4)
    return _product(_patches(x, 2), matrix, bias)


class _Product(torch.autograd.Function):
    """``rows @ matrix^T + bias``, whose matrix's gradient is a batch of products over ranges of rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, matrix: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        ctx.save_for_backward(rows, matrix)
        ctx.groups, ctx.has_bias = groups, bias is not None
        return F.linear(rows, matrix, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, matrix = ctx.saved_tensors
        wide = torch.promote_types(rows.dtype, torch.float32)
        d_rows = grad @ matrix if ctx.needs_input_grad[0] else None
        grad = grad.contiguous()
        parts = grad.view(ctx.groups, -1, grad.shape[-1]).transpose(1, 2) @ rows.view(ctx.groups, -1, rows.shape[-1])
        d_bias = grad.sum(0, dtype=wide).to(grad.dtype) if ctx.has_bias else None
        return d_rows, parts.sum(0, dtype=wide).to(matrix.dtype), d_bias, None


def _product(patches: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N, H, W, K] times [out, K], plus [out], in the patches' dtype -> [N, H, W, out]."""
    n, height, width, depth = patches.shape
    dtype = patches.dtype
    bias = None if bias is None else bias.to(dtype)
    y = _Product.apply(patches.reshape(-1, depth), matrix.to(dtype), bias, _groups(n, height * width))
    return y.view(n, height, width, -1)


def _groups(images: int, pixels: int) -> int:
    """The largest power of two that divides the images and leaves `LEAST_ROWS` to each group."""
    groups = 1
    while images % (2 * groups) == 0 and images // (2 * groups) * pixels >= LEAST_ROWS:
        groups *= 2
    return groups


def _patches(x: Tensor, size: int) -> Tensor:
    """[N, H, W, C] -> [N, H // size, W // size, size * size * C]."""
    n, height, width, channels = x.shape
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size].reshape(n, rows, size, columns, size, channels)
    return x.transpose(2, 3).reshape(n, rows, columns, size * size * channels)


def _matrix(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).flatten(1)


def _patches_of_images(x: Tensor) -> Tensor:
    """3x3 patches of [N, H, W, 3] with stride 2 and padding 1: 27 values, a one for the bias, and four zeros."""
    n, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1)).reshape(n, height + 2, (width + 2) * channels)
    patches = padded.unfold(1, 3, 2).unfold(2, 3 * channels, 2 * channels)
    patches = patches.reshape(n, (height + 1) // 2, (width + 1) // 2, 9 * channels)
    return F.pad(F.pad(patches, (0, 1), value=1.0), (0, 4))


def _matrix_of_images(conv: nn.Conv2d) -> Tensor:
    matrix = _matrix(conv.weight)
    bias = matrix.new_zeros(matrix.shape[0]) if conv.bias is None else conv.bias
    return F.pad(torch.cat([matrix, bias[:, None]], 1), (0, 4))


def _normalised(x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """The norm over the last dimension, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if norm is None else F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
