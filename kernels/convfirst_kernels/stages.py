"""The blocks of a stage, one after another, in one launch where images are few: packing and CPU path."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convfirst_kernels import operators, patches, reference  # noqa: F401  registers the operators
from convfirst_kernels.block import BlockWeights

DOWN_CHANNELS = 128  # the fewest of a stage that begins with its downsampling in the same launch
WORKSPACE_BYTES = 1 << 22  # more than any stage needs whose tiles all run at once
WORKSPACE_COUNTERS = 256  # bytes of it, its first
_implementations = torch.library.Library("convfirst", "IMPL")


class StageWeights(NamedTuple):
    """The packed weights of blocks of one shape, stacked: the operator's arguments, vectors flattened."""

    conv_weight: Tensor  # [blocks, 9, C, 8]
    conv_bias: Tensor  # [blocks * C], float32
    expand_weight: Tensor  # [blocks, 4 C, C]
    expand_vectors: Tensor  # [blocks * 4 C * 2], float32: bias and the sum of expand_weight's row, side by side
    project_weight: Tensor  # [blocks, C, 4 C]
    project_vectors: Tensor  # [blocks * C * 2], float32: bias and layer scale, side by side
    activation: str
    eps: float
    has_norm: bool


class DownWeights(NamedTuple):
    """The packed downsampling that a stage begins with: LayerNorm without affine part, 2x2 convolution, stride 2."""

    weight: Tensor  # [C, 4 * C / 2]: output channel; row, column and channel of the patch
    vectors: Tensor  # [C * 5], float32: bias and the sums of the four taps' weights, side by side
    eps: float
    has_norm: bool


def pack_down(weight: Tensor, bias: Tensor, eps: float, has_norm: bool) -> DownWeights:
    """Of the weights that `patches.downsample` takes."""
    vectors = patches.product_vectors(weight, bias).view(5, -1).t().flatten()
    return DownWeights(weight, vectors, eps, has_norm)


def run_stage(x: Tensor, weights: StageWeights, down: DownWeights | None, workspace: Tensor) -> Tensor:
    """`conv_first_stage` on packed weights."""
    *tensors, activation, eps, has_norm = weights
    begin = (None, None) if down is None else down[:2]
    settings = (0.0, False) if down is None else down[2:]
    return torch.ops.convfirst.conv_first_stage(
        x.contiguous(memory_format=torch.channels_last),
        *tensors,
        *begin,
        workspace,
        activation,
        eps,
        has_norm,
        *settings,
    )


def pack_stage(blocks: Sequence[BlockWeights]) -> StageWeights | None:
    """Stack the weights of a stage's blocks, or None where they differ in shape or have what the kernel does not do.

    It does 3x3 convolutions in groups of 8 and an expansion of 4; a norm's affine part must have been absorbed by the
    matrices (`Parts.pack`).
    """
    first = blocks[0]
    channels = first.conv_weight.shape[1]
    if first.conv_weight.shape != (9, channels, 8) or first.expand_weight.shape != (4 * channels, channels):
        return None
    for block in blocks:
        if any(vector is not None for vector in (block.norm_weight, block.norm_bias)):
            return None
        if block[-3:] != first[-3:] or [_shape(t) for t in block[:-3]] != [_shape(t) for t in first[:-3]]:
            return None
    expand = torch.stack([block.expand_weight for block in blocks])
    expand_bias = _joined([block.expand_bias for block in blocks], expand.new_zeros(4 * channels, dtype=torch.float32))
    none = expand.new_zeros(channels, dtype=torch.float32)
    project_bias = _joined([block.project_bias for block in blocks], none)
    layer_scale = _joined([block.layer_scale for block in blocks], torch.ones_like(none))
    return StageWeights(
        torch.stack([block.conv_weight for block in blocks]),
        _joined([block.conv_bias for block in blocks], none),
        expand,
        torch.stack([expand_bias, expand.float().sum(-1).flatten()], -1).flatten(),
        torch.stack([block.project_weight for block in blocks]),
        torch.stack([project_bias, layer_scale], -1).flatten(),
        first.activation,
        first.eps,
        first.has_norm,
    )


def unpack_stage(weights: StageWeights) -> list[BlockWeights]:
    """The weights of each block, those that are large in the stage's memory; absent biases are zero, scales one."""
    count = weights.conv_weight.shape[0]
    conv_bias = weights.conv_bias.view(count, -1)
    project_bias, layer_scale = (t.contiguous() for t in weights.project_vectors.view(count, -1, 2).unbind(-1))
    expand_bias = weights.expand_vectors.view(count, -1, 2)[..., 0].contiguous()
    return [
        BlockWeights(
            weights.conv_weight[i], conv_bias[i], None, None, weights.expand_weight[i], expand_bias[i],
            weights.project_weight[i], project_bias[i], layer_scale[i], weights.activation, weights.eps,
            weights.has_norm,
        )
        for i in range(count)
    ]  # fmt: skip


def workspace(device: torch.device) -> Tensor:
    """The memory through which a stage's tiles exchange pixels: of launches one after another.

    Counters, zero, and what is not there yet, all ones; a launch leaves it so that the next one finds that again.
    """
    memory = torch.full((WORKSPACE_BYTES,), 255, dtype=torch.uint8, device=device)
    memory[:WORKSPACE_COUNTERS] = 0
    return memory


@torch.compiler.assume_constant_result
def refusal(
    batch: int, height: int, width: int, channels: int, blocks: int, dtype: str, activation: str, index: int
) -> str:
    """Why no launch computes such a stage of ``blocks`` blocks on CUDA device ``index``; empty where one does."""
    return torch.ops.convfirst.conv_first_stage_refusal(
        batch, height, width, channels, blocks, dtype, activation, index
    )


@torch.library.register_fake("convfirst::conv_first_stage")
def _fake(x: Tensor, *arguments) -> Tensor:
    n, channels, height, width = x.shape
    if arguments[6] is not None:
        channels, height, width = 2 * channels, height // 2, width // 2
    shape = n, channels, height, width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.impl(_implementations, "conv_first_stage", "CPU")
def conv_first_stage(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    expand_weight: Tensor,
    expand_vectors: Tensor,
    project_weight: Tensor,
    project_vectors: Tensor,
    down_weight: Tensor | None,
    down_vectors: Tensor | None,
    workspace: Tensor,
    activation: str,
    eps: float,
    has_norm: bool,
    down_eps: float,
    down_norm: bool,
) -> Tensor:
    """``block(... block(x))`` of `reference.conv_first_block`, weights stacked as in `StageWeights`.

    Args:
        x: [N, C, H, W], channels_last; with ``down_weight``, [N, C / 2, H, W], which `patches.downsample` makes the
            blocks' input; its weights as in `DownWeights`.
        workspace: uint8, of launches one after another; see `workspace`. On a CPU it is not used.

    Returns:
        [N, C, H, W] in x's dtype, channels_last; H and W are halved with ``down_weight``.

    Raises:
        RuntimeError: on a GPU, the operator refuses an argument; the message names it and what is supported.
    """
    stacked = StageWeights(
        conv_weight, conv_bias, expand_weight, expand_vectors, project_weight, project_vectors, activation, eps,
        has_norm,
    )  # fmt: skip
    y = x
    if down_weight is not None:
        y = patches.downsample(x, down_weight, down_vectors.view(-1, 5)[:, 0], down_eps, down_norm)
    for *tensors, _, _, _ in unpack_stage(stacked):
        y = reference.conv_first_block(y, *tensors, None, 8, activation, eps, has_norm)
    return torch.empty_like(y, memory_format=torch.channels_last).copy_(y)


def _shape(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _joined(vectors: list[Tensor | None], absent: Tensor) -> Tensor:
    return torch.cat([absent if vector is None else vector for vector in vectors])
