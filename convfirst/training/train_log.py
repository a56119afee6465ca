"""What a run writes down while it trains: loss, learning rate, speed and memory."""

import resource
import time

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from convfirst.training.flops import forward_flops, peak_flops

_TRAIN_FACTOR = 3  # a backward pass computes about twice what the forward pass does


class TrainLog(Callback):
    """Logs every `trainer.log_every_n_steps` updates to all loggers, under the number of updates.

    train/loss (of that update, mean over micro-batches and processes), train/lr, speed/images_per_s (all processes),
    speed/data_wait (share of the time that the device spent between two steps: waiting for the loader, for the copy and
    for the augmentation on the device; loading that overlaps with a step costs nothing and doesn't count),
    speed/tflops (10^12 FLOP/s a device), speed/peak_share (of the device's dense peak, where known), memory/peak_gib.
    Validation and checkpoints don't count in the speeds.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.images_trained, self.seconds_trained = 0, 0.0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before the model is sharded or compiled
            data = trainer.datamodule
            self._flops = forward_flops(module.model, data.in_chans, data.image_size) / data.image_size**2

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._peak = peak_flops(module.device, trainer.precision)
        self._gap = _DeviceGap() if module.device.type == "cuda" else _HostGap()
        self._world = trainer.world_size
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._restart()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._restart()

    def _restart(self) -> None:
        self._loss = None
        self._start = time.perf_counter()
        self._images, self._pixels = 0, 0
        self._saved_since = None
        self._gap.take()
        self._gap.begin()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._saved_since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        if self._saved_since is not None:  # Checkpointing acts after this callback
            self._start += time.perf_counter() - self._saved_since
            self._saved_since = None
            self._gap.begin()
        self._gap.end()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        loss = outputs["loss"].detach()  # Lightning has divided it by the number of micro-batches
        self._loss = loss if self._loss is None else self._loss + loss
        self._images += len(batch[0])
        self._pixels += len(batch[0]) * batch[0].shape[-1] ** 2
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            if trainer.global_step % trainer.log_every_n_steps == 0:
                self._log(trainer, module)
            self._loss = None
        if trainer.is_last_batch:
            self._count(time.perf_counter() - self._start)
        self._gap.begin()

    def _count(self, seconds: float) -> None:
        self.images_trained += self._images * self._world
        self.seconds_trained += seconds

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        loss = self._loss.clone()
        if self._world > 1:
            dist.all_reduce(loss)
            loss /= self._world
        metrics = {"train/loss": loss.item()}  # waits for the device, so that the time below is that of the work
        seconds = time.perf_counter() - self._start
        metrics["train/lr"] = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        metrics["speed/images_per_s"] = self._images * self._world / seconds
        metrics["speed/data_wait"] = self._gap.take() / seconds
        flops = _TRAIN_FACTOR * self._flops * self._pixels / seconds
        metrics["speed/tflops"] = flops / 1e12
        if self._peak is not None:
            metrics["speed/peak_share"] = flops / self._peak
        metrics["memory/peak_gib"] = _peak_memory(module.device) / 2**30
        self.latest = metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics | {"epoch": trainer.current_epoch}, step=trainer.global_step)
        self._count(seconds)
        self._start = time.perf_counter()
        self._images, self._pixels = 0, 0

    def images_per_s(self) -> float | None:
        """Mean over this process's part of the run, first step included; None if it trained nothing."""
        return self.images_trained / self.seconds_trained if self.seconds_trained else None


class _HostGap:
    """Seconds between two steps by the clock."""

    def __init__(self) -> None:
        self._from, self._seconds = 0.0, 0.0

    def begin(self) -> None:
        self._from = time.perf_counter()

    def end(self) -> None:
        self._seconds += time.perf_counter() - self._from

    def take(self) -> float:
        """The sum since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _DeviceGap:
    """The same as a CUDA device saw it, by events: the host may wait for data while the device still computes."""

    def __init__(self) -> None:
        self._from: torch.cuda.Event | None = None
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        self._from = _recorded()

    def end(self) -> None:
        self._pairs.append((self._from, _recorded()))

    def take(self) -> float:
        """The sum since the last call; waits for the last step's beginning."""
        if self._pairs:
            self._pairs[-1][1].synchronize()
        milliseconds = sum(start.elapsed_time(end) for start, end in self._pairs)
        self._pairs = []
        return milliseconds / 1e3


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident in memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
