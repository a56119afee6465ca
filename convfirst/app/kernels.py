"""Whether residual blocks run on the fused kernels of the optional package `convfirst_kernels`."""

import importlib.util
import logging
from collections.abc import Sequence

import torch
import torch.nn as nn
from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

CHOICES = ("auto", "required", "off", "reference")


def check_kernels(kernels: str, precision: str | None = None) -> None:
    """Refuse a choice that can't be met, before anything is built.

    Raises:
        ValueError: `kernels` is none of auto, required, off, reference; or it is "required" and Lightning's `precision`
            isn't one of 16-bit floats, which the kernels take.
        ModuleNotFoundError: it needs the package, which isn't installed.
    """
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r} must be one of {', '.join(CHOICES)}")
    if kernels in ("required", "reference") and not _installed():
        raise ModuleNotFoundError(f"kernels={kernels}, but the package convfirst_kernels isn't installed")
    if kernels == "required" and precision is not None and not _covered(precision):
        raise ValueError(
            f"kernels=required, but trainer.precision={precision}: the fused kernels take float16 and bfloat16; "
            "give trainer.precision=bf16-mixed or 16-mixed, or kernels=auto"
        )


def accelerate(models: Sequence[nn.Module], device: torch.device, kernels: str) -> None:
    """Swap fused kernels into `models`, which are in evaluation mode on `device`, where `kernels` asks for them.

    Raises:
        ValueError: `kernels` is "required", but `device` is no CUDA device or the kernels don't cover the model; or it
            is "reference", and `device` is one.
    """
    check_kernels(kernels)
    if _wanted(device, kernels, "evaluation"):
        reports = [_swap(model, kernels) for model in models]
        log.info("kernels=%s: %s", kernels, reports[0])


def accelerate_training(models: Sequence[nn.Module], device: torch.device, kernels: str, precision: str) -> None:
    """Swap fused kernels into the model that will be trained, the first of `models`, and into its averages.

    Residual blocks then run as one operator forward and one backward, those with batch norms as a few; a block with
    synchronised batch norms runs its own code in training. Stems and downsampling layers with layer norms become
    products of patches in PyTorch. Parameters and state dicts stay as they are. Call it before compiling and before
    wrapping for several processes. Moves the models to `device`, so that the report that is logged is of that device.

    Raises:
        ValueError: as `accelerate`, or, with "required", `precision` or a block that isn't covered in training: the
            message names it.
    """
    check_kernels(kernels, precision)
    if not _wanted(device, kernels, "training"):
        return
    if kernels == "auto" and not _covered(precision):
        log.info("kernels=auto: trainer.precision=%s, training runs in plain PyTorch", precision)
        return
    models[0].train()
    reports = [_swap(model.to(device), kernels) for model in models]
    log.info("kernels=%s: %s", kernels, reports[0])


class RepackWeights(Callback):
    """Lets fused blocks pack their weights anew for each evaluation: an update of sharded weights can't be seen."""

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if _installed():
            import convfirst_kernels

            convfirst_kernels.forget(module)

    on_test_start = on_validation_start


def _wanted(device: torch.device, kernels: str, what: str) -> bool:
    if kernels in ("required", "reference"):
        _check_device(device, kernels)
    elif kernels == "auto" and device.type != "cuda":
        log.info("kernels=auto: no CUDA device, %s runs in plain PyTorch", what)
        return False
    elif kernels == "auto" and not _installed():
        log.info("kernels=auto: convfirst_kernels isn't installed, %s runs in plain PyTorch", what)
        return False
    return kernels != "off"


def _swap(model: nn.Module, kernels: str) -> object:
    """The report of convfirst_kernels.accelerate."""
    import convfirst_kernels

    try:
        return convfirst_kernels.accelerate(model, kernels=kernels)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _check_device(device: torch.device, kernels: str) -> None:
    if kernels == "required" and device.type != "cuda":
        raise ValueError(f"kernels=required, but the fused kernels need a CUDA device, not {device}")
    if kernels == "reference" and device.type != "cpu":
        raise ValueError(f"kernels=reference computes on a CPU, not on {device}; give kernels=auto or required")


def _covered(precision: str) -> bool:
    return str(precision).startswith(("16", "bf16"))


def _installed() -> bool:
    return importlib.util.find_spec("convfirst_kernels") is not None
