"""``torch.ops.convfirst.winograd_conv2d`` and its backward: schema, checks, implementation, fake, autograd.

On a CUDA device, but in float64, they run the library's kernels, elsewhere their PyTorch reference. The library's own
operators work on transformed filters: `winograd_filter` makes them, `winograd_conv2d_filtered` takes them.
"""

import torch
from torch import Tensor

from convfirst_kernels import (
    library,  # noqa: F401  owns the namespace
)
from convfirst_kernels.reference import empty_gradient
from convfirst_kernels.winograd import kernels, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ALGORITHMS = tuple(reference.FORWARD)
ACTIVATIONS = ("none", "relu", "silu", "gelu")
PADDINGS = (0, 1, 2)  # the gradient of x is a convolution with padding 2 - padding

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, int padding, str algorithm, str activation"
_definitions = torch.library.Library("convfirst", "FRAGMENT")
_definitions.define(f"winograd_conv2d({_ARGUMENTS}) -> Tensor")
_definitions.define(
    f"winograd_conv2d_backward(Tensor grad, {_ARGUMENTS}, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)
_definitions.define("winograd_filter(Tensor weight, str algorithm, bool rotated) -> Tensor")
_definitions.define(
    "winograd_conv2d_filtered(Tensor x, Tensor filter, Tensor? bias, int outputs, int padding, str algorithm, "
    "str activation, str plan) -> Tensor"
)
_definitions.define("winograd_weight_gradient(Tensor x, Tensor grad, int padding) -> Tensor")
_definitions.define(
    "plan_winograd(int batch, int height, int width, int channels, int outputs, int padding, str dtype, "
    "str algorithm, int multiprocessors, int max_shared_memory) -> str"
)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, algorithm: str, activation: str) -> None:
    """Refuse what the operator does not compute.

    Raises:
        RuntimeError: it names the argument, its value and what is supported.
    """
    _require(x.dtype in DTYPES, f"x is {x.dtype}; supported are {_listed(DTYPES)}")
    _require(x.dim() == 4, f"x has shape {list(x.shape)}; expected 4 dimensions [batch, channels, height, width]")
    _require(min(x.shape) >= 1, f"x has shape {list(x.shape)}; every extent must be at least 1")
    channels = x.shape[1]
    fits = weight.dim() == 4 and weight.shape[0] >= 1 and tuple(weight.shape[1:]) == (channels, 3, 3)
    expected = f"[*, {channels}, 3, 3] = [output channels, channels, 3, 3]"
    _require(fits, f"weight has shape {list(weight.shape)}; expected {expected}")
    _require(weight.dtype == x.dtype, f"weight is {weight.dtype}; expected x's dtype {x.dtype}")
    _require(weight.device == x.device, f"weight is on {weight.device}; expected x's device {x.device}")
    _require(padding in PADDINGS, f"padding is {padding!r}; supported are {_listed(PADDINGS)}")
    height, width = (size + 2 * padding for size in x.shape[2:])
    _require(min(height, width) >= 3, f"x with padding {padding} is {height} x {width}; the filter needs 3 x 3")
    _require(algorithm in ALGORITHMS, f"algorithm is {algorithm!r}; supported are {_listed(ALGORITHMS)}")
    _require(activation in ACTIVATIONS, f"activation is {activation!r}; supported are {_listed(ACTIVATIONS)}")
    if bias is not None:
        shape, wide = [weight.shape[0]], torch.promote_types(x.dtype, torch.float32)
        _require(list(bias.shape) == shape, f"bias has shape {list(bias.shape)}; expected {shape} = [output channels]")
        _require(bias.dtype == wide, f"bias is {bias.dtype}; expected {wide}")
        _require(bias.device == x.device, f"bias is on {bias.device}; expected x's device {x.device}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"winograd_conv2d: {message}")


def _listed(values: tuple) -> str:
    *first, last = map(repr, values)
    return f"{', '.join(first)} and {last}"


def _empty_output(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    shape = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("convfirst::winograd_conv2d")
def _fake(x, weight, bias, padding, algorithm, activation) -> Tensor:
    check(x, weight, bias, padding, algorithm, activation)
    return _empty_output(x, weight, padding)


@torch.library.register_fake("convfirst::winograd_conv2d_backward")
def _backward_fake(grad, x, weight, bias, padding, algorithm, activation, output_mask) -> tuple[Tensor, ...]:
    return tuple(map(empty_gradient, (x, weight, bias), output_mask, (x, x, x)))


@torch.library.register_fake("convfirst::winograd_filter")
def _filter_fake(weight, algorithm, rotated) -> Tensor:
    outputs, channels = weight.shape[:2]
    if rotated:
        outputs, channels = channels, outputs
    points = (reference.FORWARD[algorithm].m + 2) ** 2
    slice = 64 // weight.element_size()  # channels of 64 bytes
    return weight.new_empty((points, -(-outputs // 64) * 64, -(-channels // slice) * slice))


@torch.library.register_fake("convfirst::winograd_conv2d_filtered")
def _filtered_fake(x, filter, bias, outputs, padding, algorithm, activation, plan) -> Tensor:
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    return x.new_empty((x.shape[0], outputs, height, width)).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("convfirst::winograd_weight_gradient")
def _weight_gradient_fake(x, grad, padding) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1], 3, 3))


@torch.library.impl(_definitions, "winograd_conv2d", "CompositeExplicitAutograd")
def _forward(x, weight, bias, padding, algorithm, activation) -> Tensor:
    check(x, weight, bias, padding, algorithm, activation)
    if kernels.refusal(x, weight.shape[0], padding, algorithm) is None:
        return kernels.forward(x, weight, bias, padding, algorithm, activation)
    with torch.autocast(x.device.type, enabled=False):  # an autocast region would round the transforms
        y = reference.winograd_conv2d(x, weight, bias, padding, algorithm, activation)
    return _empty_output(x, weight, padding).copy_(y)


@torch.library.impl(_definitions, "winograd_conv2d_backward", "CompositeExplicitAutograd")
def _backward_forward(grad, x, weight, bias, padding, algorithm, *arguments) -> tuple[Tensor, ...]:
    covered = kernels.refusal(x, weight.shape[0], padding, algorithm) is None
    compute = kernels.backward if covered else reference.winograd_conv2d_backward
    with torch.autocast(x.device.type, enabled=False):
        return compute(grad, x, weight, bias, padding, algorithm, *arguments)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scalars = inputs[3:]


def _backward(ctx, grad: Tensor):
    tensors = ctx.saved_tensors
    output_mask = [bool(wanted) for wanted in ctx.needs_input_grad[:3]]
    # An upstream gradient may come in any layout and, from an expanded scalar, with stride 0.
    grad = grad.contiguous(memory_format=torch.channels_last)
    gradients = torch.ops.convfirst.winograd_conv2d_backward(grad, *tensors, *ctx.scalars, output_mask)
    wanted = (gradient if asked else None for gradient, asked in zip(gradients, output_mask, strict=True))
    return (*wanted, None, None, None)


def _double_backward(ctx, *grads: Tensor):
    raise RuntimeError(
        "winograd_conv2d has no second derivative; torch.nn.functional.conv2d has one, or drop create_graph=True"
    )


torch.library.register_autograd("convfirst::winograd_conv2d", _backward, setup_context=_setup_context)
torch.library.register_autograd("convfirst::winograd_conv2d_backward", _double_backward)
