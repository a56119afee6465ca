"""Weights & Biases: one run there for one run directory here."""

import logging
import secrets
import sys
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)


class WandbLog(WandbLogger):
    """A WandbLogger without which training goes on.

    The signal with which Slurm preempts a job ends wandb's own process too, before the run has saved.
    """

    _lost = False

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._lost:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # of several kinds, which wandb doesn't document
            self._lost = True
            log.warning("wandb is gone (%s: %s); training goes on without it", type(error).__name__, error)


def wandb_log(run_dir: str | Path, project: str, name: str, offline: bool = False, **kwargs) -> WandbLog:
    """A logger whose id is kept in ``run_dir/wandb_id``, so that a resumed run goes on in the same place.

    Raises:
        ModuleNotFoundError: wandb isn't installed.
    """
    path = Path(run_dir) / "wandb_id"
    if rank_zero_only.rank == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    run = path.read_text() if path.exists() else None  # the other processes log nothing
    return WandbLog(save_dir=run_dir, project=project, name=name, id=run, offline=offline, resume="allow", **kwargs)


def finish_wandb() -> None:
    """End wandb's run, if there is one; what stopped training must not be hidden by wandb's end."""
    if "wandb" not in sys.modules:
        return
    try:
        sys.modules["wandb"].finish()
    except Exception as error:  # as above
        log.warning("wandb's run could not be finished (%s: %s)", type(error).__name__, error)
