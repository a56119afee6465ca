"""The progress bar: one for the whole run, with images/s and the time left."""

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from convfirst.training.train_log import TrainLog


class ProgressBar(Callback):
    """Shows epoch, updates, loss, validation top-1, images/s, time spent and time left; without a terminal, one line an
    epoch."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._console = Console()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._speeds = next((c for c in trainer.callbacks if isinstance(c, TrainLog)), None)
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "train",
            total=trainer.max_epochs * module.steps_per_epoch,
            completed=trainer.global_step,
            epoch=f"{trainer.current_epoch + 1}/{trainer.max_epochs}",
            metrics="",
        )
        self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if self._progress is not None:
            self._progress.update(
                self._task,
                completed=trainer.global_step,
                epoch=f"{trainer.current_epoch + 1}/{trainer.max_epochs}",
                metrics=self._metrics(trainer),
            )

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and not self._console.is_terminal:
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {self._metrics(trainer)}", flush=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _metrics(self, trainer: Trainer) -> str:
        parts = []
        latest = self._speeds.latest if self._speeds is not None else {}
        if latest:
            parts.append(f"loss {latest['train/loss']:.3f}")
        for name, label in (("val/top1", "top-1"), ("val/top1_ema", "EMA")):
            if name in trainer.callback_metrics:
                parts.append(f"{label} {float(trainer.callback_metrics[name]):.2f}%")
        if latest:
            parts.append(f"{latest['speed/images_per_s']:,.0f} images/s")
        return "  ".join(parts)
