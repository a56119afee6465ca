"""Measure what a paper measures and report both: python scripts/reproduce.py paper=convfirst [quick=true].

paper=convfirst|winograd|maxdnn. Results go to results/, the report to reports/<paper>.md and .html. Without a GPU it
reports the arithmetic and the results that are there. paper=convfirst train=true data.root=/data/imagenet also trains.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from convfirst.app.overrides import check_overrides
from convfirst.app.reproduce import reproduce


@hydra.main(version_base="1.3", config_path="../configs", config_name="reproduce")
def main(config: DictConfig) -> None:
    try:
        reproduce(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    check_overrides(Path(__file__).parents[1] / "configs", "reproduce")
    main()
