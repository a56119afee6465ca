"""What every source promises: positions, seeds, shards, and the work on the device."""

import pytest
import torch

SOURCES = ["digits", "image_folder", "ffcv", "synthetic"]
RANDOM_SOURCES = ["digits", "image_folder", "ffcv"]


def read(loader):
    return [(images.clone(), targets.clone()) for images, targets in loader]


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for (images, targets), (other_images, other_targets) in zip(left, right, strict=True):
        assert torch.equal(targets, other_targets)
        assert torch.equal(images, other_images)


def fingerprints(batches):
    """One sortable entry an image."""
    return sorted(
        (int(target), image.double().sum().item(), image[..., 3:5, 2].double().sum().item())
        for images, targets in batches
        for image, target in zip(images, targets, strict=True)
    )


@pytest.mark.parametrize("source", SOURCES)
def test_loader_starts_at_any_position_and_goes_on_to_the_next_epoch(make_data, source):
    loader = make_data(source).train_dataloader()
    epochs = [read(loader), read(loader)]
    assert len(epochs[0]) == len(loader)
    loader.set_position(1, 3)
    assert len(loader) == len(epochs[0])
    assert_same(read(loader), epochs[1][3:])
    loader.set_position(0)
    assert_same(read(loader), epochs[0])
    if source in RANDOM_SOURCES:
        assert fingerprints(epochs[0]) != fingerprints(epochs[1])
    loader.set_position(2, len(loader))
    assert read(loader) == []


@pytest.mark.parametrize("source", SOURCES)
def test_position_outside_the_epoch_is_refused(make_data, source):
    loader = make_data(source).train_dataloader()
    with pytest.raises(ValueError, match=rf"batch={len(loader) + 1}\) lies outside an epoch of {len(loader)} batches"):
        loader.set_position(0, len(loader) + 1)


@pytest.mark.parametrize("source", SOURCES)
def test_an_abandoned_epoch_leaves_nothing_behind(make_data, source):
    loader = make_data(source).train_dataloader()
    expected = read(loader)
    loader.set_position(0)
    for _ in zip(range(2), loader, strict=False):
        pass
    loader.set_position(0)
    assert_same(read(loader), expected)


@pytest.mark.parametrize("source", RANDOM_SOURCES)
@pytest.mark.parametrize("seed", [0, 1])
def test_seed_decides_order_and_augmentation(make_data, source, seed):
    first, again, other = (read(make_data(source, seed=s).train_dataloader()) for s in (seed, seed, 5))
    assert_same(first, again)
    assert fingerprints(first) != fingerprints(other)


@pytest.mark.parametrize("source", SOURCES)
def test_loading_leaves_the_global_generators_alone(make_data, source):
    data = make_data(source, augment={"mixup": 0.5, "reprob": 0.5})
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for batch in data.train_dataloader():
        data.on_after_batch_transfer(batch, 0)
    read(data.val_dataloader())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_counts_each_image_once_on_any_number_of_processes(make_data, source):
    whole = fingerprints(make_data(source).val_dataloader())
    assert len(whole) == make_data(source).num_val_images
    for world_size in (2, 3):
        loaders = [make_data(source, rank, world_size).val_dataloader() for rank in range(world_size)]
        assert len({len(loader) for loader in loaders}) == 1
        shards = [list(loader) for loader in loaders]
        assert {len(shard) for shard in shards} == {len(loaders[0])}
        if source == "synthetic":  # its images have no identity
            assert sum(len(targets) for shard in shards for _, targets in shard) == len(whole)
        else:
            assert fingerprints([batch for shard in shards for batch in shard]) == whole


@pytest.mark.parametrize("source", RANDOM_SOURCES)
def test_processes_share_the_steps_of_one(make_data, source):
    whole = read(make_data(source, batch_size=8).train_dataloader())
    halves = [read(make_data(source, rank, 2).train_dataloader()) for rank in range(2)]
    assert len(halves[0]) == len(halves[1]) == len(whole)
    for step, batch in enumerate(whole):
        assert fingerprints([batch]) == fingerprints([half[step] for half in halves])


@pytest.mark.parametrize("source", RANDOM_SOURCES)
def test_repeated_augmentation_repeats_images_with_fresh_draws(make_data, source):
    data = make_data(source, augment={**vars(make_data(source).augment), "repeats": 2})
    for images, targets in data.train_dataloader():
        assert torch.equal(targets[::2], targets[1::2])
        assert not torch.equal(images[::2], images[1::2])


@pytest.mark.parametrize("source", SOURCES)
def test_device_work_depends_on_the_position_only(make_data, source):
    augment = {"mixup": 0.8, "cutmix": 1.0, "reprob": 0.5, "remode": "pixel", "label_smoothing": 0.1}

    def finished(start):
        data = make_data(source, augment=augment)
        loader = data.train_dataloader()
        loader.set_position(1, start)
        return [data.on_after_batch_transfer(batch, 0) for batch in loader]

    batches = finished(0)
    assert_same(finished(2), batches[2:])
    images, targets = batches[0]
    assert images.dtype == torch.float32 and targets.shape == (4, make_data(source).num_classes)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_consumed_counts_what_the_training_step_got(make_data):
    data = make_data("image_folder", num_workers=2)
    loader = data.train_dataloader()
    loader.set_position(4, 1)
    batches = iter(loader)
    for _ in range(3):
        data.on_after_batch_transfer(next(batches), 0)
    next(batches)  # fetched, not consumed
    assert loader.consumed == (4, 4)
    data.trainer.training = False
    data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert loader.consumed == (4, 4)


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_targets_stay_labels(make_data, source):
    data = make_data(source, augment={"mixup": 0.8, "label_smoothing": 0.1})
    data.trainer.training = False
    images, targets = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert images.dtype == torch.float32 and targets.dtype == torch.int64 and targets.shape == (4,)


def test_label_smoothing_without_mixing_equals_the_usual_loss(make_data):
    data = make_data("digits", augment={"label_smoothing": 0.1})
    images, labels = next(iter(data.train_dataloader()))
    _, targets = data.finish_batch((images, labels), training=True)
    logits = torch.randn(4, 10)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_image_size_changes_for_training_only(make_data, source):
    data = make_data(source)
    loader, side = data.train_dataloader(), data.image_size
    read(loader)
    data.set_image_size(24)
    assert next(iter(loader))[0].shape[-2:] == (24, 24)
    assert next(iter(data.test_dataloader()))[0].shape[-2:] == (side, side)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "data.batch_size=0 must be an integer of at least 1"),
        ({"seed": -1}, "data.seed=-1"),
        ({"seed": None}, "data.seed=None"),
        ({"batch_size": 3, "augment": {"mixup": 0.2}}, "data.batch_size=3 must be even"),
        ({"augment": {"hflip": 1.5}}, "augment.hflip=1.5"),
        ({"augment": {"remode": "zero"}}, "augment.remode='zero' must be one of const, rand, pixel"),
        ({"augment": {"auto_augment": "rand-m9"}}, "augment.auto_augment='rand-m9' isn't available"),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_wrong_options_are_named(make_data, source, options, message):
    with pytest.raises(ValueError, match=message):
        make_data(source, **options)


@pytest.mark.parametrize("source", SOURCES)
def test_a_data_set_smaller_than_a_batch_is_an_error(make_data, source):
    with pytest.raises(ValueError, match=r"images give no batch: 2 process\(es\) x batch_size=2000 need 4000"):
        make_data(source, 1, 2, batch_size=2000).train_dataloader()
