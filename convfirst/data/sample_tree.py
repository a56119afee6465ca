"""A small tree of JPEGs in ImageNet's layout, drawn by rule, that a network learns within a few epochs."""

import colorsys
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "val")
SHAPES = ("disc", "square", "triangle", "ring", "cross")


@dataclass(frozen=True)
class SampleTree:
    """What to draw.

    A class is a shape with a colour and a texture direction; an image places it anywhere, at some scale, over a noisy
    grey ground. An image depends on (seed, split, class, number) alone, so a larger tree contains the smaller one's
    images where classes and sizes agree.

    Attributes:
        num_classes: class folders, named like WordNet ids (n00000000, n00000001, ...).
        train_images, val_images: in each class.
        min_side, max_side: range of the image's sides, in pixels, drawn separately.
        quality: of the JPEG.
    """

    num_classes: int = 10
    train_images: int = 100
    val_images: int = 20
    min_side: int = 160
    max_side: int = 320
    seed: int = 0
    quality: int = 90

    def __post_init__(self) -> None:
        for name in ("num_classes", "train_images", "val_images", "min_side"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_side < self.min_side:
            raise ValueError(f"max_side={self.max_side} is below min_side={self.min_side}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")

    def write(self, root: str | Path, num_workers: int = 1) -> None:
        """Write `root`/train and `root`/val, whole or not at all, with `num_workers` processes.

        Raises:
            FileExistsError: `root` exists.
            OSError: the files can't be written, e.g. because the disk is full; the message names `root`.
        """
        root = Path(root)
        if root.exists():
            raise FileExistsError(f"{root} exists; give another folder or remove it")
        root.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
        try:
            parts = [(unfinished, split, label) for split in SPLITS for label in range(self.num_classes)]
            if num_workers > 1:
                with ProcessPoolExecutor(num_workers) as pool:
                    list(pool.map(self._write_class, *zip(*parts, strict=True)))
            else:
                for part in parts:
                    self._write_class(*part)
            os.replace(unfinished, root)
        except OSError as error:
            raise OSError(error.errno, f"can't write the sample tree {root}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write_class(self, root: Path, split: str, label: int) -> None:
        folder = root / split / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number in range(self.train_images if split == "train" else self.val_images):
            generator = np.random.default_rng([self.seed, SPLITS.index(split), label, number])
            image = Image.fromarray(draw_image(label, self.num_classes, self.min_side, self.max_side, generator))
            image.save(folder / f"{folder.name}_{number}.JPEG", quality=self.quality)


def draw_image(
    label: int, num_classes: int, min_side: int, max_side: int, generator: np.random.Generator
) -> np.ndarray:
    """One image of class `label`, uint8 [H, W, 3]."""
    height, width = generator.integers(min_side, max_side + 1, size=2)
    radius = min(height, width) * generator.uniform(0.25, 0.4)
    centre_y = generator.uniform(radius, height - radius)
    centre_x = generator.uniform(radius, width - radius)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = (y - centre_y) / radius, (x - centre_x) / radius
    mask = _shape_mask(SHAPES[label % len(SHAPES)], y, x)
    hue = label / num_classes + generator.uniform(-0.2, 0.2) / num_classes
    colour = np.array(colorsys.hsv_to_rgb(hue % 1.0, generator.uniform(0.6, 1.0), generator.uniform(0.6, 1.0)))
    angle = np.pi * label / num_classes
    stripes = 0.8 + 0.2 * np.sin(12 * (x * np.cos(angle) + y * np.sin(angle)))
    ground = generator.uniform(0.2, 0.8) + 0.1 * generator.standard_normal((height, width), dtype=np.float32)
    pixels = np.where(mask[..., None], colour * stripes[..., None], ground[..., None])
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


def _shape_mask(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Where the shape of radius 1 around (0, 0) lies."""
    distance = np.hypot(y, x)
    if shape == "disc":
        return distance < 1
    if shape == "ring":
        return (distance < 1) & (distance > 0.55)
    if shape == "square":
        return np.maximum(abs(y), abs(x)) < 0.8
    if shape == "triangle":
        return (y < 0.7) & (y > 2 * abs(x) - 0.95)
    return (np.minimum(abs(y), abs(x)) < 0.3) & (np.maximum(abs(y), abs(x)) < 0.95)
