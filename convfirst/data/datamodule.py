"""What the data sources share: positions that can be resumed, and the batch-wise work on the device."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
import torch.distributed
from lightning import LightningDataModule
from timm.data.mixup import mixup_target

from convfirst.data.augment import Augment
from convfirst.data.order import Batches, TrainOrder
from convfirst.data.seeding import seeded

Batch = tuple[torch.Tensor, torch.Tensor]
# second word of the random key, so that no two uses of (seed, epoch, ...) share a stream
ERASE, MIX = 1, 2


class TrainLoader:
    """The training batches of one process, startable at any batch of any epoch.

    An iteration starts where `set_position` said; without a call, at the start of the epoch after the last one. The
    position is read when the first batch is asked for. `len` is always the whole epoch's count of batches.

    Attributes:
        consumed: (epoch, batches of it handed to the training step so far). What workers or prefetching have made
            beyond that isn't counted.
    """

    def __init__(self, order: TrainOrder, read: Callable[[int, Batches], Iterator[Batch]]) -> None:
        self.order = order
        self.consumed = (0, 0)
        self._read = read
        self._next = (0, 0)

    def __len__(self) -> int:
        return len(self.order)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration start at batch `batch` (0 to `len`, which yields none) of epoch `epoch`."""
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"position (epoch={epoch}, batch={batch}) lies outside an epoch of {len(self)} batches")
        self._next = (epoch, batch)

    def __iter__(self) -> Iterator[Batch]:
        epoch, batch = self._next
        self._next = (epoch + 1, 0)
        self.consumed = (epoch, batch)
        yield from self._read(epoch, self.order.batches(epoch, batch))


class EvalLoader:
    """A sized, restartable iteration over evaluation batches."""

    def __init__(self, num_batches: int, read: Callable[[], Iterator[Batch]]) -> None:
        self._num_batches = num_batches
        self._read = read

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self._read()


class ImageDataModule(LightningDataModule):
    """Images and labels of one source.

    A batch that leaves `on_after_batch_transfer` is (images, targets): images float32 [B, C, H, W], normalised; targets
    int64 [B], or float32 [B, num_classes] in training when mixup, cutmix or label smoothing is on (the smoothing is in
    them: the loss must not smooth again). Loaders may yield uint8 images: a quarter of the bytes to move; then the
    normalisation happens here, on the device.

    All randomness is a function of (seed, epoch, image or batch), never of worker count, process history or wall time.

    Args:
        batch_size, eval_batch_size: images in a batch of one process.
        num_workers: worker processes (or threads) of a loader.
        seed: of order and augmentation, 0 included.
        augment: an `Augment`, or its fields.
        num_classes, image_size, in_chans: what the model is built for; `image_size` is the training side in pixels.
        mean, std: per channel, for pixels scaled to [0, 1].
    """

    num_train_images: int
    bad_images: Mapping[str, str] = MappingProxyType({})  # path -> reason of each file that was skipped

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        augment: Augment | Mapping | None,
        num_classes: int,
        image_size: int,
        in_chans: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.augment = augment if isinstance(augment, Augment) else Augment(**(augment or {}))
        least = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "seed": 0, "image_size": 1, "num_classes": 1}
        given = dict(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        for name, value in {**given, "image_size": image_size, "num_classes": num_classes}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
                raise ValueError(f"data.{name}={value!r} must be an integer of at least {least[name]}")
        if self.augment.mixes and batch_size % 2:
            raise ValueError(f"data.batch_size={batch_size} must be even: mixup and cutmix pair the images of a batch")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.num_classes, self.image_size, self.in_chans = num_classes, image_size, in_chans
        self.eval_image_size = self.augment.test_size or image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.train_loader: TrainLoader | None = None
        self._mixup = self.augment.make_mixup(num_classes)
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def test_reader(self) -> str:
        """What makes pixels of the test images, and how it resizes: what a score rests on beside the model."""
        raise NotImplementedError

    @property
    def rank_and_world(self) -> tuple[int, int]:
        """This process's number and the number of processes."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def set_image_size(self, size: int) -> None:
        """Train with images of side `size` from the next iteration on; evaluation keeps its side."""
        if size < 1:
            raise ValueError(f"image size {size} must be at least 1")
        self.image_size = size

    def make_train_loader(self, read: Callable[[int, Batches], Iterator[Batch]]) -> TrainLoader:
        """The loader of this process's share, remembered as `train_loader`."""
        rank, world_size = self.rank_and_world
        order = TrainOrder(
            self.num_train_images, self.batch_size, self.seed, rank, world_size, repeats=self.augment.repeats
        )
        self.train_loader = TrainLoader(order, read)
        return self.train_loader

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.finish_batch(batch, training=self.trainer is not None and self.trainer.training)

    @torch.no_grad()
    def finish_batch(self, batch: Batch, training: bool) -> Batch:
        """Normalise uint8 images; in training erase, mix and smooth, and count the batch as consumed."""
        images, targets = batch
        if images.dtype == torch.uint8:
            images = self._normalise(images)
        if not training:
            return images, targets
        epoch, index = self.train_loader.consumed
        self.train_loader.consumed = (epoch, index + 1)
        return self._augment_batch(images, targets, (epoch, index, self.rank_and_world[0]))

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        if images.device not in self._on_device:
            values = torch.tensor([self.mean, self.std], device=images.device).mul_(255)
            self._on_device[images.device] = tuple(values.view(2, 1, -1, 1, 1))
        mean, std = self._on_device[images.device]
        return images.float().sub_(mean).div_(std)

    def _augment_batch(self, images: torch.Tensor, targets: torch.Tensor, key: tuple[int, int, int]) -> Batch:
        erasing = self.augment.make_erasing(images.device.type)
        if erasing is not None:
            with seeded(self.seed, ERASE, *key, device=images.device):
                images = erasing(images)
        if self._mixup is not None:
            with seeded(self.seed, MIX, *key):
                images, targets = self._mixup(images, targets)
        elif self.augment.label_smoothing > 0:
            targets = mixup_target(targets, self.num_classes, smoothing=self.augment.label_smoothing)
        return images, targets


def bad_images(data: ImageDataModule) -> set[str]:
    """Paths of the files that some process skipped; every process must call it."""
    found = [set(data.bad_images)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, set(data.bad_images))
    return set().union(*found)
