"""Run a benchmark suite: python scripts/benchmark.py suite=throughput [option=value ...]."""

import signal
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from convfirst.app.benchmark import benchmark
from convfirst.app.overrides import check_overrides


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
def main(config: DictConfig) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit loses what isn't measured yet, no more
    try:
        benchmark(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    check_overrides(Path(__file__).parents[1] / "configs", "benchmark")
    main()
