"""Two processes under torchrun and a real Slurm, killed, warned, preempted: the run ends as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from convfirst.data.sample_tree import SampleTree
from tests.training.helpers import REPOSITORY, TINY, assert_same_weights, last_checkpoint, losses

HERE = Path(__file__).parent
# 12 updates of two processes
TWO = [
    *(o for o in TINY if not o.startswith(("data.batch_size", "trainer.limit_train_batches"))),
    "data.batch_size=16",
    "batch.global_size=32",
    "trainer.limit_train_batches=4",
]
pytestmark = pytest.mark.timeout(900)  # on a busy machine
SLOW = "+callbacks.slow={_target_:tests.cluster.callbacks.Slow,seconds:0.5}"
NO_SLURM = None if shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("munged") else "no Slurm here"
if NO_SLURM is None and os.geteuid() != 0:
    NO_SLURM = "slurmd starts jobs as root only"


def environment() -> dict[str, str]:
    # the last as README says: a restarted worker may read its predecessor's addresses from the shared store
    # (pytorch#135712)
    own = {"PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "offline", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, **own}


def torchrun(run_root: Path, *overrides: str, restarts: int = 0) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, *launcher, "train.py", *TWO, "trainer.devices=2", f"run_root={run_root}", *overrides]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    torchrun(root)
    return root / "digits"


def check_same(whole: Path, run: Path) -> None:
    assert len(losses(whole)) == 12 + 3  # updates and validations
    assert losses(run) == losses(whole)
    a, b = last_checkpoint(whole), last_checkpoint(run)
    assert_same_weights(a["state_dict"], b["state_dict"])
    torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)
    assert a["callbacks"]["Checkpointing"] == b["callbacks"]["Checkpointing"]  # position and best score
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, run)]
    assert summaries[0]["test"] == summaries[1]["test"]


def test_torchrun_replaces_a_killed_worker(tmp_path, whole):
    output = torchrun(
        tmp_path, "+callbacks.kill={_target_:tests.cluster.callbacks.KilledOnce,rank:1,step:5}", restarts=1
    )
    assert "resuming from" in output
    check_same(whole, tmp_path / "digits")


@pytest.mark.skipif(NO_SLURM is not None, reason=str(NO_SLURM))
@pytest.mark.parametrize("way", ["sbatch", "submitit"])
def test_slurm_requeues_a_run_that_goes_on(tmp_path, whole, way):
    """First sbatch's is warned by SIGUSR1, submitit's by SIGTERM and SIGUSR2, then another job preempts it."""
    if way == "submitit":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    options = [*TWO, f"run_root={tmp_path}", SLOW, "logger=wandb"]
    script = [
        str(HERE / "slurm_single_node.sh"),
        sys.executable,
        str(HERE / "interrupt.py"),
        way,
        str(tmp_path),
        *options,
    ]
    done = subprocess.run(script, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["restarts"] == 2, done.stdout
    assert all(0 < step < 12 for step in report["saved"]), done.stdout
    check_same(whole, tmp_path / "digits")
    wandb_runs = list((tmp_path / "digits" / "wandb").glob("offline-run-*"))
    assert len(wandb_runs) == report["restarts"] + 1
    assert {path.name.rsplit("-", 1)[1] for path in wandb_runs} == {(tmp_path / "digits" / "wandb_id").read_text()}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_loaders_workers_alone(tmp_path, signum):
    """As the terminal and Slurm send it."""
    SampleTree(num_classes=5, train_images=26, val_images=2, min_side=40, max_side=64).write(tmp_path / "tree")
    changed = ("data.image_size", "data.batch_size", "batch.global_size", "trainer.limit_train_batches")
    options = [
        *(o for o in TINY if not o.startswith(changed)),
        "data.image_size=32",
        "data.batch_size=8",
        "batch.global_size=8",
    ]
    options += ["data=image_folder", f"data.root={tmp_path / 'tree'}", "data.num_workers=2", "augment=light", SLOW]
    command = [sys.executable, "train.py", *options, f"run_root={tmp_path}", "callbacks.checkpoint.every_n_steps=null"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        while not (tmp_path / "digits/metrics.csv").exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signum)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum, output
    assert f"{signum.name}: saved" in output
