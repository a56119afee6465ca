"""The LightningModule of image classification: model, loss, optimiser, schedule and EMA."""

from collections.abc import Mapping

import torch
import torch.nn as nn
from lightning import LightningModule
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MeanMetric, SumMetric

from convfirst.training.fsdp import compile_sharded, shard
from convfirst.training.schedule import create_scheduler
from convfirst.training.seeding import step_seed

Batch = tuple[torch.Tensor, torch.Tensor]


class ClassificationModule(LightningModule):
    """Trains `model` on batches of images float [B, C, H, W] and targets int64 [B] or float [B, num_classes].

    Label smoothing, mixup and cutmix arrive inside dense targets; the loss adds none of its own.

    Args:
        model: gives logits [B, num_classes].
        num_classes: for the metrics; top-5 is left out below five classes.
        optimizer: arguments of `timm.optim.create_optimizer_v2`: opt, lr, weight_decay, layer_decay, ...
        scheduler: arguments of `create_scheduler`.
        epochs, steps_per_epoch: length of the schedule; a step is one optimiser update.
        loss: type "ce" (softmax cross-entropy) or "bce" (timm's BinaryCrossEntropy), and for the latter its arguments.
        ema: decay, and optionally warmup (bool), warmup_gamma, warmup_power of timm's `ModelEmaV3`; None keeps no EMA.
        seed: of drop path and dropout, reseeded each batch from (seed, rank, epoch, batch) so that a resumed run draws
            what the uninterrupted one would have.
        channels_last: memory format of model and images.
        compile: arguments of `torch.nn.Module.compile`; None runs eagerly. Evaluation is always eager: its ragged last
            batch would recompile.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        optimizer: Mapping,
        scheduler: Mapping,
        epochs: int,
        steps_per_epoch: int,
        loss: Mapping | None = None,
        ema: Mapping | None = None,
        seed: int = 0,
        channels_last: bool = False,
        compile: Mapping | None = None,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.model = model.to(memory_format=self.memory_format)
        self.ema, self._ema_warmup = _create_ema(self.model, ema)
        self.criterion = _create_loss(**(loss or {}))
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self._optimizer, self._scheduler, self._epochs = dict(optimizer), dict(scheduler), epochs
        self._compile = None if compile is None else dict(compile)
        self.schedule = None
        names = ["raw"] if self.ema is None else ["raw", "ema"]
        self.metrics = nn.ModuleDict({name: _metrics(num_classes) for name in names})
        self.num_evaluated = SumMetric()

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled in training."""
        return self._compile is not None

    # Setting up ------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard for FSDP, then compile in place: the keys of the state dict stay those of the plain model."""
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            for module in [self.model] if self.ema is None else [self.model, self.ema.module]:
                shard(module, self.device_mesh)
        if self._compile is not None and self.trainer.training:
            if isinstance(self.model, FSDPModule):
                compile_sharded(self.model, **self._compile)
            else:
                self.model.compile(**self._compile)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = create_optimizer_v2(self.model, **self._optimizer)
        self.schedule = create_scheduler(optimizer, self._epochs, self.steps_per_epoch, **self._scheduler)
        return optimizer

    # Training --------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        step_seed(self.seed, self.global_rank, self.trainer.current_epoch, batch_idx)
        self.schedule.step_update(self.trainer.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        images, targets = batch
        logits = self.model(images.to(memory_format=self.memory_format))
        return self.criterion(logits.float(), targets)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            # Lightning counts this step only after the hook
            self.ema.update(self.model, step=self.trainer.global_step + 1 if self._ema_warmup else None)

    # Evaluating ------------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: Batch) -> None:
        images, targets = batch
        # a batch of unreadable files alone: the forward pass may hold collective calls that other processes wait for
        shown = images if len(images) else images.new_zeros(1, *images.shape[1:])
        shown = shown.to(memory_format=self.memory_format)
        for name, metrics in self.metrics.items():
            with torch.compiler.set_stance("force_eager"):
                logits = (self.model if name == "raw" else self.ema.module)(shown).float()[: len(images)]
            if targets.ndim == 1:
                metrics["loss"].update(nn.functional.cross_entropy(logits, targets, reduction="none"))
            for key in metrics.keys() - {"loss"}:
                metrics[key].update(_hits(logits, targets, k=int(key.removeprefix("top"))))
        self.num_evaluated.update(len(targets))

    def _finish_evaluation(self, split: str) -> None:
        """Reduce over processes, log, and check that each image was seen exactly once."""
        values = {}
        for name, metrics in self.metrics.items():
            suffix = "" if name == "raw" else f"_{name}"
            for key, metric in metrics.items():
                if metric.update_called:
                    values[f"{split}/{key}{suffix}"] = float(metric.compute()) * (1 if key == "loss" else 100)
                metric.reset()
        self.images_evaluated = int(self.num_evaluated.compute())
        self.num_evaluated.reset()
        self._check_count(split, self.images_evaluated)
        # for callbacks that monitor a metric; all processes have the same values already
        self.log_dict(values, logger=False, sync_dist=True)
        if split == "val":
            epoch = self.trainer.current_epoch
            for logger in self.trainer.loggers:
                logger.log_metrics(values | {"epoch": epoch}, step=self.trainer.global_step)

    def _check_count(self, split: str, images: int) -> None:
        expected = getattr(self.trainer.datamodule, f"num_{split}_images", None)
        limit = self.trainer.limit_val_batches if split == "val" else self.trainer.limit_test_batches
        whole = isinstance(limit, float) and limit == 1.0  # the integer 1 is one batch
        skips = getattr(self.trainer.datamodule, "on_bad_image", "raise") == "skip"
        if expected is not None and whole and not skips and images != expected:
            raise RuntimeError(f"{split}: {images} images were evaluated, but the data set holds {expected}")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")


def _metrics(num_classes: int) -> nn.ModuleDict:
    return nn.ModuleDict({key: MeanMetric() for key in ["loss", "top1"] + ["top5"] * (num_classes >= 5)})


def _hits(logits: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """float [b]: 1 where one of the k highest of [B, num_classes] logits is right, else 0.

    Targets are int64 [B], or [B, L] padded with -1 where any of several labels is right; images without a label don't
    count (b < B).
    """
    labels = targets.unsqueeze(1) if targets.ndim == 1 else targets
    predicted = logits.topk(k, dim=1).indices
    hit = (predicted.unsqueeze(2) == labels.unsqueeze(1)).flatten(1).any(1)
    return hit[(labels >= 0).any(1)].float()


def _create_loss(type: str = "ce", **kwargs) -> nn.Module:
    if type == "ce":
        return nn.CrossEntropyLoss(**kwargs)
    if type == "bce":
        return BinaryCrossEntropy(**{"smoothing": 0.0, **kwargs})
    raise ValueError(f"loss.type={type!r} must be one of ce, bce")


def _create_ema(model: nn.Module, ema: Mapping | None) -> tuple[ModelEmaV3 | None, bool]:
    if ema is None:
        return None, False
    ema = dict(ema)
    warmup = ema.pop("warmup", False)
    average = ModelEmaV3(model, use_warmup=warmup, **ema)
    average.requires_grad_(False)  # DDP must not wait for its gradients
    return average, warmup
