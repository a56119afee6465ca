"""WebDataset shards: tar files whose members n.jpg and n.cls are image and label of one sample."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from convfirst.data.image_folder import ImageFolderDataModule, refuse_test_sets
from convfirst.data.image_tree import read_image

SPLITS = {"train": ("train",), "val": ("val", "validation")}


@dataclass(frozen=True)
class Shards:
    """The samples of a split's shards, in order, each read where it lies.

    Attributes:
        root: the folder of the shards.
        classes: label numbers as text: shards don't name their classes.
        places: int64 [samples, 3]: shard, offset and size of the image in bytes.
        targets: int64 [samples].
    """

    root: Path
    shards: tuple[Path, ...]
    classes: tuple[str, ...]
    places: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        shard, offset, _ = self.places[index]
        return f"{self.shards[shard]} at byte {offset}"

    def read(self, index: int) -> Image.Image:
        """Decode an image to RGB; BadImageError names shard and place."""
        shard, offset, size = self.places[index]
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return read_image(io.BytesIO(file.read(size)), self.name(index))


def find_shards(root: Path, split: str) -> list[Path]:
    """``root/<split>/*.tar``, or the tar files in `root` with the split in their names ("validation" is "val" too).

    Raises:
        FileNotFoundError: there are none.
    """
    for name in SPLITS[split]:
        found = sorted((root / name).glob("*.tar")) or sorted(
            path for path in root.glob("*.tar") if name in path.stem.replace("_", "-").split("-")
        )
        if found:
            return found
    raise FileNotFoundError(f"{root}: no shards of {split}; expected {split}/*.tar or *-{split}-*.tar")


def read_shards(shards: Sequence[Path], num_classes: int | None = None) -> Shards:
    """Index the shards by reading every header once; the images stay where they are.

    Labels are members n.cls, or "label" (also "cls") of n.json.

    Args:
        num_classes: None takes the largest label and one.

    Raises:
        ValueError: a shard is cut short or no tar file, an image has no label, or a label is out of range.
    """
    places, targets = [], []
    for number, shard in enumerate(shards):
        try:
            samples = _members(shard)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"can't read the shard {shard}: {error}") from error
        for key, (place, label) in samples.items():
            if place is None:
                continue
            if label is None:
                raise ValueError(
                    f"{shard}: the image of sample {key} has no label, neither {key}.cls nor in {key}.json"
                )
            places.append((number, *place))
            targets.append(label)
    labels = np.array(targets, dtype=np.int64)
    if len(labels) == 0:
        raise ValueError(f"{shards[0]} and the other {len(shards) - 1} shards hold no image")
    count = int(labels.max()) + 1 if num_classes is None else num_classes
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        where = f"{shards[places[wrong[0]][0]]} at byte {places[wrong[0]][1]}"
        raise ValueError(f"{where}: label {labels[wrong[0]]} is out of the range 0 to {count - 1}")
    classes = tuple(str(label) for label in range(count))
    return Shards(shards[0].parent, tuple(shards), classes, np.array(places, dtype=np.int64), labels)


def _members(shard: Path) -> dict[str, tuple[tuple[int, int] | None, int | None]]:
    """By sample: (offset, size) of the image and the label, None where a member is missing."""
    samples: dict[str, tuple[tuple[int, int] | None, int | None]] = {}
    size = shard.stat().st_size
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            if not member.isfile():
                continue
            if member.offset_data + member.size > size:
                raise ValueError(f"it ends inside {member.name}")
            folder, _, file = member.name.rpartition("/")
            stem, _, extension = file.partition(".")
            key, extension = f"{folder}/{stem}".lstrip("/"), extension.lower()
            place, label = samples.get(key, (None, None))
            if f".{extension}" in IMG_EXTENSIONS:
                place = member.offset_data, member.size
            elif extension == "cls":
                label = int(archive.extractfile(member).read())
            elif extension == "json":
                content = json.loads(archive.extractfile(member).read())
                label = content.get("label", content.get("cls", label))
            samples[key] = place, label
    return samples


class WebDatasetDataModule(ImageFolderDataModule):
    """Shards on a local disk: `root`/train/*.tar and `root`/val/*.tar, or `root`/*-train-*.tar and `root`/*-val-*.tar.

    Where a name has val, validation will do. Samples are read at random by their place in the shards, so that order,
    resumption and the exact count of an evaluation are those of image_folder. The options are image_folder's, without
    those of its test sets.

    Args:
        num_classes: None takes the largest label of val and one.

    Raises:
        FileNotFoundError: `root` isn't there or holds no shards of a split.
        ValueError: as `read_shards`.
    """

    def __init__(self, root: str | None, num_classes: int | None = None, **options) -> None:
        refuse_test_sets("webdataset", options)
        self.given_num_classes = num_classes
        super().__init__(root, num_classes=num_classes, **options)

    @property
    def test_tree(self) -> Shards:
        return self.val_tree

    def open_split(self, split: str) -> Shards:
        count = self.given_num_classes if split == "val" else self.num_classes
        return read_shards(find_shards(self.root, split), count)
