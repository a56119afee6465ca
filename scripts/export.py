"""Export a trained model for timm and ONNX: python scripts/export.py checkpoint=runs/digits output=exported/digits."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from convfirst.app.export import export
from convfirst.app.overrides import check_overrides


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(config: DictConfig) -> None:
    try:
        export(config)
    except (FileNotFoundError, FileExistsError, MissingMandatoryValue, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    check_overrides(Path(__file__).parents[1] / "configs", "export")
    main()
