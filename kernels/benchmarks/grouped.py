"""Benchmark suite of the grouped convolution alone, 3x3 in groups of 8, against cuDNN and spio in the same run.

Ours is the operator that begins a block where the block takes several launches, on compute capability 9.0. The peer is
the faster of cuDNN's NHWC and NCHW convolutions with its own search on, in a CUDA graph as ours is, on the same inputs.
`spio_ms` is that of spio's kernel where there is one, and `spio` says how it ran or why it didn't. `block_ms` is the
whole fused block at the same shape, of which the convolution is a part.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import convfirst.models
import torch
import torch.nn.functional as F
from direct import check_agreement, cudnn_searches
from graph_timing import Captured, capture, copy_tbps, matmul_tflops, rotating_inputs
from spio_peer import prepare_spio
from torch import Tensor
from turns import measured

import convfirst_kernels
from convfirst_kernels import (
    conv_norm,  # noqa: F401  registers the operator
    pack_conv_weight,
)

GROUP_WIDTH = 8
EPS = 1e-6


@dataclass(frozen=True)
class GroupedConv:
    """The convolution of one of ConvFirst-T's blocks, at its resolution for 224 x 224 images."""

    name: str
    channels: int
    side: int


GROUPED = [GroupedConv(f"grouped-c{c}", c, side) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))]


def grouped(
    select: str = "",
    dtypes: Sequence[str] = ("float16",),
    batches: Sequence[int] = (128,),
    iterations: int = 15,
    turn: str | None = None,
) -> Iterator[dict]:
    """One row for each convolution, batch size and dtype.

    Args:
        select: regular expression that picks from GROUPED by name.
        dtypes: "float16", "bfloat16"; spio has the former alone.
        batches: images in a batch.
        iterations: replays of each graph, of which the median counts.
        turn: a file by which processes that share the GPU take turns; see `turns.measured`.
    """
    chosen = [shape for shape in GROUPED if re.search(select, shape.name)]
    if not chosen:
        raise ValueError(f"select={select!r} matches none of {', '.join(shape.name for shape in GROUPED)}")
    jobs = (_rows(shape, dtype, batch, iterations) for dtype in dtypes for shape in chosen for batch in batches)
    yield from measured(jobs, turn)


@torch.no_grad()
def _rows(shape: GroupedConv, dtype: str, batch: int, iterations: int) -> Iterator[dict | None]:
    torch_dtype, channels = getattr(torch, dtype), shape.channels
    torch.manual_seed(0)
    inputs = rotating_inputs(lambda: _images((batch, channels, shape.side, shape.side), torch_dtype))
    weight = torch.randn(channels, GROUP_WIDTH, 3, 3, device="cuda") * (9 * GROUP_WIDTH) ** -0.5
    weight = weight.to(torch_dtype, memory_format=torch.channels_last)
    bias = torch.randn(channels, device="cuda") * 0.1
    packed = pack_conv_weight(weight, torch_dtype)

    def ours(x: Tensor) -> Tensor:
        return torch.ops.convfirst.conv_norm(x, packed, bias, None, GROUP_WIDTH, False, EPS)[0]

    groups = channels // GROUP_WIDTH
    check_agreement(ours(inputs[0]), F.conv2d(inputs[0], weight, bias.to(torch_dtype), padding=1, groups=groups))
    graph, block, time_spio = (
        capture(ours, inputs),
        _block(shape, torch_dtype, inputs),
        prepare_spio(inputs, weight, bias),
    )
    yield None
    ours_ms, (spio_ms, how) = graph.ms(iterations), time_spio()
    peer, peer_ms = _fastest_peer(inputs, weight, bias.to(torch_dtype), groups, iterations)
    flops = 2 * batch * shape.side**2 * channels * 9 * GROUP_WIDTH
    traffic = 2 * inputs[0].numel() * inputs[0].element_size()
    tflops, ceiling = 1e-9 * flops / ours_ms, matmul_tflops(torch_dtype)
    row = {
        "name": shape.name,
        "batch": batch,
        "dtype": dtype,
        "path": "sm90",
        "ours_ms": round(ours_ms, 5),
        "peer": f"cudnn-{peer}",
        "peer_ms": round(peer_ms, 5),
        "speedup": round(peer_ms / ours_ms, 3),
        "spio_ms": spio_ms and round(spio_ms, 5),
        "spio_speedup": spio_ms and round(spio_ms / ours_ms, 3),
        "spio": how,
        "tflops": round(tflops, 1),
        "ceiling_tflops": round(ceiling, 1),
        "efficiency": round(tflops / ceiling, 4),
        "floor_memory_ms": round(1e-9 * traffic / copy_tbps(), 5),
        "block_ms": round(block.ms(iterations), 5),
    }
    print(json.dumps(row), flush=True)
    yield row


def _fastest_peer(inputs, weight: Tensor, bias: Tensor, groups: int, iterations: int) -> tuple[str, float]:
    times = {}
    for name, layout in (("nhwc", torch.channels_last), ("nchw", torch.contiguous_format)):
        converted, theirs = (
            [x.contiguous(memory_format=layout) for x in inputs],
            weight.contiguous(memory_format=layout),
        )
        with cudnn_searches():
            graph = capture(lambda x, w=theirs: F.conv2d(x, w, bias, padding=1, groups=groups), converted)
        times[name] = graph.ms(iterations)
        del converted, graph
    fastest = min(times, key=times.__getitem__)
    return fastest, times[fastest]


def _block(shape: GroupedConv, dtype: torch.dtype, inputs: Sequence[Tensor]) -> Captured:
    block = convfirst.models.ConvFirstBlock(shape.channels, layer_scale=0.5).eval()
    block.to("cuda", dtype, memory_format=torch.channels_last)
    convfirst_kernels.accelerate(block, kernels="required", frozen=True)
    return capture(block, inputs)


def _images(shape: tuple, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype, memory_format=torch.channels_last)
