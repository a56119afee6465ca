"""Benchmark suites: fused blocks, and networks with fused blocks, against Inductor in the same run.

Every suite yields its rows as it measures them: {name, batch, dtype, path, ours_ms, peer, peer_ms, speedup, tflops,
ceiling_tflops, efficiency} and a few columns more. Those of direct, grouped and winograd are in files of their names.
Both sides run in channels_last inside CUDA graphs on rotating inputs; times are medians, each taken on a rested device.
sustained_ms and peer_sustained_ms are the same after 0.3 s of that work alone, when the clocks have fallen to what the
power limit allows.
`SUITES` names them; `python kernels/benchmarks/run.py` runs them.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import convfirst.models  # noqa: F401  registers ConvFirst with timm
import timm
import torch
from counters import counters
from direct import direct
from graph_timing import Captured, capture, copy_tbps, matmul_tflops, rotating_inputs
from grouped import GROUPED, grouped
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from turns import measured
from winograd import winograd

import convfirst_kernels
from convfirst_kernels.block import pack_conv_weight, pack_matrix, pack_vector
from convfirst_kernels.planner import Device, MBConvProblem, Problem, plan, problems_of

# Peers: a mode of torch.compile, or none.
PEERS = {"inductor": None, "inductor-max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True)
class Block:
    """One residual block of a network, at its resolution for 224 x 224 images."""

    name: str
    channels: int
    side: int

    def build(self) -> nn.Module:
        if self.name.startswith("convfirst"):
            norm = "batchnorm" if "batchnorm" in self.name else "layernorm"
            return convfirst.models.ConvFirstBlock(self.channels, norm=norm, layer_scale=0.5)
        return timm.models.convnext.ConvNeXtBlock(self.channels, ls_init_value=0.5)


BLOCKS = [
    *(Block(f"convfirst-c{c}", c, side) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(Block(f"convnext-c{c}", c, side) for c, side in ((96, 56), (192, 28), (384, 14), (768, 7))),
    *(Block(f"convfirst-batchnorm-c{c}", c, side) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
]


@dataclass(frozen=True)
class MBConvShape:
    """An MBConv block of stride 1 with folded norms, at its resolution for 224 x 224 images."""

    name: str
    channels: int
    side: int
    hidden: int
    group_width: int

    def build(self) -> nn.Module:
        return MBConv(self.channels, self.hidden, self.group_width)


class MBConv(nn.Module):
    """The plain block: 1x1, grouped 3x3, 1x1, SiLU between them, and the residual."""

    def __init__(self, channels: int, hidden: int, group_width: int):
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden // group_width)
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        return x + self.project(silu(self.conv(silu(self.expand(x)))))


# Widths and resolutions of EfficientNet-B0's stages, all with 3x3 filters; then groups of 8 at ConvFirst-T's.
MBCONVS = [
    *(
        MBConvShape(f"mbconv-c{c}", c, side, 6 * c, 1)
        for c, side in ((24, 56), (40, 28), (80, 14), (112, 14), (192, 7))
    ),
    *(MBConvShape(f"mbconv-grouped-c{c}", c, side, 4 * c, 8) for c, side in ((64, 56), (128, 28), (256, 14))),
]

# Networks, each with the other network that it is also held against.
MODELS = {
    "convfirst_nano": None,
    "convfirst_tiny": "convnext_tiny",
    "convfirst_small": "convnext_small",
    "convfirst_base": "convnext_base",
    "convnext_tiny": None,
    "convnext_small": None,
    "convnext_base": None,
    "resnet50": None,
    "vgg19": None,
}
# How they are created: branches that count, where training starts without them.
MODEL_OPTIONS = {"resnet50": {"zero_init_last": False}, "vgg19": {}}

# The order of results.
NAMES = [*(shape.name for shapes in (BLOCKS, MBCONVS, GROUPED) for shape in shapes), *MODELS]


def blocks(
    select: str = "^conv(first|next)-c",
    dtypes: Sequence[str] = ("float16",),
    batches: Sequence[int] = (128,),
    peer: str | None = "inductor",
    reuse: str | None = None,
    path: str = "",
    iterations: int = 15,
    turn: str | None = None,
) -> Iterator[dict]:
    """One fused block against the same plain modules compiled by Inductor.

    Args:
        select: regular expression that picks from BLOCKS by name; the default leaves out batch norm.
        dtypes: "float16", "bfloat16".
        batches: images in a batch.
        peer: "inductor", "inductor-max-autotune", or None to time ours alone, which needs no compilation.
        reuse: a result file whose peer times to take, instead of timing peers again; its rows say so.
        path: restricts the planner to a path or variant.
        turn: a file by which processes that share the GPU take turns; see `turns.measured`.
    """
    chosen = [block for block in BLOCKS if re.search(select, block.name)]
    if not chosen:
        raise ValueError(f"select={select!r} matches none of {', '.join(block.name for block in BLOCKS)}")
    torch.backends.cudnn.benchmark = True  # cuDNN's fastest, under Inductor too
    known = _peer_times(reuse)
    jobs = (
        _block_row(block, dtype, batch, peer, known, path, iterations)
        for dtype in dtypes
        for block in chosen
        for batch in batches
    )
    yield from measured(jobs, turn)


@torch.no_grad()
def _block_row(
    block: Block, dtype: str, batch: int, peer: str | None, known: dict, path: str, iterations: int
) -> Iterator[dict | None]:
    torch_dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    plain = block.build().eval().to("cuda", torch_dtype, memory_format=torch.channels_last)
    shape = (batch, block.channels, block.side, block.side)
    inputs = rotating_inputs(lambda: _images(shape, torch_dtype))
    fused = copy.deepcopy(plain)
    convfirst_kernels.accelerate(fused, kernels="required", frozen=True)
    (problem,) = problems_of(plain, shape, dtype)
    with convfirst_kernels.force_path(path):
        _check_agreement(fused, plain, inputs[0])
        variant = plan(problem, Device.of(inputs[0].device.index))["chosen"]
        graph = capture(fused, inputs)
    time_peer, peer = _prepare_peer(plain, inputs, peer, known.get((block.name, batch, dtype)))
    yield None
    ours, theirs = _times(graph, iterations), time_peer(iterations)
    flops = _block_flops(problem)
    traffic = 2 * inputs[0].numel() * inputs[0].element_size()
    ceiling = matmul_tflops(torch_dtype)
    row = {
        **_row(block.name, batch, dtype, variant.split("_")[0], ours, peer, theirs, flops, ceiling),
        "variant": variant,
        "floor_tensor_ms": round(1e-9 * flops / ceiling, 5),
        "floor_memory_ms": round(1e-9 * traffic / copy_tbps(), 5),
        "copy_tbps": round(copy_tbps(), 3),
    }
    yield _printed(row)


def mbconv(
    select: str = "",
    dtypes: Sequence[str] = ("float16",),
    batches: Sequence[int] = (128,),
    peer: str | None = "inductor",
    reuse: str | None = None,
    path: str = "sm80",
    iterations: int = 15,
    turn: str | None = None,
) -> Iterator[dict]:
    """One fused MBConv block against the same plain modules compiled by Inductor; arguments as of `blocks`."""
    chosen = [shape for shape in MBCONVS if re.search(select, shape.name)]
    if not chosen:
        raise ValueError(f"select={select!r} matches none of {', '.join(shape.name for shape in MBCONVS)}")
    known = _peer_times(reuse)
    jobs = (
        _mbconv_row(shape, dtype, batch, peer, known, path, iterations)
        for dtype in dtypes
        for shape in chosen
        for batch in batches
    )
    yield from measured(jobs, turn)


@torch.no_grad()
def _mbconv_row(
    shape: MBConvShape, dtype: str, batch: int, peer: str | None, known: dict, path: str, iterations: int
) -> Iterator[dict | None]:
    torch_dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    plain = shape.build().eval().to("cuda", torch_dtype, memory_format=torch.channels_last)
    inputs = rotating_inputs(lambda: _images((batch, shape.channels, shape.side, shape.side), torch_dtype))
    weights = (
        pack_matrix(plain.expand.weight, torch_dtype), pack_vector(plain.expand.bias),
        pack_conv_weight(plain.conv.weight, torch_dtype), pack_vector(plain.conv.bias),
        pack_matrix(plain.project.weight, torch_dtype), pack_vector(plain.project.bias),
    )  # fmt: skip

    def fused(x: Tensor) -> Tensor:
        return torch.ops.convfirst.mbconv_block(x, *weights, None, shape.group_width, "silu")

    size = batch, shape.side, shape.side, shape.channels, shape.hidden, shape.group_width
    problem = MBConvProblem(*size, dtype, "silu")
    with convfirst_kernels.force_path(path):
        _check_agreement(fused, plain, inputs[0])
        variant = plan(problem, Device.of(inputs[0].device.index))["chosen"]
        graph = capture(fused, inputs)
    time_peer, peer = _prepare_peer(plain, inputs, peer, known.get((shape.name, batch, dtype)))
    yield None
    ours, theirs = _times(graph, iterations), time_peer(iterations)
    flops = 2 * batch * shape.side**2 * shape.hidden * (2 * shape.channels + 9 * shape.group_width)
    row = _row(shape.name, batch, dtype, variant.split("_")[0], ours, peer, theirs, flops, matmul_tflops(torch_dtype))
    yield _printed({**row, "variant": variant})


def models(
    select: str = "^convfirst_tiny$|^convnext_tiny$",
    dtypes: Sequence[str] = ("float16",),
    batches: Sequence[int] = (128,),
    peer: str | None = "inductor",
    reuse: str | None = None,
    path: str = "",
    iterations: int = 15,
    compiled: bool = True,
    image_size: int = 224,
    turn: str | None = None,
) -> Iterator[dict]:
    """Whole networks: accelerated, in a CUDA graph, against the plain network and its counterpart in Inductor.

    VGG and ResNet, which have no residual blocks of ours, run their 3x3 convolutions on the kernels for those; in
    float32 both sides are without TF32.

    Arguments as of `blocks`, and ``compiled``: what lies outside the blocks goes through Inductor on our side too.
    Rows have ``images_per_s``, and ``peak_mib`` and ``peer_peak_mib``, memory beyond weights and inputs, and its ratio.
    """
    chosen = [name for name in MODELS if re.search(select, name)]
    if not chosen:
        raise ValueError(f"select={select!r} matches none of {', '.join(MODELS)}")
    known = _peer_times(reuse)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True  # cuDNN's fastest, on both sides
    peers: dict[tuple, tuple] = {}
    jobs = (
        _model_rows(name, dtype, batch, peer, known, path, iterations, compiled, image_size, peers)
        for dtype in dtypes
        for batch in batches
        for name in chosen
    )
    yield from measured(jobs, turn)


@torch.no_grad()
def _model_rows(
    name, dtype, batch, peer, known, path, iterations, compiled, image_size, peers
) -> Iterator[dict | None]:
    torch_dtype = getattr(torch, dtype)
    inputs = [_images((batch, 3, image_size, image_size), torch_dtype) for _ in range(2)]

    def prepare_peer(other: str) -> tuple:
        """(function that times it, its name), and its memory; once for all networks that are held against it."""
        key = other, dtype, batch
        if key not in peers:
            network, reused = _network(other, torch_dtype), known.get(key)
            peers[key] = _with_peak(lambda: _prepare_peer(network, inputs, peer, reused, calls=2))
        return peers[key]

    network = _network(name, torch_dtype)
    problem = next(iter(problems_of(network, (batch, 3, image_size, image_size), dtype)), None)
    fused = copy.deepcopy(network)
    kernels = "auto" if problem is None else "required"  # which is about blocks
    convfirst_kernels.accelerate(fused, kernels=kernels, frozen=True, whole_stages=True)
    with convfirst_kernels.force_path(path):
        _check_agreement(fused, network, inputs[0])
        device = Device.of(inputs[0].device.index)
        label = "convolutions" if problem is None else plan(problem, device)["chosen"].split("_")[0]
        function = torch.compile(fused, dynamic=False) if compiled else fused
        graph, peak = _with_peak(lambda: capture(function, inputs, calls=2))
    flops = _network_flops(name, batch, image_size)
    others = {other: prepare_peer(other) for other in filter(None, (name, MODELS[name] if peer else None))}
    yield None
    ours = _times(graph, iterations)
    for other, ((time_peer, peer_name), peer_peak) in others.items():
        peer_label, theirs = peer_name and f"{other} {peer_name}", time_peer(iterations)
        row = _row(name, batch, dtype, label, ours, peer_label, theirs, flops, matmul_tflops(torch_dtype))
        row |= {
            "images_per_s": round(1e3 * batch / ours.ms, 1),
            "outside_blocks": "inductor" if compiled else "eager",
            "peak_mib": peak,
            "peer_peak_mib": peer_peak,
            "memory_ratio": round(peak / peer_peak, 3) if peer_peak else None,
        }
        yield _printed(row)


def _printed(row: dict) -> dict:
    print(json.dumps(row), flush=True)
    return row


class Times(NamedTuple):
    """Milliseconds of a call, on a rested device and after 0.3 s of such calls."""

    ms: float | None = None
    sustained_ms: float | None = None


def _times(graph: Captured, iterations: int) -> Times:
    return Times(graph.ms(iterations), graph.sustained_ms(iterations))


def _row(name, batch, dtype, path, ours: Times, peer, theirs: Times, flops, ceiling) -> dict:
    tflops = 1e-9 * flops / ours.ms
    return {
        "name": name,
        "batch": batch,
        "dtype": dtype,
        "path": path,
        "ours_ms": round(ours.ms, 5),
        "peer": peer,
        "peer_ms": theirs.ms and round(theirs.ms, 5),
        "speedup": theirs.ms and round(theirs.ms / ours.ms, 3),
        "sustained_ms": round(ours.sustained_ms, 5),
        "peer_sustained_ms": theirs.sustained_ms and round(theirs.sustained_ms, 5),
        "tflops": round(tflops, 1),
        "ceiling_tflops": round(ceiling, 1),
        "efficiency": round(tflops / ceiling, 4),
    }


def _prepare_peer(
    plain: nn.Module, inputs: list[Tensor], peer: str | None, reused: float | None, calls: int = 8
) -> tuple[Callable[[int], Times], str | None]:
    """What times the peer, given a number of iterations, and its name."""
    if reused is not None:
        return lambda iterations: Times(reused), f"{peer or 'inductor'} (reused)"
    if peer is None:
        return lambda iterations: Times(), None
    if peer not in PEERS:
        raise ValueError(f"peer={peer!r}; accepted: {', '.join(PEERS)} or none")
    compiled = torch.compile(plain, mode=PEERS[peer], dynamic=False)
    graph = capture(compiled, inputs, calls)
    return cache(lambda iterations: _times(graph, iterations)), peer


def _peer_times(file: str | None) -> dict[tuple, float]:
    """Peer times of an earlier result on the same device, by (name, batch, dtype)."""
    if file is None:
        return {}
    before = json.loads(Path(file).read_text())
    if before["device"] != torch.cuda.get_device_name():
        raise ValueError(f"{file} was measured on {before['device']}, this is {torch.cuda.get_device_name()}")
    times = {}
    for row in before["rows"]:
        # A network's peer is named "network compiler", a block's by its compiler alone.
        name = row["peer"].split()[0] if row["peer"] and row["name"] in MODELS else row["name"]
        if row["peer_ms"]:
            times[name, row["batch"], row["dtype"]] = row["peer_ms"]
    return times


def _check_agreement(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """A benchmark of wrong results is worth nothing: a coarse comparison (the tests have the fine one)."""
    x = x[: min(len(x), 16)]
    ours, theirs = fused(x).float(), plain(x).float()
    difference, scale = (ours - theirs).abs().max(), theirs.abs().max()
    if not difference <= 0.03 * scale:
        raise RuntimeError(f"fused and plain results differ by {difference:.3g} at a magnitude of {scale:.3g}")


def _with_peak(function: Callable) -> tuple:
    """The function's result, and MiB of device memory that it used on top of what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    return result, round((torch.cuda.max_memory_allocated() - before) / 2**20)


def _images(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype, memory_format=torch.channels_last)


def _network(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    options = MODEL_OPTIONS.get(name, {"ls_init_value": 0.5})
    return timm.create_model(name, **options).eval().to("cuda", dtype, memory_format=torch.channels_last)


def _block_flops(p: Problem) -> int:
    macs = p.kernel_size**2 * p.group_width * p.channels + 2 * p.channels * p.hidden
    return 2 * p.batch * p.height * p.width * macs


def _network_flops(name: str, batch: int, image_size: int) -> int:
    model = timm.create_model(name).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return batch * counter.get_total_flops()


SUITES: dict[str, Callable[..., list[dict]]] = {
    "blocks": blocks,
    "counters": counters,
    "direct": direct,
    "grouped": grouped,
    "mbconv": mbconv,
    "models": models,
    "winograd": winograd,
}
