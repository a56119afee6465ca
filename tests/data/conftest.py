from types import SimpleNamespace

import pytest
import torch

from convfirst.data import DigitsDataModule, FFCVDataModule, ImageFolderDataModule, SyntheticDataModule

CROP = {"hflip": 0.5, "scale": (0.35, 1.0), "ratio": (0.75, 1.33)}


@pytest.fixture(scope="session")
def compiled():
    """FFCV pipelines by thread count and what they do; compiling one takes seconds."""
    return {}


@pytest.fixture
def make_data(request):
    """make_data(source, rank=0, world_size=1, **options): a small instance of a source, by name."""

    made = []

    def make(source, rank=0, world_size=1, **options):
        small = {"batch_size": 4, "eval_batch_size": 4}
        if source == "digits":
            data = DigitsDataModule(**{**small, "augment": {"rotate": 10.0, "translate": 0.1}, **options})
        elif source == "synthetic":
            sizes = {"image_size": 8, "num_classes": 3, "num_train_images": 39, "num_val_images": 15}
            data = SyntheticDataModule(**{**small, **sizes, **options})
        elif source == "ffcv":
            folder = {"root": str(request.getfixturevalue("betons")), "num_workers": 1, "image_size": 32}
            data = FFCVDataModule(**{**small, **folder, "augment": CROP, **options})
            data._readers = request.getfixturevalue("compiled").setdefault(data.num_workers, {})
        else:
            folder = {"root": str(request.getfixturevalue("tree")), "num_workers": 0, "image_size": 32}
            augment = {**CROP, "auto_augment": "rand-m9-mstd0.5-inc1"}
            data = ImageFolderDataModule(**{**small, **folder, "augment": augment, **options})
        made.append(data)
        data.trainer = SimpleNamespace(
            global_rank=rank,
            world_size=world_size,
            training=True,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        return data

    yield make
    for data in made:
        data.teardown("fit")
