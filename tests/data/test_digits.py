"""The embedded digits: the split, and that a linear rule can read them."""

import torch

from convfirst.data import Augment, DigitsDataModule

AUGMENT = Augment(rotate=10.0, translate=0.08, zoom=0.1)


def test_split_is_disjoint_stratified_and_independent_of_the_seed():
    data, other = DigitsDataModule(seed=0), DigitsDataModule(seed=7)
    images = [data._splits[name][0] for name in ("train", "val", "test")]
    assert [len(part) for part in images] == [1293, 144, 360]
    assert torch.equal(images[2], other._splits["test"][0])
    flat = torch.cat(images).flatten(1)
    assert len(flat) == 1797 and len(flat.unique(dim=0)) == 1797
    histogram = data._splits["test"][1].bincount(minlength=10)
    assert histogram.min() >= 34 and histogram.max() <= 38


def test_augmentation_is_the_same_whatever_the_batch_size():
    rows = []
    for batch_size in (32, 64):
        batches = list(DigitsDataModule(batch_size=batch_size, augment=AUGMENT).train_dataloader())
        rows.append(torch.cat([images for images, _ in batches])[:1280])
    torch.testing.assert_close(rows[0], rows[1])


def test_nearest_class_mean_reads_the_digits():
    data = DigitsDataModule()
    images, targets = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    means = torch.stack([images[targets == digit].mean(0).flatten() for digit in range(10)])
    images, targets = next(iter(data.test_dataloader()))
    assert (torch.cdist(images.flatten(1), means).argmin(1) == targets).float().mean() > 0.85
