"""Work out what binds a model on a device: python scripts/analyse.py timm_model=convnext_tiny device=h100."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from convfirst.app.analyse import analyse
from convfirst.app.overrides import check_overrides


@hydra.main(version_base="1.3", config_path="../configs", config_name="analyse")
def main(config: DictConfig) -> None:
    try:
        analyse(config)
    except (MissingMandatoryValue, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    check_overrides(Path(__file__).parents[1] / "configs", "analyse")
    main()
