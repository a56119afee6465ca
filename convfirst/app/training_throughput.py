"""How fast the trainer trains, held against a bare PyTorch loop in the same run on the same device."""

import csv
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from convfirst.app.results import REPOSITORY

log = logging.getLogger(__name__)


def training_throughput(config: DictConfig) -> list[dict]:
    """One row for each recipe, data source and number of devices of ``config.training_throughput``.

    Each measurement is a process of its own: ``train.py`` as a user starts it, and the bare loop. ``ratio_to_bare`` is
    the trainer's images/s over the bare loop's, whose random images never leave the device.
    """
    suite = config.training_throughput
    rows = []
    for recipe in suite.recipes:
        for devices in suite.devices:
            for source, overrides in suite.sources.items():
                log.info("%s, %s, %d device(s)", recipe, source, devices)
                arguments = [*_common_overrides(suite, recipe, devices), *overrides, *suite.overrides]
                train_config = hydra.compose("train", overrides=arguments)
                pairs = [
                    (run_bare_loop(train_config, devices, suite), run_trainer(arguments, suite.warmup_steps))
                    for _ in range(suite.repeats)
                ]
                rows.append(_row(recipe, source, devices, train_config, pairs))
    return rows


def _common_overrides(suite: DictConfig, recipe: str, devices: int) -> list[str]:
    return [
        f"recipe={recipe}",
        f"trainer.devices={devices}",
        f"trainer.precision={suite.precision}",
        f"trainer.limit_train_batches={suite.warmup_steps + suite.steps}",
        "trainer.limit_val_batches=2",
        "trainer.limit_test_batches=2",
        f"trainer.log_every_n_steps={suite.interval}",
        f"batch.global_size={suite.batch * devices}",
        f"data.batch_size={suite.batch}",
        f"data.eval_batch_size={suite.batch}",
        f"compile.enabled={str(suite.compile).lower()}",
        "kernels=off",
        "epochs=1",
        "scheduler.warmup_epochs=0",
        "callbacks.checkpoint.every_n_steps=null",
        "logger=csv",
    ]


def run_trainer(overrides: list[str], warmup_steps: int) -> dict:
    """Run train.py in a folder of its own; medians of what it logged after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        _run([str(REPOSITORY / "train.py"), *overrides, f"run_root={folder}", "run_id=benchmark"])
        with open(Path(folder) / "benchmark/metrics.csv", newline="") as file:
            logged = [row for row in csv.DictReader(file) if row["speed/images_per_s"]]
    steady = [row for row in logged if int(row["step"]) > warmup_steps]
    if not steady:
        raise ValueError(f"no speed was logged after warmup_steps={warmup_steps}; the data set gives too few batches")

    def median(column: str) -> float:
        return statistics.median(float(row[column]) for row in steady)

    return {
        "images_per_s": median("speed/images_per_s"),
        "data_wait": median("speed/data_wait"),
        "peak_memory_gib": max(float(row["memory/peak_gib"]) for row in logged),
    }


def run_bare_loop(train_config: DictConfig, devices: int, suite: DictConfig) -> dict:
    """Run `convfirst.app.bare_loop` with the model, batch, precision, compilation and optimiser of ``train_config``."""
    model = OmegaConf.to_container(train_config.model, resolve=True)
    arguments = {
        "model": model.pop("model_name"),
        "model_kwargs": {key: value for key, value in model.items() if key != "_target_"},
        "batch": train_config.data.batch_size,
        "image_size": train_config.data.image_size,
        "precision": train_config.trainer.precision,
        "compile": train_config.compile.enabled,
        "channels_last": train_config.channels_last,
        "optimizer": OmegaConf.to_container(train_config.optimizer, resolve=True),
        "steps": suite.steps,
        "warmup_steps": suite.warmup_steps,
        "interval": suite.interval,
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"] if devices > 1 else []
    output = _run([*launcher, "-m", "convfirst.app.bare_loop", json.dumps(arguments)])
    return json.loads(output.strip().splitlines()[-1])


def _run(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        output = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"exit status {done.returncode} of python {' '.join(arguments)}:\n{output}")
    return done.stdout


def _row(recipe: str, source: str, devices: int, train_config: DictConfig, pairs: list[tuple[dict, dict]]) -> dict:
    bare = statistics.median(bare["images_per_s"] for bare, _ in pairs)
    trainer = {key: statistics.median(trainer[key] for _, trainer in pairs) for key in pairs[0][1]}
    return {
        "name": recipe,
        "model": train_config.model.model_name,
        "data": source,
        "devices": devices,
        "batch": train_config.data.batch_size,
        "image_size": train_config.data.image_size,
        "precision": train_config.trainer.precision,
        "compile": train_config.compile.enabled,
        "ema": train_config.ema is not None,
        "images_per_s": round(trainer["images_per_s"], 1),
        "bare_images_per_s": round(bare, 1),
        "ratio_to_bare": round(trainer["images_per_s"] / bare, 4),
        "data_wait": round(trainer["data_wait"], 4),
        "peak_memory_gib": round(trainer["peak_memory_gib"], 2),
    }
