"""A training loop in plain PyTorch, which the framework's speed is held against.

Same model, batch, precision, compilation, kernels and optimiser as the trainer is given; random images that stay on the
device; no EMA, no logging, no augmentation. Run by ``torchrun`` on several GPUs; prints one line of JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import timm
import torch
import torch._inductor.config
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn

import convfirst  # noqa: F401  registers its models
from convfirst.app.kernels import accelerate_training

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def bare_loop(
    model: str,
    model_kwargs: dict,
    batch: int,
    image_size: int = 224,
    precision: str = "bf16-mixed",
    compile: bool = True,
    channels_last: bool = True,
    optimizer: dict | None = None,
    steps: int = 100,
    warmup_steps: int = 30,
    interval: int = 10,
    kernels: str = "off",
    graph: bool = False,
) -> dict:
    """Train for ``warmup_steps + steps`` updates and time them, the warm-up left out.

    Uses the current CUDA device, or the CPU where there is none; wraps the model in DDP if a process group is there.
    With ``graph`` an update, from the forward pass to the new weights, is one CUDA graph; its optimiser must be
    ``capturable``.

    Returns:
        images_per_s of all processes and ms of an update, medians over intervals of updates; peak_memory_gib of this
        process while it trains: weights, optimiser, images, activations; None on a CPU.

    Raises:
        ValueError: ``graph`` with float16, whose loss scale is judged on the host, or with several processes.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    network = timm.create_model(model, **model_kwargs).to(device, memory_format=memory_format).train()
    images = torch.randn(batch, 3, image_size, image_size, device=device).to(memory_format=memory_format)
    labels = torch.randint(network.num_classes, (batch,), device=device)
    update = create_optimizer_v2(network, **(optimizer or {"opt": "adamw", "lr": 1e-3}))
    accelerate_training([network], device, kernels, precision)
    if compile:
        torch._inductor.config.autotune_local_cache = False  # tuned here and now, not beside other processes
        network.compile()
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes > 1:
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    dtype = _AUTOCAST[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")
    if graph and (scaler.is_enabled() or processes > 1):
        raise ValueError(f"graph=True with precision={precision} and {processes} processes is not supported")

    def step() -> None:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            loss = nn.functional.cross_entropy(network(images).float(), labels)
        update.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(update)
        scaler.update()

    run = _captured(step, update, warmup_steps) if graph else _warmed_up(step, warmup_steps)
    seconds = []
    for _ in range(max(1, steps // interval)):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(interval):
            run()
        _synchronize(device)
        seconds.append((time.perf_counter() - start) / interval)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    speed = processes * batch / statistics.median(seconds)
    return {"images_per_s": speed, "ms": 1e3 * statistics.median(seconds), "peak_memory_gib": peak}


def _warmed_up(step: Callable[[], None], steps: int) -> Callable[[], None]:
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # compiling and tuning needed memory of their own
    return step


def _captured(step: Callable[[], None], update: torch.optim.Optimizer, steps: int) -> Callable[[], None]:
    """``step`` as a CUDA graph, captured after ``steps`` ordinary ones; its gradients live in the graph's memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _warmed_up(step, max(3, steps))
    torch.cuda.current_stream().wait_stream(side)
    update.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()  # replays allocate nothing: what the capture takes is the peak
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arguments", type=json.loads, help="keyword arguments of bare_loop as JSON")
    arguments = parser.parse_args().arguments
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.set_float32_matmul_precision("high")
    result = bare_loop(**arguments)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
