"""Two more label sets for ImageNet-1K models: ImageNet-V2 and ReaL."""

import json
import pkgutil
from pathlib import Path

import numpy as np
import torch

from convfirst.data.image_tree import ImageTree

NUM_CLASSES = 1000
NUM_VAL_IMAGES = 50_000
V2_IMAGES_PER_CLASS = 10


def check_imagenet_v2(tree: ImageTree, num_classes: int) -> None:
    """Raise ValueError unless `tree` has ImageNet-V2's 1000 classes of 10 images (Recht et al. 2019)."""
    if num_classes != NUM_CLASSES:
        raise ValueError(f"ImageNet-V2 labels need a model of {NUM_CLASSES} classes, not {num_classes}")
    if len(tree.classes) != NUM_CLASSES:
        raise ValueError(f"{tree.root} has {len(tree.classes)} class folders, ImageNet-V2 has {NUM_CLASSES}")
    counts = np.bincount(tree.targets, minlength=NUM_CLASSES)
    wrong = np.flatnonzero(counts != V2_IMAGES_PER_CLASS)
    if len(wrong):
        label = int(wrong[0])
        raise ValueError(f"{tree.root}/{label} holds {counts[label]} images, ImageNet-V2 has {V2_IMAGES_PER_CLASS}")


def read_real_labels(tree: ImageTree, num_classes: int, path: str | None = None) -> np.ndarray:
    """The reassessed labels of ImageNet's validation images (Beyer et al. 2020).

    Args:
        tree: the validation images, named ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00050000.JPEG.
        num_classes: of the model, 1000.
        path: real.json, a list of label lists in the order of the numbers; None takes timm's copy.

    Returns:
        int64 [50000, L], L the largest number of labels of an image. A row holds an image's labels, then -1; any of
        them is right. A row of -1 only is to be left out of the score (`real_correct` does).

    Raises:
        ValueError: the counts, a file's name or a label is wrong.
    """
    source = path or "timm's imagenet_real_labels.json"
    text = Path(path).read_bytes() if path else pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    labels = json.loads(text)
    for name, found in ((source, len(labels)), (str(tree.root), len(tree))):
        if found != NUM_VAL_IMAGES:
            raise ValueError(f"{name} has {found} entries, ImageNet's validation set has {NUM_VAL_IMAGES}")
    highest = max(max(row, default=0) for row in labels)
    lowest = min(min(row, default=0) for row in labels)
    if num_classes != NUM_CLASSES or highest >= num_classes or lowest < 0:
        raise ValueError(f"{source} has labels {lowest} to {highest}; the model has {num_classes} classes")
    padded = np.full((NUM_VAL_IMAGES, max(map(len, labels))), -1, dtype=np.int64)
    for row, entry in zip(padded, labels, strict=True):
        row[: len(entry)] = entry
    return padded[[_val_number(tree.path(i)) - 1 for i in range(len(tree))]]


def _val_number(path: Path) -> int:
    prefix, _, number = path.stem.rpartition("_")
    if prefix != "ILSVRC2012_val" or not number.isdigit() or not 1 <= int(number) <= NUM_VAL_IMAGES:
        raise ValueError(f"{path} isn't named like ImageNet's validation images, ILSVRC2012_val_00000001.JPEG")
    return int(number)


def real_correct(logits: torch.Tensor, targets: torch.Tensor, k: int = 1) -> tuple[int, int]:
    """Score one batch with ReaL labels.

    Args:
        logits: [B, num_classes].
        targets: int64 [B, L], padded with -1.
        k: a hit is one of the `k` highest logits among the labels.

    Returns:
        (hits, images that have a label).
    """
    predicted = logits.topk(k, dim=1).indices
    hit = (predicted.unsqueeze(2) == targets.unsqueeze(1)).flatten(1).any(1)
    counted = (targets >= 0).any(1)
    return int((hit & counted).sum()), int(counted.sum())
