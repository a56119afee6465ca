"""FFCV: one .beton file a split, decoded and cropped by compiled threads; the rest happens on the device."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from convfirst.data.augment import Augment
from convfirst.data.datamodule import Batch, EvalLoader, ImageDataModule, TrainLoader
from convfirst.data.image_folder import ImageFolderDataModule, require_root
from convfirst.data.order import Batches, eval_batches


class FFCVDataModule(ImageDataModule):
    """`root`/train.beton, `root`/val.beton and optionally `root`/test.beton, as `scripts/write_ffcv.py` writes them.

    Random resized crop and flip happen while decoding, as functions of (seed, epoch, image); normalisation, erasing,
    mixup and cutmix on the device. FFCV has neither RandAugment nor colour jitter, and resizes by area averaging
    (OpenCV's INTER_AREA) whatever `augment.interpolation` says: results are close to image_folder's, not the same.
    Evaluation crops the centre as timm does; images stored uncompressed at the evaluation's resize (the writer's preset
    eval, at 224 pixels and crop_pct=0.875) are taken pixel by pixel and so equal image_folder's. With `eval_root` the
    test doesn't rest on that: it reads the image tree through Pillow, as published scores were measured. The system's
    file cache holds the data: shuffled reading is fast once the file fits into memory.

    Args:
        root: folder of the .beton files.
        num_workers: decoding threads of this process; at most its cores are used.
        num_classes: checked against the file; None takes what the file says.
        batches_ahead: decoded batches waiting for the training step.
        timeout: seconds after which a batch that doesn't come is an error (the first one waits for FFCV's compiler
            too), None for no limit.
        eval_root: an image tree for the test: `eval_root`/test, or `eval_root`/val if there is none.

    Raises:
        ImportError: FFCV isn't installed.
        FileNotFoundError: `root` or a file isn't there.
        ValueError: a file is half-written or damaged, has a label out of range, or train, val and `eval_root` differ in
            classes.
        TimeoutError: while reading, FFCV's thread hangs.
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
        batches_ahead: int = 3,
        timeout: float | None = 600,
        eval_root: str | None = None,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ) -> None:
        require_ffcv()
        self.root = require_root(root)
        self.given_num_classes = num_classes
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            augment=augment,
            num_classes=self.val_file.num_classes,
            image_size=image_size,
            in_chans=3,
            mean=mean,
            std=std,
        )
        advice = "FFCV has none; take augment=convnext_ffcv (ConvNeXt's recipe without it), light or none"
        self.augment.refuse("ffcv", "auto_augment", "color_jitter", advice=advice)
        self.augment.refuse("ffcv", "rotate", "translate", "zoom")
        if self.augment.scale is None:
            self.augment.refuse("ffcv and augment.scale=null", "hflip", "ratio")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"data.timeout={timeout!r} must be a number of seconds above 0, or null")
        self.batches_ahead, self.timeout = batches_ahead, timeout
        if (self.root / "train.beton").is_file():
            self.train_file.require_same_classes(self.val_file)
        self.test_tree = None if eval_root is None else self._open_tree(eval_root)
        self._readers: dict = {}

    def _open(self, split: str):
        from convfirst.data.ffcv_file import open_beton

        return open_beton(self.root / f"{split}.beton", self.given_num_classes)

    def _open_tree(self, root: str) -> ImageFolderDataModule:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"data.eval_root={root}: no such folder")
        tree = ImageFolderDataModule(
            root,
            eval_batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            augment=self.augment.evaluation(),
            image_size=self.eval_image_size,
            mean=self.mean,
            std=self.std,
        )
        self.val_file.require_classes(tree.val_tree.classes, tree.val_tree.root)
        return tree

    @cached_property
    def train_file(self):
        return self._open("train")

    @cached_property
    def val_file(self):
        return self._open("val")

    @cached_property
    def test_file(self):
        if not (self.root / "test.beton").is_file():
            return self.val_file
        file = self._open("test")
        file.require_same_classes(self.val_file)
        return file

    @property
    def num_train_images(self) -> int:
        return len(self.train_file)

    @property
    def num_val_images(self) -> int:
        return len(self.val_file)

    @property
    def num_test_images(self) -> int:
        return len(self.test_file) if self.test_tree is None else self.test_tree.num_test_images

    @property
    def test_reader(self) -> str:
        return "FFCV, area averaging" if self.test_tree is None else self.test_tree.test_reader

    def train_dataloader(self) -> TrainLoader:
        return self.make_train_loader(self._read_train)

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader(self.val_file.path, self.num_val_images)

    def test_dataloader(self) -> EvalLoader:
        if self.test_tree is not None:
            self.test_tree.trainer = self.trainer
            return self.test_tree.test_dataloader()
        return self._eval_loader(self.test_file.path, self.num_test_images)

    def teardown(self, stage: str) -> None:
        if self.test_tree is not None:
            self.test_tree.teardown(stage)

    def _read_train(self, epoch: int, order: Batches) -> Iterator[Batch]:
        from convfirst.data.ffcv_loader import CentreCropDecoder, RandomCropDecoder, draw_keys

        augment, size = self.augment, self.image_size
        if augment.scale is None:
            decoder = CentreCropDecoder(size, augment.crop_pct)
        else:
            decoder = RandomCropDecoder(size, augment.scale, augment.ratio or (3 / 4, 4 / 3), augment.hflip)
        keys = draw_keys(self.seed, epoch, order.indices, order.copies)
        return self._read(self.train_file.path, decoder, list(keys), self.batch_size)

    def _eval_loader(self, path: Path, num_images: int) -> EvalLoader:
        from convfirst.data.ffcv_loader import CentreCropDecoder

        batches = eval_batches(num_images, self.eval_batch_size, *self.rank_and_world)
        keys = [batch.astype(np.uint64) for batch in batches]

        def read() -> Iterator[Batch]:
            decoder = CentreCropDecoder(self.eval_image_size, self.augment.crop_pct)
            return self._read(path, decoder, keys, self.eval_batch_size)

        return EvalLoader(len(batches), read)

    def _read(self, path: Path, decoder, batches: list[np.ndarray], batch_size: int) -> Iterator[Batch]:
        from ffcv.transforms import ToTensor, ToTorchImage

        from convfirst.data.ffcv_loader import BetonReader

        name = (path, batch_size, decoder.key)
        if name not in self._readers:  # each one is compiled: seconds
            operations = [decoder, ToTensor(), ToTorchImage()]
            self._readers[name] = BetonReader(
                path, operations, batch_size, self.num_workers, self.batches_ahead, self.timeout
            )
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return self._readers[name].read(batches, device)


def require_ffcv() -> None:
    """Raise ImportError, saying what to install, unless FFCV can be imported."""
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"data=ffcv needs FFCV, which can't be imported ({error}): pip install 'convfirst[ffcv]' "
            "(it compiles against OpenCV and libturbojpeg; on Debian apt-get install g++ pkg-config libopencv-dev "
            "libturbojpeg0-dev), or use data=image_folder"
        ) from error
