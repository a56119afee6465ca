"""Handwritten digits that ship with scikit-learn: 1797 grey images of 8 x 8 pixels, held in memory."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from convfirst.data.augment import Augment
from convfirst.data.datamodule import Batch, EvalLoader, ImageDataModule, TrainLoader
from convfirst.data.order import Batches, eval_batches
from convfirst.data.seeding import seed_of

NUM_TEST, NUM_VAL = 360, 144
SPLIT_SEED = 0  # fixed: the test images are the same whatever a run's seed is
AFFINE = 3  # word of the random key


class DigitsDataModule(ImageDataModule):
    """`sklearn.datasets.load_digits` in a fixed, stratified split: 1293 train, 144 validation and 360 test images.

    The images are enlarged to `image_size` once and kept as float32 [N, 1, image_size, image_size]; a batch is one
    gather, and its augmentation (`rotate`, `translate`, `zoom`) one `grid_sample`. `num_workers` has no effect.
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 360,
        num_workers: int = 0,
        seed: int = 0,
        augment: Augment | Mapping | None = None,
        image_size: int = 32,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            augment=augment,
            num_classes=10,
            image_size=image_size,
            in_chans=1,
            mean=(0.312,),  # of the enlarged training images, as is std
            std=(0.356,),
        )
        self.augment.refuse("digits", "auto_augment", "hflip", "scale", "ratio", "color_jitter")
        self._splits = _split_digits()
        self._enlarged: dict[tuple[str, int], torch.Tensor] = {}
        self.num_train_images = len(self._splits["train"][1])
        self.num_val_images, self.num_test_images = NUM_VAL, NUM_TEST

    test_reader = "scikit-learn, bicubic"

    def train_dataloader(self) -> TrainLoader:
        return self.make_train_loader(self._read_train)

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def _images(self, split: str, size: int) -> torch.Tensor:
        if (split, size) not in self._enlarged:
            images = F.interpolate(self._splits[split][0], size=(size, size), mode="bicubic", align_corners=False)
            self._enlarged[split, size] = images.clamp_(0, 1).sub_(self.mean[0]).div_(self.std[0])
        return self._enlarged[split, size]

    def _read_train(self, epoch: int, batches: Batches) -> Iterator[Batch]:
        images, targets = self._images("train", self.image_size), self._splits["train"][1]
        maps = self._affine_maps(epoch)
        for indices, copies in zip(batches.indices, batches.copies, strict=True):
            batch = images[indices]
            if maps is not None:
                grid = F.affine_grid(maps[copies, indices], list(batch.shape), align_corners=False)
                batch = F.grid_sample(batch, grid, padding_mode="border", align_corners=False)
            yield batch, targets[indices]

    def _affine_maps(self, epoch: int) -> torch.Tensor | None:
        """Output-to-input maps of one epoch, float32 [repeats, num_train_images, 2, 3]; None if augmentation is off."""
        augment = self.augment
        if not (augment.rotate or augment.translate or augment.zoom):
            return None
        generator = torch.Generator().manual_seed(seed_of(self.seed, AFFINE, epoch))
        # one draw for the whole epoch: an image's map depends on neither its batch nor its process
        draw = torch.rand(4, augment.repeats, self.num_train_images, generator=generator) * 2 - 1
        angle, zoom = torch.deg2rad(draw[0] * augment.rotate), 1 + draw[1] * augment.zoom
        shift_x, shift_y = draw[2:] * 2 * augment.translate  # affine_grid's sides have length 2
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        rows = [torch.stack([cos, -sin, shift_x], -1), torch.stack([sin, cos, shift_y], -1)]
        return torch.stack(rows, -2)

    def _eval_loader(self, split: str) -> EvalLoader:
        batches = eval_batches(len(self._splits[split][1]), self.eval_batch_size, *self.rank_and_world)

        def read() -> Iterator[Batch]:
            images, targets = self._images(split, self.eval_image_size), self._splits[split][1]
            for indices in batches:
                yield images[indices], targets[indices]

        return EvalLoader(len(batches), read)


def _split_digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images float32 [N, 1, 8, 8] in [0, 1] and targets int64 [N] of train, val and test."""
    digits = load_digits()
    indices = np.arange(len(digits.target))
    rest, test = train_test_split(indices, test_size=NUM_TEST, stratify=digits.target, random_state=SPLIT_SEED)
    train, val = train_test_split(rest, test_size=NUM_VAL, stratify=digits.target[rest], random_state=SPLIT_SEED)
    images = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()
    return {name: (images[part], targets[part]) for name, part in (("train", train), ("val", val), ("test", test))}
