"""One random batch, made on the device and handed out again and again: the training loop without any loading."""

from collections.abc import Iterator, Mapping

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from convfirst.data.augment import Augment
from convfirst.data.datamodule import Batch, EvalLoader, ImageDataModule, TrainLoader
from convfirst.data.order import Batches, eval_batches
from convfirst.data.seeding import seed_of


class SyntheticDataModule(ImageDataModule):
    """Normal noise with random labels for measuring throughput; no disk, any size.

    Args:
        num_train_images, num_val_images: what an epoch pretends to hold.
        channels_last: lay the images out as the model wants them, so that no step has to.
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        augment: Augment | Mapping | None = None,
        image_size: int = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        num_train_images: int = 1_281_167,
        num_val_images: int = 50_000,
        channels_last: bool = True,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            augment=augment,
            num_classes=num_classes,
            image_size=image_size,
            in_chans=in_chans,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
        crops = ("auto_augment", "hflip", "scale", "ratio", "color_jitter", "rotate", "translate", "zoom")
        self.augment.refuse("synthetic", *crops)
        self.num_train_images, self.num_val_images = num_train_images, num_val_images
        self.num_test_images = num_val_images
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    test_reader = "random numbers"

    def train_dataloader(self) -> TrainLoader:
        return self.make_train_loader(self._read_train)

    def val_dataloader(self) -> EvalLoader:
        rank, world_size = self.rank_and_world
        batches = eval_batches(self.num_val_images, self.eval_batch_size, rank, world_size)

        def read() -> Iterator[Batch]:
            images, targets = self._random_batch(self.eval_batch_size, self.eval_image_size)
            for batch in batches:
                yield images[: len(batch)], targets[: len(batch)]

        return EvalLoader(len(batches), read)

    def test_dataloader(self) -> EvalLoader:
        return self.val_dataloader()

    def _read_train(self, epoch: int, batches: Batches) -> Iterator[Batch]:
        images, targets = self._random_batch(self.batch_size, self.image_size)
        written_to = self.augment.mixes or self.augment.reprob > 0  # both work in place
        for _ in batches.indices:
            yield (images.clone() if written_to else images), targets

    def _random_batch(self, batch_size: int, size: int) -> Batch:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, self.rank_and_world[0]))
        images = torch.randn(batch_size, self.in_chans, size, size, generator=generator, device=device)
        targets = torch.randint(self.num_classes, (batch_size,), generator=generator, device=device)
        return images.to(memory_format=self._layout), targets
