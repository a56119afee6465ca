"""A model's blocks, layers or kernels against a device's ceilings, as a table."""

import sys
from pathlib import Path

import timm
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

import convfirst.models  # noqa: F401  registers ConvFirst with timm
from convfirst.analysis.devices import DTYPES, dtype_name, load_device
from convfirst.analysis.kernels import PARTITIONS, Kernel, blocks, kernels, layers
from convfirst.analysis.plots import draw_waterline
from convfirst.analysis.trace import Trace, meta_model, trace
from convfirst.analysis.waterline import KernelTime, Waterline
from convfirst.app.report import shown
from convfirst.app.results import REPOSITORY

_DEPTH = (
    "Depth: the waterline over FLOP/byte, how many times longer the memory takes than the arithmetic; above 1 a kernel "
    "is under water, inf without multiply-adds. Lost: what the least time has beyond the arithmetic's."
)


def analyse(config: DictConfig) -> dict[str, Waterline]:
    """Print what `configs/analyse.yaml` describes; return the waterline of each way to run the kernels.

    Raises:
        ValueError: the model, the device, its dtype or what to show is unknown, or the model can't be traced.
    """
    accepted = ("blocks", "layers", *PARTITIONS)
    if config.show not in accepted:
        raise ValueError(f"show={config.show!r} is unknown; accepted: {', '.join(accepted)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype!r} is unknown; accepted: {', '.join(DTYPES)}")
    if not timm.is_model(config.timm_model):
        raise ValueError(f"timm_model={config.timm_model!r} is unknown to timm")
    device = load_device(config.device, REPOSITORY / "results")
    ceilings = device.ceilings(config.dtype, config.ceilings)
    traced, parameters = _traced(config)
    sequences = {name: Waterline(kernels(traced, name), ceilings) for name in PARTITIONS}
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_work(config, traced, parameters, device.name), soft_wrap=True)
    if config.show == "blocks" and not traced.blocks:
        console.print(f"{config.timm_model}: no residual blocks; try show=layers", soft_wrap=True)
    else:
        console.print(_kernel_table(config, *_shown_kernels(config.show, traced, sequences)))
    console.print(_sequence_table(config, sequences))
    for remark in (_DEPTH, *_other_dtypes(config, traced)):
        console.print(remark, soft_wrap=True)
    about = f"Waterline {ceilings.waterline:.0f} FLOP/byte. Ceilings ({ceilings.kind}): {ceilings.source}."
    console.print(about, soft_wrap=True)
    if config.picture is not None:
        title = f"{config.timm_model}, batch {config.batch}, {config.dtype}, on {config.device} ({ceilings.kind})"
        draw_waterline({name.replace("_", " "): line for name, line in sequences.items()}, title, Path(config.picture))
    return sequences


def _traced(config: DictConfig) -> tuple[Trace, int]:
    """The model's trace, and how many parameters it has.

    Raises:
        ValueError: making the model or running it failed.
    """
    dtype = torch.float32 if config.dtype == "tfloat32" else getattr(torch, config.dtype)
    try:
        model = meta_model(config.timm_model)
        traced = trace(model, config.batch, config.image_size, dtype)
    except Exception as error:  # a model may raise anything, e.g. AssertionError on images that it doesn't take
        known = timm.get_pretrained_cfg(config.timm_model)
        own = "" if known is None else f" (its own is {known.input_size[-1]})"
        raise ValueError(
            f"timm_model={config.timm_model!r} can't be traced with batch={config.batch}, "
            f"image_size={config.image_size}{own}: {type(error).__name__}: {error}"
        ) from error
    return traced, sum(parameter.numel() for parameter in model.parameters())


def _work(config: DictConfig, traced: Trace, parameters: int, device: str) -> str:
    gmacs, millions = shown(traced.macs / traced.batch / 1e9), shown(parameters / 1e6)
    run = f"batch {traced.batch}, {traced.image_size} x {traced.image_size} pixels, {config.dtype}, on {device}"
    return f"{config.timm_model}: {gmacs} GMACs an image, {millions} M parameters; {run}"


def _other_dtypes(config: DictConfig, traced: Trace) -> list[str]:
    """What to know of convolutions and matrix products that the model runs in a dtype of its own."""
    others = [operation for operation in traced.contractions if operation.dtype != traced.dtype]
    if not others:
        return []
    names = ", ".join(dict.fromkeys(dtype_name(operation.dtype) for operation in others))
    gmacs = shown(sum(operation.macs for operation in others) / traced.batch / 1e9)
    return [
        f"{len(others)} of {len(traced.contractions)} convolutions and matrix products ({gmacs} GMACs an image) are in "
        f"{names}, as PyTorch's attention without a fused kernel is: their traffic is that of {names}, their "
        f"arithmetic is taken at the rate of {config.dtype}."
    ]


def _shown_kernels(show: str, traced: Trace, sequences: dict[str, Waterline]) -> tuple[Waterline, Waterline | None]:
    """What the table lists, and what of the model isn't in it."""
    if show in sequences:
        return sequences[show], None
    fused = sequences["block_fused"]
    if show == "layers":
        return Waterline(layers(traced), fused.ceilings), None
    outside = [kernel for kernel in fused.kernels if kernel.block is None]
    return Waterline(blocks(traced), fused.ceilings), Waterline(outside, fused.ceilings)


def _kernel_table(config: DictConfig, line: Waterline, outside: Waterline | None) -> Table:
    headings = ("", "MMACs an image", "MB", "of them weights", "FLOP/byte", "depth", "least µs", "lost µs", "bound by")
    table = Table(*headings, title=f"{config.timm_model}: {config.show}, each as one kernel")
    for time in line.times:
        binds = "memory" if time.under_water else "arithmetic"
        table.add_row(*_cells(config, time.kernel.name, time.kernel, time, time.attainable_s), binds)
    table.add_section()
    whole = line
    if outside is not None:
        whole = Waterline([*line.kernels, *outside.kernels], line.ceilings)
        table.add_row(*_cells(config, "outside the blocks, as compiled", outside, outside, outside.latency_s))
    table.add_row(*_cells(config, "whole model", whole, whole, whole.latency_s))
    return table


def _cells(config: DictConfig, name: str, work: Kernel | Waterline, time: KernelTime | Waterline, least_s: float):
    amounts = (work.macs / config.batch / 1e6, work.bytes / 1e6, work.weight_bytes / 1e6, work.intensity)
    return name, *(shown(value) for value in (*amounts, time.depth, 1e6 * least_s, 1e6 * time.lost_s))


def _sequence_table(config: DictConfig, sequences: dict[str, Waterline]) -> Table:
    headings = ("sequence", "kernels", "under water", "share of time", "GB", "FLOP/byte", "least ms", "lost ms")
    table = Table(*headings, "attainable efficiency", title=f"{config.timm_model}: kernel sequences on {config.device}")
    for name, line in sequences.items():
        counts = (len(line.kernels), len(line.under_water), line.share_under_water)
        times = (1e3 * line.latency_s, 1e3 * line.lost_s, line.efficiency)
        table.add_row(name, *(shown(value) for value in (*counts, line.bytes / 1e9, line.intensity, *times)))
    return table
