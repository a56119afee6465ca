import os

# Set before anything imports the libraries that read them: tests use no network, and xdist's workers share the cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """An image tree: 3 classes of 13 training and 5 validation images."""
    from convfirst.data.sample_tree import SampleTree

    root = tmp_path_factory.mktemp("images") / "tree"
    SampleTree(num_classes=3, train_images=13, val_images=5, min_side=40, max_side=64).write(root)
    return root


@pytest.fixture(scope="session")
def betons(tree, tmp_path_factory):
    """The tree as FFCV files."""
    from tests.data.betons import write_betons

    return write_betons(tree, tmp_path_factory.mktemp("ffcv"))
