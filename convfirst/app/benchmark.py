"""Benchmarks: `benchmark(config)` runs the suite that the config names and writes its rows as JSON."""

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import timm
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from convfirst.analysis.trace import meta_model
from convfirst.app.data_loading import data_loading
from convfirst.app.kernels import accelerate, check_kernels
from convfirst.app.kernels_agreement import kernels_agreement, runs_made
from convfirst.app.results import REPOSITORY, environment, gpu_slug, kept_rows, write_results
from convfirst.app.timing import captured, median_ms
from convfirst.app.training_step import training_step
from convfirst.app.training_throughput import training_throughput
from convfirst.training.flops import forward_flops

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODES = ("eager", "eager+graph", "inductor", "inductor+graph")
# Suites whose result files name the GPU.
PER_GPU = ("blocks", "models", "winograd", "direct", "counters", "training", "throughput", "latency")
# Suites that go on from the rows that append=true keeps: what tells which of a file's rows these are.
RESUMED: Mapping[str, Callable[[DictConfig, Path], list[dict]]] = {"kernels_agreement": runs_made}


def benchmark(config: DictConfig) -> list[dict]:
    """Run the suite ``config.suite``, print its rows, write them to ``config.output`` and return them.

    Without an output the file is results/<suite>.json, with hyphens for underscores; those of `PER_GPU` add the GPU:
    results/blocks-h100.json.

    Raises:
        ValueError: the suite or one of its options is unknown; the message names what is accepted. Or append=true, and
            the output has rows of another device, commit or other versions.
    """
    if config.suite not in SUITES:
        raise ValueError(f"suite={config.suite!r} is unknown; accepted: {', '.join(SUITES)}")
    gpu = f"-{gpu_slug()}" if config.suite in PER_GPU and torch.cuda.is_available() else ""
    output = REPOSITORY / Path(config.output or f"results/{config.suite.replace('_', '-')}{gpu}.json")
    here = environment()  # a commit made while a suite measures is not the one that it measures
    kept: list[dict] = []
    if config.append:
        resumed = RESUMED.get(config.suite)
        kept = kept_rows(output, here) if resumed is None else resumed(config, output)
    rows: list[dict] = []
    written = None
    try:
        for row in SUITES[config.suite](config):
            rows.append(row)
            # Row by row: what was measured before an error, or before the process is killed, isn't lost.
            written = write_results(output, config.suite, kept + rows, here)
    finally:
        if rows:
            print_rows(config.suite, rows)
        if written:
            log.info("wrote %s", written)
    return rows


def throughput(config: DictConfig) -> Iterator[dict]:
    """Images/s of inference with calls queued up: one row for each model, mode and batch size."""
    return _inference(config, config.throughput, synchronize=False)


def latency(config: DictConfig) -> Iterator[dict]:
    """Time of one forward pass on an idle device, launching included: one row for each model, mode and batch size."""
    return _inference(config, config.latency, synchronize=True)


def cost(config: DictConfig) -> list[dict]:
    """Multiply-accumulates of convolutions and matrix products for one image, and parameters, of each model."""
    rows = []
    for name in config.cost.models:
        gmacs, mparams = _cost(meta_model(name), config.image_size)
        rows.append({"name": name, "image_size": config.image_size, "gmacs": gmacs, "mparams": mparams})
    return rows


def blocks(config: DictConfig) -> Iterator[dict]:
    """Fused residual blocks against the same modules under Inductor: one row for each block, dtype and batch size."""
    return _kernel_suite("blocks")(**config.blocks)


def networks(config: DictConfig) -> Iterator[dict]:
    """Networks with fused blocks against themselves and their counterparts under Inductor, both in CUDA graphs."""
    return _kernel_suite("models")(**config.networks)


def winograd(config: DictConfig) -> Iterator[dict]:
    """Winograd's convolution on VGG-E's layers against cuDNN: a row for each layer, batch size, dtype and algorithm."""
    return _kernel_suite("winograd")(**config.winograd)


def direct(config: DictConfig) -> Iterator[dict]:
    """Direct convolution of maxDNN's and VGG-E's layers against cuDNN, and its gradients."""
    return _kernel_suite("direct")(**config.direct)


def counters(config: DictConfig) -> Iterator[dict]:
    """Hardware counters of the kernels' launches, and maxDNN's computational efficiency; needs Nsight Compute."""
    return _kernel_suite("counters")(**config.counters)


def _kernel_suite(name: str) -> Callable[..., Iterator[dict]]:
    """A suite that the kernel package keeps beside its tests."""
    if not torch.cuda.is_available():
        raise ValueError(f"suite={name} times CUDA kernels, but there is no CUDA device here")
    folder = str(REPOSITORY / "kernels/benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("suites").SUITES[name]


def _cost(model: nn.Module, image_size: int) -> tuple[float, float]:
    macs = forward_flops(model, 3, image_size) / 2
    return round(macs / 1e9, 3), round(sum(p.numel() for p in model.parameters()) / 1e6, 3)


def _inference(config: DictConfig, suite: DictConfig, synchronize: bool) -> Iterator[dict]:
    _check("dtype", config.dtype, DTYPES)
    check_kernels(config.kernels)
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device!r}, but there is no CUDA device here; use device=cpu")
    for name in config.models:
        for mode in suite.modes:
            _check("modes", mode, MODES)
            for batch in suite.batches:
                log.info("%s, %s, batch %d", name, mode, batch)
                yield _measure(config, name, mode, batch, synchronize)
                torch.compiler.reset()


@torch.no_grad()
def _measure(config: DictConfig, name: str, mode: str, batch: int, synchronize: bool) -> dict:
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    compiler, _, graph = mode.partition("+")
    if graph and device.type != "cuda":
        raise ValueError(f"modes={mode!r} needs a CUDA device, but device={config.device!r}")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.reset_peak_memory_stats()
    model = timm.create_model(name).eval().to(device, dtype, memory_format=memory_format)
    gmacs, mparams = _cost(model, config.image_size)
    accelerate([model], device, config.kernels)
    shape = (batch, 3, config.image_size, config.image_size)
    inputs = [
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format) for _ in range(config.inputs)
    ]
    run: Callable[[Tensor], Tensor] = torch.compile(model) if compiler == "inductor" else model
    if graph:
        run = captured(run, inputs)
    ms = median_ms(run, inputs, config.warmup, config.iterations, synchronize)
    return {
        "name": name,
        "batch": batch,
        "dtype": config.dtype,
        "path": mode,
        "kernels": config.kernels,
        "channels_last": config.channels_last,
        "image_size": config.image_size,
        "ms": round(ms, 4),
        "images_per_s": round(1e3 * batch / ms, 1),
        "gmacs": gmacs,
        "mparams": mparams,
        "tflops": round(2 * gmacs * batch / ms, 2),
        "peak_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else None,
    }


def _check(option: str, value: str, accepted) -> None:
    if value not in accepted:
        raise ValueError(f"{option}={value!r} is unknown; accepted: {', '.join(accepted)}")


def print_rows(suite: str, rows: list[dict]) -> None:
    """One table of what differs between the rows, above a line of what doesn't; curves are left to the file."""
    columns = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list)))
    same = [key for key in columns if len(rows) > 1 and len({str(row.get(key)) for row in rows}) == 1]
    table = Table(title=suite, caption=", ".join(f"{key}={rows[0].get(key)}" for key in same))
    shown = [key for key in columns if key not in same]
    for column in shown:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in shown))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


# What suite=... may name. A suite takes the configuration and gives rows of plain values as it measures them.
SUITES: Mapping[str, Callable[[DictConfig], Iterable[dict]]] = {
    "throughput": throughput,
    "latency": latency,
    "cost": cost,
    "training_throughput": training_throughput,
    "blocks": blocks,
    "models": networks,
    "winograd": winograd,
    "direct": direct,
    "counters": counters,
    "training": training_step,
    "kernels_agreement": kernels_agreement,
    "data_loading": data_loading,
}
