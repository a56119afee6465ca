"""Training a block whose norms are batch norms: the statistics of its hidden tensor, without the tensor.

    c = conv(x)                                 a kernel
    a = norm(c)                                 PyTorch's own batch norm, C channels wide
    mean, Cov[a]                                over all pixels: [C], [C, C]
    S = W1 a + b1:  E[S] = W1 mean + b1,  Var[S] = diag(W1 Cov[a] W1^T)
    W1', b1' = W1, b1 and the norm of S         [hidden, C], [hidden], in float32; differentiable
    z = W2 act(W1' a + b1') + b2                a kernel, and one in the backward: no hidden tensor is stored
    y = x + drop_path(scale * norm(z))          PyTorch's own, C channels wide

The statistics are those of the exact products of the rounded factors, where PyTorch's are of their rounded sums.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convfirst_kernels import backward, kept
from convfirst_kernels import block as fused
from convfirst_kernels.blocks import Parts, fold

TILE = 128  # of a matrix product's result, of which as many as there are multiprocessors are made at once
MULTIPROCESSORS = 132
operators = torch.ops.convfirst
_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
_definitions = torch.library.Library("convfirst", "FRAGMENT")
_definitions.define("block_conv(Tensor x, Tensor conv_weight, Tensor? conv_bias, int group_width) -> Tensor")
_definitions.define(
    "block_conv_backward(Tensor grad, Tensor x, Tensor conv_weight, int group_width) -> (Tensor, Tensor, Tensor)"
)
_definitions.define("pixel_moments(Tensor a) -> (Tensor, Tensor)")
_definitions.define("pixel_moments_backward(Tensor d_mean, Tensor d_covariance, Tensor mean, Tensor a) -> Tensor")
_definitions.define(
    "hidden_layers(Tensor a, Tensor expand_weight, Tensor? expand_bias, Tensor project_weight, Tensor? project_bias, "
    "int kernel_size, int group_width, str activation) -> Tensor"
)


def needs_statistics(parts: Parts) -> bool:
    """Whether a batch norm of the block is in training mode."""
    return any(norm.training for norm in parts.batch_norms)


def refusal(parts: Parts, device: torch.device, dtype: torch.dtype, kernels: str = "auto") -> str | None:
    """Why a block with batch norms in training mode can't run as these stages, or None."""
    for norm in parts.batch_norms:
        if norm.training and type(norm) is not nn.BatchNorm2d:
            return f"{type(norm).__name__} in training mode needs the statistics of all processes"
    if parts.norm is not None:
        return "it has a layer norm and batch norms in training mode"
    if kernels == "reference":
        return None
    conv = parts.conv
    shape = conv.in_channels, parts.expand.weight.shape[0], conv.kernel_size[0], conv.in_channels // conv.groups
    reason = backward.refusal(device, dtype, *shape, parts.activation)
    splits = device.type != "cuda" or kept.splits(1, 14, 14, *shape, dtype, parts.activation, False, device)
    if reason is None and not splits:
        reason = f"batch norm in training mode: no kernel runs the layers of {shape[1]} hidden units alone"
    return reason


def forward(parts: Parts, x: Tensor, sample_scale: Tensor | None) -> Tensor:
    """The block's result in x's dtype, channels_last, by batch statistics where its norms are in training mode.

    Args:
        parts: of a block that `refusal` doesn't refuse.
        x: [N, C, H, W] in the dtype to compute in.
        sample_scale: drop path's factors, [N], or None.

    Running statistics move as PyTorch's do.
    """
    conv, dtype = parts.conv, x.dtype
    width, side = conv.in_channels // conv.groups, conv.kernel_size[0]
    with torch.autocast(x.device.type, enabled=False):
        weight = fused.pack_conv_weight(conv.weight, dtype)
        a = operators.block_conv(
            x.contiguous(memory_format=torch.channels_last), weight, _vector(conv.bias, dtype), width
        )
        if parts.conv_norm is not None:
            a = parts.conv_norm(a)
        expand, expand_bias = _expand(parts, a)
        project = fused.pack_matrix(parts.project.weight, dtype)
        layers = expand, expand_bias, project, _vector(parts.project.bias, dtype)
        z = operators.hidden_layers(a, *layers, side, width, parts.activation)
        if parts.project_norm is not None:
            z = parts.project_norm(z)
        factor = None if parts.scale is None else parts.scale.view(1, -1, 1, 1)
        if sample_scale is not None:
            drop = sample_scale.view(-1, 1, 1, 1)
            factor = drop if factor is None else factor * drop
        return x + z if factor is None else torch.addcmul(x, z, factor.to(dtype))


def _vector(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In float32, or in float64 beside float64."""
    return None if vector is None else vector.to(torch.promote_types(dtype, torch.float32))


def _expand(parts: Parts, a: Tensor) -> tuple[Tensor, Tensor | None]:
    """The expansion's matrix in a's dtype and its bias, with the norm after it folded in."""
    norm, layer = parts.expand_norm, parts.expand
    if norm is None or not norm.training:
        weight, bias = fold(layer, norm)
        return fused.pack_matrix(weight, a.dtype), _vector(bias, a.dtype)
    matrix = fused.pack_matrix(layer.weight, a.dtype)
    wide = torch.promote_types(a.dtype, torch.float32)
    mean, covariance = operators.pixel_moments(a)
    rounded = matrix.to(wide)  # what the kernels multiply by, as PyTorch's convolution does
    projected, variance = rounded @ mean, ((rounded @ covariance) * rounded).sum(1).clamp_min(0)
    bias = projected.new_zeros(()) if layer.bias is None else layer.bias.to(wide)
    _count(norm, projected + bias, variance, a.numel() // a.shape[1])
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -projected * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    return (rounded * factor[:, None]).to(a.dtype), shift


@torch.no_grad()
def _count(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, pixels: int) -> None:
    """Move the running statistics as `torch.nn.BatchNorm2d` does, the variance by its unbiased estimate."""
    if norm.running_mean is None:
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = 1.0 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    unbiased = variance * (pixels / max(1, pixels - 1))
    for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_(share * (now.to(running.dtype) - running))


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last -> [N * H * W, C], without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(like.shape[0], *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)


@torch.library.impl(_definitions, "block_conv", "CompositeExplicitAutograd")
def block_conv(x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, group_width: int) -> Tensor:
    """The block's convolution alone, differentiable: `conv_norm.conv_norm` without norm and residual."""
    return operators.conv_norm(x, conv_weight, conv_bias, None, group_width, False, 0.0)[0]


@torch.library.register_fake("convfirst::block_conv")
def _block_conv_fake(x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, group_width: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _block_conv_context(ctx, inputs, output) -> None:
    x, conv_weight, _, ctx.group_width = inputs
    ctx.save_for_backward(x, conv_weight)


@torch.library.impl(_definitions, "block_conv_backward", "CompositeExplicitAutograd")
def block_conv_backward(
    grad: Tensor, x: Tensor, conv_weight: Tensor, group_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the packed weight in its dtype and of the bias in float32 at least."""
    side = {9: 3, 25: 5, 49: 7}[conv_weight.shape[0]]
    transposed = operators.transpose_filter(conv_weight)
    d_x, _ = operators.conv_norm(grad, transposed, None, None, group_width, False, 0.0)
    d_weight, d_bias = operators.conv_weight_gradient(grad, x, side, group_width)
    return d_x, d_weight.to(conv_weight.dtype, copy=True), d_bias


@torch.library.register_fake("convfirst::block_conv_backward")
def _block_conv_backward_fake(grad: Tensor, x: Tensor, conv_weight: Tensor, group_width: int):
    d_bias = x.new_empty((x.shape[1],), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(conv_weight), d_bias


def _block_conv_gradients(ctx, grad: Tensor):
    grad = grad.contiguous(memory_format=torch.channels_last)
    with torch.autocast(grad.device.type, enabled=False):
        d_x, d_weight, d_bias = operators.block_conv_backward(grad, *ctx.saved_tensors, ctx.group_width)
    return d_x, d_weight, d_bias if ctx.needs_input_grad[2] else None, None


torch.library.register_autograd("convfirst::block_conv", _block_conv_gradients, setup_context=_block_conv_context)


@torch.library.impl(_definitions, "pixel_moments", "CompositeExplicitAutograd")
def pixel_moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, [C], and covariance, [C, C], of a [N, C, H, W] tensor's vectors of channels over all pixels.

    Sums are in float32 at least, and so are the results. Differentiable.
    """
    wide, rows = torch.promote_types(a.dtype, torch.float32), _rows(a)
    mean = rows.sum(0, dtype=wide) / len(rows)
    if a.device.type != "cuda" or a.dtype == wide:
        centred = rows.to(wide) - mean
        return mean, centred.t() @ centred / len(rows)
    # A product as deep as there are pixels has too few tiles for a GPU: several, of some images each, and their sum.
    parts = _shares(a.shape[0], a.shape[1])
    images = rows.view(parts, -1, a.shape[1])
    moments = torch.bmm(images.transpose(1, 2), images, out_dtype=wide).sum(0) / len(rows)
    return mean, moments - torch.outer(mean, mean)


def _shares(images: int, channels: int) -> int:
    """The largest divisor of the number of images whose products' tiles run at once."""
    most = max(1, MULTIPROCESSORS // (-(-channels // TILE)) ** 2)
    return max(count for count in range(1, min(images, most) + 1) if images % count == 0)


@torch.library.register_fake("convfirst::pixel_moments")
def _pixel_moments_fake(a: Tensor) -> tuple[Tensor, Tensor]:
    wide, channels = torch.promote_types(a.dtype, torch.float32), a.shape[1]
    return a.new_empty((channels,), dtype=wide), a.new_empty((channels, channels), dtype=wide)


@torch.library.impl(_definitions, "pixel_moments_backward", "CompositeExplicitAutograd")
def _moments_backward(d_mean: Tensor, d_covariance: Tensor, mean: Tensor, a: Tensor) -> Tensor:
    """``(d_mean + (d_covariance + d_covariance^T) (a - mean)) / pixels``, pixel by pixel, like a."""
    rows, both = _rows(a), d_covariance + d_covariance.t()
    unit = torch.exp2(torch.frexp(both.abs().max().clamp_min(1e-30)).exponent.to(both.dtype))
    rounded = (both / unit).to(a.dtype)  # float16 would lose small gradients
    # By the rounded matrix too, so that the pixels' parts cancel as they must: in their sum over all pixels.
    shift = d_mean - (mean @ rounded.to(both.dtype)) * unit
    grad = torch.addcmul(shift / len(rows), rows @ rounded, unit / len(rows))
    return _image(grad.to(a.dtype), a)


@torch.library.register_fake("convfirst::pixel_moments_backward")
def _moments_backward_fake(d_mean: Tensor, d_covariance: Tensor, mean: Tensor, a: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.channels_last)


def _pixel_moments_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[0], *inputs)


def _pixel_moments_backward(ctx, d_mean: Tensor, d_covariance: Tensor) -> Tensor:
    with torch.autocast(d_mean.device.type, enabled=False):
        return operators.pixel_moments_backward(d_mean, d_covariance, *ctx.saved_tensors)


torch.library.register_autograd(
    "convfirst::pixel_moments", _pixel_moments_backward, setup_context=_pixel_moments_context
)


@torch.library.impl(_definitions, "hidden_layers", "CUDA")
def hidden_layers(
    a: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    kernel_size: int,
    group_width: int,
    activation: str,
) -> Tensor:
    """``project(act(expand(a)))`` of a [N, C, H, W] tensor in channels_last, without a residual. Differentiable.

    kernel_size and group_width are the block's, by which the planner knows its kernels.
    """
    # feed_forward adds its second argument. The fill also comes between the weights' packing and the kernel, which may
    # read weights before the launch that precedes it has ended.
    nothing = torch.zeros_like(a, memory_format=torch.channels_last)
    layers = expand_weight, expand_bias, project_weight, project_bias
    return operators.feed_forward(a, nothing, *layers, None, None, kernel_size, group_width, activation)


@torch.library.impl(_definitions, "hidden_layers", "CPU")
def _hidden_layers_cpu(
    a, expand_weight, expand_bias, project_weight, project_bias, kernel_size, group_width, activation
) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    hidden = F.linear(_rows(a).to(wide), expand_weight.to(wide), expand_bias)
    rows = F.linear(_ACTIVATIONS[activation](hidden), project_weight.to(wide), project_bias)
    return torch.empty_like(a, memory_format=torch.channels_last).copy_(_image(rows, a))


@torch.library.register_fake("convfirst::hidden_layers")
def _hidden_layers_fake(a: Tensor, *arguments) -> Tensor:
    return torch.empty_like(a, memory_format=torch.channels_last)


def _hidden_layers_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.activation = inputs[7]


def _hidden_layers_backward(ctx, grad: Tensor):
    a, expand_weight, expand_bias, project_weight, project_bias = ctx.saved_tensors
    grad = grad.contiguous(memory_format=torch.channels_last)
    with torch.autocast(grad.device.type, enabled=False):
        da, *gradients, _ = operators.feed_forward_backward(
            a, grad, None, expand_weight, expand_bias, project_weight, project_bias, None, None, ctx.activation
        )
    tensors = expand_weight, expand_bias, project_weight, project_bias
    rounded = (None if t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True))
    return _image(da, a), *rounded, None, None, None


torch.library.register_autograd(
    "convfirst::hidden_layers", _hidden_layers_backward, setup_context=_hidden_layers_context
)
