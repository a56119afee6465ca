"""Whether evaluation runs on the fused kernels of the optional package `convfirst_kernels`."""

import importlib.util
import logging

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


def accelerate(model: nn.Module, device: torch.device, kernels: str) -> nn.Module:
    """`model`, in evaluation mode on `device`, with fused kernels where `kernels` asks for them and they are to be had.

    Raises:
        RuntimeError: `kernels` is "required", but `device` is no CUDA device.
    """
    check_kernels(kernels)
    if kernels == "off":
        return model
    if device.type != "cuda":
        if kernels == "required":
            raise RuntimeError(f"kernels=required, but the fused kernels need a CUDA device, not {device}")
        log.info("kernels=auto: no CUDA device, evaluation runs in plain PyTorch")
        return model
    if importlib.util.find_spec("convfirst_kernels") is None:
        log.info("kernels=auto: convfirst_kernels isn't installed, evaluation runs in plain PyTorch")
        return model
    import convfirst_kernels

    report = convfirst_kernels.accelerate(model, kernels=kernels)
    log.info("kernels=%s: %s", kernels, report)
    return model
