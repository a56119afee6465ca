"""What the fused block computes, in plain PyTorch: the definition, the CPU path and, in float64, the tests' oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


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
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    group_width: int,
    activation: str,
    eps: float,
    has_norm: bool,
) -> Tensor:
    """``x + sample_scale * layer_scale * project(act(expand(norm(conv(x)))))`` in x's dtype.

    Grouped convolution with k x k filters, stride 1 and padding k // 2; LayerNorm over channels; two 1x1 convolutions
    (Lavin, arXiv 2404.03617; with group width 1, Liu et al., arXiv 2201.03545).

    Args:
        x: [N, C, H, W].
        conv_weight: [k * k, C, group_width], packed as `convfirst_kernels.pack_conv_weight` does.
        conv_bias, norm_weight, norm_bias, project_bias, layer_scale: [C] or None.
        expand_weight: [hidden, C]; expand_bias: [hidden] or None.
        project_weight: [C, hidden].
        sample_scale: [N] or None: drop path's factor for each sample.
        activation: "relu", "silu" or "gelu" (exact).
        eps: of the norm.
        has_norm: False where there is no norm, or batch norms were folded into the layers around it.

    Returns:
        [N, C, H, W] in x's dtype.
    """
    a = conv(x, conv_weight, conv_bias, group_width).permute(0, 2, 3, 1)
    if has_norm:
        a = F.layer_norm(a, a.shape[-1:], _as(norm_weight, a), _as(norm_bias, a), eps)
    h = _ACTIVATIONS[activation](F.linear(a, expand_weight, _as(expand_bias, a)))
    branch = F.linear(h, project_weight, _as(project_bias, a))
    if layer_scale is not None:
        branch = branch * _as(layer_scale, a)
    if sample_scale is not None:
        branch = branch * _as(sample_scale, a)[:, None, None, None]
    return x + branch.permute(0, 3, 1, 2)


def mbconv_block(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    sample_scale: Tensor | None,
    group_width: int,
    activation: str,
) -> Tensor:
    """``x + sample_scale * project(act(conv(act(expand(x)))))`` in x's dtype: MBConv of stride 1 with folded norms.

    1x1 convolution, grouped 3x3 convolution with padding 1, 1x1 convolution (Sandler et al., arXiv 1801.04381; fused in
    Lavin, arXiv 2404.03617).

    Args:
        x: [N, C, H, W].
        expand_weight: [hidden, C]; expand_bias, conv_bias: [hidden] or None.
        conv_weight: [9, hidden, group_width], packed as `convfirst_kernels.pack_conv_weight` does.
        project_weight: [C, hidden]; project_bias: [C] or None.
        sample_scale: [N] or None: drop path's factor for each sample.
        activation: "relu", "silu" or "gelu" (exact).
    """
    act = _ACTIVATIONS[activation]
    hidden = act(F.conv2d(x, expand_weight[:, :, None, None], _as(expand_bias, x)))
    hidden = act(conv(hidden, conv_weight, conv_bias, group_width))
    branch = F.conv2d(hidden, project_weight[:, :, None, None], _as(project_bias, x))
    if sample_scale is not None:
        branch = branch * _as(sample_scale, x)[:, None, None, None]
    return x + branch


def conv(x: Tensor, packed: Tensor, bias: Tensor | None, group_width: int) -> Tensor:
    """The block's grouped convolution on a packed weight: [N, C, H, W] -> [N, C, H, W]."""
    weight = unpack_conv_weight(packed)
    return F.conv2d(x, weight, _as(bias, x), padding=weight.shape[-1] // 2, groups=x.shape[1] // group_width)


def unpack_conv_weight(packed: Tensor) -> Tensor:
    """[k * k, C, group_width] -> [C, group_width, k, k]."""
    taps, channels, group_width = packed.shape
    side = {9: 3, 25: 5, 49: 7}[taps]
    return packed.permute(1, 2, 0).reshape(channels, group_width, side, side)


def _as(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def conv_first_block_backward(
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
) -> tuple[Tensor, ...]:
    """Gradients of `conv_first_block` for its eleven tensors in order, recomputing everything from x.

    Matrix products run in x's dtype, sums over pixels in float32 at least. A gradient that ``output_mask`` does not ask
    for, or whose tensor is None, is an empty tensor.
    """
    inputs = (
        x, conv_weight, conv_bias, norm_weight, norm_bias, expand_weight, expand_bias, project_weight, project_bias,
        layer_scale, sample_scale,
    )  # fmt: skip
    output_mask = [wanted and tensor is not None for wanted, tensor in zip(output_mask, inputs, strict=True)]
    pixels, hidden_pixels = (-1, x.shape[1]), (-1, expand_weight.shape[0])
    a = conv(x, conv_weight, conv_bias, group_width).permute(0, 2, 3, 1)
    nhwc = a.shape
    if has_norm:
        scale, shift = _as(norm_weight, a), _as(norm_bias, a)
        n, mean, rstd = torch.ops.aten.native_layer_norm(a.contiguous(), [a.shape[-1]], scale, shift, eps)
    else:
        n = a
    n = n.reshape(pixels)
    s = F.linear(n, expand_weight, _as(expand_bias, x))
    h = _ACTIVATIONS[activation](s)

    # dp: gradient of the projection's output, before both scales.
    dy = grad.permute(0, 2, 3, 1)
    dp = dy
    if layer_scale is not None:
        dp = dp * _as(layer_scale, dy)
    if sample_scale is not None:
        dp = dp * _as(sample_scale, dy)[:, None, None, None]
    dp = dp.reshape(pixels)
    ds = _activation_backward(activation, dp @ project_weight, s)
    dn = (ds @ expand_weight).reshape(nhwc)

    d_norm_weight = d_norm_bias = None
    da = dn
    if has_norm:
        da, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
            dn, a.contiguous(), [a.shape[-1]], mean, rstd, scale, shift, [True, output_mask[3], output_mask[4]]
        )
    da = da.permute(0, 3, 1, 2)
    weight = unpack_conv_weight(conv_weight)
    dx, d_conv, _ = torch.ops.aten.convolution_backward(
        da, x, weight, None, [1, 1], [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0],
        x.shape[1] // group_width, [output_mask[0], output_mask[1], False],
    )  # fmt: skip
    d_layer, d_sample = _scale_gradients(dy, h, project_weight, project_bias, layer_scale, sample_scale, output_mask)
    results = (
        dx + grad if output_mask[0] else None,
        d_conv.flatten(2).permute(2, 0, 1) if output_mask[1] else None,
        _sum(da.permute(0, 2, 3, 1).reshape(pixels)) if output_mask[2] else None,
        d_norm_weight,
        d_norm_bias,
        ds.t() @ n if output_mask[5] else None,
        _sum(ds) if output_mask[6] else None,
        dp.t() @ h.reshape(hidden_pixels) if output_mask[7] else None,
        _sum(dp) if output_mask[8] else None,
        d_layer,
        d_sample,
    )
    gradients = tuple(empty_gradient(tensor, wanted, x) for tensor, wanted in zip(inputs, output_mask, strict=True))
    for gradient, result in zip(gradients, results, strict=True):
        if gradient.numel() and result is not None:
            gradient.copy_(result)
    return gradients


def empty_gradient(tensor: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    """A gradient's dtype, shape and strides: the tensor's, dense; [0] where absent or not wanted."""
    if tensor is None or not wanted:
        return x.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


def _scale_gradients(dy, h, project_weight, project_bias, layer_scale, sample_scale, output_mask):
    """Gradients of layer_scale [C] and sample_scale [N]; both need the unscaled branch."""
    d_layer = d_sample = None
    if not (output_mask[9] or output_mask[10]):
        return d_layer, d_sample
    product = dy * F.linear(h, project_weight, _as(project_bias, h)).reshape(dy.shape)
    if output_mask[9]:
        scaled = product if sample_scale is None else product * _as(sample_scale, product)[:, None, None, None]
        d_layer = _sum(scaled.reshape(-1, scaled.shape[-1]))
    if output_mask[10]:
        scaled = product if layer_scale is None else product * _as(layer_scale, product)
        d_sample = scaled.flatten(1).sum(1, dtype=_wide(scaled))
    return d_layer, d_sample


def _activation_backward(activation: str, grad: Tensor, s: Tensor) -> Tensor:
    if activation == "relu":
        return torch.where(s > 0, grad, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, s)
    return torch.ops.aten.gelu_backward(grad, s)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=_wide(rows))
