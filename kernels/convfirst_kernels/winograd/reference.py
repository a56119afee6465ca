"""What the Winograd operators compute, in plain PyTorch: the definition, the path without a kernel, the tests' oracle.

3x3 filters, stride 1 (Lavin & Gray, arXiv 1509.09308). Transforms, sums and the epilogue run in float32, or float64
where x is; the factors of each product are rounded to x's dtype, as tensor cores take them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convfirst_kernels import reference
from convfirst_kernels.winograd.transforms import Matrix, Transform, cook_toom

FORWARD = {"f2": cook_toom(2, 3), "f4": cook_toom(4, 3)}
WEIGHT_GRADIENT = cook_toom(3, 2)


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, algorithm: str, activation: str
) -> Tensor:
    """``act(conv2d(x, weight, bias, padding=padding))`` by F(2x2, 3x3) or F(4x4, 3x3).

    Args:
        x: [N, C, H, W].
        weight: [K, C, 3, 3] in x's dtype; bias: [K] or None.
        padding: zeros at each edge of the image.
        algorithm: "f2" or "f4".
        activation: "none", "relu", "silu" or "gelu" (exact).

    Returns:
        [N, K, H + 2 padding - 2, W + 2 padding - 2] in x's dtype.
    """
    y = _biased(correlate(x, weight, padding, FORWARD[algorithm], x.dtype), bias)
    return y.to(x.dtype) if activation == "none" else reference._ACTIVATIONS[activation](y).to(x.dtype)


def winograd_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    algorithm: str,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `winograd_conv2d` for x, weight and bias; what stands before the activation is computed again.

    That of x is a convolution of the same algorithm with rotated filters, that of weight is F(3x3, 2x2) with the
    gradient as the filter. A gradient that ``output_mask`` does not ask for, or whose tensor is None, is empty.
    """
    if activation != "none":
        before = _biased(correlate(x, weight, padding, FORWARD[algorithm], x.dtype), bias)
        grad = reference._activation_backward(activation, grad.to(before.dtype), before).to(x.dtype)
    results = (
        correlate(grad, _rotated(weight), 2 - padding, FORWARD[algorithm], x.dtype) if output_mask[0] else None,
        correlate_weight(x, grad, padding, x.dtype) if output_mask[1] else None,
        grad.sum((0, 2, 3), dtype=_wide(grad)) if output_mask[2] else None,
    )
    tensors = (x, weight, bias)
    gradients = tuple(map(reference.empty_gradient, tensors, output_mask, (x, x, x)))
    for gradient, result in zip(gradients, results, strict=True):
        if gradient.numel() and result is not None:
            gradient.copy_(result)
    return gradients


def correlate(x: Tensor, weight: Tensor, padding: int, transform: Transform, operands: torch.dtype) -> Tensor:
    """The convolution by F(m x m, 3 x 3).

    Args:
        x: [N, C, H, W]; weight: [K, C, 3, 3].
        padding: zeros at each edge of the image.
        transform: of m outputs and 3 taps.
        operands: dtype to which both factors of the products are rounded.

    Returns:
        [N, K, H + 2 padding - 2, W + 2 padding - 2] in float32, or in float64 where x is.
    """
    m, r = transform.m, transform.r
    height, width = (size + 2 * padding - r + 1 for size in x.shape[2:])
    u = _sandwich(transform.filter, weight.permute(2, 3, 0, 1), operands)
    v = _sandwich(transform.input, _tiles(x, padding, -(-height // m), -(-width // m), m, m + r - 1), operands)
    products = (u @ v.flatten(3)).unflatten(3, v.shape[3:])  # [n, n, K, N, rows, columns]
    tiles = _sandwich(transform.output, products, products.dtype)
    return tiles.permute(3, 2, 4, 0, 5, 1).flatten(4).flatten(2, 3)[:, :, :height, :width]


def correlate_weight(x: Tensor, grad: Tensor, padding: int, operands: torch.dtype) -> Tensor:
    """The filter's gradient by F(3x3, 2x2): 2x2 tiles of grad are filters, summed over tiles before the inverse.

    Args:
        x: [N, C, H, W].
        grad: of the output, [N, K, H + 2 padding - 2, W + 2 padding - 2].
        padding: the convolution's.
        operands: dtype to which both factors of the products are rounded.

    Returns:
        [K, C, 3, 3] in float32, or in float64 where x is.
    """
    m, r = WEIGHT_GRADIENT.m, WEIGHT_GRADIENT.r
    rows, columns = (-(-size // r) for size in grad.shape[2:])
    u = _sandwich(WEIGHT_GRADIENT.filter, _tiles(grad, 0, rows, columns, r, r), operands)
    v = _sandwich(WEIGHT_GRADIENT.input, _tiles(x, padding, rows, columns, r, m + r - 1), operands)
    products = u.flatten(3) @ v.flatten(3).transpose(2, 3)  # [n, n, K, C]
    return _sandwich(WEIGHT_GRADIENT.output, products, products.dtype).permute(2, 3, 0, 1)


def _tiles(x: Tensor, padding: int, rows: int, columns: int, step: int, size: int) -> Tensor:
    """[N, C, H, W] -> [size, size, C, N, rows, columns]: overlapping tiles, ``step`` apart, zeros beyond the image."""
    bottom, right = ((n - 1) * step + size for n in (rows, columns))
    padded = F.pad(x, (padding, right - padding - x.shape[3], padding, bottom - padding - x.shape[2]))
    return padded.unfold(2, size, step).unfold(3, size, step).permute(4, 5, 1, 0, 2, 3)


def _sandwich(matrix: Matrix, tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix @ tile @ matrix^T`` for tiles [a, a, ...] -> [b, b, ...], computed wide and rounded to dtype."""
    wide = _wide(tiles)
    factor = torch.tensor([list(map(float, row)) for row in matrix], dtype=wide, device=tiles.device)
    return torch.einsum("ij,jk...,lk->il...", factor, tiles.to(wide), factor).to(dtype).to(wide)


def _rotated(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
