"""Latency of a compiled network and the kernels of one replay of its graph: start, duration and name, in microseconds.

python kernels/benchmarks/profile_network.py --model convfirst_tiny --batch 1
python kernels/benchmarks/profile_network.py --blocks            # each block a launch of its own, for comparison
"""

import argparse
import sys
from pathlib import Path

import timm
import torch

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

import convfirst.models  # noqa: E402, F401
from graph_timing import replay_ms  # noqa: E402

import convfirst_kernels  # noqa: E402
from convfirst_kernels import acceleration  # noqa: E402


def kernels_of(graph: torch.cuda.CUDAGraph, replays: int = 5) -> list[tuple[float, float, str]]:
    """(start, duration, name) of each kernel of the last of some replays; kernels overlap where launches do."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    found = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ranges = sorted((event.time_range.start, event.time_range.end, event.name) for event in found)
    last = ranges[-(len(ranges) // replays) :]
    return [(start - last[0][0], end - start, name) for start, end, name in last]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convfirst_tiny")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--outside", default="inductor", help="inductor or eager")
    parser.add_argument("--blocks", action="store_true", help="no stage in one launch")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this needs one")
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval().to("cuda", dtype)
    x = torch.randn(options.batch, 3, options.image_size, options.image_size, device="cuda", dtype=dtype)
    if options.blocks:
        acceleration.StageForward.covers = lambda self, x, halved: False
    fast = convfirst_kernels.compile_for_inference(model, x, outside=options.outside)
    graph = fast.graph(options.batch)
    print(f"{options.model} batch {options.batch} on {torch.cuda.get_device_name()}: {replay_ms(graph, 50):.4f} ms")
    for start, duration, name in kernels_of(graph):
        print(f"{start:8.2f} +{duration:7.2f}  {name[:90]}")


if __name__ == "__main__":
    main(sys.argv[1:])
