"""Progressive resizing: small images first."""

import logging

from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

# ffcv-imagenet 4dd291a, rn50_configs/rn50_88_epochs.yaml
_SIZES, _EPOCHS = (160, 192), (65, 76, 88)


class ProgressiveResize(Callback):
    """Train with images that grow from `min_size` to `max_size`, linearly from `start_epoch` to `end_epoch`.

    The size is constant within an epoch and a multiple of `multiple`, so that shapes stay static and few
    (ffcv-imagenet, train_imagenet.py at 4dd291a, `get_resolution`). A compiled model is compiled once for each size, in
    the first step that has it.

    Args:
        min_size, max_size: sides in pixels. None: `max_size` is the run's training size, and `min_size` has to it the
            proportion of 160 to 192, rounded to `multiple`.
        start_epoch, end_epoch: None: 65 and 76 of each 88 epochs of the run.

    Raises:
        ValueError: sizes or epochs are out of order, or no multiple of `multiple`; where they depend on the run, when
            training starts.
    """

    def __init__(
        self,
        min_size: int | None = None,
        max_size: int | None = None,
        start_epoch: int | None = None,
        end_epoch: int | None = None,
        multiple: int = 32,
    ) -> None:
        self.min_size, self.max_size = min_size, max_size
        self.start_epoch, self.end_epoch, self.multiple = start_epoch, end_epoch, multiple
        if None not in (min_size, max_size, start_epoch, end_epoch):
            self._check()

    def derive(self, image_size: int, epochs: int) -> None:
        """Fill in what was left to the run's training size and number of epochs."""
        if self.max_size is None:
            self.max_size = image_size
        if self.min_size is None:
            small = self.max_size * _SIZES[0] / _SIZES[1] / self.multiple
            self.min_size = min(self.max_size, max(1, round(small)) * self.multiple)
        start, end = (round(epochs * epoch / _EPOCHS[2]) for epoch in _EPOCHS[:2])
        if self.end_epoch is None:
            self.end_epoch = max(min(end, epochs - 1), self.start_epoch or 0)  # the last epoch has the full size
        if self.start_epoch is None:
            self.start_epoch = min(start, self.end_epoch)
        self._check()

    def _check(self) -> None:
        if not 0 < self.min_size <= self.max_size or self.min_size % self.multiple or self.max_size % self.multiple:
            raise ValueError(
                f"resize: min_size={self.min_size} and max_size={self.max_size} must be rising multiples of "
                f"multiple={self.multiple}"
            )
        if not 0 <= self.start_epoch <= self.end_epoch:
            raise ValueError(f"resize: start_epoch={self.start_epoch} must not lie after end_epoch={self.end_epoch}")

    def size(self, epoch: int) -> int:
        """Side in pixels in `epoch` (from 0)."""
        if epoch >= self.end_epoch:
            return self.max_size
        if epoch <= self.start_epoch:
            return self.min_size
        share = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        size = self.min_size + share * (self.max_size - self.min_size)
        return round(size / self.multiple) * self.multiple

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.derive(trainer.datamodule.image_size, trainer.max_epochs)
        sizes = sorted({self.size(epoch) for epoch in range(trainer.max_epochs)})
        if trainer.is_global_zero:
            compiled = "; the model is compiled anew in the first step of each" if module.compiles else ""
            log.info(
                "images of %s pixels, growing in epochs %d to %d%s",
                ", ".join(map(str, sizes)), self.start_epoch, self.end_epoch, compiled,
            )  # fmt: skip
        trainer.datamodule.set_image_size(self.size(trainer.current_epoch))  # a resumed epoch has no epoch start

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.datamodule.set_image_size(self.size(trainer.current_epoch))
