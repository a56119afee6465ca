"""Train a model: `python train.py [group=option] [key=value]`, see `--help`."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from convfirst.app import train
from convfirst.app.overrides import check_overrides


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    train.main(config)


if __name__ == "__main__":
    check_overrides(Path(__file__).parent / "configs", "train")
    main()
