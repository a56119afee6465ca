"""What is refused before it is submitted, and which signals requeue a job; no Slurm is needed."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from convfirst.app import train
from convfirst.app.slurm import SWEPT, CheckSubmission, check_submission, requeue, without_requeue
from tests.training.helpers import REPOSITORY

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")


def submission(*overrides: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "configs")):
        fixed = [override for override in overrides if "," not in override or "'" in override]
        config = compose("train", overrides=["launcher=slurm", *fixed], return_hydra_config=True)
    with open_dict(config):
        config.hydra.overrides.task = list(overrides)  # a sweep's values aren't in the configuration
    return config


FITS = ["trainer.devices=2", "data.batch_size=32"]
NO_GPUS_PER_NODE = [*FITS, "hydra.launcher.gpus_per_node=null"]
UNBOUND = "+hydra.launcher.additional_parameters.gpu_bind=none"


@pytest.mark.parametrize(
    "overrides",
    [
        FITS,
        [*FITS, "seed=0,1", "optimizer.lr=1e-3,2e-3"],
        [*FITS, "trainer.accelerator=cpu", "hydra.launcher.gpus_per_node=null"],
        [*NO_GPUS_PER_NODE, "hydra.launcher.gres=gpu:h100:2"],
        [*NO_GPUS_PER_NODE, "hydra.launcher.gres='tmpdisk:4,gpu:2'"],
        [*NO_GPUS_PER_NODE, "hydra.launcher.gres='gpu:h100,gpu:a100:1'"],
        [*FITS, "hydra.launcher.gres=gpu:2"],
        [*NO_GPUS_PER_NODE, "hydra.launcher.gpus_per_task=1", UNBOUND],
        [*FITS, "hydra.launcher.gpus_per_task=1", UNBOUND],
        ["hydra.launcher.gpus_per_node=null", "hydra.launcher.gpus_per_task=1"],
        ["trainer.devices=2", "trainer.num_nodes=4", "recipe=convnext_tiny", "hydra.launcher.timeout_min=60"],
    ],
)
def test_what_fits_together_is_submitted(overrides):
    config = submission(*overrides)
    check_submission(config)
    launcher = config.hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node) == (config.trainer.num_nodes, config.trainer.devices)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs of Slurm that do nothing, alone on PATH; what writes others in their place."""

    def write(name: str, script: str) -> None:
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    for name in ("sbatch", "srun", "scontrol"):
        write(name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(SWEPT, "")
    return write


def refusal(*overrides: str) -> str:
    with pytest.raises(SystemExit) as stop:
        CheckSubmission().on_multirun_start(submission(*overrides))
    assert "\n" not in stop.value.code
    return stop.value.code


def test_a_slurm_that_is_not_there_is_one_line(slurm, tmp_path):
    slurm("scontrol", "echo 'Slurmctld(primary) at head is DOWN'; echo; exit 1")
    assert "Slurm can't be reached; scontrol ping says: Slurmctld(primary) at head is DOWN" in refusal(*FITS)
    slurm("scontrol", "echo 'no such file' >&2; echo fatal >&2; exit 1")
    assert "scontrol ping says: no such file fatal" in refusal(*FITS)
    (tmp_path / "sbatch").unlink()
    assert "there is no sbatch on PATH" in refusal(*FITS)


def test_a_slurm_without_scontrol_is_submitted_to(slurm, tmp_path):
    (tmp_path / "scontrol").unlink()
    CheckSubmission().on_multirun_start(submission(*FITS))


@pytest.mark.parametrize(
    ("override", "warning"),
    [
        ("seed=1", ""),
        ("hydra.launcher.max_num_timeout=0", "max_num_timeout=0: at its time limit the run saves and the job is not"),
        ("~hydra.launcher.additional_parameters.requeue", "additional_parameters has no requeue=true"),
    ],
)
def test_what_is_not_requeued_is_said(override, warning, slurm, capsys):
    config = submission(*FITS, override)
    CheckSubmission().on_multirun_start(config)
    assert warning in capsys.readouterr().err
    assert len(without_requeue(config)) == bool(warning)


@pytest.mark.parametrize(
    ("overrides", "swept"),
    [(FITS, ""), ([*FITS, "seed=0,1", "+model.dims=[8,16],[8,8]"], "model.dims,seed")],
)
def test_jobs_are_told_what_is_swept(overrides, swept, slurm, monkeypatch):
    monkeypatch.setenv(SWEPT, "")
    CheckSubmission().on_multirun_start(submission(*overrides))
    assert os.environ[SWEPT] == swept


def test_runs_are_named_after_what_is_swept(monkeypatch):
    """So that a run goes on when its submission is repeated with other resources."""
    hydra = SimpleNamespace(mode=RunMode.MULTIRUN, overrides=SimpleNamespace(task=[]))
    monkeypatch.setattr(train.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(train.HydraConfig, "get", lambda: hydra)

    def name(swept: str, *overrides: str) -> str:
        monkeypatch.setenv(SWEPT, swept)
        hydra.overrides.task, config = list(overrides), OmegaConf.create({"run_id": "digits"})
        train._name_sweep_job(config)
        return config.run_id

    assert name("", "trainer.num_nodes=4", "recipe=digits") == name("", "trainer.num_nodes=2") == "digits"
    first = name("seed", "seed=1", "trainer.num_nodes=4")
    assert first == name("seed", "trainer.num_nodes=2", "seed=1") != name("seed", "seed=2", "trainer.num_nodes=4")
    assert name("seed", "seed=1", "run_id=mine") == "digits"  # as given: composed before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=auto"], "trainer.devices=auto: a submission needs the number"),
        (["trainer.devices=1,2"], "trainer.devices is swept"),
        (["hydra.launcher.tasks_per_node=8"], "hydra.launcher.tasks_per_node=8 must be trainer.devices=1"),
        (["hydra.launcher.gpus_per_node=8"], "hydra.launcher.gpus_per_node=8 must be trainer.devices=1"),
        (["hydra.launcher.nodes=2"], "hydra.launcher.nodes=2 must be trainer.num_nodes=1"),
        (["trainer.accelerator=cpu"], "add hydra.launcher.gpus_per_node=null"),
        (
            ["hydra.launcher.cpus_per_task=4", "data.num_workers=4"],
            "cpus_per_task=4 must be more than data.num_workers=4",
        ),
        (
            [*NO_GPUS_PER_NODE, "hydra.launcher.gres=gpu:h100:4"],
            "gres=gpu:h100:4 has 4 GPUs of a node, trainer.devices=2",
        ),
        ([*FITS, "hydra.launcher.gres=gpu"], "gres=gpu has 1 GPUs of a node, trainer.devices=2"),
        ([*NO_GPUS_PER_NODE, "hydra.launcher.gres=gpu:a:b"], "gres=gpu:a:b: accepted for GPUs are gpu:COUNT"),
        (
            [*NO_GPUS_PER_NODE, "+hydra.launcher.additional_parameters.gres=gpu:2"],
            "additional_parameters.gres=gpu:2: ask for GPUs by hydra.launcher.gpus_per_node=2 or by",
        ),
        ([*NO_GPUS_PER_NODE, "hydra.launcher.gres=tmpdisk:4"], "gpus_per_node=None must be trainer.devices=2"),
        ([*NO_GPUS_PER_NODE, "hydra.launcher.gpus_per_task=2"], "gpus_per_task=2 must be null or 1"),
        ([*FITS, "hydra.launcher.gpus_per_task=2"], "gpus_per_task=2 must be null or 1"),
        (
            [*FITS, "hydra.launcher.gpus_per_task=1"],
            r"trainer.devices=2 looks for 2; add \+hydra.launcher.additional_parameters.gpu_bind=none",
        ),
        (
            ["trainer.accelerator=cpu", "hydra.launcher.gpus_per_node=null", "hydra.launcher.gres=gpu:1"],
            "add hydra.launcher.gres=null",
        ),
        (["hydra.launcher.signal_delay_s=0"], "signal_delay_s=0 must be at least 1"),
        (["hydra.launcher.max_num_timeout=-1"], "max_num_timeout=-1 must be at least 0"),
        (["hydra.launcher.additional_parameters.requeue=false"], "additional_parameters.requeue=False must be true"),
        (["hydra.launcher.timeout_min=3"], "signal_delay_s=180 leaves nothing of hydra.launcher.timeout_min=3"),
        (["trainer.devices=2"], r"2 devices x 1 nodes x data.batch_size=64 = 128 images"),
    ],
)
def test_what_does_not_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        check_submission(submission(*overrides))


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Stands for Slurm's; what it was called with, `preempt_time` being what it shows."""

    class Scontrol:
        preempt_time, fails = "None", False

        def calls(self) -> list[str]:
            log = tmp_path / "calls"
            return log.read_text().splitlines() if log.exists() else []

        def install(self) -> None:
            program = tmp_path / "scontrol"
            program.write_text(f"""#!{sys.executable}
import sys
open({str(tmp_path / "calls")!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
print("JobId=7 JobState=RUNNING PreemptTime={self.preempt_time} AccrueTime=x")
sys.exit("Requested operation is presently disabled" if {self.fails} and sys.argv[1] == "requeue" else 0)
""")
            program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return Scontrol()


@pytest.mark.parametrize(
    ("signum", "preempt_time", "requeued"),
    [
        (signal.SIGUSR1, "None", True),
        (signal.SIGUSR2, "None", True),
        (signal.SIGTERM, "2026-01-02T03:04:05", True),
        (signal.SIGTERM, "None", False),  # scancel
        (signal.SIGINT, "None", False),
    ],
)
def test_which_signals_requeue(scontrol, signum, preempt_time, requeued):
    scontrol.preempt_time = preempt_time
    scontrol.install()
    requeue(signum)
    assert ("requeue 7" in scontrol.calls()) == requeued


def test_nothing_is_requeued_outside_a_job(scontrol, monkeypatch):
    scontrol.install()
    monkeypatch.delenv("SLURM_JOB_ID")
    requeue(signal.SIGUSR1)
    assert scontrol.calls() == []


def test_what_slurm_answers_is_shown(scontrol, capsys):
    scontrol.fails = True
    scontrol.install()
    requeue(signal.SIGUSR1)
    assert "job 7 was not requeued (Requested operation is presently disabled)" in capsys.readouterr().err


def test_submitit_requeues_its_own_jobs(scontrol, monkeypatch):
    scontrol.install()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda *arguments: calls.append(arguments))
    try:
        requeue(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert calls == [(signal.SIGUSR2, None)]
    assert scontrol.calls() == []
