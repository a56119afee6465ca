"""Benchmark suite of direct convolution and its gradients, against cuDNN in the same run.

The layers are maxDNN's, VGG-E's, and the stems and downsampling layers of ConvFirst-T and ConvNeXt-T.

The peer is the faster of cuDNN's NHWC and NCHW convolutions with its own search on (torch.backends.cudnn.benchmark),
without TF32, in a CUDA graph as ours is, on the same inputs. `computational_efficiency` is what maxDNN's paper defines:
useful multiply-adds over elapsed clocks of all multiprocessors times the multiply-adds a clock of the unit that ours
uses (tensor cores in 16 bits, CUDA cores in float32); the clocks are the time times the clock rate that NVML reads
while the graph runs. `efficiency` is the share of the measured matrix-product rate.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from convfirst.analysis.convolutions import ConvLayer
from graph_timing import graph_ms, matmul_tflops, rotating_inputs
from torch import Tensor

import convfirst_kernels
from convfirst_kernels.direct.convolution import plan_direct

DIRECTIONS = ("forward", "dgrad", "wgrad")
# Multiply-adds a clock of one multiprocessor by compute capability, dense, summed in float32: NVIDIA's white papers.
TENSOR_MACS = {80: 1024, 86: 256, 89: 256, 90: 2048}
FLOAT_MACS = {80: 64, 86: 128, 89: 128, 90: 128}


def _papers_layers(paper: str) -> list[dict]:
    folder = Path(__file__).parents[2] / "convfirst/analysis/papers"
    return json.loads((folder / f"{paper}.json").read_text())["layers"]


def _outside_blocks(network: str, widths: Sequence[int]) -> list[ConvLayer]:
    """A network's stem and downsampling layers for 224 x 224 images."""
    stem = [ConvLayer(f"{network}_stem", 3, 224, 224, widths[0], kernel_size=4, stride=4, padding=0)]
    if network.startswith("convfirst"):
        half = widths[0] // 2
        stem = [ConvLayer(f"{network}_stem1", 3, 224, 224, half, stride=2)]
        stem += [ConvLayer(f"{network}_stem2", half, 112, 112, widths[0], stride=2)]
    pairs = enumerate(zip(widths, widths[1:], strict=False))
    return stem + [
        ConvLayer(f"{network}_downsample{i + 1}", before, 56 >> i, 56 >> i, after, kernel_size=2, stride=2, padding=0)
        for i, (before, after) in pairs
    ]


# Each with its batch sizes: those that its paper measures.
LAYERS = [
    *((ConvLayer(**layer), (128,)) for layer in _papers_layers("maxdnn")),
    *((ConvLayer(**{**layer, "name": f"vgg_{layer['name']}"}), (1, 8, 64)) for layer in _papers_layers("winograd")),
    *((layer, (128,)) for layer in _outside_blocks("convfirst_tiny", (64, 128, 256, 512))),
    *((layer, (128,)) for layer in _outside_blocks("convnext_tiny", (96, 192, 384, 768))),
]


def direct(
    select: str = "",
    dtypes: Sequence[str] = ("float16", "float32"),
    directions: Sequence[str] = DIRECTIONS,
    path: str = "",
    iterations: int = 9,
) -> Iterator[dict]:
    """One row for each layer, batch size, dtype and direction; in float32 the forward pass alone.

    Args:
        select: regular expression that picks from LAYERS by name.
        dtypes: "float16", "bfloat16", "float32".
        directions: of DIRECTIONS. The gradient of x is left out where x is an image of three channels.
        path: restricts the planner to a path or variant.
        iterations: replays of each graph, of which the median counts.
    """
    chosen = [(layer, batch) for layer, batches in LAYERS for batch in batches if re.search(select, layer.name)]
    if not chosen:
        raise ValueError(f"select={select!r} matches none of {', '.join(layer.name for layer, _ in LAYERS)}")
    unknown = set(directions) - set(DIRECTIONS)
    if unknown:
        raise ValueError(f"directions={sorted(unknown)}; accepted: {', '.join(DIRECTIONS)}")
    for dtype in dtypes:
        for layer, batch in chosen:
            for row in _layer_rows(layer, batch, dtype, directions, path, iterations):
                print(json.dumps(row), flush=True)
                yield row
            torch.cuda.empty_cache()


@torch.no_grad()
def _layer_rows(
    layer: ConvLayer, batch: int, dtype: str, directions: Sequence[str], path: str, iterations: int
) -> Iterator[dict]:
    torch_dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    shape = (batch, layer.channels, layer.height, layer.width)
    weight_shape = (layer.filters, layer.channels, layer.kernel_size, layer.kernel_size)
    weight = _normal(weight_shape, torch_dtype) * (layer.channels * layer.kernel_size**2) ** -0.5
    bias = torch.randn(layer.filters, device="cuda") * 0.1
    grad = _normal((batch, layer.filters, layer.output_height, layer.output_width), torch_dtype)
    inputs = rotating_inputs(lambda: _normal(shape, torch_dtype))
    ours, theirs = _ours(layer, weight, bias, grad), _theirs(layer, weight, bias.to(torch_dtype), grad)
    for direction in directions:
        if direction != "forward" and dtype == "float32" or direction == "dgrad" and layer.channels < 8:
            continue
        options = {"direction": direction, "dtype": dtype, "device": "cuda", "path": path}
        variant = plan_direct(shape, weight_shape, layer.stride, layer.padding, **options)["chosen"]
        with convfirst_kernels.force_path(path):
            check_agreement(ours[direction](inputs[0]), theirs[direction](inputs[0]))
            ours_ms = graph_ms(ours[direction], inputs, iterations, calls=4)
            clock_mhz = _clock_mhz(ours[direction], inputs)
        peer, peer_ms = _fastest_peer(layer, direction, inputs, weight, bias.to(torch_dtype), grad, iterations)
        yield _row(layer, batch, dtype, direction, variant, ours_ms, peer, peer_ms, clock_mhz)


def _row(layer, batch, dtype, direction, variant, ours_ms, peer, peer_ms, clock_mhz) -> dict:
    macs, ceiling = layer.macs * batch, matmul_tflops(getattr(torch, dtype))
    tflops = 2e-9 * macs / ours_ms
    efficiencies = [_computational_efficiency(macs, ms, dtype, clock_mhz) for ms in (ours_ms, peer_ms)]
    return {
        "name": layer.name,
        "layer": layer.name,
        "batch": batch,
        "N": batch,
        "dtype": dtype,
        "direction": direction,
        "path": variant.split("_")[0],
        "variant": variant,
        "ours_ms": round(ours_ms, 5),
        "peer": f"cudnn-{peer}",
        "peer_ms": round(peer_ms, 5),
        "speedup": round(peer_ms / ours_ms, 3),
        "tflops": round(tflops, 1),
        "ceiling_tflops": round(ceiling, 1),
        "efficiency": round(tflops / ceiling, 4),
        "clock_mhz": clock_mhz,
        "computational_efficiency": efficiencies[0],
        "peer_computational_efficiency": efficiencies[1],
    }


def _computational_efficiency(macs: int, ms: float, dtype: str, clock_mhz: int | None) -> float | None:
    device = torch.cuda.get_device_properties(0)
    unit = FLOAT_MACS if dtype == "float32" else TENSOR_MACS
    peak = unit.get(10 * device.major + device.minor)
    if peak is None or clock_mhz is None:
        return None
    return round(macs / (1e3 * clock_mhz * ms * device.multi_processor_count * peak), 4)


def _clock_mhz(function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> int | None:
    """The multiprocessors' clock rate while the function runs over and over; None where NVML can't tell."""
    readings = []
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        for _ in range(20):
            function(inputs[0])
        try:
            readings.append(torch.cuda.clock_rate())
        except (ModuleNotFoundError, RuntimeError):
            return None
        torch.cuda.synchronize()
    return int(statistics.median(readings))


def _ours(layer: ConvLayer, weight: Tensor, bias: Tensor, grad: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    geometry = (*[layer.stride] * 2, *[layer.padding] * 2, 1, 1)
    ops = torch.ops.convfirst
    return {
        "forward": lambda x: ops.direct_conv2d(x, weight, bias, *geometry, "none"),
        "dgrad": lambda x: ops.direct_conv2d_dgrad(grad, weight, *x.shape[2:], *geometry),
        "wgrad": lambda x: ops.direct_conv2d_wgrad(grad, x, *weight.shape[2:], *geometry),
    }


def _theirs(layer: ConvLayer, weight: Tensor, bias: Tensor, grad: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    arguments = (None, [layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], 1)
    backward = torch.ops.aten.convolution_backward
    return {
        "forward": lambda x: F.conv2d(x, weight, bias, layer.stride, layer.padding),
        "dgrad": lambda x: backward(grad, x, weight, *arguments, [True, False, False])[0],
        "wgrad": lambda x: backward(grad, x, weight, *arguments, [False, True, False])[1],
    }


def _fastest_peer(layer, direction, inputs, weight, bias, grad, iterations) -> tuple[str, float]:
    times = {}
    for name, layout in (("nhwc", torch.channels_last), ("nchw", torch.contiguous_format)):
        converted = [x.contiguous(memory_format=layout) for x in inputs]
        theirs = _theirs(layer, weight.contiguous(memory_format=layout), bias, grad.contiguous(memory_format=layout))
        with cudnn_searches():
            times[name] = graph_ms(theirs[direction], converted, iterations, calls=4)
        del converted
    fastest = min(times, key=times.__getitem__)
    return fastest, times[fastest]


def check_agreement(ours: Tensor, theirs: Tensor) -> None:
    """A benchmark of wrong results is worth nothing: a coarse comparison (the tests have the fine one)."""
    difference, scale = (ours.float() - theirs.float()).abs().max(), theirs.float().abs().max()
    if not difference <= 0.03 * scale:
        raise RuntimeError(f"our result and cuDNN's differ by {difference:.3g} at a magnitude of {scale:.3g}")


@contextmanager
def cudnn_searches():
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
        yield


def _normal(shape: tuple, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
