"""A GPU's two ceilings, measured: bytes/s of its memory and FLOP/s of matrix products."""

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig

from convfirst.analysis.devices import DTYPES
from convfirst.app.results import REPOSITORY, environment, gpu_slug, write_json
from convfirst.app.timing import median_ms

log = logging.getLogger(__name__)


def measure_device(config: DictConfig) -> Path:
    """Measure what `configs/measure_device.yaml` describes; write and return the file that the analysis reads.

    The bandwidth counts bytes read and written together and is the best of three ways to move them, each of which the
    file names: a copy, an addition of a scalar and one of two tensors. The products are of normal random numbers, which
    draw more power than zeros and so run slower.

    Raises:
        ValueError: there is no CUDA device, or a dtype is unknown.
    """
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device!r}, but there is no CUDA device here")
    for dtype in config.dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes={dtype!r} is unknown; accepted: {', '.join(DTYPES)}")
    if config.output is None and device.type != "cuda":
        raise ValueError(f"device={config.device!r} has no name for a file; give output=FILE")
    ways = _bandwidths(config, device)
    products = {dtype: _rounded(_matmul_tflops(config, device, dtype)) for dtype in config.dtypes}
    here = environment()
    measured = {
        "bandwidth_tbps": max(ways.values()),
        "tflops": products,
        "source": f"scripts/measure_device.py on one {here['device']}, {here['date']}, PyTorch {torch.__version__}",
    }
    path = REPOSITORY / (config.output or f"results/device-{gpu_slug()}.json")
    options = {"bytes": config.bytes, "size": config.size, "bandwidths_tbps": ways}
    write_json(path, {"suite": "device", **here, "measured": measured, "options": options})
    log.info("%s: %.3g TB/s, TFLOP/s %s; wrote %s", here["device"], measured["bandwidth_tbps"], products, path)
    return path


def _bandwidths(config: DictConfig, device: torch.device) -> dict[str, float]:
    """TB/s, read and written together, of ways to move float32 tensors of ``config.bytes``."""
    x = torch.randn(config.bytes // 4, device=device)
    y = torch.empty_like(x)
    ways = {
        "copy": (2, lambda source: y.copy_(source)),
        "add a scalar": (2, lambda source: torch.add(source, 1.0, out=y)),
        "add a tensor": (3, lambda source: torch.add(source, y, out=y)),
    }
    return {
        name: _rounded(1e-9 * tensors * x.numel() * 4 / median_ms(move, [x], config.warmup, config.iterations))
        for name, (tensors, move) in ways.items()
    }


def _matmul_tflops(config: DictConfig, device: torch.device, dtype: str) -> float:
    """TFLOP/s of a product of square matrices; "tfloat32" is float32 data on tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tfloat32" else "highest")
    try:
        data = torch.float32 if dtype == "tfloat32" else getattr(torch, dtype)
        a, b = (torch.randn(config.size, config.size, device=device, dtype=data) for _ in range(2))
        ms = median_ms(lambda x: x @ b, [a], config.warmup, config.iterations)
        return 2e-9 * config.size**3 / ms
    finally:
        torch.set_float32_matmul_precision(before)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
