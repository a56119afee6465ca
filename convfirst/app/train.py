"""Training from a configuration: build, resume, fit, test, report."""

import hashlib
import logging
import os
import platform
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning
import timm
import torch
import torch.nn as nn
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from timm.layers import convert_sync_batchnorm

from convfirst import __version__
from convfirst.app import slurm
from convfirst.app.kernels import RepackWeights, accelerate, accelerate_training, check_kernels
from convfirst.app.run_dir import RunDirectory, RunExistsError
from convfirst.data import ImageDataModule
from convfirst.data.datamodule import bad_images
from convfirst.data.order import TrainOrder
from convfirst.training import (
    AtomicCheckpointIO,
    Checkpointing,
    ClassificationModule,
    NonFiniteLossError,
    StopRequested,
    TrainLog,
    finish_wandb,
    plan_batch,
)
from convfirst.training.checkpoint import step_of
from convfirst.training.curves import plot_curves

log = logging.getLogger(__name__)

# What a setting or the machine may be at fault for: one line says so, without a traceback.
_EXPECTED = (
    InstantiationException,
    MisconfigurationException,
    ModuleNotFoundError,
    NonFiniteLossError,
    OSError,
    ValueError,
)


def main(config: DictConfig) -> None:
    """Train and exit with the status that `train.py --help` lists; a mistake in the input ends in one message.

    ``HYDRA_FULL_ERROR=1`` shows where such a message comes from.
    """
    try:
        slurm.watch()
        train(config)
    except StopRequested as stop:
        slurm.unwatch()
        if _is_main_process():
            saved = f"saved {stop.path}" if stop.path else "stopped, with nothing to save"
            print(f"{signal.Signals(stop.signum).name}: {saved}; the same command goes on from there.", flush=True)
            slurm.requeue(stop.signum)
            sys.exit(128 + stop.signum)
    except _EXPECTED as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        devices = f"trainer.accelerator={config.trainer.accelerator}, trainer.devices={config.trainer.devices}: "
        sys.exit(f"error: {devices if isinstance(cause, MisconfigurationException) else ''}{cause}")
    except Exception as error:
        if not _is_wandbs(error) or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"error: logger=wandb: {str(error).rstrip('.')}; or give logger.wandb.offline=true")


def _is_wandbs(error: Exception) -> bool:
    """Whether Weights & Biases refused something, such as a run without a login."""
    return "wandb" in sys.modules and isinstance(error, sys.modules["wandb"].errors.Error)


def train(config: DictConfig) -> dict[str, Any]:
    """Run one training to its end, from wherever its directory says it stands.

    Returns:
        The summary that is also written to summary.json.

    Raises:
        ValueError: a setting that can't be honoured; `RunExistsError` if the run's directory holds something else.
        NonFiniteLossError: the loss became NaN or infinite.
        StopRequested: a signal ended the run after saving.
    """
    _quieten()
    check_kernels(config.kernels, config.trainer.precision)
    _name_sweep_job(config)
    run = RunDirectory(_absolute(config.run_dir))
    if _is_main_process():
        _prepare_directory(run, config)
    if (summary := run.read_summary()) is not None and config.resume == "auto":
        print(f"{run.path} is finished; for another run add run_id=..., to start anew resume=never overwrite=true")
        report(summary)
        return summary

    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(config.matmul_precision)
    data = instantiate(config.data, _convert_="all")
    start = run.find_start(config.resume)
    with open_dict(config):
        config.start_step = 0 if start is None else step_of(start)
        config.model.num_classes, config.model.in_chans = data.num_classes, data.in_chans
        if "tensorboard" in config.logger:
            config.logger.tensorboard.purge_step = config.start_step + 1  # TensorBoard hides that step and later ones
        if "csv" in config.logger:
            config.logger.csv.start_step = config.start_step
    trainer = build_trainer(config)
    module = build_module(config, data, trainer.world_size, steps_per_epoch=_plan(config, trainer, data))
    accelerate_training(_models(module), trainer.strategy.root_device, config.kernels, config.trainer.precision)
    is_new = not run.config.exists()
    if trainer.is_global_zero:
        run.freeze(config)
    if start is not None:
        log.info("resuming from %s", start)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start)
        summary = _finish(config, run, trainer, module, data)
    except BaseException:
        if is_new and trainer.is_global_zero and trainer.global_step == 0 and not run.checkpoints:
            run.config.unlink(missing_ok=True)  # nothing was trained: the corrected command may have the directory
        raise
    finally:
        finish_wandb()
        data.teardown("fit")  # Lightning leaves the loader's workers to the interpreter's exit after an exception
    if trainer.is_global_zero:
        run.write_summary(summary)
        report(summary)
    return summary


def build_trainer(config: DictConfig) -> Trainer:
    """Lightning's Trainer with the configured callbacks and loggers; ours save, resume and show progress."""
    arguments = dict(config.trainer)
    if isinstance(arguments["strategy"], DictConfig):
        arguments["strategy"] = instantiate(arguments["strategy"])
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():  # torchrun inside a job stays torchrun
        plugins.append(SLURMEnvironment(auto_requeue=False))  # the run saves and stops by itself
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback is not None]
    checkpointing = [callback for callback in callbacks if isinstance(callback, Checkpointing)]
    if len(checkpointing) != 1:
        raise ValueError(f"callbacks holds {len(checkpointing)} Checkpointing; a run needs exactly one")
    checkpointing[0].run_config = OmegaConf.to_container(config, resolve=True)
    trainer = Trainer(
        **arguments,
        callbacks=[*callbacks, RepackWeights()],
        logger=[instantiate(logger) for logger in config.logger.values() if logger is not None],
        plugins=plugins,
        default_root_dir=_absolute(config.run_dir),
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    _refuse_sweep_of_subprocesses(trainer)
    return trainer


def build_module(
    config: DictConfig, data: ImageDataModule, processes: int, steps_per_epoch: int
) -> ClassificationModule:
    """The model of the configuration and what trains it."""
    model = instantiate(config.model, _convert_="all")
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if config.sync_bn and processes > 1:
        model = convert_sync_batchnorm(model)
    plain = OmegaConf.to_container(config, resolve=True)
    compile = {key: plain["compile"][key] for key in ("mode", "dynamic")} if config.compile.enabled else None
    return ClassificationModule(
        model,
        num_classes=data.num_classes,
        optimizer=plain["optimizer"],
        scheduler=plain["scheduler"],
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        loss=plain["loss"],
        ema=plain["ema"],
        seed=config.seed,
        channels_last=config.channels_last,
        compile=compile,
    )


def _plan(config: DictConfig, trainer: Trainer, data: ImageDataModule) -> int:
    """Work out the accumulation, let an epoch end with a whole update, and return the updates of an epoch."""
    if getattr(data, "num_train_images", None) is None:
        data.prepare_data()
        data.setup("fit")
    plan = plan_batch(
        config.batch.global_size, trainer.num_devices, trainer.num_nodes, data.batch_size, config.batch.accumulate
    )
    order = TrainOrder(
        data.num_train_images, data.batch_size, config.seed, world_size=plan.processes, repeats=data.augment.repeats
    )
    limit = trainer.limit_train_batches
    steps = plan.steps_per_epoch(min(len(order), limit) if isinstance(limit, int) else int(len(order) * limit))
    trainer.accumulate_grad_batches = plan.accumulate
    trainer.limit_train_batches = steps * plan.accumulate
    if trainer.is_global_zero:
        log.info(
            "effective batch %d = %d processes x %d images x %d accumulated, %d updates an epoch",
            plan.global_size, plan.processes, plan.per_device, plan.accumulate, steps,
        )  # fmt: skip
    return steps


def _finish(
    config: DictConfig, run: RunDirectory, trainer: Trainer, module: ClassificationModule, data: ImageDataModule
) -> dict[str, Any]:
    """Test the final weights, raw and EMA, and sum the run up."""
    accelerate([model.eval() for model in _models(module)], trainer.strategy.root_device, config.kernels)
    module.images_evaluated = 0
    trainer.test(module, datamodule=data, verbose=False)
    results = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("test/")}
    checkpointing = next(c for c in trainer.callbacks if isinstance(c, Checkpointing))
    train_log = next((c for c in trainer.callbacks if isinstance(c, TrainLog)), None)
    curves = None
    if run.metrics.exists() and trainer.is_global_zero:
        plot_curves(run.metrics, run.curves)
        curves = str(run.curves)
    return {
        "run_id": config.run_id,
        "name": config.name,
        "model": config.model.model_name if "model_name" in config.model else config.model._target_,
        "epochs": config.epochs,
        "updates": trainer.global_step,
        "test": {key.removeprefix("test/"): value for key, value in results.items()},
        "test_images": module.images_evaluated,
        "test_image_size": getattr(data, "eval_image_size", data.image_size),
        "test_reader": data.test_reader,
        "skipped_images": len(bad_images(data)),
        "best_val": {"score": checkpointing.best_score, "update": checkpointing.best_step},
        "images_per_s": None if train_log is None else train_log.images_per_s(),
        "checkpoint": str(run.checkpoints[-1]) if run.checkpoints else None,
        "best_checkpoint": str(run.path / "checkpoints" / "best.ckpt"),
        "curves": curves,
        "summary": str(run.summary),
        "device": _device_name(trainer.strategy.root_device),
        "processes": trainer.world_size,
        "precision": trainer.precision,
        "versions": {
            "convfirst": __version__, "torch": torch.__version__, "timm": timm.__version__,
            "lightning": lightning.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip


def _models(module: ClassificationModule) -> list[nn.Module]:
    return [module.model] if module.ema is None else [module.model, module.ema.module]


def report(summary: dict[str, Any]) -> None:
    """Print the summary as a short table."""
    table = Table(title=f"{summary['run_id']}: {summary['model']}, {summary['epochs']} epochs", show_header=False)
    test = summary["test"]
    for key, label in (("top1", "top-1"), ("top5", "top-5")):
        if key in test:
            ema = f" (EMA {test[f'{key}_ema']:.2f} %)" if f"{key}_ema" in test else ""
            table.add_row(f"test {label}", f"{test[key]:.2f} %{ema}")
    reader = f" ({summary['test_reader']})" if "test_reader" in summary else ""  # summaries of old have none
    table.add_row("test images", f"{summary['test_images']} at {summary['test_image_size']} px{reader}")
    if summary.get("skipped_images"):
        table.add_row("unreadable images skipped", str(summary["skipped_images"]))
    if summary["images_per_s"]:
        table.add_row("images/s in training", f"{summary['images_per_s']:,.0f}")
    for key in ("checkpoint", "curves"):
        table.add_row(key, str(summary[key]))
    table.add_row("summary", summary["summary"])
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _prepare_directory(run: RunDirectory, config: DictConfig) -> None:
    if config.resume == "never" and run.holds_run():
        if not config.overwrite:
            raise RunExistsError(
                f"resume=never, but {run.path} holds a run; choose another run_id=..., or add overwrite=true, "
                "which moves the old one aside"
            )
        print(f"moved the old run to {run.move_aside()}")
    if config.resume != "never":
        run.check_same_config(config)


def _name_sweep_job(config: DictConfig) -> None:
    """Give each job of a sweep its own run, named after its overrides, so that the same sweep finds it again.

    Of a submission to Slurm the overrides that are swept count alone: where there are none, the run is ``run_id``.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    overrides = sorted(HydraConfig.get().overrides.task)
    if not any(override.startswith("run_id=") for override in overrides):
        keys = {override: override.lstrip("+~").split("=")[0] for override in overrides}
        if (swept := os.environ.get(slurm.SWEPT)) is not None:
            kept = [override for override in overrides if keys[override] in swept.split(",")]
        else:
            kept = [o for o in overrides if keys[o] not in ("run_root", "resume", "overwrite", "launcher")]
        if kept:
            config.run_id = f"{config.run_id}-{hashlib.sha256(' '.join(kept).encode()).hexdigest()[:8]}"


def _refuse_sweep_of_subprocesses(trainer: Trainer) -> None:
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    launcher = trainer.strategy.launcher
    if sweep and launcher is not None and isinstance(trainer.strategy.cluster_environment, LightningEnvironment):
        raise ValueError(
            f"trainer.devices={trainer.num_devices} in a sweep (-m): the processes that Lightning starts would each "
            "run the whole sweep. Start one process a device (torchrun, srun), or run the jobs one by one"
        )


def _is_main_process() -> bool:
    return all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def _absolute(path: str) -> Path:
    return Path(hydra.utils.to_absolute_path(path)) if HydraConfig.initialized() else Path(path).absolute()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def _quieten() -> None:
    if not _is_main_process():
        logging.getLogger("convfirst").setLevel(logging.WARNING)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # between Lightning and torch
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # ours is: by set_position
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # the EMA model
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
