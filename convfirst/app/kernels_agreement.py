"""Whether training with fused blocks ends where training without them does, within the noise of seeds."""

import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from convfirst.app.results import REPOSITORY, environment, kept_rows
from convfirst.data.sample_tree import SampleTree
from convfirst.training.csv_log import read_rows

log = logging.getLogger(__name__)

PLAIN, OURS = "off", "with_kernels"


def kernels_agreement(config: DictConfig) -> Iterator[dict]:
    """Rows of runs of ``train.py``, a pair for each workload and seed, then one row of each workload that compares.

    The runs of ``config.kernels_agreement`` share the device, ``jobs`` at a time. A run's row has its test top1 (%),
    test loss and curve [[update, training loss], ...]; a comparison's row has means over seeds, their difference, and
    the noise that seeds alone explain (`compare`). The curves and ends are drawn beside the output file, as a PNG.
    After ``seconds`` (null: never) runs still going are stopped; then those seeds count whose both runs have ended.
    With ``config.append`` runs that the output file has already, of the same overrides, are not made again, nor are
    their rows among the results; comparisons take them in.

    Raises:
        RuntimeError: a run failed; the message ends with what it printed.
    """
    suite, output = config.kernels_agreement, REPOSITORY / Path(config.output or "results/kernels-agreement.json")
    end = time.monotonic() + (math.inf if suite.seconds is None else suite.seconds)
    rows = runs_made(config, output) if config.append else []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        SampleTree(**suite.tree).write(tree, os.cpu_count())
        made = {_identity(row) for row in rows}
        missing = [run for run in _commands(suite, tree, Path(folder)) if _identity(run[0]) not in made]
        for row in _run_all(missing, suite.jobs, end):
            log.info("%s", json.dumps({key: value for key, value in row.items() if key != "curve"}))
            rows.append(row)
            yield row
    pairs = pairs_of(rows)
    for workload in dict.fromkeys(row["workload"] for row in pairs):
        yield compare([row for row in pairs if row["workload"] == workload])
    if pairs:
        plot(pairs, output.with_suffix(".png"))


def pairs_of(rows: list[dict]) -> list[dict]:
    """Rows of those workloads and seeds that have a run with kernels and one without."""
    ended = Counter((row["workload"], row["seed"]) for row in rows)
    return [row for row in rows if ended[row["workload"], row["seed"]] == 2]


def _commands(suite: DictConfig, tree: Path, folder: Path) -> Iterator[tuple[dict, list[str]]]:
    """What a run is, and the overrides of train.py that make it."""
    for workload, options in suite.workloads.items():
        for seed in options.seeds:
            for kernels in (PLAIN, suite.kernels):
                run_id = f"{workload}-{seed}-{kernels}"
                overrides = [override.replace("{tree}", str(tree)) for override in options.overrides]
                common = [f"recipe={options.recipe}", f"run_root={folder}", f"run_id={run_id}", f"seed={seed}"]
                common += [f"kernels={kernels}", f"trainer.precision={suite.precision}", "logger=csv"]
                common += ["callbacks.checkpoint.every_n_steps=null"]
                about = {"workload": workload, "kernels": kernels, "seed": seed, "precision": suite.precision}
                about["overrides"] = [f"recipe={options.recipe}", *options.overrides]
                yield about | {"run": str(folder / run_id)}, [*overrides, *common]


def runs_made(config: DictConfig, output: Path) -> list[dict]:
    """Rows of runs that the suite asks for and the output file has."""
    asked = {_identity(run) for run, _ in _commands(config.kernels_agreement, Path(), Path())}
    return [row for row in kept_rows(output, environment()) if "curve" in row and _identity(row) in asked]


def _identity(run: dict) -> tuple:
    """What tells a run from others."""
    return tuple(str(run[key]) for key in ("workload", "kernels", "seed", "precision", "overrides"))


def _run_all(commands: list[tuple[dict, list[str]]], jobs: int, end: float) -> Iterator[dict]:
    """Rows of the runs that end before ``end``, of `time.monotonic`."""
    waiting, running = list(commands), {}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                about, overrides = waiting.pop(0)
                command = [sys.executable, str(REPOSITORY / "train.py"), *overrides]
                with open(f"{about['run']}.log", "w") as output:
                    process = subprocess.Popen(
                        command, cwd=REPOSITORY, env=variables, stdout=output, stderr=subprocess.STDOUT
                    )
                running[process] = about
            ended = next((process for process in running if process.poll() is not None), None)
            if ended is not None:
                yield _row(running.pop(ended), ended.returncode)
            elif time.monotonic() < end:
                time.sleep(0.1)
            else:
                log.warning("out of time: %d runs not begun, stopped: %s", len(waiting), _progress(running))
                return
    finally:
        for process in running:
            process.kill()
            process.wait()  # it writes into the folder that is removed next


def _progress(running: dict) -> str:
    steps = {}
    for about in running.values():
        metrics = Path(about["run"]) / "metrics.csv"
        rows = read_rows(metrics) if metrics.exists() else []
        steps[Path(about["run"]).name] = max((int(row["step"]) for row in rows if row.get("step")), default=0)
    return ", ".join(f"{run} after update {step}" for run, step in steps.items()) or "none"


def _row(about: dict, returncode: int) -> dict:
    run = Path(about.pop("run"))
    if returncode:
        printed = Path(f"{run}.log").read_text().splitlines()[-30:]
        raise RuntimeError(f"{about} ended with exit status {returncode}:\n" + "\n".join(printed))
    summary = json.loads((run / "summary.json").read_text())
    logged = [row for row in read_rows(run / "metrics.csv") if row.get("train/loss")]
    test = summary["test"]
    return {
        **about,
        "model": summary["model"],
        "updates": summary["updates"],
        "top1": round(test["top1"], 3),
        "loss": round(test["loss"], 5),
        "test_images": summary["test_images"],
        "curve": [[int(row["step"]), round(float(row["train/loss"]), 5)] for row in logged],
    }


def compare(rows: list[dict]) -> dict:
    """One row from the runs of a workload, with and without kernels.

    ``top1_noise`` and ``loss_noise`` are two standard errors of the difference of means, from the spread over seeds;
    top-1's is at least one image. ``agree`` says whether both differences are within them; None for a single seed.
    """
    first = rows[0]
    row = {key: first[key] for key in ("workload", "model", "precision", "updates")} | {"kernels": OURS}
    row["seeds"] = len({run["seed"] for run in rows})
    for metric, least in (("top1", 100 / first["test_images"]), ("loss", 0.0)):
        plain = [run[metric] for run in rows if run["kernels"] == PLAIN]
        ours = [run[metric] for run in rows if run["kernels"] != PLAIN]
        spread = [statistics.variance(values) / len(values) if len(values) > 1 else 0.0 for values in (plain, ours)]
        row[metric], row[f"plain_{metric}"] = (round(statistics.mean(values), 4) for values in (ours, plain))
        row[f"{metric}_difference"] = round(statistics.mean(ours) - statistics.mean(plain), 4)
        row[f"{metric}_noise"] = round(max(least, 2 * sum(spread) ** 0.5), 4)
    within = all(abs(row[f"{metric}_difference"]) <= row[f"{metric}_noise"] for metric in ("top1", "loss"))
    return row | {"agree": within if row["seeds"] > 1 else None}


def plot(rows: list[dict], target: Path) -> None:
    """Draw each workload's training losses and where its runs ended, both kinds of run over each other."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(10, 3.2 * len(workloads)), layout="constrained")
    grid = figure.subplots(len(workloads), 2, squeeze=False)
    for (curves, ends), workload in zip(grid, workloads, strict=True):
        for kind, colour, marker in ((PLAIN, "tab:gray", "o"), (OURS, "tab:red", "x")):
            runs = [row for row in rows if row["workload"] == workload and (row["kernels"] == PLAIN) == (kind == PLAIN)]
            for run in runs:
                first = run is runs[0]
                label = ("plain PyTorch" if kind == PLAIN else "with kernels") if first else None
                curves.plot(*zip(*run["curve"], strict=True), color=colour, linewidth=0.9, alpha=0.6, label=label)
            ends.scatter([run["loss"] for run in runs], [run["top1"] for run in runs], color=colour, marker=marker)
        curves.set(title=workload, xlabel="update", ylabel="training loss")
        ends.set(title="where each seed ended", xlabel="test loss", ylabel="test top-1 (%)")
        ends.locator_params(axis="x", nbins=5)  # their labels must not touch
        curves.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
