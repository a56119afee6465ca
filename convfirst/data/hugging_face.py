"""Data sets of the Hugging Face hub, or of a local folder in one of its formats, through timm's reader."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from convfirst.data.image_folder import ImageFolderDataModule, refuse_test_sets
from convfirst.data.image_tree import read_image


class HuggingFaceImages:
    """A split that timm's ``ReaderHfds`` has opened: random access to undecoded images.

    Attributes:
        classes: names of the label's classes.
        targets: int64 [number of images].
    """

    def __init__(self, name: str, split: str, cache: str | None, image_key: str, label_key: str) -> None:
        from timm.data.readers.reader_hfds import ReaderHfds

        self.root = Path(name)
        self.split = split
        self._reader = ReaderHfds(name, root=cache, split=split, input_key=image_key, target_key=label_key)
        labels = self._reader.class_to_idx
        if not labels:
            raise ValueError(f"{name}: the column data.label_key={label_key!r} of split {split} names no classes")
        self.classes = tuple(sorted(labels, key=labels.get))
        self.targets = np.fromiter(self._reader.iter_targets(), dtype=np.int64)
        wrong = np.flatnonzero((self.targets < 0) | (self.targets >= len(self.classes)))
        if len(wrong):
            raise ValueError(
                f"{self.name(wrong[0])} has label {self.targets[wrong[0]]}, "
                f"out of the range 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return f"{self.root}, split {self.split}, row {index}"

    def read(self, index: int) -> Image.Image:
        """Decode an image to RGB; BadImageError names the row."""
        return read_image(self._reader[int(index)][0], self.name(index))


class HuggingFaceDataModule(ImageFolderDataModule):
    """``datasets.load_dataset(name)`` with a column of images and one of class labels.

    Order, resumption, augmentation and evaluation are those of image_folder, and so are the options, without those of
    its test sets. A gated set such as ``ILSVRC/imagenet-1k`` wants the hub's login.

    Args:
        name: on the hub, or a local folder.
        root: where downloads are kept; None takes the hub's own cache.
        train_split, val_split: their names there.
        image_key, label_key: names of the columns.

    Raises:
        ModuleNotFoundError: the package datasets isn't installed.
        ValueError: `name` isn't given, or the labels name no classes or leave their range.
    """

    def __init__(
        self,
        name: str | None,
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        image_key: str = "image",
        label_key: str = "label",
        **options,
    ) -> None:
        if importlib.util.find_spec("datasets") is None:
            raise ModuleNotFoundError("data=hugging_face needs the package datasets: pip install datasets")
        if name is None:
            raise ValueError("data.name isn't set: give one of the hub or a folder, e.g. data.name=ILSVRC/imagenet-1k")
        refuse_test_sets("hugging_face", options)
        self.dataset, self.cache = name, root
        self.splits = {"train": train_split, "val": val_split}
        self.keys = (image_key, label_key)
        super().__init__(".", **options)  # no folder of ours

    @property
    def test_tree(self) -> HuggingFaceImages:
        return self.val_tree

    def open_split(self, split: str) -> HuggingFaceImages:
        return HuggingFaceImages(self.dataset, self.splits[split], self.cache, *self.keys)
