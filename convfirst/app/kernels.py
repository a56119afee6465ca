"""Whether evaluation runs on the fused kernels of the optional package `convfirst_kernels`."""

import copy
import importlib.util
import logging
from collections.abc import Sequence

import torch
import torch.nn as nn

log = logging.getLogger(__name__)

CHOICES = ("auto", "required", "off")


def check_kernels(kernels: str, precision: str | None = None) -> None:
    """Refuse a choice that can't be met, before anything is built.

    Raises:
        ValueError: `kernels` is none of auto, required, off; or it is "required" and Lightning's `precision` isn't one
            of 16-bit floats, which the kernels take.
        ModuleNotFoundError: it is "required", but the package isn't installed.
    """
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r} must be one of {', '.join(CHOICES)}")
    if kernels == "required" and importlib.util.find_spec("convfirst_kernels") is None:
        raise ModuleNotFoundError("kernels=required, but the package convfirst_kernels isn't installed")
    if kernels == "required" and precision is not None and not str(precision).startswith(("16", "bf16")):
        raise ValueError(
            f"kernels=required, but trainer.precision={precision}: the fused kernels take float16 and bfloat16; "
            "give trainer.precision=bf16-mixed or 16-mixed, or kernels=auto"
        )


def rehearse(model: nn.Module, device: torch.device, kernels: str) -> None:
    """Where kernels are required, find out now whether they cover `model` on `device`; `model` stays as it is.

    Raises:
        ValueError: they don't.
    """
    if kernels == "required":
        _check_device(device)
        accelerate([copy.deepcopy(model).eval().to(device)], device, kernels)


def accelerate(models: Sequence[nn.Module], device: torch.device, kernels: str) -> None:
    """Swap fused kernels into `models`, which are in evaluation mode on `device`, where `kernels` asks for them.

    Raises:
        ValueError: `kernels` is "required", but `device` is no CUDA device or the kernels don't cover the model.
    """
    check_kernels(kernels)
    if kernels == "off":
        return
    if device.type != "cuda":
        if kernels == "required":
            _check_device(device)
        log.info("kernels=auto: no CUDA device, evaluation runs in plain PyTorch")
        return
    if importlib.util.find_spec("convfirst_kernels") is None:
        log.info("kernels=auto: convfirst_kernels isn't installed, evaluation runs in plain PyTorch")
        return
    import convfirst_kernels

    try:
        reports = [convfirst_kernels.accelerate(model, kernels=kernels) for model in models]
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    log.info("kernels=%s: %s", kernels, reports[0])


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"kernels=required, but the fused kernels need a CUDA device, not {device}")
