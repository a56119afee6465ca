"""``torch.ops.convfirst.direct_conv2d`` and its gradients: schemas, CPU path, fake implementations, autograd.

Their CUDA implementations are in the compiled library (csrc/direct/op.cpp).
"""

import torch
from torch import Tensor

from convfirst_kernels import (
    library,  # noqa: F401  owns the namespace
)
from convfirst_kernels.direct import reference
from convfirst_kernels.reference import _activation_backward, empty_gradient

_GEOMETRY = "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w"
_FORWARD = f"Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, str activation"
_definitions = torch.library.Library("convfirst", "FRAGMENT")
for _schema in (
    f"direct_conv2d({_FORWARD}) -> Tensor",
    f"direct_conv2d_check({_FORWARD}) -> str",
    f"direct_conv2d_backward(Tensor grad, {_FORWARD}, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    f"direct_conv2d_dgrad(Tensor grad, Tensor weight, int height, int width, {_GEOMETRY}) -> Tensor",
    f"direct_conv2d_wgrad(Tensor grad, Tensor x, int kernel_h, int kernel_w, {_GEOMETRY}) -> Tensor",
    f"plan_direct_conv2d(str direction, int batch, int height, int width, int channels, int filters, int kernel_h, "
    f"int kernel_w, {_GEOMETRY}, str dtype, str activation, int capability, int multiprocessors, "
    "int max_shared_memory, str path) -> str",
):
    _definitions.define(_schema)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _outputs(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@torch.library.register_fake("convfirst::direct_conv2d")
def _fake(x, weight, bias, sh, sw, ph, pw, dh, dw, activation) -> Tensor:
    n, _, h, w = x.shape
    k, _, r, s = weight.shape
    return _empty(x, n, k, _outputs(h, r, sh, ph, dh), _outputs(w, s, sw, pw, dw))


@torch.library.register_fake("convfirst::direct_conv2d_dgrad")
def _dgrad_fake(grad, weight, height, width, *geometry) -> Tensor:
    return _empty(grad, grad.shape[0], weight.shape[1], height, width)


@torch.library.register_fake("convfirst::direct_conv2d_wgrad")
def _wgrad_fake(grad, x, kernel_h, kernel_w, *geometry) -> Tensor:
    return _empty(x, grad.shape[1], x.shape[1], kernel_h, kernel_w)


@torch.library.register_fake("convfirst::direct_conv2d_backward")
def _backward_fake(grad, x, weight, bias, *arguments) -> tuple[Tensor, ...]:
    return tuple(map(empty_gradient, (x, weight, bias), arguments[-1], (x, x, x)))


@torch.library.impl(_definitions, "direct_conv2d", "CPU")
def _cpu(x, weight, bias, *arguments) -> Tensor:
    torch.ops.convfirst.direct_conv2d_check(x, weight, bias, *arguments)
    y = reference.direct_conv2d(x, weight, bias, *arguments)
    return _empty(x, *y.shape).copy_(y)


@torch.library.impl(_definitions, "direct_conv2d_dgrad", "CPU")
def _dgrad_cpu(grad, weight, height, width, *geometry) -> Tensor:
    result = reference.dgrad(grad, weight, height, width, *geometry)
    return _empty(grad, *result.shape).copy_(result)


@torch.library.impl(_definitions, "direct_conv2d_wgrad", "CPU")
def _wgrad_cpu(grad, x, kernel_h, kernel_w, *geometry) -> Tensor:
    result = reference.wgrad(grad, x, kernel_h, kernel_w, *geometry)
    return _empty(x, *result.shape).copy_(result)


@torch.library.impl(_definitions, "direct_conv2d_backward", "CompositeExplicitAutograd")
def _backward_forward(grad, x, weight, bias, *arguments) -> tuple[Tensor, ...]:
    *geometry, activation, output_mask = arguments
    ops = torch.ops.convfirst
    if activation != "none":  # the sums before it are computed again
        before = ops.direct_conv2d(x, weight, bias, *geometry, "none")
        grad = _activation_backward(activation, grad, before)
    grad = _dense(grad)
    results = list(map(empty_gradient, (x, weight, bias), output_mask, (x, x, x)))
    if output_mask[0]:
        results[0].copy_(ops.direct_conv2d_dgrad(grad, weight, *x.shape[2:], *geometry))
    if output_mask[1]:
        if x.shape[0] == 0:
            results[1].zero_()
        else:
            results[1].copy_(ops.direct_conv2d_wgrad(grad, x, *weight.shape[2:], *geometry))
    if output_mask[2] and bias is not None:
        results[2].copy_(grad.sum((0, 2, 3), dtype=bias.dtype))
    return tuple(results)


def _dense(x: Tensor) -> Tensor:
    """x in channels_last, at an address that is a multiple of 16 bytes."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scalars = inputs[3:]


def _backward(ctx, grad: Tensor):
    tensors = ctx.saved_tensors
    output_mask = [bool(wanted) for wanted in ctx.needs_input_grad[:3]]
    # An upstream gradient may come in any layout and, from an expanded scalar, with stride 0.
    grad = grad.contiguous(memory_format=torch.channels_last)
    gradients = torch.ops.convfirst.direct_conv2d_backward(grad, *tensors, *ctx.scalars, output_mask)
    wanted = (
        gradient if asked and tensor is not None else None
        for gradient, tensor, asked in zip(gradients, tensors, output_mask, strict=True)
    )
    return (*wanted, *(None for _ in ctx.scalars))


def _double_backward(ctx, *grads: Tensor):
    raise RuntimeError(
        "direct_conv2d has no second derivative; torch.nn.functional.conv2d has one, or drop create_graph=True"
    )


torch.library.register_autograd("convfirst::direct_conv2d", _backward, setup_context=_setup_context)
torch.library.register_autograd("convfirst::direct_conv2d_backward", _double_backward)
