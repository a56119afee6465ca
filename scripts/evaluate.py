"""Evaluate a run or a timm model: python scripts/evaluate.py run=runs/digits (or timm_model=NAME data.root=ROOT)."""

import sys
from pathlib import Path

import hydra
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from convfirst.app.evaluate import evaluate
from convfirst.app.overrides import check_overrides


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    try:
        evaluate(config)
    except (InstantiationException, MisconfigurationException, OSError, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"error: {error.__cause__ or error}")


if __name__ == "__main__":
    check_overrides(Path(__file__).parents[1] / "configs", "evaluate")
    main()
