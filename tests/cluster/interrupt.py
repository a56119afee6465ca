"""Submits a training run to the Slurm of the environment, interrupts it, and waits for its end.

    python interrupt.py sbatch|submitit RUN_ROOT OVERRIDES...

Prints, as JSON, how often Slurm restarted the job and after which updates the run was saved.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def show(job: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "show", "job", "--oneliner", job)))


def wait(what: str, condition: Callable[[], object], seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not after {seconds} s\n{slurm('squeue', '--long')}")
        time.sleep(0.2)


def updates(run: Path) -> int:
    """The number of updates that the run has written down."""
    metrics = run / "metrics.csv"
    return (
        max((int(line.split(",")[0]) for line in metrics.read_text().splitlines()[1:]), default=0)
        if metrics.exists()
        else 0
    )


def wait_for_requeue(job: str, restarts: int) -> None:
    wait("requeue", lambda: show(job)["Restarts"] == str(restarts) and show(job)["JobState"] == "PENDING")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes after a requeue


def submit(run_root: Path, overrides: list[str]) -> tuple[str, Path]:
    """Submits the batch script; the job and what it prints."""
    log = run_root / "job.log"
    resources = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]
    os.environ["PYTHON"] = sys.executable
    return slurm("sbatch", "--parsable", *resources, "scripts/train.sbatch", *overrides), log


def warn(job: str, run: Path) -> None:
    """As before the time limit."""
    wait("update 2", lambda: updates(run) >= 2)
    slurm("scancel", "--signal=USR1", job)
    wait_for_requeue(job, 1)


def preempt(job: str, run: Path) -> None:
    """By a job that is more urgent, after `warn` or `rehearse`."""
    before = updates(run)
    wait("2 more updates", lambda: updates(run) >= before + 2)
    urgent = slurm("sbatch", "--parsable", "--partition=urgent", "--ntasks=4", "--output=/dev/null", "--wrap=true")
    wait("the other job's end", lambda: show(urgent)["JobState"] == "COMPLETED")
    wait_for_requeue(job, 2)


def rehearse(run: Path) -> str:
    """What submitit's job._interrupt() does; returns the job."""
    wait("update 2", lambda: updates(run) >= 2)
    job = slurm("squeue", "--noheader", "--format=%i")
    slurm("scancel", "--signal=TERM", job)
    slurm("scancel", "--signal=USR2", job)
    wait_for_requeue(job, 1)
    return job


def wait_for_end(job: str, log: Path) -> None:
    wait("the job's end", lambda: show(job)["JobState"] in ENDED)
    output = log.read_text()
    print(output)
    if show(job)["JobState"] != "COMPLETED":
        sys.exit(f"the job ended as {show(job)['JobState']}")
    saved = [int(step) for step in re.findall(r": saved \S*step_(\d+)\.ckpt", output)]
    print(json.dumps({"restarts": int(show(job)["Restarts"]), "saved": saved}))


def main() -> None:
    way, run_root, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    run = run_root / "digits"
    os.chdir(REPOSITORY)
    if way == "sbatch":
        job, log = submit(run_root, overrides)
        warn(job, run)
        preempt(job, run)
        wait_for_end(job, log)
        return
    cpus = ["trainer.devices=2", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
    launcher = subprocess.Popen([sys.executable, "train.py", "launcher=slurm", *overrides, *cpus], stdout=sys.stderr)
    try:
        job = rehearse(run)
        preempt(job, run)
        wait_for_end(job, run_root / "slurm" / job / f"{job}_0_log.out")
        if launcher.wait(timeout=100) != 0:
            sys.exit("the launcher failed")
    finally:
        launcher.kill()


if __name__ == "__main__":
    main()
