"""The program under Nsight Compute: the calls of groups of the suite `counters`, each in an NVTX range of its own.

    ncu --nvtx --profile-from-start off ... python profiled_calls.py labels.json direct=float16,float32

Everything up to a call's second run, cuDNN's search too, lies outside the profiler's marks. A label, which counters.py
copies into the call's rows, is a dict of columns; labels.json gets the list of them, after an error too, and the ranges
are named by `RANGE` and the place in that list.
"""

import argparse
import copy
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

PROCESS_START = time.perf_counter()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import direct  # noqa: E402
import suites  # noqa: E402
import winograd  # noqa: E402

import convfirst_kernels  # noqa: E402
from convfirst_kernels.direct.convolution import plan_direct  # noqa: E402
from convfirst_kernels.planner import Device, plan, problems_of  # noqa: E402

RANGE = "counters."
BATCH = 128  # of blocks and of maxDNN's layers
WINOGRAD_LAYERS, WINOGRAD_BATCHES = ("4.2", "5"), (64, 1)  # others have up to hundreds of launches a call
FUSED_LAYERS = ("2.2", "4.2")
Call = tuple[dict, Callable[[], Tensor]]  # the label, and what to profile


def blocks(select: str, dtypes: Sequence[str], path: str = "", among: str = "^conv(first|next)-c") -> Iterator[Call]:
    """Residual blocks with random frozen weights, as the suite `blocks` times them."""
    for dtype in dtypes:
        for block in suites.BLOCKS:
            if not (re.search(among, block.name) and re.search(select, block.name)):
                continue
            torch_dtype = getattr(torch, dtype)
            torch.manual_seed(0)
            plain = block.build().eval().to("cuda", torch_dtype, memory_format=torch.channels_last)
            shape = (BATCH, block.channels, block.side, block.side)
            x = suites._images(shape, torch_dtype)
            fused = copy.deepcopy(plain)
            convfirst_kernels.accelerate(fused, kernels="required", frozen=True)
            (problem,) = problems_of(plain, shape, dtype)
            with convfirst_kernels.force_path(path):
                suites._check_agreement(fused, plain, x)
                variant = plan(problem, Device.of(x.device.index))["chosen"]
                label = {"block": block.name, "batch": BATCH, "dtype": dtype, "path": variant.split("_")[0]}
                yield label | {"variant": variant}, partial(fused, x)


def portable(select: str, dtypes: Sequence[str]) -> Iterator[Call]:
    return blocks(select, dtypes, "sm80", "^convfirst-c|^convnext-c(96|192)$")


def direct_forward(select: str, dtypes: Sequence[str]) -> Iterator[Call]:
    """Forward passes of AlexNet's and Overfeat's layers: ours, then cuDNN's in both layouts with its search on."""
    for dtype in dtypes:
        for layer, _ in direct.LAYERS:
            if re.search("^alexnet|^overfeat", layer.name) and re.search(select, layer.name):
                yield from _direct_layer(layer, dtype)


def _direct_layer(layer, dtype: str) -> Iterator[Call]:
    torch_dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    shape = (BATCH, layer.channels, layer.height, layer.width)
    weight_shape = (layer.filters, layer.channels, layer.kernel_size, layer.kernel_size)
    x = direct._normal(shape, torch_dtype)
    weight = direct._normal(weight_shape, torch_dtype) * (layer.channels * layer.kernel_size**2) ** -0.5
    bias = torch.randn(layer.filters, device="cuda") * 0.1
    device = torch.cuda.get_device_properties(0)
    unit = (direct.FLOAT_MACS if dtype == "float32" else direct.TENSOR_MACS)[10 * device.major + device.minor]
    label = {
        "layer": layer.name,
        "N": BATCH,
        "dtype": dtype,
        "macs": layer.macs * BATCH,
        "macs_per_clock": unit * device.multi_processor_count,
    }
    answer = plan_direct(shape, weight_shape, layer.stride, layer.padding, dtype=dtype, device="cuda")
    ours = partial(direct._ours(layer, weight, bias, None)["forward"], x)
    result = ours()
    yield label | {"side": "ours", "variant": answer["chosen"]}, ours
    for name, layout in (("nhwc", torch.channels_last), ("nchw", torch.contiguous_format)):
        images, filters = (tensor.contiguous(memory_format=layout) for tensor in (x, weight))
        theirs = partial(direct._theirs(layer, filters, bias.to(torch_dtype), None)["forward"], images)
        with direct.cudnn_searches():
            direct.check_agreement(result, theirs())
            yield label | {"side": f"cudnn-{name}"}, theirs


def winograd_forward(select: str, dtypes: Sequence[str]) -> Iterator[Call]:
    """Layers of VGG-E by our Winograd kernels, filters transformed in the call."""
    for dtype in dtypes:
        for layer in winograd.LAYERS:
            if not re.search(select, layer.name):
                continue
            for batch in WINOGRAD_BATCHES:
                for algorithm in ("f2", "f4") if dtype == "float32" else ("f2", "f2-fused"):
                    if layer.name in (FUSED_LAYERS if algorithm == "f2-fused" else WINOGRAD_LAYERS):
                        yield _winograd_layer(layer, batch, dtype, algorithm)


def _winograd_layer(layer, batch: int, dtype: str, algorithm: str) -> Call:
    reference = winograd._reference(layer, dtype)
    x = winograd._images((batch, layer.channels, layer.side, layer.side), getattr(torch, dtype))
    x[:1] = reference.image
    # Winograd's kernels of 16 bits run where their path is asked for.
    with convfirst_kernels.force_path(winograd.PATHS[algorithm]):
        call, _, plan = winograd._ours(x, reference.weight, reference.bias, algorithm.removesuffix("-fused"))
        direct.check_agreement(call(x)[:1], reference.exact)
    label = {"layer": layer.name, "N": batch, "dtype": dtype, "algorithm": algorithm, "plan": plan}

    def forced() -> Tensor:
        with convfirst_kernels.force_path(winograd.PATHS[algorithm]):
            return call(x)

    return label, forced


GROUPS = {"blocks": blocks, "portable": portable, "direct": direct_forward, "winograd": winograd_forward}


@torch.no_grad()
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("groups", nargs="+", help="group=dtype,dtype")
    parser.add_argument("--select", default="", help="regular expression over names of blocks or layers")
    options = parser.parse_args(arguments)
    labels: list[dict] = []
    failed = False
    for wanted in options.groups:
        group, _, dtypes = wanted.partition("=")
        try:
            _profile(group, GROUPS[group](options.select, dtypes.split(",")), labels)
        except Exception:  # the other groups' calls are worth their time all the same
            traceback.print_exc()
            failed = True
        options.labels.write_text(json.dumps(labels))
    sys.exit(failed)


def _profile(group: str, calls: Iterator[Call], labels: list[dict]) -> None:
    """Run each call between the profiler's marks, and append its label to ``labels``."""
    for label, call in calls:
        start = time.perf_counter()
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda.nvtx.range_push(f"{RANGE}{len(labels)}")
        call()
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_pop()
        torch.cuda.cudart().cudaProfilerStop()
        print(
            f"{time.perf_counter() - PROCESS_START:.1f} s: {time.perf_counter() - start:.2f} s for {label}", flush=True
        )
        labels.append({"group": group, **label})


if __name__ == "__main__":
    main(sys.argv[1:])
