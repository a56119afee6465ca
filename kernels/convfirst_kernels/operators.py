"""The Python side of the operators ``torch.ops.convfirst.*``: CPU path, fake implementations, autograd, autocast.

Their schemas and CUDA implementations are in the compiled library (csrc/bindings.cpp).
"""

import torch
from torch import Tensor

from convfirst_kernels import (
    backward,
    library,  # noqa: F401  loads the library
    reference,
)

_TENSORS = 11  # the operator's leading arguments that are tensors
_implementations = torch.library.Library("convfirst", "IMPL")


def _channels_last_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.register_fake("convfirst::conv_first_block")
def _fake(x: Tensor, *arguments) -> Tensor:
    return _channels_last_like(x)


@torch.library.register_fake("convfirst::conv_first_block_out")
def _out_fake(*arguments, out: Tensor) -> None:
    return None


@torch.library.register_fake("convfirst::conv_first_block_backward")
def _backward_fake(grad: Tensor, *arguments) -> tuple[Tensor, ...]:
    tensors, output_mask = arguments[:_TENSORS], arguments[-1]
    return tuple(
        reference.empty_gradient(tensor, wanted, tensors[0])
        for tensor, wanted in zip(tensors, output_mask, strict=True)
    )


@torch.library.impl(_implementations, "conv_first_block", "CPU")
def _cpu(x: Tensor, *arguments) -> Tensor:
    return _channels_last_like(x).copy_(reference.conv_first_block(x, *arguments))


@torch.library.impl(_implementations, "conv_first_block_out", "CPU")
def _out_cpu(x: Tensor, *arguments, out: Tensor) -> None:
    out.copy_(reference.conv_first_block(x, *arguments))


_implementations.impl("conv_first_block_backward", reference.conv_first_block_backward, "CPU")
_implementations.impl("conv_first_block_backward", backward.conv_first_block_backward, "CUDA")


@torch.library.register_fake("convfirst::mbconv_block")
def _mbconv_fake(x: Tensor, *arguments) -> Tensor:
    return _channels_last_like(x)


@torch.library.impl(_implementations, "mbconv_block", "CPU")
def _mbconv_cpu(x: Tensor, *arguments) -> Tensor:
    return _channels_last_like(x).copy_(reference.mbconv_block(x, *arguments))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.scalars = inputs[_TENSORS:]


def _backward(ctx, grad: Tensor):
    tensors = ctx.saved_tensors
    output_mask = [bool(wanted) for wanted in ctx.needs_input_grad[:_TENSORS]]
    # An upstream gradient may come in any layout and, from an expanded scalar, with stride 0.
    grad = grad.contiguous(memory_format=torch.channels_last)
    gradients = torch.ops.convfirst.conv_first_block_backward(grad, *tensors, *ctx.scalars, output_mask)
    wanted = (
        gradient if asked and tensor is not None else None
        for gradient, tensor, asked in zip(gradients, tensors, output_mask, strict=True)
    )
    return (*wanted, *(None for _ in ctx.scalars))


torch.library.register_autograd("convfirst::conv_first_block", _backward, setup_context=_setup_context)


def _autocast(device_type: str):
    """The operator under autocast: x and the matrices in the autocast dtype, the vectors in float32."""
    key = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}[device_type]
    matrices = {0, 1, 5, 7}

    def rule(*arguments) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [
            tensor if tensor is None else tensor.to(dtype if index in matrices else torch.float32)
            for index, tensor in enumerate(arguments[:_TENSORS])
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return torch.ops.convfirst.conv_first_block(*cast, *arguments[_TENSORS:])

    _implementations.impl("conv_first_block", rule, key)


for _device_type in ("cuda", "cpu"):
    _autocast(_device_type)
