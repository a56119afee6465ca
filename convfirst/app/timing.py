"""Timing of a function on a device."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def median_ms(
    function: Callable[[Tensor], object],
    inputs: Sequence[Tensor],
    warmup: int = 10,
    iterations: int = 50,
    synchronize: bool = False,
) -> float:
    """Median time of one call in milliseconds, over ``iterations`` calls that take the inputs in turn.

    On CUDA a pair of events around each call does the timing. With ``synchronize`` the device is idle before each
    call, so that the time of launching counts (latency); without it calls queue up (throughput).
    """
    for i in range(warmup):
        function(inputs[i % len(inputs)])
    rotation = [inputs[i % len(inputs)] for i in range(iterations)]
    timer = _cuda_times if inputs[0].is_cuda else _cpu_times
    return statistics.median(timer(function, rotation, synchronize))


def _cuda_times(function: Callable, rotation: Sequence[Tensor], synchronize: bool) -> list[float]:
    events = []
    torch.cuda.synchronize()
    for x in rotation:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(x)
        end.record()
        events.append((start, end))
        if synchronize:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _cpu_times(function: Callable, rotation: Sequence[Tensor], synchronize: bool) -> list[float]:
    times = []
    for x in rotation:
        start = time.perf_counter()
        function(x)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def captured(function: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], warmup: int = 3) -> Callable:
    """``function`` as CUDA graphs, one for each of ``inputs``; the result takes those tensors and no others."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, tunes and fills the allocator outside the capture
        for x in [*inputs] * warmup:
            function(x)
    torch.cuda.current_stream().wait_stream(side)
    graphs = {}
    pool = torch.cuda.graph_pool_handle()
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = function(x)
        graphs[x.data_ptr()] = (graph, output)

    def replay(x: Tensor) -> Tensor:
        graph, output = graphs[x.data_ptr()]
        graph.replay()
        return output

    return replay
