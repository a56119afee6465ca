"""How many images/s the data sources give with no model behind them, and what FFCV's files take on disk."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from convfirst.app.results import processor_name
from convfirst.data.datamodule import ImageDataModule
from convfirst.data.ffcv import require_ffcv
from convfirst.data.image_tree import read_tree
from convfirst.data.sample_tree import SampleTree


def data_loading(config: DictConfig) -> Iterator[dict]:
    """One row for each source of ``config.data_loading``, all of which read the same generated images.

    A source is overrides of train.py and, for FFCV, the preset that its file is written with. Its training batches are
    taken as fast as they come, epoch after epoch, for ``seconds`` that begin ``warmup_seconds`` after the first batch,
    from the system's file cache. ``bytes_per_image`` is what a training image takes on disk. Each image has ``links``
    more names, so that an epoch is long and its images are soon drawn; FFCV's file holds every one of them.

    Raises:
        ImportError: a source has a preset, and FFCV is not installed.
    """
    suite = config.data_loading
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=suite.folder) as folder:
        tree = Path(folder) / "tree"
        SampleTree(**suite.tree).write(tree, cores)
        _link(tree / "train", suite.links)
        for name, source in suite.sources.items():
            root = tree if source.preset is None else _write_ffcv(tree, Path(folder) / name, source.preset, cores)
            data = _data([f"data.num_workers={cores}", *suite.overrides, *source.overrides, f"data.root={root}"])
            files = [root / "train.beton"] if source.preset else (root / "train").glob("*/*")
            size = sum(path.stat().st_size for path in files)
            yield {
                "name": name,
                "preset": source.preset,
                "workers": data.num_workers,
                "cores": cores,
                "processor": processor_name(),
                "batch": data.batch_size,
                "images_per_s": round(_rate(data, suite.warmup_seconds, suite.seconds), 1),
                "bytes_per_image": round(size / data.num_train_images),
            }
            if root != tree:
                shutil.rmtree(root)


def _link(folder: Path, links: int) -> None:
    for path in [*folder.glob("*/*")]:
        for number in range(links):
            os.link(path, path.with_stem(f"{path.stem}_{number}"))


def _write_ffcv(tree: Path, root: Path, preset: str, workers: int) -> Path:
    require_ffcv()
    from convfirst.data.ffcv_writer import PRESETS, write_beton

    root.mkdir()
    for split, chosen in (("train", preset), ("val", "eval")):
        write_beton(read_tree(tree / split), root / f"{split}.beton", PRESETS[chosen], workers)
    return root


def _data(overrides: list[str]) -> ImageDataModule:
    data = instantiate(hydra.compose("train", overrides).data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    return data


def _rate(data: ImageDataModule, warmup_seconds: float, seconds: float) -> float:
    """Images/s of the training batches, from some time after the first on, before which decoders compile."""
    batches = _endless(data)
    next(batches)
    begin = time.perf_counter() + warmup_seconds
    while time.perf_counter() < begin:
        next(batches)
    start, seen, passed = time.perf_counter(), 0, 0.0
    while passed < seconds:
        seen += len(next(batches)[0])
        passed = time.perf_counter() - start
    data.teardown("fit")
    return seen / passed


def _endless(data: ImageDataModule) -> Iterator:
    loader = data.train_dataloader()
    while True:
        yield from loader
