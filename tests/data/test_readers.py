"""WebDataset shards and Hugging Face data sets hold what the image tree holds, and are refused where they don't."""

import importlib.util
import tarfile

import pytest
import torch

from convfirst.data import BadImageError, HuggingFaceDataModule, WebDatasetDataModule
from tests.data.shards import add, write_shards

SMALL = {"batch_size": 4, "eval_batch_size": 4, "num_workers": 0, "image_size": 32}
CROP = {"hflip": 0.5, "scale": (0.35, 1.0), "ratio": (0.75, 1.33), "auto_augment": "rand-m9-mstd0.5-inc1"}


@pytest.fixture
def shards(tree, tmp_path):
    write_shards(tree, tmp_path, "train", "sample-train-{:04d}.tar")
    write_shards(tree, tmp_path, "val", "sample-validation-{:02d}.tar", json_labels=True)
    return tmp_path


def batches(loader):
    return [(images.clone(), targets.clone()) for images, targets in loader]


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for (images, targets), (others, labels) in zip(left, right, strict=True):
        assert torch.equal(images, others) and torch.equal(targets, labels)


def assert_same_as_the_tree(data, make_data):
    folder = make_data("image_folder", **SMALL, augment=CROP)
    assert data.num_classes == 3
    assert_same(batches(data.val_dataloader()), batches(folder.val_dataloader()))
    assert_same(batches(data.test_dataloader()), batches(folder.test_dataloader()))
    loader, expected = data.train_dataloader(), folder.train_dataloader()
    for position in ((0, 0), (1, 3)):
        loader.set_position(*position)
        expected.set_position(*position)
        assert_same(batches(loader), batches(expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_what_the_tree_holds(make_data, shards, workers):
    data = WebDatasetDataModule(str(shards), **{**SMALL, "num_workers": workers}, augment=CROP)
    assert (data.num_train_images, data.num_val_images) == (39, 15)
    assert_same_as_the_tree(data, make_data)
    data.teardown("fit")


def test_the_webdataset_package_reads_the_same_shards(shards):
    webdataset = pytest.importorskip("webdataset")
    found = sorted(map(str, shards.glob("*train*.tar")))
    samples = list(webdataset.WebDataset(found, shardshuffle=False).decode("torchrgb").to_tuple("jpg", "cls"))
    assert [label for _, label in samples] == read_labels(shards)


def read_labels(shards):
    data = WebDatasetDataModule(str(shards), **SMALL, augment=CROP)
    return data.train_tree.targets.tolist()


def test_shards_that_are_wrong_are_named(shards):
    make = lambda: WebDatasetDataModule(str(shards), **SMALL, augment=CROP)  # noqa: E731
    path = shards / "sample-train-0001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="can't read the shard .*sample-train-0001.tar"):
        assert make().num_train_images
    path.write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match="can't read the shard .*sample-train-0001.tar"):
        assert make().num_train_images
    with tarfile.open(path, "w") as archive:
        add(archive, "a.jpg", b"")
    with pytest.raises(ValueError, match="sample-train-0001.tar: the image of sample a has no label"):
        assert make().num_train_images
    with tarfile.open(path, "w") as archive:
        add(archive, "a.jpg", b"no image")
        add(archive, "a.cls", b"7")
    with pytest.raises(ValueError, match="sample-train-0001.tar at byte 512: label 7 is out of the range 0 to 2"):
        assert make().num_train_images
    with tarfile.open(path, "w") as archive:
        add(archive, "a.jpg", b"no image")
        add(archive, "a.cls", b"2")
    with pytest.raises(BadImageError, match="can't read image .*sample-train-0001.tar at byte 512"):
        for _ in range(2):
            list(make().train_dataloader())
    for path in shards.glob("*validation*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no shards of val; expected"):
        make()


def test_a_hugging_face_data_set_holds_what_the_tree_holds(make_data, tree, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    data = HuggingFaceDataModule(str(tree), str(tmp_path), **SMALL, augment=CROP)
    assert (data.num_train_images, data.num_val_images) == (39, 15)
    assert_same_as_the_tree(data, make_data)


def test_a_missing_package_or_name_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    with pytest.raises(ModuleNotFoundError, match="needs the package datasets: pip install datasets"):
        HuggingFaceDataModule("some/name", **SMALL)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="data.name isn't set"):
        HuggingFaceDataModule(None, **SMALL)


@pytest.mark.parametrize("make", [WebDatasetDataModule, HuggingFaceDataModule])
def test_the_test_sets_of_image_folder_are_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="data.test_set=imagenet_real isn't available with .* data.eval_root="):
        make(str(tmp_path), **SMALL, test_set="imagenet_real")
