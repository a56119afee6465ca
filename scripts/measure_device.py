"""Measure a GPU's ceilings, memory bandwidth and matrix products: python scripts/measure_device.py [option=value ...].

Writes results/device-<name>.json, which the analysis and the reports then use in place of the shipped numbers.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from convfirst.app.measure_device import measure_device
from convfirst.app.overrides import check_overrides


@hydra.main(version_base="1.3", config_path="../configs", config_name="measure_device")
def main(config: DictConfig) -> None:
    try:
        measure_device(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    check_overrides(Path(__file__).parents[1] / "configs", "measure_device")
    main()
