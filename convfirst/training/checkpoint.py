"""Checkpoints that are whole or absent, and the callback that writes them, keeps the best score and resumes."""

import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from convfirst.training.guard import StepGuard, StopRequested, more_urgent

_NAME = re.compile(r"step_(\d+)\.ckpt")


def write_atomically(path: str | Path, write) -> None:
    """Call ``write(file)`` with a binary file that becomes `path` at once when all of it is on disk.

    Raises:
        OSError: it can't be written, a full disk for instance; the message names `path`, whose old content stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's archive writer turns a failed write into a RuntimeError
        raise OSError(f"can't write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # or the new name may be lost with the power
    finally:
        os.close(directory)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written by `write_atomically`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save(checkpoint, file))


def step_of(path: str | Path) -> int:
    """The number of updates behind a checkpoint named by `Checkpointing`."""
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path} isn't named step_<updates>.ckpt")
    return int(match[1])


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of `folder`, oldest first. A file cut short (by a copy, say) is left out."""
    named = [path for path in Path(folder).glob("step_*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(filter(zipfile.is_zipfile, named), key=step_of)


def _link(source: Path, target: Path) -> None:
    """Let `target` be `source`'s content, replaced at once; a hard link where the file system has them."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


class Checkpointing(Callback):
    """Writes ``folder/step_<updates>.ckpt`` and ``folder/best.ckpt``, and stops the run when its `StepGuard` says so.

    A checkpoint is written after each epoch's validation and, inside an epoch, every `every_n_steps` updates or when a
    signal arrives; only between updates, so that it holds no half-accumulated gradients. At the last update of an epoch
    a signal takes effect after the validation.

    Attributes:
        run_config: the run's resolved configuration as a plain dict, stored in each checkpoint.
        position: (epoch, batches of it) at which training goes on.
        best_score, best_step: of `monitor`, and after which update.

    Args:
        folder: where the files go.
        every_n_steps: updates between checkpoints inside an epoch; None writes only at its end.
        every_n_epochs: epochs between checkpoints; the last epoch always writes one.
        keep: number of newest checkpoints that stay, beside the best.
        monitor: metric of which the largest value is best, None for "val/top1_ema" or, without EMA, "val/top1".
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int | None = None,
        every_n_epochs: int = 1,
        keep: int = 2,
        monitor: str | None = None,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name}={value} must be at least 1")
        self.folder = Path(folder)
        self.every_n_steps, self.every_n_epochs, self.keep = every_n_steps, every_n_epochs, keep
        self.monitor = monitor
        self.run_config: dict | None = None
        self.guard = StepGuard()
        self.position = (0, 0)
        self.best_score, self.best_step = float("-inf"), None
        self.split: dict[str, int] | None = None  # of an epoch, as `_split` says

    def state_dict(self) -> dict[str, Any]:
        best = {"best_score": self.best_score, "best_step": self.best_step}
        return {"position": list(self.position), "split": self.split, **best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.split = tuple(state["position"]), state.get("split")
        self.best_score, self.best_step = state["best_score"], state["best_step"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.run_config
        # of rank 0, whose loggers are the real ones
        checkpoint["wandb_id"] = next((logger.version for logger in trainer.loggers if _is_wandb(logger)), None)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._check_same_step(trainer)
        self._check_same_split(trainer)
        if trainer.is_global_zero and self.best_step == trainer.global_step:
            self._link_best(self.best_step)  # the run may have died between writing that checkpoint and naming it best
        self._start_at(trainer, *self.position)
        self.guard.install()
        # Lightning's own agreement on SIGTERM makes the device wait at each batch; StepGuard's doesn't
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        resumed_inside = trainer.current_epoch == self.position[0] and self.position[1] > 0
        if not resumed_inside:
            self._start_at(trainer, trainer.current_epoch, 0)

    def _start_at(self, trainer: Trainer, epoch: int, batch: int) -> None:
        self.position = (epoch, batch)
        trainer.datamodule.train_loader.set_position(epoch, batch)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        accumulating = trainer.fit_loop.epoch_loop._should_accumulate()
        where = f"epoch {trainer.current_epoch}, batch {batch_idx}, update {trainer.global_step}, lr {lr:.4g}"
        signum = self.guard.observe(outputs["loss"], where)
        if accumulating or trainer.is_last_batch:
            return
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due or signum:
            self._save(trainer, (trainer.current_epoch, batch_idx + 1), signum)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        signum = self.guard.settle() or self.guard.agree(module.device)
        improved = self._update_best(trainer, module)
        if improved or signum or epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs:
            self._save(trainer, (epoch, 0), signum, improved)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.guard.restore()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.guard.restore()

    def _update_best(self, trainer: Trainer, module: LightningModule) -> bool:
        monitor = self.monitor or ("val/top1" if module.ema is None else "val/top1_ema")
        score = trainer.callback_metrics.get(monitor)
        if score is None or trainer.fit_loop.epoch_loop._should_check_val_epoch() is False:
            return False
        if float(score) <= self.best_score:
            return False
        self.best_score, self.best_step = float(score), trainer.global_step
        return True

    def _save(self, trainer: Trainer, position: tuple[int, int], signum: int = 0, improved: bool = False) -> None:
        signum = self.guard.settle() or signum
        self.position = position
        path = self.folder / f"step_{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            if improved:
                self._link_best(trainer.global_step)
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink()
        if signum:
            # one more may have come to this process during the save: after SIGTERM the warning that means requeueing
            raise StopRequested(more_urgent(signum, self.guard.signum), str(path))

    def _link_best(self, step: int) -> None:
        _link(self.folder / f"step_{step:08d}.ckpt", self.folder / "best.ckpt")

    def _check_same_step(self, trainer: Trainer) -> None:
        step = trainer.strategy.broadcast(trainer.global_step)
        if step != trainer.global_step:
            raise RuntimeError(
                f"process {trainer.global_rank} resumed at update {trainer.global_step}, process 0 at {step}: "
                f"the processes don't see the same files in {self.folder}"
            )

    def _check_same_split(self, trainer: Trainer) -> None:
        """A position inside an epoch counts batches of one process, and the schedule counts updates."""
        before, now = self.split, _split(trainer)
        self.split = now
        if before is None or before == now:
            return
        if self.position[1] > 0 or _updates(before) != _updates(now):
            where = f"inside epoch {self.position[0]}" if self.position[1] > 0 else "at an epoch's start"
            raise ValueError(
                f"the checkpoint stands {where} of a run with {before}, this command gives {now}: "
                "go on with the devices, data.batch_size, accumulation and trainer.limit_train_batches it was made with"
            )


def _split(trainer: Trainer) -> dict[str, int]:
    return {
        "processes": trainer.world_size,
        "batches of one process": trainer.num_training_batches,
        "accumulation": trainer.accumulate_grad_batches,
    }


def _updates(split: dict[str, int]) -> int:
    return -(-split["batches of one process"] // split["accumulation"])


def _is_wandb(logger) -> bool:
    return any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)  # wandb may not be installed
