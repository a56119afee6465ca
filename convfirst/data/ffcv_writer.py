"""Writing a folder of images into .beton files: presets, a disk preflight, and a file that is whole or not there."""

import ctypes
import os
import queue
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import Process, Queue, Value
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import encode_jpeg
from ffcv.memory_allocator import MemoryAllocator
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType
from ffcv.writer import DatasetWriter, worker_job_indexed_dataset
from torchvision.transforms.functional import InterpolationMode, resize
from tqdm import tqdm

from convfirst.data.ffcv_file import FIELDS, open_beton, write_note
from convfirst.data.image_tree import ImageTree, read_image

CHUNK = 100  # images a worker takes at once
MARGIN = 1.05  # of the estimate from a sample


class WriteError(RuntimeError):
    """A .beton file could not be written; nothing is left of it."""


@dataclass(frozen=True)
class Preset:
    """How images are stored.

    Attributes:
        short_side: larger images are resized (bicubic, antialiased, as torchvision does) until their short side is
            this; FFCV's own `max_resolution` bounds the long one.
        jpeg: share of the images stored as JPEG, the rest as pixels: faster to read, several times the size.
        quality: of the JPEGs.
        page_size: FFCV's, a power of two; no stored image may be larger.
    """

    short_side: int
    jpeg: float
    quality: int = 90
    page_size: int = 1 << 23

    def __post_init__(self) -> None:
        for name, least, most in (("short_side", 1, 4096), ("jpeg", 0, 1), ("quality", 1, 100)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must lie between {least} and {most}")


# An uncompressed image takes 3 * short_side * long side bytes, at ImageNet's usual 4:3 and a short side of 256
# 262 KB, or 336 GB for the 1.28 million training images and 13 GB for the 50,000 of the validation.
PRESETS = {
    "jpeg": Preset(short_side=400, jpeg=1.0),  # smallest; decoding needs the most cores
    "mixed": Preset(short_side=400, jpeg=0.5),  # ffcv-imagenet's 0.50_90, there with the long side at 500
    "raw": Preset(short_side=256, jpeg=0.0),  # fastest
    "eval": Preset(short_side=256, jpeg=0.0),  # 224 / 0.875: evaluation at 224 sees image_folder's pixels
}


class StoredImages:
    """(uint8 [H, W, 3], label) by index, resized as a preset says: what FFCV's writer encodes."""

    def __init__(self, tree: ImageTree, preset: Preset) -> None:
        self.tree, self.preset = tree, preset

    def __len__(self) -> int:
        return len(self.tree)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = read_image(self.tree.path(index))
        if min(image.size) > self.preset.short_side:
            image = resize(image, self.preset.short_side, InterpolationMode.BICUBIC)
        # FFCV draws next, whether to store a JPEG: by image, not by worker
        np.random.seed(index)  # noqa: NPY002
        return np.array(image), int(self.tree.targets[index])


def estimate_bytes(images: StoredImages, sample: int = 200, seed: int = 0) -> int:
    """Size of the file to write, from a random sample of images encoded as it will be.

    Raises:
        BadImageError: an image of the sample can't be read.
    """
    preset = images.preset
    chosen = np.random.default_rng(seed).permutation(len(images))[:sample]
    sizes = []
    for index in chosen:
        pixels, _ = images[index]
        jpeg = len(encode_jpeg(pixels, preset.quality)) if preset.jpeg > 0 else 0
        sizes.append(preset.jpeg * jpeg + (1 - preset.jpeg) * pixels.nbytes)
    # pages are filled with whole images: on average half an image stays empty at the end of each
    mean = float(np.mean(sizes))
    pages = np.ceil(len(images) * mean / max(preset.page_size - mean / 2, 1)) + 1
    header = HeaderType.itemsize + 2 * FieldDescType.itemsize
    return int(MARGIN * pages * preset.page_size) + header + len(images) * (64 + ALLOC_TABLE_TYPE.itemsize)


def write_beton(tree: ImageTree, path: str | Path, preset: Preset, num_workers: int = 1) -> None:
    """Write the images of one split to `path`, in the tree's order.

    The file is written beside `path` under a temporary name and moved there when it is whole.

    Raises:
        FileExistsError: `path` exists.
        WriteError: too little space, by estimate or in fact; an unreadable image; a writing process that died.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or give another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = StoredImages(tree, preset)
    needed, free = estimate_bytes(images), shutil.disk_usage(path.parent).free
    if needed > free:
        raise WriteError(
            f"{path} needs about {needed / 1e9:.2f} GB, but {path.parent} has {free / 1e9:.2f} GB free; "
            "take a smaller short side, a larger share of JPEG or another disk"
        )
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        field = RGBImageField("proportion", jpeg_quality=preset.quality, compress_probability=preset.jpeg)
        fields = dict(zip(FIELDS, (field, IntField()), strict=True))
        _Writer(name, fields, page_size=preset.page_size, num_workers=num_workers).from_indexed_dataset(
            images, chunksize=CHUNK
        )
        write_note(unfinished, tree.classes)
        open_beton(unfinished, len(tree.classes))
        unfinished.chmod(0o644)
        os.replace(unfinished, path)
    except (OSError, RuntimeError, ValueError) as error:
        raise WriteError(f"can't write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


class _Writer(DatasetWriter):
    """FFCV's writer, ending when a worker fails (FFCV's waits for the count of images for ever)."""

    def _write_common(self, num_samples, queue_content, work_fn, extra_worker_args) -> None:
        self.num_samples = num_samples
        self.prepare()
        try:
            self.finalize(self._run_workers(queue_content, extra_worker_args))
        finally:
            self.metadata_sm.close()
            self.metadata_sm.unlink()

    def _run_workers(self, todo: Iterable, extra: tuple) -> list:
        """The allocations of all images, or WriteError with the first worker's error."""
        work, allocations, errors, done = Queue(), Queue(), Queue(), Value(ctypes.c_uint64, 0)
        for item in (*todo, *[None] * self.num_workers):
            work.put(item)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        job = (work, self.metadata_sm, self.metadata_type, self.fields, allocator, done, allocations, *extra)
        workers = [Process(target=_work, args=(errors, *job), daemon=True) for _ in range(self.num_workers)]
        for worker in workers:
            worker.start()
        finished: list[list] = []
        try:
            with tqdm(total=self.num_samples, unit="img", disable=None) as progress:
                while len(finished) < len(workers):
                    try:
                        finished.append(allocations.get(timeout=0.2))
                    except queue.Empty:
                        _raise_failure(workers, errors)
                    progress.update(done.value - progress.n)
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
        return [allocation for part in finished for allocation in part]


def _work(errors: Queue, *job) -> None:
    try:
        worker_job_indexed_dataset(*job)
    except Exception as error:
        errors.put(str(error))
        errors.close()
        errors.join_thread()
        sys.exit(1)


def _raise_failure(workers: list[Process], errors: Queue) -> None:
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        try:
            raise WriteError(errors.get(timeout=1))
        except queue.Empty:
            raise WriteError(f"a writing process died (exit code {failed[0]})") from None
