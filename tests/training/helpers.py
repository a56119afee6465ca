"""A run small enough for a test: 12 updates of a model of a few thousand weights on the digits."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback
from omegaconf import DictConfig

REPOSITORY = Path(__file__).parents[2]

TINY = [
    "+model.dims=[8,16]",
    "+model.depths=[1,1]",
    "+model.drop_path_rate=0.3",
    "data.image_size=16",
    "data.batch_size=32",
    "batch.global_size=64",
    "epochs=3",
    "scheduler.warmup_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=8",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_steps=3",
    "logger=csv",
    "kernels=off",
]


def tiny_config(run_root: Path, *overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "configs")):
        return compose(name, overrides=[*TINY, f"run_root={run_root}", *overrides])


def environment() -> dict[str, str]:
    """This process's, with the repository on Python's path."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def command(run_root: Path, *overrides: str) -> list[str]:
    """train.py with the tiny run's overrides and these, options such as -m first."""
    # the last value of a key counts in TINY's stead
    keys = {override.lstrip("+").split("=")[0] for override in overrides}
    base = [override for override in TINY if override.lstrip("+").split("=")[0] not in keys]
    options = [override for override in overrides if override.startswith("-")]
    values = [override for override in overrides if not override.startswith("-")]
    return [sys.executable, "train.py", *options, *base, f"run_root={run_root}", *values]


def start(run_root: Path, *overrides: str, **kwargs) -> subprocess.Popen:
    """That command, started."""
    return subprocess.Popen(
        command(run_root, *overrides), cwd=REPOSITORY, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    """What it printed, once it has ended well."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def losses(run_dir: Path) -> list[tuple[str, str, str, str]]:
    """The curves of a run without what depends on time."""
    columns = ("step", "epoch", "train/loss", "train/lr", "val/loss", "val/loss_ema", "val/top1", "val/top1_ema")
    with open(run_dir / "metrics.csv") as file:
        return [tuple(row.get(column, "") for column in columns) for row in csv.DictReader(file)]


def last_checkpoint(run_dir: Path) -> dict:
    path = max(run_dir.glob("checkpoints/step_*.ckpt"))
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


class Dies(BaseException):
    """Stands for a process that ends here; nothing in the project catches it."""


class AtUpdate(Callback):
    """Does something after update `step`: kill -9 of this process, a signal, or `Dies`.

    With ``at="validation"`` it is done in the first validation after that update.
    """

    def __init__(self, step: int, action: str = "die", at: str = "update") -> None:
        self.step, self.action, self.at = step, action, at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.at == "update" and trainer.global_step == self.step:
            self._act()

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.at == "validation" and trainer.global_step >= self.step:
            self._act()

    def _act(self) -> None:
        self.step = float("inf")
        if self.action == "die":
            raise Dies
        os.kill(os.getpid(), signal.Signals[self.action])
