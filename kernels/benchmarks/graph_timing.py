"""Times of kernels without their launches, and the rates that they can be held against."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CACHE_MULTIPLE = 3  # rotating inputs fill the L2 cache this many times over
MAX_INPUTS = 16
# An H200 lowers its clocks when matrix products have kept it at its power limit (700 W) for some tenths of a second. A
# rest before each timing gives every row the same start, whatever was timed before it: `Captured.sustained_ms` is for
# the other state.
REST_SECONDS = 0.2
SUSTAINED_SECONDS = 0.3


def rotating_inputs(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many tensors as push each other out of the L2 cache before they come round again, at most MAX_INPUTS."""
    first = make()
    cache_bytes = torch.cuda.get_device_properties(first.device).L2_cache_size
    # Each call reads one tensor and writes another of its size.
    count = -(-CACHE_MULTIPLE * cache_bytes // (2 * first.numel() * first.element_size()))
    return [first, *(make() for _ in range(min(MAX_INPUTS, max(2, count)) - 1))]


@dataclass(frozen=True)
class Captured:
    """Calls of a function in one CUDA graph: compiled, tuned and captured, ready to be timed."""

    graph: torch.cuda.CUDAGraph
    calls: int
    # The graph reads inputs and weights: they must live as long.
    inputs: Sequence[Tensor]
    function: Callable[[Tensor], Tensor]

    def ms(self, iterations: int = 15, warmup: int = 3) -> float:
        """Median milliseconds of a call on a rested device."""
        return replay_ms(self.graph, iterations, warmup, REST_SECONDS) / self.calls

    def sustained_ms(self, iterations: int = 15) -> float:
        """Median milliseconds of a call once the device has done nothing else for `SUSTAINED_SECONDS`."""
        replays = 1e3 * SUSTAINED_SECONDS / replay_ms(self.graph, 3)
        return replay_ms(self.graph, iterations, warmup=round(replays)) / self.calls


@torch.no_grad()
def capture(function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], calls: int = 8) -> Captured:
    """A graph of at least ``calls`` calls that take the inputs in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, tunes, and fills the allocator outside the capture
        for x in [*inputs[:2], *inputs[:1]]:
            function(x)
    torch.cuda.current_stream().wait_stream(stream)
    rotation = [inputs[i % len(inputs)] for i in range(max(calls, len(inputs)))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in rotation:
            function(x)
    return Captured(graph, len(rotation), inputs, function)


def graph_ms(
    function: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    iterations: int = 15,
    calls: int = 8,
    warmup: int = 3,
    rest: float = 0.0,
) -> float:
    """Median milliseconds of a call inside one CUDA graph of at least ``calls`` calls that take the inputs in turn."""
    captured = capture(function, inputs, calls)
    return replay_ms(captured.graph, iterations, warmup, rest) / captured.calls


def replay_ms(graph: torch.cuda.CUDAGraph, iterations: int, warmup: int = 3, rest: float = 0.0) -> float:
    """Median milliseconds of a replay, after ``rest`` seconds in which the device does nothing."""
    torch.cuda.synchronize()
    time.sleep(rest)
    for _ in range(warmup):
        graph.replay()
    times = []
    for _ in range(iterations):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@cache
def matmul_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 product of normal random numbers: the tensor cores' ceiling in practice."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2e-9 * size**3 / graph_ms(lambda x: x @ b, [a], calls=4, rest=REST_SECONDS)


@cache
def copy_tbps() -> float:
    """TB/s read and written together by a copy of 1 GiB: the memory's ceiling in practice."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2e-9 * x.numel() / graph_ms(lambda source: y.copy_(source), [x], calls=4)
