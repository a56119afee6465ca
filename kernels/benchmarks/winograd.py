"""Benchmark suite of Winograd's convolution: the layers of VGG-E and of ResNets against cuDNN in the same run.

The peer is the faster of cuDNN's NHWC and NCHW convolutions with its own search on (torch.backends.cudnn.benchmark),
without TF32, in a CUDA graph as ours is, on the same inputs. Ours transforms the filters in every call, as cuDNN must;
`ours_filtered_ms` is the time with transformed filters at hand, which is how an accelerated network runs. In 16 bits
direct convolution, which transforms nothing, is one of our algorithms, and F(2x2, 3x3) is timed by its portable kernels
("f2") and by Hopper's fused one ("f2-fused"), both of which run where they are asked for alone. Errors are those of one
image of the batch that is timed, against float64 on the same rounded numbers.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from graph_timing import graph_ms, rotating_inputs
from torch import Tensor

import convfirst_kernels
from convfirst_kernels.direct.convolution import plan_direct
from convfirst_kernels.winograd import kernels

Call = Callable[[Tensor], Tensor]
WARMUP = 1  # replays of a graph before those that count: its calls have run three times before the capture
# Winograd's kernels of 16 bits run where their path is asked for.
PATHS = {"f2": "sm80", "f4": "sm80", "f2-fused": "sm90", "direct": ""}
LONG = 1e11  # operations of a call, a millisecond and more in float32, from which on two calls a graph are enough


@dataclass(frozen=True)
class Layer:
    """A convolution of a network for 224 x 224 images: 3x3, padding 1."""

    name: str
    channels: int
    outputs: int
    side: int
    depth: int = 0  # how often VGG-E has it

    def flops(self, batch: int) -> int:
        return 2 * 9 * batch * self.channels * self.outputs * self.side**2


LAYERS = [
    Layer("1.1", 3, 64, 224, 1),
    Layer("1.2", 64, 64, 224, 1),
    Layer("2.1", 64, 128, 112, 1),
    Layer("2.2", 128, 128, 112, 1),
    Layer("3.1", 128, 256, 56, 1),
    Layer("3.2", 256, 256, 56, 3),
    Layer("4.1", 256, 512, 28, 1),
    Layer("4.2", 512, 512, 28, 3),
    Layer("5", 512, 512, 14, 4),
    *(Layer(f"resnet-{c}", c, c, side) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
]


def winograd(
    select: str = "",
    dtypes: Sequence[str] = ("float32", "float16"),
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    algorithms: Sequence[str] = ("f2", "f4", "f2-fused", "direct"),
    iterations: int = 5,
) -> Iterator[dict]:
    """One row for each layer, batch size, dtype and algorithm as it is measured, and one for the sum over VGG-E.

    VGG-E's layers come first at every batch size, then ResNets'.

    Args:
        select: regular expression that picks from LAYERS by name.
        dtypes: those that the kernels take.
        batches: images in a batch.
        algorithms: "f2"; "f4", in float32 alone; "f2-fused" and "direct", in 16 bits alone, the former on Hopper where
            channels are multiples of 8.
        iterations: replays of each graph, of which the median counts.
    """
    chosen = [layer for layer in LAYERS if re.search(select, layer.name)]
    if not chosen:
        raise ValueError(f"select={select!r} matches none of {', '.join(layer.name for layer in LAYERS)}")
    for row in _rows(chosen, dtypes, batches, algorithms, iterations):
        print(json.dumps(row), flush=True)
        yield row


def _rows(chosen: Sequence[Layer], dtypes, batches, algorithms, iterations) -> Iterator[dict]:
    vgg, others = ([layer for layer in chosen if bool(layer.depth) is wanted] for wanted in (True, False))
    whole = all(layer in chosen for layer in LAYERS if layer.depth)
    for dtype in dtypes:
        for batch in batches:
            measured = []
            for layer in vgg:
                rows = _layer_rows(layer, batch, dtype, algorithms, iterations)
                measured += rows
                yield from rows
            if whole:
                yield _network_row(measured)
        for batch in batches:
            for layer in others:
                yield from _layer_rows(layer, batch, dtype, algorithms, iterations)


def _network_row(rows: list[dict]) -> dict:
    """The sum over VGG-E's sixteen convolutions, for each layer the fastest algorithm that runs unasked for."""
    sums = dict.fromkeys(("ours_ms", "ours_filtered_ms", "peer_ms"), 0.0)
    flops = 0
    for layer in LAYERS:
        own = [row for row in rows if row["layer"] == layer.name and row["algorithm"] != "f2-fused"]
        flops += layer.depth * layer.flops(rows[0]["N"])
        for column in sums:
            sums[column] += layer.depth * min(row[column] for row in own) if layer.depth else 0.0
    return {
        "name": "vgg-e",
        "layer": "all",
        "N": rows[0]["N"],
        "dtype": rows[0]["dtype"],
        "algorithm": "fastest",
        "plan": "",
        **{column: round(ms, 5) for column, ms in sums.items()},
        "peer": "cudnn",
        "speedup": round(sums["peer_ms"] / sums["ours_ms"], 3),
        "effective_tflops": round(1e-9 * flops / sums["ours_ms"], 1),
        "peer_tflops": round(1e-9 * flops / sums["peer_ms"], 1),
        "max_error": None,
    }


@torch.no_grad()
def _layer_rows(layer: Layer, batch: int, dtype: str, algorithms: Sequence[str], iterations: int) -> list[dict]:
    reference = _reference(layer, dtype)
    weight, bias = reference.weight, reference.bias
    shape = (batch, layer.channels, layer.side, layer.side)
    inputs = rotating_inputs(lambda: _images(shape, weight.dtype))
    inputs[0][:1] = reference.image
    calls = 2 if layer.flops(batch) >= LONG else 4
    peer, peer_ms = _peer(inputs, weight, bias, iterations, calls)
    rows = []
    for algorithm in algorithms:
        if not _runs(layer, dtype, algorithm):
            continue
        with convfirst_kernels.force_path(PATHS[algorithm]):
            call, filtered, plan = _ours(inputs[0], weight, bias, algorithm.removesuffix("-fused"))
            error = float((call(inputs[0])[:1].double() - reference.exact).abs().max())
            ours_ms = _ms(call, inputs, iterations, calls)
            filtered_ms = ours_ms if filtered is None else _ms(filtered, inputs, iterations, calls)
        rows.append(
            {
                "name": layer.name if layer.name.startswith("resnet") else f"vgg-conv{layer.name}",
                "layer": layer.name,
                "channels": layer.channels,
                "outputs": layer.outputs,
                "side": layer.side,
                "N": batch,
                "dtype": dtype,
                "algorithm": algorithm,
                "plan": plan,
                "ours_ms": round(ours_ms, 5),
                "ours_filtered_ms": round(filtered_ms, 5),
                "peer": f"cudnn-{peer}",
                "peer_ms": round(peer_ms, 5),
                "speedup": round(peer_ms / ours_ms, 3),
                "effective_tflops": round(1e-9 * layer.flops(batch) / ours_ms, 1),
                "max_error": float(f"{error:.3g}"),
                "peer_max_error": float(f"{reference.peer_error:.3g}"),
            }
        )
    return rows


def _runs(layer: Layer, dtype: str, algorithm: str) -> bool:
    if algorithm == "f2-fused":
        on_hopper = torch.cuda.get_device_capability() == (9, 0)
        return dtype != "float32" and on_hopper and layer.channels % 8 == layer.outputs % 8 == 0
    return algorithm != ("direct" if dtype == "float32" else "f4")


@dataclass(frozen=True)
class Reference:
    """A layer's weights and an image, what comes of them in float64, and the largest error of cuDNN's own choice."""

    weight: Tensor
    bias: Tensor
    image: Tensor
    exact: Tensor
    peer_error: float


@cache
def _reference(layer: Layer, dtype: str) -> Reference:
    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    weight, bias = _uniform(layer.outputs, layer.channels, 3, 3).to(torch_dtype), _uniform(layer.outputs)
    image = _images((1, layer.channels, layer.side, layer.side), torch_dtype)
    exact = F.conv2d(image.double(), weight.double(), bias.double(), padding=1)
    with _cudnn(search=False):
        theirs = F.conv2d(image, weight, bias.to(torch_dtype), padding=1)
    return Reference(weight, bias, image, exact, float((theirs.double() - exact).abs().max()))


def _ms(function: Call, inputs: Sequence[Tensor], iterations: int, calls: int) -> float:
    return graph_ms(function, inputs, iterations, calls, WARMUP)


def _ours(x: Tensor, weight: Tensor, bias: Tensor, algorithm: str) -> tuple[Call, Call | None, str]:
    """The convolution, the same with transformed filters at hand, None where there are none, and how it runs."""
    ops, outputs = torch.ops.convfirst, len(weight)
    if algorithm == "direct":
        theirs = weight.contiguous(memory_format=torch.channels_last)
        shapes = {"shape": tuple(x.shape), "weight_shape": tuple(weight.shape)}
        answer = plan_direct(**shapes, padding=1, dtype=str(x.dtype).removeprefix("torch."), device="cuda")
        return lambda x: ops.direct_conv2d(x, theirs, bias, 1, 1, 1, 1, 1, 1, "none"), None, answer["chosen"]
    filter = ops.winograd_filter(weight, algorithm, False)
    return (
        lambda x: ops.winograd_conv2d(x, weight, bias, 1, algorithm, "none"),
        lambda x: ops.winograd_conv2d_filtered(x, filter, bias, outputs, 1, algorithm, "none", ""),
        kernels.plan(x, outputs, 1, algorithm),
    )


def _peer(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor, iterations: int, calls: int) -> tuple[str, float]:
    times = {}
    bias = bias.to(weight.dtype)
    for name, layout in (("nhwc", torch.channels_last), ("nchw", torch.contiguous_format)):
        theirs = weight.contiguous(memory_format=layout)
        converted = [x.contiguous(memory_format=layout) for x in inputs]
        with _cudnn(search=True):
            times[name] = _ms(lambda x, w=theirs: F.conv2d(x, w, bias, padding=1), converted, iterations, calls)
        del converted
    fastest = min(times, key=times.__getitem__)
    return fastest, times[fastest]


@contextmanager
def _cudnn(search: bool):
    backend = torch.backends.cudnn
    with backend.flags(enabled=True, benchmark=search, deterministic=False, allow_tf32=False):
        yield


def _images(shape: tuple, dtype: torch.dtype) -> Tensor:
    return _uniform(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def _uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda") * 2 - 1
