"""Fused residual blocks for convolutional networks: CUDA kernels behind PyTorch operators.

>>> import convfirst_kernels
>>> report = convfirst_kernels.accelerate(model)   # swaps the blocks of ConvFirst and of timm's ConvNeXt in place
>>> print(report)
>>> report.undo()

Importing needs no GPU. Without one, every operator runs its PyTorch reference.
"""

from convfirst_kernels import feed_forward_backward as _feed_forward_backward  # noqa: F401  registers its operator
from convfirst_kernels.acceleration import Report, accelerate, forget
from convfirst_kernels.block import (
    ACTIVATIONS,
    BlockWeights,
    conv_first_block,
    pack_block,
    pack_conv_weight,
    pack_vector,
)
from convfirst_kernels.direct import direct_conv2d
from convfirst_kernels.inference import CompiledInference, compile_for_inference
from convfirst_kernels.mbconv import mbconv_block
from convfirst_kernels.planner import Device, MBConvProblem, Problem, explain, force_path
from convfirst_kernels.winograd import winograd_conv2d

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "BlockWeights",
    "CompiledInference",
    "Device",
    "MBConvProblem",
    "Problem",
    "Report",
    "accelerate",
    "compile_for_inference",
    "conv_first_block",
    "direct_conv2d",
    "explain",
    "force_path",
    "forget",
    "mbconv_block",
    "pack_block",
    "pack_conv_weight",
    "pack_vector",
    "winograd_conv2d",
]
