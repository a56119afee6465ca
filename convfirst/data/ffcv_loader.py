"""FFCV's decoding threads made resumable: crops as functions of a key, positions, surfacing errors, owned batches."""

import math
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import torch
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.transforms import Convert, ModuleWrapper, ToDevice, ToTensor, ToTorchImage, View

from convfirst.data.datamodule import Batch
from convfirst.data.seeding import seed_of

CROP = 4  # word of the random key
TORCH_OPERATIONS = (Convert, ModuleWrapper, ToDevice, ToTensor, ToTorchImage, View, torch.nn.Module)

# A key is what FFCV takes for an image's index: the index in the low half, random bits in the high half.
INDEX_MASK = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class FFCVError(OSError):
    """FFCV's loading thread ended; the message names the file and the cause."""


def _mix(z):
    """Finaliser of splitmix64 (Steele et al. 2014): uint64 to uint64, for numba and for numpy arrays."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw_keys(seed: int, epoch: int, indices: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Keys for images `indices` (below 2^32) in their `copies`-th repetition in `epoch`: uint64, same shape.

    FFCV's own random decoders draw from numba's per-thread generators, so that a crop depends on the thread that makes
    it. Here the key decides it.
    """
    base = np.array(seed_of(seed, CROP, epoch), dtype=np.uint64)
    bits = _mix(_mix(base + indices.astype(np.uint64) * GOLDEN) + copies.astype(np.uint64) * GOLDEN)
    return bits >> HALF << HALF | indices.astype(np.uint64)


class KeyLabelDecoder(IntDecoder):
    """Labels by key, int64 [B, 1]."""

    def generate_code(self) -> Callable:
        def decode(keys, destination, metadata, storage_state):
            for i in range(len(keys)):
                destination[i] = metadata[keys[i] & INDEX_MASK]
            return destination[: len(keys)]

        return decode


class CropDecoder(SimpleRGBImageDecoder):
    """Decode, crop, resize to uint8 [B, size, size, 3] by area averaging and perhaps flip, all as the key says.

    Attributes:
        size: side of the result.
        key: decoders with equal keys do the same.
    """

    def __init__(self, size: int, *options) -> None:
        super().__init__()
        self.size = size
        self.key = (type(self), size, *options)

    def make_crop(self) -> Callable:
        """A function for numba: (height, width, key) to (top, left, height, width, flip)."""
        raise NotImplementedError

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self.size, self.size, 3), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        jpeg = IMAGE_MODES["jpg"]
        read, each = self.memory_read, Compiler.get_iterator()
        decode_jpeg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        crop = Compiler.compile(self.make_crop())

        def decode(keys, destination, metadata, storage_state):
            damaged = np.int64(-1)
            for i in each(len(keys)):
                field = metadata[keys[i] & INDEX_MASK]
                data = read(field["data_ptr"], storage_state)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                if field["mode"] == jpeg:
                    # not from FFCV's pool: that would hold the largest image once for each place in each batch ahead
                    pixels = np.empty((height, width, 3), np.uint8)
                    if decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                        damaged = max(damaged, np.int64(keys[i] & INDEX_MASK))
                else:
                    pixels = data.reshape(height, width, 3)
                top, left, rows, columns, flip = crop(height, width, keys[i])
                image = destination[i]
                resize(pixels, top, top + rows, left, left + columns, image)
                if flip:
                    image[:] = image[:, ::-1].copy()
            if damaged >= 0:
                raise ValueError("the JPEG of this image (from 0) can't be decoded", damaged)
            return destination[: len(keys)]

        decode.is_parallel = True
        return decode


class RandomCropDecoder(CropDecoder):
    """torchvision's RandomResizedCrop, then a horizontal flip with probability `hflip`."""

    def __init__(self, size: int, scale: tuple[float, float], ratio: tuple[float, float], hflip: float) -> None:
        super().__init__(size, scale, ratio, hflip)
        self.scale, self.ratio, self.hflip = scale, ratio, hflip

    def make_crop(self) -> Callable:
        (low, high), (narrow, wide), hflip = self.scale, self.ratio, self.hflip
        log_narrow, log_wide = math.log(narrow), math.log(wide)
        mix = Compiler.compile(_mix)

        def uniform(key, draw):
            return float(mix(key + np.uint64(draw) * GOLDEN) >> np.uint64(11)) * 2.0**-53

        uniform = Compiler.compile(uniform)

        def crop(height, width, key):
            flip = uniform(key, 1) < hflip
            for attempt in range(10):
                draw = 4 * attempt + 2
                area = height * width * (low + (high - low) * uniform(key, draw))
                aspect = math.exp(log_narrow + (log_wide - log_narrow) * uniform(key, draw + 1))
                columns, rows = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
                if 0 < columns <= width and 0 < rows <= height:
                    top = int(uniform(key, draw + 2) * (height - rows + 1))
                    left = int(uniform(key, draw + 3) * (width - columns + 1))
                    return top, left, rows, columns, flip
            rows, columns = height, width  # the centre, as near to the allowed aspects as the image goes
            if width < narrow * height:
                rows = int(round(width / narrow))
            elif width > wide * height:
                columns = int(round(height * wide))
            return (height - rows) // 2, (width - columns) // 2, rows, columns, flip

        return crop


class CentreCropDecoder(CropDecoder):
    """What resizing the short side to floor(size / crop_pct) and cropping the centre would show."""

    def __init__(self, size: int, crop_pct: float) -> None:
        super().__init__(size, crop_pct)
        self.crop_pct = crop_pct

    def make_crop(self) -> Callable:
        share = self.size / math.floor(self.size / self.crop_pct)

        def crop(height, width, key):
            side = max(1, int(round(min(height, width) * share)))
            # rounded as torchvision's CenterCrop does
            return int(round((height - side) / 2.0)), int(round((width - side) / 2.0)), side, side, False

        return crop


def check_operations(operations: Sequence[Operation | torch.nn.Module]) -> None:
    """Refuse an order of operations that FFCV would compile for ever.

    Raises:
        ValueError: a compiled (numba) operation stands after one on torch tensors; ffcv 1.0.2 never returns from
            building such a pipeline.
    """
    torch_operation = None
    for operation in operations:
        if isinstance(operation, TORCH_OPERATIONS):
            torch_operation = operation
        elif torch_operation is not None:
            raise ValueError(
                f"FFCV pipeline: {type(operation).__name__} is compiled and stands after "
                f"{type(torch_operation).__name__}, which works on torch tensors; move it before"
            )


class BetonReader:
    """Batches of one file through one compiled pipeline.

    Args:
        path: a checked .beton file (`open_beton`).
        operations: of the image field, a `CropDecoder` first.
        batch_size: the largest that will be asked for.
        num_threads: that decode; at most the cores of this process.
        batches_ahead: decoded batches that wait.
        timeout: seconds after which a batch that doesn't come is an error, None for no limit.
    """

    def __init__(
        self,
        path: Path,
        operations: Sequence[Operation | torch.nn.Module],
        batch_size: int,
        num_threads: int,
        batches_ahead: int,
        timeout: float | None = None,
    ) -> None:
        check_operations(operations)
        if numba.config.THREADING_LAYER == "default":
            # two loaders may decode at once, training's and evaluation's; numba's own layer would abort the process
            numba.config.THREADING_LAYER = "threadsafe"
        self.path, self.timeout = path, timeout
        torch_threads = torch.get_num_threads()
        self._loader = Loader(
            str(path),
            batch_size=batch_size,
            num_workers=max(1, min(num_threads, numba.config.NUMBA_NUM_THREADS)),
            os_cache=True,
            seed=0,  # FFCV's order isn't used
            pipelines={"image": list(operations), "label": [KeyLabelDecoder(), ToTensor()]},
            batches_ahead=batches_ahead,
        )
        torch.set_num_threads(torch_threads)  # FFCV sets it to its own number

    def read(self, batches: Sequence[np.ndarray], device: torch.device) -> Iterator[Batch]:
        """The batches of keys, in order: images uint8 [B, 3, size, size] in channels-last layout, targets int64 [B].

        Raises:
            FFCVError: the loading thread failed.
            TimeoutError: it lives, but gave no batch for `timeout` seconds; the message names file and batch.
        """
        torch_threads = torch.get_num_threads()
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        epoch = _Epoch(self._loader, _Chunks(batches, self._loader.batch_size))
        try:
            for index in range(len(batches)):
                images, targets = self._next(epoch, index)
                torch.set_num_threads(torch_threads)
                yield _own(images, targets.squeeze(1), device, stream)
        finally:
            epoch.stop()

    def _next(self, epoch: "_Epoch", index: int) -> Batch:
        start = time.monotonic()
        while True:
            try:
                result = epoch.output_queue.get(timeout=0.5)
            except queue.Empty:
                if epoch.is_alive():
                    if self.timeout is not None and time.monotonic() - start > self.timeout:
                        epoch.hangs = True
                        raise TimeoutError(
                            f"loading from {self.path} hangs: batch {index} of this pass (from 0) didn't come within "
                            f"data.timeout={self.timeout} s, though FFCV's thread lives"
                        ) from None
                    continue
                result = None if epoch.output_queue.empty() else epoch.output_queue.get()
            if result is None:
                raise FFCVError(f"loading from {self.path} failed: {epoch.error!r}") from epoch.error
            return result[1]


class _Chunks(Sequence):
    """Batches in the form that FFCV cuts batches from: something of len * batch_size that is read in slices."""

    def __init__(self, batches: Sequence[np.ndarray], batch_size: int) -> None:
        self.batches, self.batch_size = batches, batch_size

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.batches[part.start // self.batch_size]


class _Epoch(EpochIterator):
    """FFCV's loading thread, with its error kept (FFCV's would leave the reader waiting for ever)."""

    error: BaseException | None = None
    hangs = False

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        """End the thread, also in the middle of an epoch; one that hangs is left to the process's end."""
        self.terminate_event.set()
        if self.hangs:
            return
        while self.is_alive():
            try:
                self.output_queue.get(timeout=0.05)  # it may wait for a place
            except queue.Empty:
                continue
        self.close()


def _own(images: torch.Tensor, targets: torch.Tensor, device: torch.device, stream) -> Batch:
    """Copies on `device`: FFCV decodes the next batches into the same buffers."""
    if stream is None:
        return images.clone().to(device), targets.clone().to(device)
    with torch.cuda.stream(stream):
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
    # waits for this copy alone, not for the training step that runs on the current stream
    stream.synchronize()
    current = torch.cuda.current_stream(device)
    for tensor in (images, targets):
        tensor.record_stream(current)
    return images, targets
