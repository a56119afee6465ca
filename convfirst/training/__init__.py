"""Training: the LightningModule, its schedule, and the callbacks that keep a run safe and written down."""

from convfirst.training.batch import BatchPlan, plan_batch
from convfirst.training.checkpoint import AtomicCheckpointIO, Checkpointing
from convfirst.training.csv_log import CSVLog
from convfirst.training.guard import NonFiniteLossError, StopRequested
from convfirst.training.module import ClassificationModule
from convfirst.training.progress import ProgressBar
from convfirst.training.resize import ProgressiveResize
from convfirst.training.train_log import TrainLog
from convfirst.training.wandb_log import finish_wandb, wandb_log

__all__ = [
    "AtomicCheckpointIO",
    "BatchPlan",
    "CSVLog",
    "Checkpointing",
    "ClassificationModule",
    "NonFiniteLossError",
    "ProgressBar",
    "ProgressiveResize",
    "StopRequested",
    "TrainLog",
    "finish_wandb",
    "plan_batch",
    "wandb_log",
]
