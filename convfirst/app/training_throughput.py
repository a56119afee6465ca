"""How fast the trainer trains, held against a bare PyTorch loop in the same run on the same device."""

import csv
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from convfirst.app.results import REPOSITORY

log = logging.getLogger(__name__)


def training_throughput(config: DictConfig) -> Iterator[dict]:
    """One row for each recipe, number of devices and data source of ``config.training_throughput``.

    Each measurement has processes of its own, one a device: ``train.py`` as a user starts it, and the bare loop, which
    has no source and runs once in each repeat, before the sources' trainers. ``ratio_to_bare`` is the trainer's
    images/s over the bare loop's, whose random images never leave the device; ``config.training_throughput.bare=false``
    leaves both out. On several devices the trainer's strategy is ``config.training_throughput.strategy``, the bare
    loop's always DDP.
    """
    suite = config.training_throughput
    for recipe in suite.recipes:
        for devices in suite.devices:
            yield from _compare(suite, recipe, devices)


def _compare(suite: DictConfig, recipe: str, devices: int) -> Iterator[dict]:
    common = _common_overrides(suite, recipe, devices)
    arguments = {source: [*common, *overrides, *suite.overrides] for source, overrides in suite.sources.items()}
    configs = {source: hydra.compose("train", overrides=given) for source, given in arguments.items()}
    pairs = {source: [] for source in arguments}
    for repeat in range(suite.repeats):
        bare: dict[str, dict] = {}
        for source, train_config in configs.items():
            loop = json.dumps(_bare_arguments(train_config, suite))
            if loop not in bare:
                bare[loop] = run_bare_loop(loop, devices) if suite.bare else None
                log.info("%s, bare loop, %d device(s): %s", recipe, devices, bare[loop])
            pairs[source].append((bare[loop], run_trainer(arguments[source], devices, suite.warmup_steps)))
            log.info("%s, %s, %d device(s): %s", recipe, source, devices, pairs[source][-1][1])
            if repeat == suite.repeats - 1:
                yield _row(recipe, source, devices, suite.strategy, train_config, pairs[source])


def _common_overrides(suite: DictConfig, recipe: str, devices: int) -> list[str]:
    return [
        f"recipe={recipe}",
        *([f"trainer={suite.strategy}"] if devices > 1 else []),
        f"trainer.devices={devices}",
        f"trainer.precision={suite.precision}",
        f"trainer.limit_train_batches={suite.warmup_steps + suite.steps}",
        "trainer.limit_val_batches=0",
        "trainer.limit_test_batches=0",
        f"trainer.log_every_n_steps={suite.interval}",
        f"batch.global_size={suite.batch * devices}",
        f"data.batch_size={suite.batch}",
        f"data.eval_batch_size={suite.batch}",
        f"compile.enabled={str(suite.compile).lower()}",
        f"kernels={suite.kernels}",
        "epochs=1",
        "scheduler.warmup_epochs=0",
        "callbacks.checkpoint.every_n_steps=null",
        "logger=csv",
    ]


def run_trainer(overrides: list[str], devices: int, warmup_steps: int) -> dict:
    """Run train.py in a folder of its own, one process a device; medians of what it logged after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        run = [f"run_root={folder}", "run_id=benchmark"]
        _run([*_launcher(devices), str(REPOSITORY / "train.py"), *overrides, *run])
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


def run_bare_loop(arguments: str, devices: int) -> dict:
    """Run `convfirst.app.bare_loop` with ``arguments`` (JSON), one process a device."""
    output = _run([*_launcher(devices), "-m", "convfirst.app.bare_loop", arguments])
    return json.loads(output.strip().splitlines()[-1])


def _launcher(devices: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"] if devices > 1 else []


def _bare_arguments(train_config: DictConfig, suite: DictConfig) -> dict:
    """The model, batch, precision, compilation and optimiser of ``train_config``."""
    model = OmegaConf.to_container(train_config.model, resolve=True)
    left_out = {"_target_", "unused", *model.get("unused", [])}
    return {
        "model": model.pop("model_name"),
        "model_kwargs": {key: value for key, value in model.items() if key not in left_out},
        "batch": train_config.data.batch_size,
        "image_size": train_config.data.image_size,
        "precision": train_config.trainer.precision,
        "compile": train_config.compile.enabled,
        "channels_last": train_config.channels_last,
        "kernels": train_config.kernels,
        "optimizer": OmegaConf.to_container(train_config.optimizer, resolve=True),
        "steps": suite.steps,
        "warmup_steps": suite.warmup_steps,
        "interval": suite.interval,
    }


def _run(arguments: list[str]) -> str:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *arguments], cwd=REPOSITORY, **pipes) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.terminate()  # a killed torchrun would leave its workers on the GPUs
            try:
                process.communicate(timeout=60)  # it gives them 30 seconds
            finally:
                process.kill()
            raise
    if process.returncode:
        tail = "\n".join((output + errors).splitlines()[-30:])
        raise RuntimeError(f"exit status {process.returncode} of python {' '.join(arguments)}:\n{tail}")
    return output


def _row(
    recipe: str,
    source: str,
    devices: int,
    strategy: str,
    train_config: DictConfig,
    pairs: list[tuple[dict | None, dict]],
) -> dict:
    bare = [bare["images_per_s"] for bare, _ in pairs if bare is not None]
    bare = statistics.median(bare) if bare else None
    trainer = {key: statistics.median(trainer[key] for _, trainer in pairs) for key in pairs[0][1]}
    return {
        "name": recipe,
        "model": train_config.model.model_name,
        "data": source,
        "devices": devices,
        "strategy": strategy if devices > 1 else None,
        "num_workers": train_config.data.num_workers,
        "batch": train_config.data.batch_size,
        "image_size": train_config.data.image_size,
        "precision": train_config.trainer.precision,
        "compile": train_config.compile.enabled,
        "ema": train_config.ema is not None,
        "kernels": train_config.kernels,
        "images_per_s": round(trainer["images_per_s"], 1),
        "bare_images_per_s": bare and round(bare, 1),
        "ratio_to_bare": bare and round(trainer["images_per_s"] / bare, 4),
        "data_wait": round(trainer["data_wait"], 4),
        "peak_memory_gib": round(trainer["peak_memory_gib"], 2),
    }
