"""Slurm: refusing a submission that doesn't fit together, and requeueing the job of a run that was told to stop."""

import os
import re
import shutil
import signal
import subprocess
import sys
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from convfirst.training import StopRequested, plan_batch
from convfirst.training.guard import REQUEUE_SIGNALS

# Keys that differ between the jobs of a submission, separated by commas; a job can't tell them from its others.
SWEPT = "CONVFIRST_SWEPT"


class CheckSubmission(Callback):
    """Hydra callback of ``launcher=slurm``: ends the program with one message before anything is submitted.

    Otherwise it tells the jobs, by an environment variable that Slurm hands on, what is swept.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check_submission(config)
            check_slurm()
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")  # Hydra turns a callback's Exception into a warning and goes on
        for text in without_requeue(config):
            print(f"warning: {text}", file=sys.stderr, flush=True)
        os.environ[SWEPT] = ",".join(sorted(_swept(config)))


def check_submission(config: DictConfig) -> None:
    """Check that tasks, GPUs, nodes, CPUs and times of ``config.hydra.launcher`` are those the trainer will want.

    Raises:
        ValueError: they aren't; the message names both settings.
    """
    launcher, trainer = config.hydra.launcher, config.trainer
    swept = _swept(config)
    for key in ("trainer", "trainer.devices", "trainer.num_nodes", "data.num_workers"):
        if key in swept:
            raise ValueError(f"{key} is swept, but the jobs of a sweep get the same resources; submit a sweep for each")
    if isinstance(trainer.devices, bool) or not isinstance(trainer.devices, int) or trainer.devices < 1:
        raise ValueError(f"trainer.devices={trainer.devices}: a submission needs the number of GPUs of a node")
    _check_equal("hydra.launcher.nodes", launcher.nodes, "trainer.num_nodes", trainer.num_nodes)
    _check_equal("hydra.launcher.tasks_per_node", launcher.tasks_per_node, "trainer.devices", trainer.devices)
    _check_gpus(launcher, trainer)
    if launcher.cpus_per_task is None or launcher.cpus_per_task <= config.data.num_workers:
        raise ValueError(
            f"hydra.launcher.cpus_per_task={launcher.cpus_per_task} must be more than "
            f"data.num_workers={config.data.num_workers}: a process computes beside its workers"
        )
    _check_requeue(launcher)
    if launcher.signal_delay_s >= 60 * launcher.timeout_min:
        raise ValueError(
            f"hydra.launcher.signal_delay_s={launcher.signal_delay_s} leaves nothing of "
            f"hydra.launcher.timeout_min={launcher.timeout_min}"
        )
    if not swept & {"recipe", "data", "data.batch_size", "batch.global_size", "batch.accumulate"}:
        plan_batch(
            config.batch.global_size,
            trainer.devices,
            trainer.num_nodes,
            config.data.batch_size,
            config.batch.accumulate,
        )


def check_slurm() -> None:
    """Check that jobs can be submitted from here.

    Raises:
        OSError: Slurm's programs are missing, or its controller doesn't answer; the message says which.
    """
    missing = [program for program in ("sbatch", "srun") if shutil.which(program) is None]
    if missing:
        raise OSError(
            f"launcher=slurm: there is no {' and no '.join(missing)} on PATH; submit on a machine of the cluster, "
            "or leave launcher=slurm out to train on this one"
        )
    if shutil.which("scontrol") is None:  # sbatch may be a script that submits elsewhere
        return
    shown, error = _scontrol("ping")
    if error:
        reason = shown.partition("\n")[0] or " ".join(error.split())
        raise OSError(f"launcher=slurm: Slurm can't be reached; scontrol ping says: {reason}")


def without_requeue(config: DictConfig) -> list[str]:
    """One text for each setting of ``config.hydra.launcher`` with which a job that could go on isn't requeued."""
    launcher, texts = config.hydra.launcher, []
    if launcher.max_num_timeout == 0:
        texts.append(
            "hydra.launcher.max_num_timeout=0: at its time limit the run saves and the job is not requeued; "
            "submit it again to go on"
        )
    if "requeue" not in launcher.additional_parameters:
        texts.append(
            "hydra.launcher.additional_parameters has no requeue=true: at its time limit and when it is preempted "
            "the job is requeued only if the cluster's JobRequeue lets it"
        )
    return texts


def _check_gpus(launcher: DictConfig, trainer: DictConfig) -> None:
    gres = _gpus_of(launcher.gres)
    if trainer.accelerator == "cpu":
        for key in ("gpus_per_node", "gpus_per_task", "gres"):
            value = launcher[key]
            if value is not None and (key != "gres" or gres is not None):
                raise ValueError(
                    f"trainer.accelerator=cpu, but hydra.launcher.{key}={value}; add hydra.launcher.{key}=null"
                )
        return
    for key in ("gres", "gpus", "gpus_per_node", "gpus_per_task"):
        if key in launcher.additional_parameters:
            raise ValueError(
                f"hydra.launcher.additional_parameters.{key}={launcher.additional_parameters[key]}: ask for GPUs by "
                f"hydra.launcher.gpus_per_node={trainer.devices} or by hydra.launcher.gpus_per_node=null "
                f"hydra.launcher.gres=gpu:TYPE:{trainer.devices}"
            )
    if launcher.gpus_per_node is not None or (launcher.gpus_per_task is None and gres is None):
        _check_equal("hydra.launcher.gpus_per_node", launcher.gpus_per_node, "trainer.devices", trainer.devices)
    if gres is not None and gres != trainer.devices:
        raise ValueError(
            f"hydra.launcher.gres={launcher.gres} has {gres} GPUs of a node, trainer.devices={trainer.devices}: "
            "they must be equal, one GPU for each process"
        )
    if launcher.gpus_per_task is not None:
        _check_gpus_per_task(launcher, trainer.devices)


def _check_gpus_per_task(launcher: DictConfig, devices: int) -> None:
    if launcher.gpus_per_task != 1:
        raise ValueError(
            f"hydra.launcher.gpus_per_task={launcher.gpus_per_task} must be null or 1: one GPU for each process"
        )
    parameters = launcher.additional_parameters
    bound = parameters.get("gpu_bind", parameters.get("gpu-bind"))
    if devices > 1 and bound != "none":
        raise ValueError(
            f"hydra.launcher.gpus_per_task=1 lets a process see its own GPU only, and trainer.devices={devices} "
            f"looks for {devices}; add +hydra.launcher.additional_parameters.gpu_bind=none, or give "
            "hydra.launcher.gpus_per_node instead"
        )


def _gpus_of(gres: str | None) -> int | None:
    """GPUs of a node in sbatch's --gres, a list of name[[:type]:count]; None if it has no entry `gpu`."""
    counts = []
    for entry in (gres or "").split(","):
        name, *rest = entry.strip().split(":")
        if name != "gpu":
            continue
        if len(rest) > 2 or "" in rest or (len(rest) == 2 and not rest[1].isdecimal()):
            raise ValueError(f"hydra.launcher.gres={gres}: accepted for GPUs are gpu:COUNT and gpu:TYPE:COUNT")
        counts.append(int(rest[-1]) if rest and rest[-1].isdecimal() else 1)
    return sum(counts) if counts else None


def _check_requeue(launcher: DictConfig) -> None:
    if launcher.signal_delay_s < 1:
        raise ValueError(
            f"hydra.launcher.signal_delay_s={launcher.signal_delay_s} must be at least 1: the seconds before its time "
            "limit in which a run saves and is requeued"
        )
    if launcher.max_num_timeout < 0:
        raise ValueError(
            f"hydra.launcher.max_num_timeout={launcher.max_num_timeout} must be at least 0: "
            "how often a job is requeued at its time limit"
        )
    requeue = launcher.additional_parameters.get("requeue", True)
    if requeue is not True:
        raise ValueError(
            f"hydra.launcher.additional_parameters.requeue={requeue} must be true: sbatch takes no other value, and a "
            "run goes on after its time limit or a preemption only if its job may be requeued"
        )


def _swept(config: DictConfig) -> set[str]:
    """Keys that have another value in each job."""
    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    return swept | set(config.hydra.sweeper.get("params") or ())


def _check_equal(name: str, value: Any, other_name: str, other: Any) -> None:
    if value != other:
        raise ValueError(f"{name}={value} must be {other_name}={other}: one task and one GPU for each process")


def in_job() -> bool:
    """Whether this process is a task of a Slurm job (not a worker of torchrun inside one)."""
    return "SLURM_JOB_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def watch() -> None:
    """Let a signal that comes before the training's own handlers stand, or after them, end the run as `StopRequested`.

    submitit, which has handlers of its own, keeps them.
    """
    if in_job() and not _under_submitit():
        for signum in (signal.SIGTERM, *REQUEUE_SIGNALS):
            signal.signal(signum, _stop)


def unwatch() -> None:
    """Let no signal disturb a process that is ending: requeueing, for one, sends SIGTERM to all of the job's."""
    if in_job() and not _under_submitit():
        for signum in (signal.SIGTERM, *REQUEUE_SIGNALS):
            signal.signal(signum, signal.SIG_IGN)


def _stop(signum: int, frame: Any) -> None:
    raise StopRequested(signum)


def requeue(signum: int) -> None:
    """Put this job back into the queue if `signum`, which stopped its run, means that; only one process may call it.

    SIGUSR1 and SIGUSR2, the warning before the time limit, do. SIGTERM does where Slurm says that it is preempting the
    job: a job that ends within its grace time isn't requeued by Slurm itself. After scancel nothing is requeued.
    """
    if not in_job():
        return
    job = os.environ["SLURM_JOB_ID"]
    if signum not in REQUEUE_SIGNALS and not (signum == signal.SIGTERM and _preempted(job)):
        return
    if _under_submitit():  # it counts time-outs and renews what the job reads
        number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
        signal.getsignal(number)(number, None)
        return
    print(f"requeueing job {job}", flush=True)  # before the call, which ends this process
    error = _scontrol("requeue", job)[1]
    if error:
        print(f"job {job} was not requeued ({error}); submit it again to go on", file=sys.stderr, flush=True)


def _under_submitit() -> bool:
    return "SUBMITIT_EXECUTOR" in os.environ


def _preempted(job: str) -> bool:
    shown, error = _scontrol("show", "job", "--oneliner", job)
    if error:
        print(f"Slurm doesn't say whether it preempts job {job} ({error}); not requeued", file=sys.stderr, flush=True)
    time = re.search(r"\bPreemptTime=(\S+)", shown)
    return time is not None and time[1] not in ("None", "N/A", "Unknown")


def _scontrol(*arguments: str) -> tuple[str, str]:
    """What scontrol printed, and why it failed or ""."""
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout, (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""
