"""How fast a whole training step is with fused blocks, held against Inductor in the same run."""

import gc
import json
import logging
from collections.abc import Iterator
from functools import cache, partial

import torch
from omegaconf import DictConfig, OmegaConf

from convfirst.app.bare_loop import bare_loop
from convfirst.app.training_throughput import run_bare_loop

log = logging.getLogger(__name__)

MODES = ("eager", "eager+graph", "inductor", "inductor+graph")


def training_step(config: DictConfig) -> Iterator[dict]:
    """One row for each model, batch size, mode and peer of ``config.training``, printed as soon as it is measured.

    A step is forward pass, loss, backward pass and update on images that stay on the device (`bare_loop`). Ours has
    the kernels that ``config.training.kernels`` says; a peer is plain PyTorch, in the same mode, and either the same
    model or the one that ``config.training.peers`` holds it against (null: no peers, for rows of several devices only).
    ``speedup`` and ``memory_ratio`` are over the peer. With several devices a row has ``scaling`` instead: images/s
    over those of one device, the batch being that of one device.

    Raises:
        ValueError: a mode is unknown, or needs a GPU that isn't there.
    """
    suite = config.training
    for mode in suite.modes:
        if mode not in MODES:
            raise ValueError(f"modes={mode!r} is unknown; accepted: {', '.join(MODES)}")
        if mode.endswith("+graph") and not torch.cuda.is_available():
            raise ValueError(f"modes={mode!r} needs a CUDA device, and there is none here")
    measured = cache(partial(_measure, suite))
    for batch in suite.batches:
        for mode in suite.modes:
            for name in suite.models:
                yield from _rows(suite, name, batch, mode, measured)


def _rows(suite: DictConfig, name: str, batch: int, mode: str, measured) -> Iterator[dict]:
    about = {"name": name, "batch": batch, "mode": mode, "kernels": suite.kernels, "precision": suite.precision}
    about["image_size"] = suite.image_size
    ours = measured(name, suite.kernels, batch, mode)
    peers = [] if suite.peers is None else [name, *suite.peers.get(name, [])]
    for peer in peers:
        theirs = measured(peer, "off", batch, mode)
        yield _printed({**about, "devices": 1, **_compared(ours, peer, theirs)})
    for devices in suite.devices:
        if devices > 1:
            arguments = _arguments(suite, name, suite.kernels, batch, mode)
            several = run_bare_loop(json.dumps(arguments), devices)
            scaling = round(several["images_per_s"] / ours["images_per_s"], 3)
            yield _printed({**about, "devices": devices, **_rounded(several), "scaling": scaling})


def _compared(ours: dict, peer: str, theirs: dict) -> dict:
    row = {**_rounded(ours), "peer": peer, **{f"peer_{key}": value for key, value in _rounded(theirs).items()}}
    row["speedup"] = round(ours["images_per_s"] / theirs["images_per_s"], 3)
    if theirs["peak_memory_gib"]:
        row["memory_ratio"] = round(ours["peak_memory_gib"] / theirs["peak_memory_gib"], 3)
    return row


def _rounded(result: dict) -> dict:
    digits = {"images_per_s": 1, "ms": 3, "peak_memory_gib": 3}
    return {key: value if value is None else round(value, digits[key]) for key, value in result.items()}


def _printed(row: dict) -> dict:
    print(json.dumps(row), flush=True)
    return row


def _measure(suite: DictConfig, name: str, kernels: str, batch: int, mode: str) -> dict:
    log.info("%s, kernels=%s, batch %d, %s", name, kernels, batch, mode)
    result = bare_loop(**_arguments(suite, name, kernels, batch, mode))
    torch.compiler.reset()
    gc.collect()  # the compiled model holds itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def _arguments(suite: DictConfig, name: str, kernels: str, batch: int, mode: str) -> dict:
    compiler, _, graph = mode.partition("+")
    optimizer = OmegaConf.to_container(suite.optimizer, resolve=True)
    return {
        "model": name,
        "model_kwargs": OmegaConf.to_container(suite.model_kwargs, resolve=True),
        "batch": batch,
        "image_size": suite.image_size,
        "precision": suite.precision,
        "compile": compiler == "inductor",
        "optimizer": {**optimizer, "capturable": True} if graph else optimizer,
        "steps": suite.steps,
        "warmup_steps": suite.warmup_steps,
        "interval": suite.interval,
        "kernels": kernels,
        "graph": bool(graph),
    }
