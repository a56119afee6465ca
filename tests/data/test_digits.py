"""The embedded digits: split, determinism, and that a linear model can read them."""

import pytest
import torch

from convfirst.data import Augment, DigitsDataModule

AUGMENT = Augment(rotate=10.0, translate=0.08, zoom=0.1)


def read(loader):
    return [(images.clone(), targets.clone()) for images, targets in loader]


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for (images, targets), (other_images, other_targets) in zip(left, right, strict=True):
        assert torch.equal(targets, other_targets)
        assert torch.equal(images, other_images)


def test_split_is_disjoint_stratified_and_independent_of_the_seed():
    data, other = DigitsDataModule(seed=0), DigitsDataModule(seed=7)
    images = [data._splits[name][0] for name in ("train", "val", "test")]
    assert [len(part) for part in images] == [1293, 144, 360]
    assert torch.equal(images[2], other._splits["test"][0])
    flat = torch.cat(images).flatten(1)
    assert len(flat) == 1797 and len(flat.unique(dim=0)) == 1797
    histogram = data._splits["test"][1].bincount(minlength=10)
    assert histogram.min() >= 34 and histogram.max() <= 38


def test_loader_starts_at_any_position_and_repeats_itself():
    loader = DigitsDataModule(augment=AUGMENT).train_dataloader()
    epochs = [read(loader), read(loader)]
    assert len(epochs[0]) == len(loader) == 20
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    loader.set_position(1, 13)
    assert_same(read(loader), epochs[1][13:])
    assert len(loader) == 20
    loader.set_position(0)
    assert_same(read(loader), epochs[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_seed_decides_order_and_augmentation(seed):
    first, again, other = (read(DigitsDataModule(seed=s, augment=AUGMENT).train_dataloader()) for s in (seed, seed, 5))
    assert_same(first, again)
    assert not torch.equal(first[0][0], other[0][0])


def test_position_outside_the_epoch_is_refused():
    loader = DigitsDataModule().train_dataloader()
    with pytest.raises(ValueError, match="batch=21.*20 batches"):
        loader.set_position(0, 21)


def test_augmentation_is_the_same_whatever_the_batch_size():
    rows = []
    for batch_size in (32, 64):
        batches = read(DigitsDataModule(batch_size=batch_size, augment=AUGMENT).train_dataloader())
        rows.append(torch.cat([images for images, _ in batches])[:1280])
    torch.testing.assert_close(rows[0], rows[1])


def test_image_size_changes_for_training_only():
    data = DigitsDataModule(augment=AUGMENT)
    loader = data.train_dataloader()
    data.set_image_size(16)
    assert next(iter(loader))[0].shape == (64, 1, 16, 16)
    assert next(iter(data.test_dataloader()))[0].shape == (360, 1, 32, 32)


def test_natural_image_augmentation_is_refused():
    with pytest.raises(ValueError, match="augment.hflip=0.5 isn't available with data=digits"):
        DigitsDataModule(augment={"hflip": 0.5})


def test_nearest_class_mean_reads_the_digits():
    data = DigitsDataModule()
    images, targets = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    means = torch.stack([images[targets == digit].mean(0).flatten() for digit in range(10)])
    images, targets = next(iter(data.test_dataloader()))
    assert (torch.cdist(images.flatten(1), means).argmin(1) == targets).float().mean() > 0.85
