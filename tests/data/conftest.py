from types import SimpleNamespace

import pytest
import torch

from convfirst.data import DigitsDataModule, FFCVDataModule, ImageFolderDataModule, SyntheticDataModule
from convfirst.data.image_tree import read_tree
from convfirst.data.sample_tree import SampleTree

CROP = {"hflip": 0.5, "scale": (0.35, 1.0), "ratio": (0.75, 1.33)}


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """3 classes of 13 training and 5 validation images."""
    root = tmp_path_factory.mktemp("images") / "tree"
    SampleTree(num_classes=3, train_images=13, val_images=5, min_side=40, max_side=64).write(root)
    return root


@pytest.fixture(scope="session")
def betons(tree, tmp_path_factory):
    """The tree as FFCV files: uncompressed, short side 36 = floor(32 / 0.875)."""
    pytest.importorskip("ffcv")
    from convfirst.data.ffcv_writer import Preset, write_beton

    root = tmp_path_factory.mktemp("ffcv")
    for split in ("train", "val"):
        write_beton(read_tree(tree / split), root / f"{split}.beton", Preset(36, jpeg=0.0, page_size=1 << 21))
    return root


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
