"""The directory of a run: what it holds, how it is found again, and when it must not be touched."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from convfirst.training.checkpoint import checkpoints, step_of, write_atomically

# What may differ when a run goes on: where and how fast it runs, not what it computes.
_FREE = ("trainer.", "callbacks.", "logger.", "compile.", "resume", "overwrite", "kernels", "run_root", "run_dir")
_FREE += ("data.root", "data.num_workers", "data.batch_size", "data.eval_batch_size", "batch.accumulate")
_FREE += ("data.timeout", "data.eval_root", "grad_checkpointing", "matmul_precision")
_FREE += ("start_step", "model.num_classes", "model.in_chans")  # added while a run is built
_BOUND = ("trainer.precision", "trainer.max_epochs", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm")


class RunExistsError(ValueError):
    """The directory already holds a run, and the command doesn't say that it means that one."""


@dataclass(frozen=True)
class RunDirectory:
    """``path/``: config.yaml, checkpoints/, metrics.csv, curves.png, summary.json and the loggers' own folders."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoints(self.path / "checkpoints")

    def holds_run(self) -> bool:
        return self.config.exists() or bool(self.checkpoints)

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, None of one that isn't."""
        return json.loads(self.summary.read_text()) if self.summary.exists() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.summary, lambda file: file.write(text.encode()))

    def freeze(self, config: DictConfig) -> None:
        """Write the resolved configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(config, resolve=True)
        write_atomically(self.config, lambda file: file.write(text.encode()))

    def move_aside(self) -> Path:
        """Rename the directory to the first free one of ``<path>.1``, ``<path>.2``, ..."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        os.rename(self.path, target)
        return target

    def find_start(self, resume: str) -> Path | None:
        """The checkpoint that ``resume`` means, None for the beginning.

        Raises:
            FileNotFoundError: `resume` names a file that isn't there.
        """
        if resume == "never":
            return None
        if resume == "auto":
            return self.checkpoints[-1] if self.checkpoints else None
        if not Path(resume).is_file():
            raise FileNotFoundError(f"resume={resume}: no such checkpoint; accepted: auto, never, or a file")
        step_of(resume)
        return Path(resume)

    def check_same_config(self, config: DictConfig) -> None:
        """Refuse to go on with a run under another recipe.

        Raises:
            RunExistsError: values differ that change what is computed, each named with both values.
        """
        if not self.config.exists():
            return
        before, now = _flatten(OmegaConf.load(self.config)), _flatten(config)
        missing = object()
        changed = [
            f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key, missing) != now.get(key, missing) and not _is_free(key)
        ]
        if changed:
            raise RunExistsError(
                f"{self.path} was started with another configuration ({'; '.join(changed)}); "
                "choose another run_id=..., or start anew: resume=never overwrite=true (the old one is moved aside)"
            )


def _is_free(key: str) -> bool:
    return key.startswith(_FREE) and key not in _BOUND


def _flatten(config: DictConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    walk("", OmegaConf.to_container(config, resolve=True))
    return flat
