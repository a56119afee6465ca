"""The blocks of a stage, one after another, in one launch where images are few: packing and CPU path."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from convfirst_kernels import operators, reference  # noqa: F401  registers the operators
from convfirst_kernels.block import BlockWeights
from convfirst_kernels.planner import Device

TILE = 32  # pixels of a tile
_implementations = torch.library.Library("convfirst", "IMPL")


class StageWeights(NamedTuple):
    """The packed weights of blocks of one shape, stacked: the operator's arguments, vectors flattened."""

    conv_weight: Tensor  # [blocks, 9, C, 8]
    conv_bias: Tensor | None  # [blocks * C], float32
    expand_weight: Tensor  # [blocks, 4 C, C]
    expand_bias: Tensor | None  # [blocks * 4 C], float32
    expand_sums: Tensor  # [blocks * 4 C], float32: sums of expand_weight's rows
    project_weight: Tensor  # [blocks, C, 4 C]
    project_bias: Tensor | None  # [blocks * C], float32
    activation: str
    eps: float
    has_norm: bool


def pack_stage(blocks: Sequence[BlockWeights]) -> StageWeights | None:
    """Stack the weights of a stage's blocks, or None where they differ in shape or have what the kernel does not do.

    It does 3x3 convolutions in groups of 8 and an expansion of 4; a norm's affine part and a layer scale must have been
    absorbed by the matrices (`Parts.pack`).
    """
    first = blocks[0]
    channels = first.conv_weight.shape[1]
    if first.conv_weight.shape != (9, channels, 8) or first.expand_weight.shape != (4 * channels, channels):
        return None
    for block in blocks:
        if any(vector is not None for vector in (block.norm_weight, block.norm_bias, block.layer_scale)):
            return None
        if block[-3:] != first[-3:] or [_shape(t) for t in block[:-3]] != [_shape(t) for t in first[:-3]]:
            return None
    expand = torch.stack([block.expand_weight for block in blocks])
    return StageWeights(
        torch.stack([block.conv_weight for block in blocks]),
        _joined([block.conv_bias for block in blocks]),
        expand,
        _joined([block.expand_bias for block in blocks]),
        expand.float().sum(-1).flatten(),
        torch.stack([block.project_weight for block in blocks]),
        _joined([block.project_bias for block in blocks]),
        first.activation,
        first.eps,
        first.has_norm,
    )


def unpack_stage(weights: StageWeights) -> list[BlockWeights]:
    """The weights of each block, in the stage's memory."""

    def part(vector: Tensor | None, index: int) -> Tensor | None:
        return None if vector is None else vector.reshape(count, -1)[index]

    count = weights.conv_weight.shape[0]
    return [
        BlockWeights(
            weights.conv_weight[i], part(weights.conv_bias, i), None, None, weights.expand_weight[i],
            part(weights.expand_bias, i), weights.project_weight[i], part(weights.project_bias, i), None,
            weights.activation, weights.eps, weights.has_norm,
        )
        for i in range(count)
    ]  # fmt: skip


def workspace(device: torch.device, index: int) -> Tensor:
    """The memory through which a stage's tiles exchange pixels: of launches one after another."""
    return torch.zeros(256 + 8 * TILE * 64 * Device.of(index).multiprocessors, dtype=torch.uint8, device=device)


@torch.compiler.assume_constant_result
def refusal(
    batch: int, height: int, width: int, channels: int, blocks: int, dtype: str, activation: str, index: int
) -> str:
    """Why no launch computes such a stage of ``blocks`` blocks on CUDA device ``index``; empty where one does."""
    return _refusal_cached(batch, height, width, channels, blocks, dtype, activation, index)


@cache
def _refusal_cached(*arguments) -> str:
    return torch.ops.convfirst.conv_first_stage_refusal(*arguments)


@torch.library.register_fake("convfirst::conv_first_stage")
def _fake(x: Tensor, *arguments) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.impl(_implementations, "conv_first_stage", "CPU")
def conv_first_stage(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    expand_sums: Tensor,
    project_weight: Tensor,
    project_bias: Tensor | None,
    workspace: Tensor,
    activation: str,
    eps: float,
    has_norm: bool,
) -> Tensor:
    """``block(... block(x))`` of `reference.conv_first_block`, weights stacked as in `StageWeights`.

    Args:
        x: [N, C, H, W], channels_last.
        workspace: uint8, zero before its first use; see `workspace`. On a CPU it is not used.

    Returns:
        [N, C, H, W] in x's dtype, channels_last.

    Raises:
        RuntimeError: on a GPU, the operator refuses an argument; the message names it and what is supported.
    """
    stacked = StageWeights(
        conv_weight, conv_bias, expand_weight, expand_bias, expand_sums, project_weight, project_bias, activation, eps,
        has_norm,
    )  # fmt: skip
    y = x
    for *tensors, _, _, _ in unpack_stage(stacked):
        y = reference.conv_first_block(y, *tensors, None, 8, activation, eps, has_norm)
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(y)


def _shape(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _joined(vectors: list[Tensor | None]) -> Tensor | None:
    return None if vectors[0] is None else torch.cat(vectors)
