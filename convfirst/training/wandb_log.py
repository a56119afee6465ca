"""Weights & Biases: one run there for one run directory here."""

import secrets
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger


def wandb_log(run_dir: str | Path, project: str, name: str, offline: bool = False, **kwargs) -> WandbLogger:
    """A logger whose id is kept in ``run_dir/wandb_id``, so that a resumed run goes on in the same place.

    Raises:
        ModuleNotFoundError: wandb isn't installed.
    """
    path = Path(run_dir) / "wandb_id"
    if rank_zero_only.rank == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    run = path.read_text() if path.exists() else None  # the other processes log nothing
    return WandbLogger(save_dir=run_dir, project=project, name=name, id=run, offline=offline, resume="allow", **kwargs)
