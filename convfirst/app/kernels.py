"""Whether evaluation runs on the fused kernels of the optional package `convfirst_kernels`."""

import importlib.util
import logging
from collections.abc import Sequence

import torch
import torch.nn as nn

log = logging.getLogger(__name__)

CHOICES = ("auto", "required", "off")


def check_kernels(kernels: str) -> None:
    """Refuse a choice that can't be met, before anything is built.

    Raises:
        ValueError: `kernels` is none of auto, required, off.
        ModuleNotFoundError: it is "required", but the package isn't installed.
    """
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r} must be one of {', '.join(CHOICES)}")
    if kernels == "required" and importlib.util.find_spec("convfirst_kernels") is None:
        raise ModuleNotFoundError("kernels=required, but the package convfirst_kernels isn't installed")


def accelerate(models: Sequence[nn.Module], device: torch.device, kernels: str) -> None:
    """Swap fused kernels into `models`, which are in evaluation mode on `device`, where `kernels` asks for them.

    Raises:
        RuntimeError: `kernels` is "required", but `device` is no CUDA device.
    """
    check_kernels(kernels)
    if kernels == "off":
        return
    if device.type != "cuda":
        if kernels == "required":
            raise RuntimeError(f"kernels=required, but the fused kernels need a CUDA device, not {device}")
        log.info("kernels=auto: no CUDA device, evaluation runs in plain PyTorch")
        return
    if importlib.util.find_spec("convfirst_kernels") is None:
        log.info("kernels=auto: convfirst_kernels isn't installed, evaluation runs in plain PyTorch")
        return
    import convfirst_kernels

    reports = [convfirst_kernels.accelerate(model, kernels=kernels) for model in models]
    log.info("kernels=%s: %s", kernels, reports[0])
