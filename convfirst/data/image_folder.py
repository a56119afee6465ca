"""ImageNet's layout on disk: JPEG files in class folders, decoded and augmented by worker processes with timm."""

import logging
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import posterize
from torch.utils.data import DataLoader, Dataset

from convfirst.data.augment import Augment
from convfirst.data.datamodule import Batch, EvalLoader, ImageDataModule, TrainLoader
from convfirst.data.image_tree import BadImageError, ImageTree, read_tree, require_same_classes
from convfirst.data.imagenet_labels import check_imagenet_v2, read_real_labels
from convfirst.data.order import Batches, eval_batches
from convfirst.data.seeding import seeded

log = logging.getLogger(__name__)

TEST_SETS = ("folder", "imagenet_v2", "imagenet_real")
IMAGENET_VAL_IMAGES = 50000
MOST_SUBSTITUTES = 100  # so many unreadable files in a row are no accident
SECONDS_AFTER_SIGTERM = 30  # a worker serves on, until the main process has come to the end of an update


class Key(NamedTuple):
    """What a worker needs to make one training image, whatever it did before."""

    epoch: int
    index: int
    copy: int
    size: int


class Sample(NamedTuple):
    """An image, uint8 [3, H, W] or None if none could be made, its target, and (path, reason) of each bad file met."""

    image: torch.Tensor | None
    target: np.ndarray
    bad: tuple[tuple[str, str], ...]


def train_transform(augment: Augment, size: int) -> Callable:
    """timm's training transform: PIL image to uint8 [3, size, size].

    What follows on the device (normalisation, erasing, mixing) is `ImageDataModule`'s; without it this is exactly
    `timm.data.create_transform(..., use_prefetcher=True)`.
    """
    transform = create_transform(
        size,
        is_training=True,
        no_aug=augment.scale is None,
        use_prefetcher=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    for step in transform.transforms:
        for operation in getattr(step, "ops", []):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    """timm's; with no bit kept the image is black, as before Pillow 13, which refuses that. RandAugment asks for it."""
    return posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def eval_transform(augment: Augment, size: int) -> Callable:
    """timm's evaluation transform: PIL image to uint8 [3, size, size]: resize the short side, crop the centre."""
    return create_transform(
        size, use_prefetcher=True, crop_pct=augment.crop_pct, interpolation=augment.test_interpolation
    )


class TrainImages(Dataset):
    """Training images by `Key`. With `skip`, an unreadable file is replaced by the next readable one in the tree."""

    def __init__(self, tree: ImageTree, augment: Augment, seed: int, skip: bool) -> None:
        self.tree, self.augment, self.seed, self.skip = tree, augment, seed, skip
        self._transforms: dict[int, Callable] = {}

    def __getitem__(self, key: Key) -> Sample:
        bad = []
        for step in range(MOST_SUBSTITUTES if self.skip else 1):
            index = (key.index + step) % len(self.tree)
            try:
                image = self.tree.read(index)
            except BadImageError as error:
                bad.append((self.tree.name(index), str(error)))
                continue
            if key.size not in self._transforms:
                self._transforms[key.size] = train_transform(self.augment, key.size)
            with seeded(self.seed, key.epoch, key.index, key.copy):
                return Sample(self._transforms[key.size](image), self.tree.targets[index], tuple(bad))
        return Sample(None, self.tree.targets[key.index], tuple(bad))


class EvalImages(Dataset):
    """Evaluation images by index; `targets` is int64 [N] or [N, L]."""

    def __init__(self, tree: ImageTree, targets: np.ndarray, augment: Augment, size: int) -> None:
        self.tree, self.targets = tree, targets
        self._transform = eval_transform(augment, size)

    def __getitem__(self, index: int) -> Sample:
        try:
            return Sample(self._transform(self.tree.read(index)), self.targets[index], ())
        except BadImageError as error:
            return Sample(None, self.targets[index], ((self.tree.name(index), str(error)),))


def collate(samples: list[Sample]) -> tuple[torch.Tensor | None, torch.Tensor, list[tuple[str, str]]]:
    """Images uint8 [B, 3, H, W], targets int64 [B] or [B, L], and the bad files; samples without image are left out."""
    bad = [entry for sample in samples for entry in sample.bad]
    good = [sample for sample in samples if sample.image is not None]
    images = torch.stack([sample.image for sample in good]) if good else None
    return images, torch.from_numpy(np.array([sample.target for sample in good], dtype=np.int64)), bad


class KeyBatches:
    """The batch sampler of a DataLoader whose workers live on: the keys of the next iteration, set before it."""

    def __init__(self) -> None:
        self.batches: list[list] = []

    def __iter__(self) -> Iterator[list]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class ImageFolderDataModule(ImageDataModule):
    """`root`/train/<class>/<image>, `root`/val/... and optionally `root`/test/..., as ImageNet-1K is unpacked.

    Args:
        root: the folder that holds train and val.
        num_classes: checked against the number of class folders; None takes that number.
        on_bad_image: "raise" stops at the first unreadable file with a BadImageError that names it. "skip" trains on
            the next readable file instead, leaves the file out of an evaluation, logs each once, and lists them in
            `bad_images`; the number of steps stays the same, if need be with a batch of no images.
        test_set: what `test_dataloader` reads. "folder": `root`/test, or `root`/val if there is none. "imagenet_v2":
            `test_root`/0 ... `test_root`/999, the 10,000 images of Recht et al. 2019. "imagenet_real": `root`/val with
            the reassessed labels of Beyer et al. 2020; targets are then int64 [B, L], see `read_real_labels`.
        test_root: for "imagenet_v2".
        real_labels: real.json for "imagenet_real"; None takes the copy in timm.
        num_images: expected counts by split, such as {"val": 50000}; another count is an error. Without it a val of
            ImageNet-1K's classes, 1000 folders called n and eight digits, must hold 50,000.

    Raises:
        FileNotFoundError: `root` isn't there, or a class folder is empty.
        ValueError: the splits' classes differ, or a count or option is wrong.
    """

    def __init__(
        self,
        root: str | None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 8,
        seed: int = 0,
        augment: Augment | Mapping | None = None,
        image_size: int = 224,
        num_classes: int | None = None,
        on_bad_image: str = "raise",
        test_set: str = "folder",
        test_root: str | None = None,
        real_labels: str | None = None,
        num_images: Mapping[str, int] | None = None,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.root = require_root(root)
        for name, value, choices in (
            ("on_bad_image", on_bad_image, ("raise", "skip")),
            ("test_set", test_set, TEST_SETS),
        ):
            if value not in choices:
                raise ValueError(f"data.{name}={value!r} must be one of {', '.join(choices)}")
        if test_set == "imagenet_v2" and test_root is None:
            raise ValueError("data.test_set=imagenet_v2 needs data.test_root, the folder that holds 0 to 999")
        self.on_bad_image, self.test_set = on_bad_image, test_set
        self.test_root, self.real_labels = test_root, real_labels
        self.num_images = dict(num_images or {})
        found = len(self.val_tree.classes)
        if num_classes not in (None, found):
            raise ValueError(f"data.num_classes={num_classes}, but {self.val_tree.root} has {found} class folders")
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            augment=augment,
            num_classes=found,
            image_size=image_size,
            in_chans=3,
            mean=mean,
            std=std,
        )
        self.augment.refuse("image_folder", "rotate", "translate", "zoom")
        if self.augment.scale is None:
            self.augment.refuse("image_folder and augment.scale=null", "auto_augment", "hflip", "ratio", "color_jitter")
        self.bad_images: dict[str, str] = {}
        self._loaders: list[DataLoader] = []

    @cached_property
    def train_tree(self) -> ImageTree:
        """Listed when it is asked for: an evaluation does without a million files."""
        tree = self._counted("train", self.open_split("train"))
        require_same_classes(tree, self.val_tree)
        return tree

    @cached_property
    def val_tree(self) -> ImageTree:
        return self._counted("val", self.open_split("val"))

    def open_split(self, split: str) -> ImageTree:
        """The images of a split; other sources read theirs from elsewhere."""
        return read_tree(self.root / split)

    @cached_property
    def test_tree(self) -> ImageTree:
        if self.test_set == "imagenet_v2":
            tree = read_tree(self.test_root, numeric=True)
            check_imagenet_v2(tree, self.num_classes)
        elif self.test_set == "folder" and (self.root / "test").is_dir():
            tree = read_tree(self.root / "test")
            require_same_classes(tree, self.val_tree)
        else:
            tree = self.val_tree
        return self._counted("test", tree)

    @property
    def num_train_images(self) -> int:
        return len(self.train_tree)

    @property
    def num_val_images(self) -> int:
        return len(self.val_tree)

    @property
    def num_test_images(self) -> int:
        return len(self.test_tree)

    @property
    def test_reader(self) -> str:
        return f"Pillow, {self.augment.test_interpolation}"

    def train_dataloader(self) -> TrainLoader:
        dataset = TrainImages(self.train_tree, self.augment, self.seed, self.on_bad_image == "skip")
        batches = KeyBatches()
        loader = self._data_loader(dataset, batches)

        def read(epoch: int, order: Batches) -> Iterator[Batch]:
            size = self.image_size
            # python integers: workers unpickle them faster than numpy's
            batches.batches = [
                [Key(epoch, index, copy, size) for index, copy in zip(*rows, strict=True)]
                for rows in zip(order.indices.tolist(), order.copies.tolist(), strict=True)
            ]
            return self._checked(loader)

        return self.make_train_loader(read)

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader(self.val_tree, self.val_tree.targets)

    def test_dataloader(self) -> EvalLoader:
        targets = self.test_tree.targets
        if self.test_set == "imagenet_real":
            targets = read_real_labels(self.test_tree, self.num_classes, self.real_labels)
        return self._eval_loader(self.test_tree, targets)

    def teardown(self, stage: str) -> None:
        """End the worker processes. Left to the garbage collector, they would be waited for in vain, 5 s each."""
        for loader in self._loaders:
            loader._iterator = None
        self._loaders.clear()

    def _eval_loader(self, tree: ImageTree, targets: np.ndarray) -> EvalLoader:
        dataset = EvalImages(tree, targets, self.augment, self.eval_image_size)
        batches = KeyBatches()
        shard = eval_batches(len(tree), self.eval_batch_size, *self.rank_and_world)
        batches.batches = [batch.tolist() for batch in shard]
        loader = self._data_loader(dataset, batches)
        nothing = torch.empty(0, 3, self.eval_image_size, self.eval_image_size, dtype=torch.uint8)
        return EvalLoader(len(batches), lambda: self._checked(loader, (nothing, torch.from_numpy(targets[:0]))))

    def _data_loader(self, dataset: Dataset, batches: KeyBatches) -> DataLoader:
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            worker_init_fn=_outlive_signals,
            # of its own: each iteration draws a number, which would move torch's global generator
            generator=torch.Generator(),
        )
        self._loaders.append(loader)
        return loader

    def _checked(self, loader: DataLoader, nothing: Batch | None = None) -> Iterator[Batch]:
        """(images, targets) of each batch; bad files are raised here, in the main process, or logged and counted.

        `nothing` stands for a batch of bad files alone; without it such a batch is an error.
        """
        for images, targets, bad in loader:
            for path, reason in bad:
                if self.on_bad_image == "raise":
                    raise BadImageError(reason)
                if path not in self.bad_images:
                    self.bad_images[path] = reason
                    log.warning("skipped, %d so far: %s", len(self.bad_images), reason)
            if images is None and nothing is None:
                raise BadImageError(f"no readable image for a whole batch; the last of its files: {bad[-1][1]}")
            yield nothing if images is None else (images, targets)

    def _counted(self, split: str, tree: ImageTree) -> ImageTree:
        held, expected = f"{tree.root} holds {len(tree)} images", self.num_images.get(split)
        if expected is not None and len(tree) != expected:
            raise ValueError(f"{held}, data.num_images.{split} says {expected}")
        if expected is None and split == "val" and _is_imagenet_1k(tree.classes) and len(tree) != IMAGENET_VAL_IMAGES:
            accept = f"+data.num_images.val={len(tree)}"
            raise ValueError(
                f"{held}, ImageNet-1K's validation has {IMAGENET_VAL_IMAGES}; {accept} takes them as they are"
            )
        return tree


def _is_imagenet_1k(classes: Sequence[str]) -> bool:
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def _outlive_signals(worker: int) -> None:
    """Leave it to the main process to stop at an update when all processes get a signal, from Ctrl-C or from Slurm."""
    for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))


def refuse_test_sets(source: str, options: Mapping) -> None:
    """Raise ValueError if `options` name one of the test sets that only image_folder reads."""
    for name in ("test_set", "test_root", "real_labels"):
        if options.get(name) is not None:
            raise ValueError(
                f"data.{name}={options[name]} isn't available with data={source}: give data.eval_root=<image tree> "
                "to scripts/evaluate.py, or train on data=image_folder"
            )


def require_root(root: str | None) -> Path:
    """`root` as a path.

    Raises:
        ValueError: it is None.
        FileNotFoundError: there is no such folder.
    """
    if root is None:
        raise ValueError("data.root isn't set: give the folder that holds train and val, e.g. data.root=/data/imagenet")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={root}: no such folder")
    return Path(root)
