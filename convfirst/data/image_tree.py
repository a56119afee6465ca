"""A tree of image files in ImageNet's layout, root/<split>/<class>/<file>, and what can be wrong with one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset


class BadImageError(ValueError):
    """A file that can't be decoded as an image; the message names it."""


@dataclass(frozen=True)
class ImageTree:
    """The files below one split's folder, by class and name.

    Attributes:
        root: the split's folder.
        classes: names of its class folders, in label order.
        files: paths relative to `root`, as an array of bytes (a list of 1.3 million strings would be copied into every
            worker process, page by page).
        targets: int64 [number of files].
    """

    root: Path
    classes: tuple[str, ...]
    files: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.files[index])

    def name(self, index: int) -> str:
        """What messages call an image."""
        return str(self.path(index))

    def read(self, index: int) -> Image.Image:
        """Decode an image to RGB, as `read_image` does."""
        return read_image(self.path(index))


def read_tree(root: str | Path, numeric: bool = False) -> ImageTree:
    """List the images of `root`/<class>/.

    Args:
        root: a split's folder.
        numeric: the class folders are label numbers, as in ImageNet-V2: "10" then follows "9", not "1".

    Raises:
        FileNotFoundError: `root` isn't there, has no class folder, or one of them holds no image.
        ValueError: with `numeric`, the folders aren't 0, 1, 2, ...
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder at {root} (expected {root}/<class>/<image>)")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise FileNotFoundError(f"{root} holds no class folder (expected {root}/<class>/<image>)")
    if numeric:
        classes.sort(key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
        wrong = [name for label, name in enumerate(classes) if name != str(label)]
        if wrong:
            raise ValueError(f"{root}: class folders must be named 0 to {len(classes) - 1}, found {_some(wrong)}")
    labels = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(root, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    targets = np.array([label for _, label in samples], dtype=np.int64)
    empty = [classes[label] for label in np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)]
    if empty:
        kinds = " ".join(IMG_EXTENSIONS)
        raise FileNotFoundError(f"{root}: class folder without an image ({kinds}): {_some(empty)}")
    order = np.argsort(targets, kind="stable")  # make_dataset goes by name
    files = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in samples])
    return ImageTree(root, tuple(classes), files[order], targets[order])


def require_same_classes(left: ImageTree, right: ImageTree) -> None:
    """Raise ValueError, naming the differing folders, unless both trees have the same classes."""
    for tree, other in ((left, right), (right, left)):
        missing = sorted(set(tree.classes) - set(other.classes))
        if missing:
            raise ValueError(f"classes differ: {_some(missing)} is in {tree.root} but not in {other.root}")


def read_image(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode a file to an RGB image; `name` is what a message calls it, by default its path.

    Raises:
        BadImageError: if the file is truncated, isn't an image or can't be read.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    # Pillow's decoders raise SyntaxError, ValueError and others for broken files
    except Exception as error:
        raise BadImageError(f"can't read image {name or file}: {error}") from error


def _some(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
