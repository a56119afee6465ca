"""image_folder: workers, parity with timm, bad input."""

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from timm.data import create_transform

from convfirst.data import Augment, BadImageError, imagenet_labels
from convfirst.data.image_folder import train_transform
from convfirst.data.image_tree import ImageTree, read_tree

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def own_tree(tree, tmp_path):
    """A copy of the tree to break."""
    return Path(shutil.copytree(tree, tmp_path / "tree"))


def read(loader):
    return [(images.clone(), targets.clone()) for images, targets in loader]


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for (images, targets), (other_images, other_targets) in zip(left, right, strict=True):
        assert torch.equal(targets, other_targets)
        assert torch.equal(images, other_images)


def first_file(root, split="train"):
    return sorted((root / split).rglob("*.JPEG"))[0]


def test_batches_do_not_depend_on_the_workers(make_data):
    alone = make_data("image_folder", num_workers=0).train_dataloader()
    epochs = [read(alone), read(alone)]
    loader = make_data("image_folder", num_workers=2).train_dataloader()
    loader.set_position(0, 4)
    assert_same(read(loader), epochs[0][4:])
    assert_same(read(loader), epochs[1])  # the workers live on


def convnext():
    return Augment(**{k: v for k, v in OmegaConf.load(CONFIGS / "augment" / "convnext.yaml").items() if k[0] != "_"})


def test_convnext_augmentation_equals_timm_with_the_published_options(tree):
    published = create_transform(
        input_size=224,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        use_prefetcher=True,
    )
    ours = train_transform(convnext(), 224)
    assert repr(ours) == repr(published)
    image = Image.open(first_file(tree)).convert("RGB")
    results = []
    for transform in (ours, published):
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002 - timm draws from this generator
        torch.manual_seed(5)
        results.append(torch.stack([transform(image) for _ in range(8)]))
    assert torch.equal(*results)


def test_a_cut_validation_set_of_imagenet_is_refused(make_data):
    names = tuple(f"n{i:08}" for i in range(1000))
    cut = ImageTree(Path("val"), names, np.zeros(49999, "S1"), np.zeros(49999, np.int64))
    with pytest.raises(ValueError, match=r"val holds 49999 images, .* has 50000; \+data.num_images.val=49999 takes"):
        make_data("image_folder")._counted("val", cut)
    assert make_data("image_folder", num_images={"val": 15})._counted("train", cut) is cut
    assert make_data("image_folder")._counted("val", replace(cut, classes=("cat", *names[1:]))).classes[0] == "cat"


def test_posterize_may_keep_no_bit(tree):
    """At magnitudes of 10 and more, which mstd0.5 reaches; Pillow 13 refuses it."""
    (policy,) = [step for step in train_transform(convnext(), 224).transforms if hasattr(step, "ops")]
    (operation,) = [operation for operation in policy.ops if operation.name == "PosterizeIncreasing"]
    image = Image.open(first_file(tree)).convert("RGB")
    for magnitude, expected in ((10, Image.new("RGB", image.size)), (5, ImageOps.posterize(image, 2))):
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, magnitude, 0
        assert operation(image) == expected


def test_convnext_mixing_and_erasing_have_the_published_values():
    augment = convnext()
    mixup, erasing = augment.make_mixup(1000), augment.make_erasing("cpu")
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (mixup.mode, mixup.label_smoothing, mixup.cutmix_minmax) == ("batch", 0.1, None)
    assert (erasing.probability, erasing.max_count) == (0.25, 1) and erasing.per_pixel
    assert augment.crop_pct == 0.875 and augment.test_interpolation == "bicubic" and augment.repeats == 1


def test_evaluation_pixels_equal_timms_normalised_transform(make_data, tree):
    data = make_data("image_folder")
    data.trainer.training = False
    images, _ = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    transform = create_transform(32, is_training=False, interpolation="bicubic", crop_pct=0.875)
    files = sorted((tree / "val").rglob("*.JPEG"))[:4]
    expected = torch.stack([transform(Image.open(path).convert("RGB")) for path in files])
    torch.testing.assert_close(images, expected)


def test_evaluation_reads_each_class_in_full(make_data):
    data = make_data("image_folder")
    targets = torch.cat([targets for _, targets in data.val_dataloader()])
    assert targets.bincount().tolist() == [5, 5, 5]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_unreadable_file_stops_with_its_name(make_data, own_tree, split, workers, content):
    path = first_file(own_tree, split)
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "text": b"not an image", "empty": b""}[content])
    source = make_data("image_folder", root=str(own_tree), num_workers=workers)
    loader = source.train_dataloader() if split == "train" else source.val_dataloader()
    with pytest.raises(BadImageError, match=f"can't read image {path}") as caught:
        for _ in range(2):  # an epoch leaves out what doesn't fill a batch
            list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_replaces_the_file_alike_for_any_workers_and_reports_it(make_data, own_tree, workers, caplog):
    path = first_file(own_tree)
    path.write_bytes(b"not an image")
    options = {"root": str(own_tree), "on_bad_image": "skip"}
    data = make_data("image_folder", num_workers=workers, **options)
    loader = data.train_dataloader()
    with caplog.at_level(logging.WARNING):
        batches = read(loader) + read(loader)
    assert len(batches) == 2 * len(loader) and all(len(images) == 4 for images, _ in batches)
    assert list(data.bad_images) == [str(path)]
    assert len([record for record in caplog.records if str(path) in record.message]) == 1
    again = make_data("image_folder", num_workers=0, **options).train_dataloader()
    assert_same(batches, read(again) + read(again))


def test_skip_leaves_the_file_out_of_an_evaluation(make_data, own_tree):
    path = first_file(own_tree, "val")
    path.write_bytes(b"not an image")
    data = make_data("image_folder", root=str(own_tree), on_bad_image="skip")
    batches = list(data.val_dataloader())
    assert len(batches) == len(data.val_dataloader()) == 4
    assert sum(len(targets) for _, targets in batches) == 14 and list(data.bad_images) == [str(path)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_goes_on_past_a_batch_without_any_readable_image(make_data, own_tree, workers):
    for path in sorted((own_tree / "val").rglob("*.JPEG"))[4:8]:  # the second batch
        path.write_bytes(b"")
    data = make_data("image_folder", root=str(own_tree), on_bad_image="skip", num_workers=workers)
    batches = list(data.val_dataloader())
    assert [len(images) for images, _ in batches] == [len(targets) for _, targets in batches] == [4, 0, 4, 3]
    assert len(data.bad_images) == 4
    data.trainer.training = False
    images, _ = data.on_after_batch_transfer(batches[1], 0)
    assert images.shape == (0, 3, 32, 32)


def test_training_on_nothing_but_unreadable_images_is_an_error(make_data, own_tree):
    for path in (own_tree / "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    with pytest.raises(BadImageError, match="no readable image for a whole batch"):
        list(make_data("image_folder", root=str(own_tree), on_bad_image="skip").train_dataloader())


def test_missing_root_is_named(make_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"data.root={tmp_path}/nowhere: no such folder"):
        make_data("image_folder", root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="data.root isn't set"):
        make_data("image_folder", root=None)
    with pytest.raises(FileNotFoundError, match=f"no image folder at {tmp_path}/val"):
        make_data("image_folder", root=str(tmp_path))


def test_empty_class_folder_is_named(make_data, own_tree):
    (own_tree / "train" / "n00000003").mkdir()
    (own_tree / "train" / "n00000003" / "readme.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match="class folder without an image.*: n00000003"):
        make_data("image_folder", root=str(own_tree)).train_dataloader()


def test_differing_classes_are_named(make_data, own_tree):
    (own_tree / "train" / "n00000002").rename(own_tree / "train" / "n00000009")
    data = make_data("image_folder", root=str(own_tree))  # an evaluation doesn't list the training images
    assert data.num_val_images == 15
    with pytest.raises(ValueError, match="classes differ: n00000009 is in .*train but not in .*val"):
        assert data.num_train_images


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_bad_image": "ignore"}, "data.on_bad_image='ignore' must be one of raise, skip"),
        ({"test_set": "v2"}, "data.test_set='v2' must be one of folder, imagenet_v2, imagenet_real"),
        ({"test_set": "imagenet_v2"}, "needs data.test_root"),
        ({"num_classes": 1000}, "data.num_classes=1000, but .* has 3 class folders"),
        ({"num_images": {"val": 50000}}, "holds 15 images, data.num_images.val says 50000"),
        (
            {"augment": {"hflip": 0.5}},
            "augment.hflip=0.5 isn't available with data=image_folder and augment.scale=null",
        ),
        ({"augment": {"rotate": 10}}, "augment.rotate=10 isn't available with data=image_folder"),
    ],
)
def test_wrong_options_are_named(make_data, options, message):
    with pytest.raises(ValueError, match=message):
        make_data("image_folder", **options)


def test_a_test_folder_is_used_where_there_is_one(make_data, own_tree):
    assert make_data("image_folder", root=str(own_tree)).num_test_images == 15
    shutil.copytree(own_tree / "train", own_tree / "test")
    data = make_data("image_folder", root=str(own_tree))
    assert data.num_test_images == 39 and sum(len(t) for _, t in data.test_dataloader()) == 39


def test_numeric_class_folders_are_ordered_as_numbers(tmp_path):
    for label in range(11):
        (tmp_path / str(label)).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / str(label) / "a.png")
    tree = read_tree(tmp_path, numeric=True)
    assert tree.classes == tuple(str(label) for label in range(11))
    assert [tree.path(i).parent.name for i in range(11)] == [str(label) for label in tree.targets]
    (tmp_path / "4").rename(tmp_path / "eleven")
    with pytest.raises(ValueError, match="class folders must be named 0 to 10, found"):
        read_tree(tmp_path, numeric=True)


def test_imagenet_v2_is_read_in_numeric_order(make_data, own_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet_labels, "NUM_CLASSES", 3)
    monkeypatch.setattr(imagenet_labels, "V2_IMAGES_PER_CLASS", 5)
    for label in range(3):
        shutil.copytree(own_tree / "val" / f"n{label:08d}", tmp_path / "v2" / str(label))
    options = {"root": str(own_tree), "test_set": "imagenet_v2", "test_root": str(tmp_path / "v2")}
    data = make_data("image_folder", **options)
    assert data.num_test_images == 15
    for (images, targets), (others, labels) in zip(data.test_dataloader(), data.val_dataloader(), strict=True):
        assert torch.equal(images, others) and torch.equal(targets, labels)


def test_real_labels_arrive_as_padded_rows(make_data, own_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet_labels, "NUM_CLASSES", 3)
    monkeypatch.setattr(imagenet_labels, "NUM_VAL_IMAGES", 15)
    for number, path in enumerate(sorted((own_tree / "val").rglob("*.JPEG")), start=1):
        path.rename(path.with_name(f"ILSVRC2012_val_{number:08d}.JPEG"))
    labels = tmp_path / "real.json"
    labels.write_text(json.dumps([[number % 3] for number in range(14)] + [[0, 2]]))
    data = make_data("image_folder", root=str(own_tree), test_set="imagenet_real", real_labels=str(labels))
    targets = torch.cat([targets for _, targets in data.test_dataloader()])
    assert targets.shape == (15, 2) and targets[-1].tolist() == [0, 2]
    assert targets[:14].tolist() == [[number % 3, -1] for number in range(14)]
