"""What lies between a network's residual blocks, as operators: definitions, CPU path and fake implementations.

``torch.ops.convfirst.{stem, patch_stem, downsample, downsample_gemm, normalised_patches, head}`` are for inference:
they have no gradient. Their CUDA kernels are in csrc/patch; `outside` packs the weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convfirst_kernels import (
    library,  # noqa: F401  loads the library
)
from convfirst_kernels.reference import _ACTIVATIONS, _as

_implementations = torch.library.Library("convfirst", "IMPL")


def stem(
    x: Tensor,
    conv1_weight: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    activation: str,
    eps1: float,
    eps2: float,
    has_norm: bool,
) -> Tensor:
    """``norm2(conv2(act(norm1(conv1(x)))))``, two 3x3 convolutions of stride 2 and padding 1, in x's dtype.

    ``norm(v) = v / sqrt(mean(v^2) + eps) * weight + bias`` over channels. It is LayerNorm where the convolution before
    it has weights and biases that sum to zero over its output channels, as `outside.centred` makes them. Without
    ``has_norm`` it is ``v * weight + bias``.

    Args:
        x: [N, 3, H, W], any strides.
        conv1_weight: [C / 2, 32]: for each filter row a zero and its 9 values (column, channel); the bias in two parts.
        conv2_weight: [C, 9, C / 2]: output channel, tap, input channel.
        norm1_weight, norm1_bias: [C / 2], float32; conv2_bias, norm2_weight, norm2_bias: [C], float32.
        activation: "relu", "silu" or "gelu" (exact).

    Returns:
        [N, C, H', W'], where H' and W' are half of the size, rounded up, twice.
    """
    mid = conv1_weight.shape[0]
    weight = conv1_weight[:, :30].reshape(mid, 3, 10)[:, :, 1:].reshape(mid, 3, 3, 3).permute(0, 3, 1, 2)
    h = F.conv2d(x, weight, conv1_weight[:, 30] + conv1_weight[:, 31], stride=2, padding=1)
    h = _ACTIVATIONS[activation](_norm(h, norm1_weight, norm1_bias, eps1, has_norm))
    weight = conv2_weight.reshape(-1, 3, 3, mid).permute(0, 3, 1, 2)
    y = F.conv2d(h, weight, _as(conv2_bias, x), stride=2, padding=1)
    return _norm(y, norm2_weight, norm2_bias, eps2, has_norm)


def patch_stem(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, has_norm: bool
) -> Tensor:
    """``norm(conv(x))``, a 4x4 convolution of stride 4 (Liu et al., arXiv 2201.03545), in x's dtype; norm as in `stem`.

    Args:
        x: [N, 3, H, W], any strides.
        weight: [C, 48]: output channel; row, column and channel of the patch.
        bias, norm_weight, norm_bias: [C], float32.

    Returns:
        [N, C, H // 4, W // 4].
    """
    y = F.conv2d(x, weight.reshape(-1, 4, 4, 3).permute(0, 3, 1, 2), _as(bias, x), stride=4)
    return _norm(y, norm_weight, norm_bias, eps, has_norm)


def downsample(x: Tensor, weight: Tensor, bias: Tensor, eps: float, has_norm: bool) -> Tensor:
    """``conv(norm(x))``, LayerNorm over channels without affine part and a 2x2 convolution of stride 2, in x's dtype.

    Args:
        x: [N, C, H, W].
        weight: [K, 4 C]: output channel; row, column and channel of the patch.
        bias: [K], float32.
        has_norm: False where there is no norm, or a batch norm was folded into the convolution.

    Returns:
        [N, K, H // 2, W // 2].
    """
    n, _, height, width = x.shape
    rows = F.linear(normalised_patches(x, eps, has_norm), weight, _as(bias, x))
    return rows.reshape(n, height // 2, width // 2, -1).permute(0, 3, 1, 2)


def downsample_gemm(x: Tensor, weight: Tensor, vectors: Tensor, eps: float, has_norm: bool, tile: int = 0) -> Tensor:
    """`downsample` as one matrix product from which the norm is taken out, for widths whose matrix no block can keep.

    Args:
        x: [N, C, H, W].
        weight: [K, 4 C]: output channel; row, column and channel of the patch.
        vectors: [5 * K], float32: the bias, then of each tap the sums over channels of ``weight``, as `product_vectors`
            makes them.
        tile: of the kernel: 1 to 3 for 64, 128, 192 pixels and 128 columns, 4 for 128 and 192 where that divides K; 0
            for the planner's choice.

    Returns:
        [N, K, H // 2, W // 2].
    """
    return downsample(x, weight, vectors[: weight.shape[0]], eps, has_norm)


def product_vectors(weight: Tensor, bias: Tensor) -> Tensor:
    """Of `downsample`'s weight and bias, what `downsample_gemm` takes."""
    sums = weight.float().view(weight.shape[0], 4, -1).sum(-1)
    return torch.cat([bias.float()[None], sums.t()]).flatten()


def head(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``linear(norm(mean(x)))``, LayerNorm over channels without affine part, in x's dtype; made for few images.

    Args:
        x: [N, C, H, W].
        weight: [K, C]; bias: [K], float32.

    Returns:
        [N, K].
    """
    pooled = F.layer_norm(x.mean((2, 3)), (x.shape[1],), eps=eps)
    return F.linear(pooled, weight, _as(bias, x))


def normalised_patches(x: Tensor, eps: float, has_norm: bool) -> Tensor:
    """The rows that `downsample` multiplies: [N, C, H, W] -> [N * (H // 2) * (W // 2), 4 C]."""
    n, channels, height, width = x.shape
    x = x[:, :, : height // 2 * 2, : width // 2 * 2].permute(0, 2, 3, 1)
    if has_norm:
        x = F.layer_norm(x, (channels,), eps=eps)
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4 * channels)


def _norm(v: Tensor, weight: Tensor, bias: Tensor, eps: float, has_norm: bool) -> Tensor:
    if has_norm:
        v = v * torch.rsqrt(v.square().mean(1, keepdim=True) + eps)
    return v * _as(weight, v)[:, None, None] + _as(bias, v)[:, None, None]


def _empty_image(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty((x.shape[0], channels, height, width)).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("convfirst::stem")
def _stem_fake(x: Tensor, conv1_weight: Tensor, *arguments) -> Tensor:
    height, width = ((-(-size // 2) + 1) // 2 for size in x.shape[2:])
    return _empty_image(x, 2 * conv1_weight.shape[0], height, width)


@torch.library.register_fake("convfirst::patch_stem")
def _patch_stem_fake(x: Tensor, weight: Tensor, *arguments) -> Tensor:
    return _empty_image(x, weight.shape[0], x.shape[2] // 4, x.shape[3] // 4)


@torch.library.register_fake("convfirst::downsample")
@torch.library.register_fake("convfirst::downsample_gemm")
def _downsample_fake(x: Tensor, weight: Tensor, *arguments) -> Tensor:
    return _empty_image(x, weight.shape[0], x.shape[2] // 2, x.shape[3] // 2)


@torch.library.register_fake("convfirst::head")
def _head_fake(x: Tensor, weight: Tensor, *arguments) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("convfirst::normalised_patches")
def _normalised_patches_fake(x: Tensor, *arguments) -> Tensor:
    return x.new_empty((x.shape[0] * (x.shape[2] // 2) * (x.shape[3] // 2), 4 * x.shape[1]))


def _cpu(name: str, function) -> None:
    def image(*arguments) -> Tensor:
        return function(*arguments).contiguous(memory_format=torch.channels_last)

    _implementations.impl(name, image, "CPU")


_cpu("stem", stem)
_cpu("patch_stem", patch_stem)
_cpu("downsample", downsample)
_cpu("downsample_gemm", downsample_gemm)
_implementations.impl("head", head, "CPU")
_implementations.impl("normalised_patches", lambda *arguments: normalised_patches(*arguments).clone(), "CPU")
