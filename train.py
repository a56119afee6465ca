"""Train a model: `python train.py [group=option] [key=value]`, see `--help`."""

import hydra
from omegaconf import DictConfig

from convfirst.app import train


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    train.main(config)


if __name__ == "__main__":
    main()
