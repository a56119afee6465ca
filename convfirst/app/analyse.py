"""A model's blocks, layers or kernels against a device's ceilings, as a table."""

import sys
from pathlib import Path

import timm
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

import convfirst.models  # noqa: F401  registers ConvFirst with timm
from convfirst.analysis.devices import DTYPES, load_device
from convfirst.analysis.kernels import PARTITIONS, blocks, kernels, layers
from convfirst.analysis.plots import draw_waterline
from convfirst.analysis.trace import meta_model, trace
from convfirst.analysis.waterline import Waterline
from convfirst.app.report import shown
from convfirst.app.results import REPOSITORY


def analyse(config: DictConfig) -> dict[str, Waterline]:
    """Print what `configs/analyse.yaml` describes; return the waterline of each way to run the kernels.

    Raises:
        ValueError: the model, the device, its dtype or what to show is unknown.
    """
    accepted = ("blocks", "layers", *PARTITIONS)
    if config.show not in accepted:
        raise ValueError(f"show={config.show!r} is unknown; accepted: {', '.join(accepted)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r} is unknown; accepted: {', '.join(DTYPES)}")
    if not timm.is_model(config.timm_model):
        raise ValueError(f"timm_model={config.timm_model!r} is unknown to timm")
    ceilings = load_device(config.device, REPOSITORY / "results").ceilings(config.dtype, config.ceilings)
    model = meta_model(config.timm_model)
    dtype = torch.float32 if config.dtype == "tfloat32" else getattr(torch, config.dtype)
    traced = trace(model, config.batch, config.image_size, dtype)
    sequences = {name: Waterline(kernels(traced, name), ceilings) for name in PARTITIONS}
    parts = {"blocks": blocks, "layers": layers}
    line = Waterline(parts[config.show](traced), ceilings) if config.show in parts else sequences[config.show]
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_kernel_table(config, line), _sequence_table(config, sequences))
    console.print(f"Waterline {ceilings.waterline:.0f} FLOP/byte. Ceilings ({ceilings.kind}): {ceilings.source}.")
    if config.picture is not None:
        title = f"{config.timm_model}, batch {config.batch}, {config.dtype}, on {config.device} ({ceilings.kind})"
        draw_waterline({name.replace("_", " "): line for name, line in sequences.items()}, title, Path(config.picture))
    return sequences


def _kernel_table(config: DictConfig, line: Waterline) -> Table:
    headings = ("", "MMACs an image", "MB", "of them weights", "FLOP/byte", "least µs", "bound by")
    table = Table(*headings, title=f"{config.timm_model}: {config.show}, each as one kernel")
    for time in line.times:
        kernel, binds = time.kernel, "memory" if time.under_water else "arithmetic"
        work = (kernel.macs / config.batch / 1e6, kernel.bytes / 1e6, kernel.weight_bytes / 1e6, kernel.intensity)
        table.add_row(kernel.name, *(shown(value) for value in (*work, 1e6 * time.attainable_s)), binds)
    return table


def _sequence_table(config: DictConfig, sequences: dict[str, Waterline]) -> Table:
    headings = ("sequence", "kernels", "under water", "share of time", "least ms", "attainable efficiency")
    table = Table(*headings, title=f"{config.timm_model}: kernel sequences on {config.device}")
    for name, line in sequences.items():
        counts = (len(line.kernels), len(line.under_water), line.share_under_water)
        table.add_row(name, *(shown(value) for value in (*counts, 1e3 * line.latency_s, line.efficiency)))
    return table
